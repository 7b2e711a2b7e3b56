"""What is known of an observable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.observables.averages import SlicedMeans, linearised, noise_floor, precision_weights
from stabie_ase.observables.base import Observable, plain_unit, unit_of
from stabie_ase.observables.energetics import Energetics
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import Curve, Number
from stabie_ase.structures.topology import Groups

ERROR_FLOOR = 1e-2
"""Fraction of a curve's mean squared error that its smallest errors are taken for: a tenth of a typical error.

What an experiment gives as exact, such as a g(r) of zero at short distances, is built into its analysis, not measured.
"""


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
    samples : Tensor of float64, shape (n_groups, width), or None
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
        energies: np.ndarray | None = None,
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
        energies : ndarray, shape (n_frames,), optional
            In eV, for an observable that is made of them; those that ASE has read if not given.

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
        samples = observable.sample(batch, groups, energetics_of(observable, frames, energies))
        sums = samples.new_zeros((len(frames), samples.shape[1])).index_add(0, groups.system, samples)
        means = sums / groups.system.bincount(minlength=len(frames))[:, None]
        if weights is None:
            mean = samples.mean(dim=0)
            floor = noise_floor(linearised(observable.statistic, mean, means), observable.measure)
            value = observable.statistic(mean)
            return cls(observable, value, floor, len(frames), observable.weight, samples, source=source)
        p = weights.double()
        if p.shape != (len(frames),) or not (p >= 0).all() or not 0 < float(p.sum()) < math.inf:
            raise ValueError(f"weights of frames are numbers that are not negative, one for each of {len(frames)}; got {tuple(p.shape)}")
        p, of_groups = p / p.sum(), p[groups.system]
        mean = of_groups @ samples / of_groups.sum()
        floor = noise_floor(linearised(observable.statistic, mean, means), observable.measure, probabilities=p)
        effective = float(1.0 / p.square().sum())
        return cls(observable, observable.statistic(mean), floor, effective, observable.weight, samples, source=source)

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

    @classmethod
    def from_number(cls, observable: Observable, number: Number) -> Target:
        """A number for an observable of one component, in its unit; the floor is the mean distance of a truth with a Gaussian error."""
        value, error = (None if x is None else torch.tensor([x], dtype=torch.float64) for x in (number.value, number.error))
        floor = None if number.error is None else math.sqrt(2.0 / math.pi) * number.error
        assert value is not None
        return cls(observable, value, floor, 0, observable.weight, error=error, source=number.source)

    @property
    def measure(self) -> Tensor:
        """c_k of the distance Σ_k c_k |ḡ_k - g_k^ref|, shape (d,): the observable's measure of what is known."""
        measure = self.observable.measure.to(self.value)
        return measure if self.known is None else measure * self.known

    @property
    def metric(self) -> Tensor:
        """c_k of the loss w Σ_k c_k (ḡ_k - g_k^ref)², shape (d,)."""
        return self.measure if self.components is None else self.components.to(self.value)

    def distance(self, observed: SlicedMeans) -> tuple[float | None, float | None]:
        """Σ_k c_k |s_k - g_k^ref| of what is compared, and its standard error, in the unit of the observable (`SlicedMeans.distance`)."""
        return observed.distance(self.value, self.measure, self.observable.statistic)

    def floor_of(self, n_replicas: int) -> float:
        """The floor of a mean over so few replicas as well, each of which may tell no more than one reference frame does.

        A scalar in the unit of the error; zero where there is no floor.
        """
        return (self.floor or 0.0) * (1.0 + self.n_frames / max(n_replicas, 1)) ** 0.5

    def to(self, device: str | torch.device) -> Target:
        """With its tensors on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def energetics_of(observable: Observable, frames: Sequence[Atoms], energies: np.ndarray | None = None) -> Energetics | None:
    """What frames tell, if the observable is made of that; else ValueError. Energies as in `from_frames`, in eV."""
    if not observable.needs:
        return None
    try:
        return Energetics.of(frames, energies, "stress" in observable.needs)
    except ValueError as error:
        raise ValueError(f"{observable.name} {error}") from None
