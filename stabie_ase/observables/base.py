"""The contract of an observable."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stabie_ase.observables.energetics import Energetics
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import Curve, Number, TargetFrames
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
    edges : Tensor of float64, shape (d + 1,), or None
        In Å, where the components are bins of a distance.
    shells : bool
        A bin holds a mean over its spherical shell, not over its width.
    """

    values: Tensor
    label: str
    names: tuple[str, ...] = ()
    edges: Tensor | None = None
    shells: bool = False

    @classmethod
    def of_distances(cls, n_bins: int, bin_width: float, shells: bool = False) -> Axis:
        """The centres of bins of one width in Å, from zero on."""
        bins = torch.arange(n_bins + 1, dtype=torch.float64)
        return cls((bins[:-1] + 0.5) * bin_width, "r (Å)", edges=bins * bin_width, shells=shells)

    @classmethod
    def of_names(cls, label: str, names: Sequence[str]) -> Axis:
        """Components that have names, numbered from 0."""
        return cls(torch.arange(len(names), dtype=torch.float64), label, tuple(names))


ATOMS_AT_ONCE = 16_384
"""In frames whose observables are worked out together: pairs of 85 frames of 64 molecules of water take 0.3 GB."""


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
    data : Curve, Number, TargetFrames or None
        What it is matched to; the reference if that is None.
    needs : frozenset of str
        Of "energy" and "stress", what a potential says of frames that it is made of, so that it depends on the parameters itself.
    internal : bool
        That of a molecule is known to be a matter of its conformation alone, not of where others are.
    """

    name: str
    label: str
    axis: Axis
    weight = 1.0
    data: ClassVar[Curve | Number | TargetFrames | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    internal: ClassVar[bool] = False

    @property
    def subject(self) -> str:
        """What it is of, which two that are the same share even if their names differ; its name, if names never do."""
        return self.name

    @property
    def width(self) -> int:
        """Components of a sample; d, but for what is no mean of samples (`statistic`)."""
        return len(self.axis.values)

    def statistic(self, mean: Tensor) -> Tensor:
        """What is compared, shape (..., d), from the mean of samples, shape (..., width): that mean, or a differentiable function of it."""
        return mean

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

    def sample(self, frames: AtomsBatch, groups: Groups | None = None, energetics: Energetics | None = None) -> Tensor:
        """As `__call__`, shape (n_groups, width), of some frames at a time, so that memory does not grow with their number.

        Parameters
        ----------
        frames : AtomsBatch
        groups : Groups, optional
            Those of one system after those of the other.
        energetics : Energetics, optional
            What a potential says of the frames, for those who need that.

        Returns
        -------
        Tensor of float64

        Raises
        ------
        ValueError
            It has no meaning for these frames or groups.
        """
        n = frames.systems_of(ATOMS_AT_ONCE)
        if frames.n_systems <= n:
            return self(frames, groups)
        return torch.cat([self(frames.select(p), None if groups is None else groups.of_systems(p, frames)) for p in frames.chunks(n)])

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
        return self._with("weight", checked_weight(weight))

    def matched_to(self, data: Curve | Number | TargetFrames) -> Observable:
        """A copy that is matched to a curve, a number, or other frames than the reference."""
        return self._with("data", data)

    def _with(self, name: str, value: object) -> Observable:
        other = copy.copy(self)
        object.__setattr__(other, name, value)  # a frozen dataclass has no other way
        return other

    def describe(self) -> str:
        """Its name, its weight if that is not 1, and what it is matched to if that is not the reference."""
        told = [] if self.weight == 1.0 else [f"weight {self.weight:g}"]
        told += [] if self.data is None else [f"matched to {self.data.source}"]
        return f"{self.name} ({', '.join(told)})" if told else self.name


WEIGHT = "a positive finite number"


def checked_weight(weight: float) -> float:
    """The weight, a factor without a unit; ValueError if it is none."""
    if not 0.0 < weight < math.inf:
        raise ValueError(f"a weight is {weight:g}, expected {WEIGHT}")
    return weight


def unit_of(label: str) -> str:
    """The unit that a label ends with in brackets, as `plain_unit` writes it; "" without one."""
    return plain_unit(label[:-1].rpartition("(")[2]) if label.endswith(")") else ""


def plain_unit(unit: str) -> str:
    """One spelling of 1/Å, Å^-1 and the like; "" of a number without a unit."""
    text = unit.strip().replace("⁻¹", "-1").replace("^", "").lower()
    text = text.replace("angstrom", "å").replace("ang", "å")
    text = f"1/{text[:-2]}" if text.endswith("-1") else text
    return {"": "", "-": "", "1": "", "none": "", "1/a": "1/å"}.get(text, text)
