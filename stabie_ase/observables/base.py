"""The contract of an observable, and what is known of one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.observables.averages import noise_floor, precision_weights
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import Curve, TargetFrames
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
    data : Curve, TargetFrames or None
        What it is matched to; the reference if that is None.
    """

    name: str
    label: str
    axis: Axis
    weight = 1.0
    data: ClassVar[Curve | TargetFrames | None] = None

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
        return self._with("weight", checked_weight(weight))

    def matched_to(self, data: Curve | TargetFrames) -> Observable:
        """A copy that is matched to a curve, or to other frames than the reference."""
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


ERROR_FLOOR = 1e-2
"""Fraction of a curve's mean squared error that its smallest errors are taken for: a tenth of a typical error.

What an experiment gives as exact, such as a g(r) of zero at short distances, is built into its analysis, not measured.
"""


def unit_of(label: str) -> str:
    """The unit that a label ends with in brackets, as `plain_unit` writes it; "" without one."""
    return plain_unit(label[:-1].rpartition("(")[2]) if label.endswith(")") else ""


def plain_unit(unit: str) -> str:
    """One spelling of 1/Å, Å^-1 and the like; "" of a number without a unit."""
    text = unit.strip().replace("⁻¹", "-1").replace("^", "").lower()
    text = text.replace("angstrom", "å").replace("ang", "å")
    text = f"1/{text[:-2]}" if text.endswith("-1") else text
    return {"": "", "-": "", "1": "", "none": "", "1/a": "1/å"}.get(text, text)


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
    n_frames : float
        Independent frames behind `value`; of weighted frames their effective number, of a curve none.
    weight : float
        Factor on its loss among those of several targets.
    samples : Tensor of float64, shape (n_groups, d), or None
        g of the frames, or of the groups of their atoms, where the reference is frames.
    components : Tensor of float64, shape (d,), or None
        c_k of the loss, if not `measure`.
    error : Tensor of float64, shape (d,), or None
        Standard error of each component of `value`, where the reference tells them.
    known : Tensor of bool, shape (d,), or None
        Components that the reference tells; the others are zero in `value` and count nowhere. All if None.
    source : str
        What it was made of.
    """

    observable: Observable
    value: Tensor
    floor: float | None = None
    n_frames: float = 1
    weight: float = 1.0
    samples: Tensor | None = None
    components: Tensor | None = None
    error: Tensor | None = None
    known: Tensor | None = None
    source: str = ""

    @classmethod
    def from_frames(
        cls,
        observable: Observable,
        frames: Sequence[Atoms],
        groups_of: Callable[[AtomsBatch], Groups] = Groups.systems,
        weights: Tensor | None = None,
        source: str = "",
    ) -> Target:
        """The mean over reference frames, each of which is taken to be independent of the others; the observable's own weight.

        Parameters
        ----------
        observable : Observable
        frames : sequence of Atoms
        groups_of : callable
            Groups of atoms whose g is averaged, in which those of one frame tell no more of the noise than their mean; each frame is
            one by default.
        weights : Tensor, shape (n_frames,), optional
            How much each frame counts, as of `temperature_weights`; all alike if not given.
        source : str
            Where they are from.

        Returns
        -------
        Target

        Raises
        ------
        ValueError
            The observable has no meaning for these frames or groups; weights that are not one non-negative number for each frame.
        """
        batch = AtomsBatch.from_atoms(frames)
        groups = groups_of(batch)
        samples = observable(batch, groups)
        sums = samples.new_zeros((len(frames), samples.shape[1])).index_add(0, groups.system, samples)
        means = sums / groups.system.bincount(minlength=len(frames))[:, None]
        if weights is None:
            floor = noise_floor(means, observable.measure)
            return cls(observable, samples.mean(dim=0), floor, len(frames), observable.weight, samples, source=source)
        p = weights.double()
        if p.shape != (len(frames),) or not (p >= 0).all() or not 0 < float(p.sum()) < math.inf:
            raise ValueError(f"weights of frames are numbers that are not negative, one for each of {len(frames)}; got {tuple(p.shape)}")
        p, of_groups = p / p.sum(), p[groups.system]
        floor, effective = noise_floor(means, observable.measure, probabilities=p), float(1.0 / p.square().sum())
        value = of_groups @ samples / of_groups.sum()
        return cls(observable, value, floor, effective, observable.weight, samples, source=source)

    @classmethod
    def from_curve(cls, observable: Observable, curve: Curve, error_floor: float = ERROR_FLOOR) -> Target:
        """A curve over distances, brought to the observable's bins; the observable's own weight.

        A bin holds the mean of the curve over its width, or its shell, as it does of frames; bins that are not wholly within the
        range of the curve are not known. The curve is taken to be of what the observable is: where that is smeared, smeared as
        well. A deviation counts by how well the curve is known there, c_k ∝ measure_k / (e_k²/ē² + error_floor), with the
        sum of the measure (`precision_weights`). The floor Σ_k measure_k √(2/π) e_k is the mean distance of a true curve whose
        errors e are Gaussian.

        Parameters
        ----------
        observable : Observable
            With an axis of distances that has edges.
        curve : Curve
        error_floor : float
            Fraction of the mean squared error ē² added to each: a curve that is zero with an error of zero is not known exactly.

        Returns
        -------
        Target

        Raises
        ------
        ValueError
            Another axis, another unit, or a curve that covers no bin.
        """
        axis, unit = observable.axis, unit_of(observable.label)
        if axis.edges is None:
            raise ValueError(f"{observable.name} has no axis of distances, so that it cannot be matched to a curve ({curve.source})")
        if curve.unit is not None and plain_unit(curve.unit) != unit:
            raise ValueError(f"{curve.source}: values in {curve.unit or 'no unit'}, expected {observable.label}; convert them")
        value, error, known = (torch.as_tensor(x) for x in curve.bin_means(axis.edges.numpy(), axis.shells))
        if not known.any():
            low, high = float(axis.edges[0]), float(axis.edges[-1])
            raise ValueError(f"{curve.source}: r from {curve.r[0]:g} to {curve.r[-1]:g} Å covers no bin of {observable.name}, "
                             f"which goes from {low:g} to {high:g} Å in steps of {(high - low) / len(value):g} Å")  # fmt: skip
        measure = observable.measure * known
        if curve.error is None:
            return cls(observable, value, None, 0, observable.weight, known=known, source=curve.source)
        floor = math.sqrt(2.0 / math.pi) * float((measure * error).sum())
        components = precision_weights(error.square(), measure, error_floor)
        return cls(observable, value, floor, 0, observable.weight, None, components, error, known, curve.source)

    @property
    def measure(self) -> Tensor:
        """c_k of the distance Σ_k c_k |ḡ_k - g_k^ref|, shape (d,): the observable's measure of what is known."""
        measure = self.observable.measure.to(self.value)
        return measure if self.known is None else measure * self.known

    @property
    def metric(self) -> Tensor:
        """c_k of the loss w Σ_k c_k (ḡ_k - g_k^ref)², shape (d,)."""
        return self.measure if self.components is None else self.components.to(self.value)

    def floor_of(self, n_replicas: int) -> float:
        """The floor of a mean over so few replicas as well, each of which may tell no more than one reference frame does.

        A scalar in the unit of the error; zero where there is no floor.
        """
        return (self.floor or 0.0) * (1.0 + self.n_frames / max(n_replicas, 1)) ** 0.5

    def to(self, device: str | torch.device) -> Target:
        """With its tensors on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)
