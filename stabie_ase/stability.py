"""When a replica counts as unstable, and the statistics of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from ase import Atoms, units
from ase.data import covalent_radii
from scipy import stats
from torch import Tensor

from stabie_ase.batch import AtomsBatch

if TYPE_CHECKING:
    from stabie_ase.dynamics.state import MDState

BOND_FACTOR = 1.25
"""Two atoms are bonded when their mean distance is below this factor times the sum of their covalent radii."""


class Verdict(NamedTuple):
    """What a criterion says of each system.

    Attributes
    ----------
    unstable : Tensor of bool, shape (n_systems,)
    value : Tensor, shape (n_systems,)
        The quantity that is held against the tolerance.
    atoms : Tensor of int64, shape (n_systems, k)
        The atoms to blame, numbered within their system.
    """

    unstable: Tensor
    value: Tensor
    atoms: Tensor


class Criterion(Protocol):
    """Judges a batch; `name` goes into reports and `describe()` says it with its numbers."""

    name: str

    def __call__(self, batch: AtomsBatch) -> Verdict: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class BondLengthDeviation:
    """Unstable once a bond is longer or shorter than its mean in the reference by more than a tolerance.

    Parameters
    ----------
    bonds : Tensor of int64, shape (2, n_bonds)
        Atoms of one system; every system of a batch has the same.
    lengths : Tensor, shape (n_bonds,)
        Reference lengths in Å.
    tolerance : float
        In Å.
    """

    bonds: Tensor
    lengths: Tensor
    tolerance: float
    name = "bonds"

    @classmethod
    def from_reference(cls, frames: Sequence[Atoms], tolerance: float) -> BondLengthDeviation:
        """Bonds and their mean lengths from frames of one molecule.

        The topology comes from the distances averaged over all frames: in a single hot frame a bond can be stretched
        beyond any sensible threshold.

        Raises
        ------
        ValueError
            Frames of several compositions, periodic frames, or no bond at all.
        """
        if not 0 < tolerance < math.inf:
            raise ValueError(f"the bond tolerance must be a positive length, got {tolerance} Å")
        batch = AtomsBatch.from_atoms(frames)
        if not batch.same_composition:
            raise ValueError("the bond criterion needs reference frames of one molecule with its atoms in one order")
        if batch.pbc.any():
            raise ValueError("the bond criterion is for isolated molecules, but the reference is periodic")
        positions = batch.positions.view(batch.n_systems, -1, 3)
        i, j = torch.triu_indices(positions.shape[1], positions.shape[1], offset=1)
        distances = (positions[:, j] - positions[:, i]).norm(dim=2).mean(dim=0)
        radii = torch.as_tensor(covalent_radii)[batch.numbers[: positions.shape[1]]]
        bonded = distances < BOND_FACTOR * (radii[i] + radii[j])
        if not bonded.any():
            raise ValueError("the reference has no bonds, so the bond criterion cannot tell when it breaks")
        return cls(torch.stack([i, j])[:, bonded], distances[bonded], tolerance)

    def __call__(self, batch: AtomsBatch) -> Verdict:
        if len(set(batch.sizes)) > 1:
            raise ValueError(f"the bond criterion is for one molecule, got systems of {sorted(set(batch.sizes))} atoms")
        bonds, lengths = self.bonds.to(batch.device), self.lengths.to(batch.device, batch.dtype)
        positions = batch.positions.view(batch.n_systems, -1, 3)
        deviations = ((positions[:, bonds[1]] - positions[:, bonds[0]]).norm(dim=2) - lengths).abs()
        value, worst = deviations.max(dim=1)
        return Verdict(~(value <= self.tolerance), value, bonds.T[worst])

    def describe(self) -> str:
        return f"a bond off its mean length by more than {self.tolerance:g} Å ({self.bonds.shape[1]} bonds)"


CRITERIA = {BondLengthDeviation.name: BondLengthDeviation}
"""By their names on the command line."""


def criterion_from(spec: str, frames: Sequence[Atoms]) -> BondLengthDeviation:
    """A criterion from KIND:TOLERANCE and the reference frames.

    Raises
    ------
    ValueError
        Unknown kind, or a tolerance that is no positive number.
    """
    kind, _, tolerance = spec.partition(":")
    if kind not in CRITERIA:
        raise ValueError(f"unknown criterion {kind!r}; known: {', '.join(CRITERIA)} (as in bonds:0.25)")
    try:
        value = float(tolerance)
    except ValueError:
        raise ValueError(f"criterion {spec!r} has no tolerance that is a number; write it as in bonds:0.25") from None
    return CRITERIA[kind].from_reference(frames, value)


@dataclass(frozen=True)
class Failures:
    """First failure of each replica in one run.

    Attributes
    ----------
    step : Tensor of int64, shape (n_systems,)
        Steps into the run at which it was seen; -1 for none.
    value : Tensor of float64, shape (n_systems,)
        What the criterion measured; infinite for numbers that are not finite.
    criterion : list of str or None
    atoms : list of list of int
        Atoms to blame, numbered within their system.
    frames : AtomsBatch
        Positions at the failure; at the start for the others.
    """

    step: Tensor
    value: Tensor
    criterion: list[str | None]
    atoms: list[list[int]]
    frames: AtomsBatch

    @classmethod
    def none(cls, batch: AtomsBatch) -> Failures:
        """Nothing has failed yet."""
        n = batch.n_systems
        value = torch.zeros(n, dtype=torch.float64, device=batch.device)
        return cls(torch.full((n,), -1, device=batch.device), value, [None] * n, [[] for _ in range(n)], batch)

    @property
    def failed(self) -> Tensor:
        """Shape (n_systems,), bool."""
        return self.step >= 0

    @property
    def share(self) -> float:
        """Part of the replicas that have failed."""
        return float(self.failed.double().mean())

    def examine(self, state: MDState, active: Tensor, criteria: Sequence[Criterion], step: int) -> Failures:
        """Hold the replicas `active`, whose present state is `state`, against the criteria."""
        infinite = torch.full_like(state.potential_energy, torch.inf)
        nothing = state.step.new_zeros((len(active), 0))
        verdicts = [("not finite", Verdict(~state.alive, infinite, nothing))]
        verdicts += [(criterion.name, criterion(state.batch)) for criterion in criteria]
        result = self
        for name, verdict in verdicts:
            new = (verdict.unstable & ~result.failed[active]).nonzero()[:, 0]
            if len(new):
                result = result._add(name, verdict, new, state.batch, active[new], step)
        return result

    def _add(
        self, name: str, verdict: Verdict, new: Tensor, batch: AtomsBatch, replicas: Tensor, step: int
    ) -> Failures:
        criterion, atoms = list(self.criterion), list(self.atoms)
        for k, replica in zip(new.tolist(), replicas.tolist()):
            criterion[replica], atoms[replica] = name, verdict.atoms[k].tolist()
        positions = self.frames.positions.index_copy(
            0, self.frames.atom_index(replicas), batch.positions[batch.atom_index(new)]
        )
        return replace(
            self,
            step=self.step.index_fill(0, replicas, step),
            value=self.value.index_copy(0, replicas, verdict.value[new].double()),
            criterion=criterion,
            atoms=atoms,
            frames=self.frames.replace(positions=positions),
        )


@dataclass(frozen=True)
class StabilityStatistics:
    """Times to first failure of many replicas; those that outlive the run are censored.

    Attributes
    ----------
    times_ps : ndarray, shape (n_replicas,)
        To the failure, or to the end of the run.
    failed : ndarray of bool, shape (n_replicas,)
    """

    times_ps: np.ndarray
    failed: np.ndarray

    @property
    def n_failed(self) -> int:
        return int(self.failed.sum())

    @property
    def stable_replica_ps(self) -> float:
        """Time all replicas together spent before their first failure."""
        return float(self.times_ps.sum())

    @property
    def hazard_per_ps(self) -> float:
        """Failures per stable replica-ps: the maximum-likelihood rate if failures came at a constant rate."""
        return self.n_failed / self.stable_replica_ps

    def hazard_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Exact Poisson interval of the hazard (Garwood, Biometrika 28, 437, 1936), per ps."""
        tail, n = (1.0 - level) / 2.0, self.n_failed
        low = stats.chi2.ppf(tail, 2 * n) / 2.0 if n else 0.0
        high = stats.chi2.ppf(1.0 - tail, 2 * n + 2) / 2.0
        return float(low / self.stable_replica_ps), float(high / self.stable_replica_ps)

    def survival(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Kaplan-Meier estimate: times in ps, surviving share and its 95 % band (log-log), low and high."""
        if not self.n_failed:
            ends = np.array([0.0, self.times_ps.max()])
            return ends, np.ones(2), np.ones(2), np.ones(2)
        curve = stats.ecdf(stats.CensoredData.right_censored(self.times_ps, ~self.failed)).sf
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore")  # where nobody is left the log-log band is undefined: [0, 1] below
            band = curve.confidence_interval(method="log-log")
        # The band has no width where all or none survive: there it is what it was before.
        low = np.where(curve.probabilities == 1.0, 1.0, np.nan_to_num(band.low.probabilities))
        high = np.minimum.accumulate(np.nan_to_num(band.high.probabilities, nan=1.0))
        return (
            np.concatenate([[0.0], curve.quantiles]),
            np.concatenate([[1.0], curve.probabilities]),
            np.concatenate([[1.0], low]),
            np.concatenate([[1.0], high]),
        )

    def median_ps(self) -> tuple[float | None, float | None, float | None]:
        """Median stable time and its 95 % band, in ps; None where the curve does not come down to one half."""
        times, share, low, high = self.survival()

        def crossing(curve):
            below = np.flatnonzero(curve <= 0.5 + 1e-12)
            return float(times[below[0]]) if len(below) else None

        return crossing(share), crossing(low), crossing(high)


def stability_statistics(failures: Failures, n_steps: int, timestep: float) -> StabilityStatistics:
    """Statistics of one run of `n_steps` steps of `timestep` (ASE units)."""
    step, failed = failures.step.cpu().numpy(), failures.failed.cpu().numpy()
    return StabilityStatistics(np.where(failed, step, n_steps) * timestep / (1000.0 * units.fs), failed)
