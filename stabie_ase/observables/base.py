"""The contract of an observable, and what is known of one."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.observables.averages import noise_floor
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups
from stabie_ase.system.spec import Spec


@dataclass(frozen=True)
class Axis:
    """Where the components of an observable belong.

    Attributes
    ----------
    values : Tensor of float64, shape (d,)
    label : str
        With its unit.
    names : tuple of str
        Of the components, if they are no points of a curve.
    """

    values: Tensor
    label: str
    names: tuple[str, ...] = ()

    @classmethod
    def of_names(cls, label: str, names: Sequence[str]) -> Axis:
        """Components that have names, numbered from 0."""
        return cls(torch.arange(len(names), dtype=torch.float64), label, tuple(names))


class Observable:
    """A vector g for every group of atoms of every frame, whose mean is compared with a reference.

    A subclass sets the attributes and gives `values` and, to be asked for by name, `from_spec`. An observable that counts
    pairs between groups overrides `__call__`.

    Attributes
    ----------
    name : str
        Unique in a run, as "hr" or "rdf:O-O"; results are called "{name}_error".
    label : str
        Of its values, with their unit.
    axis : Axis
    weight : float
        Factor on its loss among those of all that are trained on.
    """

    name: str
    label: str
    axis: Axis
    weight = 1.0

    @property
    def subject(self) -> str:
        """What it is of, which two that are the same share even if their names differ; its name, if names never do."""
        return self.name

    @property
    def measure(self) -> Tensor:
        """c_k of the distance Σ_k c_k |ḡ_k - g_k|, float64, shape (d,): the bin widths of a density, else 1/d each."""
        d = len(self.axis.values)
        return torch.full((d,), 1.0 / d, dtype=torch.float64)

    def values(self, batch: AtomsBatch) -> Tensor:
        """g of every system, shape (n_systems, d); ValueError where it has no meaning."""
        raise NotImplementedError

    def __call__(self, frames: AtomsBatch, groups: Groups | None = None) -> Tensor:
        """g of every group of atoms, float64, shape (n_groups, d); of every system if none are given."""
        return self.values(frames if groups is None else groups.batch(frames)).double()

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Observable:
        """The observable laid out for a system like the reference.

        Parameters
        ----------
        spec : Spec
            What was asked for, as `rdf:O-O,r_max=6`.
        setting : Setting
            The system, by its reference frames.

        Returns
        -------
        Observable

        Raises
        ------
        BadSpec, ValueError
            Options that there are not; a system for which it has no meaning.
        """
        spec.read({})
        return cls()

    def weighted(self, weight: float) -> Observable:
        """A copy with another weight; ValueError for one that is no positive finite number."""
        other = copy.copy(self)
        object.__setattr__(other, "weight", checked_weight(weight))  # a frozen dataclass has no other way
        return other

    def describe(self) -> str:
        """Its name, and its weight if that is not 1."""
        return self.name if self.weight == 1.0 else f"{self.name} (weight {self.weight:g})"


WEIGHT = "a positive finite number"


def checked_weight(weight: float) -> float:
    """The weight, a factor without a unit; ValueError if it is none."""
    if not 0.0 < weight < math.inf:
        raise ValueError(f"a weight is {weight:g}, expected {WEIGHT}")
    return weight


@dataclass(frozen=True)
class Target:
    """What is known of an observable, and how much it counts.

    Attributes
    ----------
    observable : Observable
    value : Tensor of float64, shape (d,)
        g^ref.
    floor : float or None
        Distance from `value` that a perfect model would show, because the reference does not know it better.
    n_frames : int
        Independent frames behind `value`.
    weight : float
        Factor on its loss among those of several targets.
    samples : Tensor of float64, shape (n_frames, d), or None
        g of the frames, where the reference is frames.
    components : Tensor of float64, shape (d,), or None
        c_k of the loss, if not the observable's own measure.
    """

    observable: Observable
    value: Tensor
    floor: float | None = None
    n_frames: int = 1
    weight: float = 1.0
    samples: Tensor | None = None
    components: Tensor | None = None

    @classmethod
    def from_frames(cls, observable: Observable, frames: Sequence[Atoms]) -> Target:
        """The mean over reference frames, each of which is taken to be independent of the others; the observable's own weight."""
        samples = observable(AtomsBatch.from_atoms(frames))
        return cls(observable, samples.mean(dim=0), noise_floor(samples, observable.measure), len(frames), observable.weight, samples)

    @property
    def metric(self) -> Tensor:
        """c_k of the loss w Σ_k c_k (ḡ_k - g_k^ref)², shape (d,)."""
        return (self.observable.measure if self.components is None else self.components).to(self.value)

    def floor_of(self, n_replicas: int) -> float:
        """The floor of a mean over so few replicas as well, each of which may tell no more than one reference frame does.

        A scalar in the unit of the error; zero where there is no floor.
        """
        return (self.floor or 0.0) * (1.0 + self.n_frames / max(n_replicas, 1)) ** 0.5

    def to(self, device: str | torch.device) -> Target:
        """With its tensors on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)
