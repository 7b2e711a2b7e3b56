"""What a model is worth in dynamics: time to first failure, observables up to it, energy and force errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms, units
from torch import Tensor

from stabie_ase.batch import AtomsBatch
from stabie_ase.config import HasTimestep
from stabie_ase.dynamics import (
    Integrator,
    Langevin,
    MDState,
    PotentialForces,
    Trajectory,
    initial_state,
    mobile_atoms,
    simulate,
)
from stabie_ase.observables import Observable
from stabie_ase.potentials.base import Potential
from stabie_ase.qm import LabelledFrames, QMErrors, qm_errors
from stabie_ase.reference import Reference
from stabie_ase.stability import Criterion, Failures, StabilityStatistics, stability_statistics


@dataclass(frozen=True)
class StabilityTest(HasTimestep):
    """How stability is measured.

    Attributes
    ----------
    temperature_K : float
    replicas : int
    time_ps : float
        Of every replica, unless it fails before.
    timestep_fs, friction_per_fs : float
        Of Langevin dynamics.
    check_every_fs : float
        Between two looks at the criterion.
    sample_every_fs : float
        Between two frames for the observable.
    seed : int
        Chooses starting frames, momenta and noise: equal for all models that are compared.
    """

    temperature_K: float
    replicas: int = 64
    time_ps: float = 5.0
    timestep_fs: float = 0.5
    friction_per_fs: float = 0.01
    check_every_fs: float = 5.0
    sample_every_fs: float = 50.0
    seed: int = 0

    @property
    def integrator(self) -> Integrator:
        return Langevin(self.timestep_fs * units.fs, self.friction_per_fs / units.fs)


@dataclass(frozen=True)
class StabilityResult:
    """Outcome of a `StabilityTest`.

    Attributes
    ----------
    statistics : StabilityStatistics
    failures : Failures
    observable_mean : Tensor or None, shape (d,)
        Mean over all frames before each replica's failure.
    observable_error : float or None
        Σ_k c_k |ḡ_k - g_k^ref|.
    observable_standard_error : float or None
        Of that, by leaving out one replica at a time; None of a single replica.
    """

    statistics: StabilityStatistics
    failures: Failures
    observable_mean: Tensor | None = None
    observable_error: float | None = None
    observable_standard_error: float | None = None


def starting_frames(frames: Sequence[Atoms], n: int, seed: int) -> list[Atoms]:
    """n frames in random order, each used about equally often."""
    rng = np.random.default_rng([seed, 1])
    rounds = -(-n // len(frames))
    order = np.concatenate([rng.permutation(len(frames)) for _ in range(rounds)])[:n]
    return [frames[k] for k in order]


def start(
    potential: Potential,
    frames: Sequence[Atoms],
    n: int,
    temperature_K: float,
    integrator: Integrator,
    seed: int,
    pressure_GPa: float = 0.0,
) -> MDState:
    """Replicas at random reference frames with Maxwell-Boltzmann momenta."""
    chosen = starting_frames(frames, n, seed)
    batch = AtomsBatch.from_atoms(chosen, device=potential.device)
    return initial_state(
        batch,
        PotentialForces(potential, stress=integrator.needs_stress),
        temperature_K,
        seed=seed,
        fix_com=integrator.fix_com,
        pressure_GPa=pressure_GPa,
        mobile=mobile_atoms(chosen).to(batch.device),
    )


def run_stability_test(
    potential: Potential,
    frames: Sequence[Atoms],
    criterion: Criterion,
    test: StabilityTest,
    observable: Observable | None = None,
    reference_mean: Tensor | None = None,
    on_block: Callable[[int, MDState, Failures], None] | None = None,
) -> StabilityResult:
    """Run fresh replicas until each fails or the time is over."""
    integrator = test.integrator
    n_steps = test.steps(1000.0 * test.time_ps)
    _, trajectory, failures = simulate(
        start(potential, frames, test.replicas, test.temperature_K, integrator, test.seed),
        integrator,
        potential,
        n_steps,
        [criterion],
        check_every=test.steps(test.check_every_fs),
        sample_every=test.steps(test.sample_every_fs) if observable else None,
        on_block=on_block,
    )
    found = () if observable is None else _observable_before_failure(trajectory, failures, observable, reference_mean)
    return StabilityResult(stability_statistics(failures, n_steps, integrator.timestep), failures, *found)


def _observable_before_failure(
    trajectory: Trajectory, failures: Failures, observable: Observable, reference: Tensor | None
) -> tuple[Tensor | None, float | None, float | None]:
    """Mean over all frames before each replica's failure, its distance from the reference and that one's standard error."""
    first = torch.where(failures.failed, failures.step, torch.iinfo(torch.int64).max)
    before = trajectory.valid & (trajectory.steps[:, None] < first)
    if not before.any():
        return None, None, None
    frames, _, replica = trajectory.keep(before).frames()
    values = observable(frames)
    mean = values.mean(dim=0).cpu()
    if reference is None:
        return mean, None, None

    def error(mean: Tensor) -> Tensor:
        return (observable.weights * (mean - reference).abs()).sum(dim=-1)

    sums = values.new_zeros(before.shape[1], values.shape[1]).index_add(0, replica, values).cpu()
    return mean, float(error(mean)), jackknife_error(sums, before.sum(dim=0).cpu(), error)


def jackknife_error(sums: Tensor, counts: Tensor, statistic: Callable[[Tensor], Tensor]) -> float | None:
    """Standard error of a function of a pooled mean, by leaving out one group at a time.

    Frames of one replica are correlated, replicas are not: they are the groups (delete-one jackknife; Efron and Stein,
    Ann. Stat. 9, 586, 1981).

    Parameters
    ----------
    sums : Tensor, shape (n_groups, d)
        Over the samples of each group.
    counts : Tensor, shape (n_groups,)
        Samples of each group; groups without any do not count.
    statistic : callable
        From means, shape (n_groups, d), to values, shape (n_groups,).

    Returns
    -------
    float or None
        None of fewer than two groups.
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    n = len(counts)
    if n < 2:
        return None
    without = statistic((sums.sum(dim=0) - sums) / (counts.sum() - counts)[:, None])
    return float(((n - 1) * without.var(correction=0)).sqrt())


def reference_mean(observable: Observable, reference: Reference) -> Tensor:
    """g^ref: the observable's mean over the reference frames, float64, shape (d,)."""
    return observable(AtomsBatch.from_atoms(reference.frames)).mean(dim=0)


def summarize(result: StabilityResult, errors: QMErrors) -> dict[str, object]:
    """What `evaluate --output` writes of one model; plain values with units in the names."""
    statistics = result.statistics
    median, low, high = statistics.median_ps()
    return {
        "n_replicas": len(statistics.failed),
        "n_failed": statistics.n_failed,
        "stable_replica_ps": statistics.stable_replica_ps,
        "hazard_per_ps": statistics.hazard_per_ps,
        "hazard_per_ps_interval": list(statistics.hazard_interval()),
        "median_stable_ps": median,
        "median_stable_ps_interval": [low, high],
        "force_mae_eV_per_A": errors.force_mae_eV_per_A,
        "energy_mae_eV": errors.energy_mae_offset_removed_eV,
        "energy_mae_with_offset_eV": errors.energy_mae_eV,
        "hr_error": result.observable_error,
        "hr_error_standard_error": result.observable_standard_error,
    }


def evaluate(
    potential: Potential,
    reference: Reference,
    criterion: Criterion,
    observable: Observable,
    test: StabilityTest,
    on_block: Callable[[int, MDState, Failures], None] | None = None,
) -> tuple[dict[str, object], StabilityResult]:
    """Stability from the reference's frames, observable against their mean, and errors on them."""
    potential.check_numbers(z for atoms in reference.frames for z in set(atoms.numbers))
    result = run_stability_test(
        potential, reference.frames, criterion, test, observable, reference_mean(observable, reference), on_block
    )
    errors = qm_errors(potential, LabelledFrames.from_reference(reference, potential.device))
    return summarize(result, errors), result
