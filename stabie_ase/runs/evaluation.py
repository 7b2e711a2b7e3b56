"""What a model is worth in dynamics: time to first failure, observables up to it, energy and force errors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms, units
from scipy.stats import binomtest
from torch import Tensor

from stabie_ase.config import CHECKS, HasTimestep
from stabie_ase.dynamics import (
    Integrator,
    Langevin,
    MDState,
    PotentialForces,
    Trajectory,
    initial_state,
    mobile_atoms,
)
from stabie_ase.observables import Observable
from stabie_ase.observables.averages import SlicedMeans, noise_floor
from stabie_ase.potentials.base import Potential
from stabie_ase.stability import (
    Criterion,
    Failures,
    OnLook,
    StabilityStatistics,
    criteria_from,
    look,
    stability_statistics,
    watched,
    with_memory,
)
from stabie_ase.stability.causes import broken
from stabie_ase.stability.criteria.distribution import DistanceShift
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import Reference, spread
from stabie_ase.structures.topology import Topology
from stabie_ase.training.labels import QMErrors

logger = logging.getLogger(__name__)


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
        Between two looks at the criteria.
    sample_every_fs : float
        Between two frames for the observable.
    slice_ps : float
        Length of the stretches over which frames are averaged.
    seed : int
        Chooses starting frames, momenta and noise: equal for all models that are compared.
    """

    temperature_K: float
    replicas: int = 64
    time_ps: float = 5.0
    timestep_fs: float = 0.5
    friction_per_fs: float = 0.01
    check_every_fs: float = 5.0
    sample_every_fs: float = 10.0
    slice_ps: float = 0.25
    seed: int = 0

    @property
    def integrator(self) -> Integrator:
        return Langevin(self.timestep_fs * units.fs, self.friction_per_fs / units.fs)

    @property
    def n_steps(self) -> int:
        """Of each replica."""
        return self.steps(1000.0 * self.time_ps)

    @property
    def n_slices(self) -> int:
        """Stretches of time, of equal length, at most MOST_SLICES and with a frame each."""
        n_frames = self.n_steps // self.steps(self.sample_every_fs)
        return max(1, min(round(self.time_ps / self.slice_ps), MOST_SLICES, n_frames))


MOST_SLICES = 80
"""Stretches of time whose means are kept."""

FRAMES_AT_ONCE = 1024
"""Whose observables are worked out before they are summed."""


@dataclass(frozen=True)
class Yardstick:
    """What models are held against: criteria, and the observable with its reference.

    Attributes
    ----------
    criteria : sequence of Criterion
        Of a single state; a replica stops at the first that it fails.
    observable : Observable
    target : Tensor of float64, shape (d,)
        g^ref.
    floor : float or None
        Error of g that a perfect model would show (`noise_floor`).
    n_frames : int
        Reference frames.
    distribution : DistanceShift or None
        Judges windows after the run; None where the reference is of another temperature.
    """

    criteria: Sequence[Criterion]
    observable: Observable
    target: Tensor
    floor: float | None
    n_frames: int
    distribution: DistanceShift | None = None

    @classmethod
    def from_reference(
        cls, spec: str, reference: Reference, observable: Observable, temperature_K: float, topology: Topology | None = None
    ) -> Yardstick:
        """All criteria, those that `spec` names with its tolerances, and the observable's mean over the reference.

        A reference that tells another temperature is warned of.

        Raises
        ------
        ValueError
            See `criteria_from`.
        """
        frames, topology = reference.frames, topology or Topology.from_frames(reference.frames)
        criteria = criteria_from(spec, frames, temperature_K, reference.temperature_K, CHECKS, topology)
        values = observable(AtomsBatch.from_atoms(frames))
        floor = noise_floor(values, observable.weights)
        distribution = DistanceShift.from_reference(frames, topology) if _same_temperature(reference, temperature_K) else None
        return cls(criteria, observable, values.mean(dim=0), floor, len(frames), distribution)

    def floor_of(self, n_replicas: int) -> float:
        """The floor of a mean over so few replicas as well, each of which may tell no more than one reference frame does."""
        return (self.floor or 0.0) * (1.0 + self.n_frames / max(n_replicas, 1)) ** 0.5

    def describe(self) -> list[str]:
        """All criteria, in words."""
        known = [*self.criteria, *([self.distribution] if self.distribution else [])]
        return [criterion.describe() for criterion in known]


SAME_TEMPERATURE = 0.05
"""Fraction by which the temperature of the dynamics may be off that of the reference: distances do not tell them apart."""


def _same_temperature(reference: Reference, temperature_K: float) -> bool:
    """Whether the reference is of the temperature of the dynamics, as far as it tells; else that is said."""
    told = reference.temperature_K
    if told is None or abs(temperature_K - told) <= SAME_TEMPERATURE * told:
        return True
    logger.warning(
        "the reference is of %g K, the dynamics are of %g K: distances over windows are not judged, and an error of the observable "
        "holds the difference of the temperatures; best are a reference and dynamics of one temperature", told, temperature_K,
    )  # fmt: skip
    return False


MOST_JUDGED = 200
"""Reference frames that are held against criteria: enough to see that these do not suit them."""


def failing_frames(potential: Potential, frames: Sequence[Atoms], criteria: Sequence[Criterion]) -> tuple[Counter[str], int]:
    """How many reference frames criteria call unstable, by criterion, and how many were looked at."""
    chosen = [frames[k] for k in spread(len(frames), MOST_JUDGED)]
    batch = AtomsBatch.from_atoms(chosen, device=potential.device)
    with potential.frozen():
        state = initial_state(batch, PotentialForces(potential), 1e-3)
    criteria = [criterion.for_model(potential) for criterion in criteria]
    looked = look(with_memory(state, criteria), criteria)
    names = [None, *(criterion.name for criterion in criteria)]
    return Counter(names[worst] for worst in looked.worst[looked.unstable].tolist() if names[worst]), len(chosen)


@dataclass(frozen=True)
class StabilityResult:
    """Outcome of one or several runs of a `StabilityTest`.

    Attributes
    ----------
    statistics : StabilityStatistics
    causes : Counter of str
        Failures by criterion.
    unstable : list of Atoms
        The frames at the failures (see `Failures.to_atoms`); those of a window that was off are not among them.
    observed : SlicedMeans
        Of the observable, over the frames before each replica's failure.
    whole : Tensor of bool, shape (n_replicas, n_slices)
        Slices that ended before the replica's failure.
    """

    statistics: StabilityStatistics
    causes: Counter[str]
    unstable: list[Atoms]
    observed: SlicedMeans
    whole: Tensor

    @classmethod
    def pool(cls, results: Sequence[StabilityResult]) -> StabilityResult:
        """Several runs of one test, with other seeds, as one."""
        return cls(
            StabilityStatistics.pool([r.statistics for r in results]),
            sum((r.causes for r in results), Counter()),
            [atoms for r in results for atoms in r.unstable],
            SlicedMeans.pool([r.observed for r in results]),
            torch.cat([r.whole for r in results]),
        )

    def stretch(self, part: int, parts: int) -> Tensor:
        """Cells of `observed` that belong to one of some equal parts of the time, shape (n_replicas, n_slices)."""
        chosen = torch.arange(self.whole.shape[1]) * parts // self.whole.shape[1] == part
        return chosen.expand_as(self.whole)




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
    state = initial_state(
        batch,
        PotentialForces.driving(potential, integrator),
        temperature_K,
        seed=seed,
        fix_com=integrator.fix_com,
        pressure_GPa=pressure_GPa,
        mobile=mobile_atoms(chosen).to(batch.device),
    )
    return integrator.prepare(state)


def run_stability_test(
    potential: Potential,
    frames: Sequence[Atoms],
    yardstick: Yardstick,
    test: StabilityTest,
    on_look: OnLook | None = None,
) -> StabilityResult:
    """Run fresh replicas until each fails or the time is over."""
    integrator = test.integrator
    _, trajectory, failures = watched(
        start(potential, frames, test.replicas, test.temperature_K, integrator, test.seed),
        integrator,
        PotentialForces(potential),
        test.n_steps,
        [criterion.for_model(potential) for criterion in yardstick.criteria],
        check_every=test.steps(test.check_every_fs),
        sample_every=min(test.steps(test.sample_every_fs), test.n_steps),
        on_look=on_look,
    )
    unstable = _with_times(failures, test.timestep_fs)
    if yardstick.distribution:
        failures = _judge_windows(trajectory, failures, yardstick.distribution, test)
    observed, whole = _sliced(trajectory, failures, yardstick.observable, len(yardstick.target), test)
    return StabilityResult(
        stability_statistics(failures, test.n_steps, integrator.timestep), failures.causes, unstable, observed, whole
    )


def _with_times(failures: Failures, timestep_fs: float) -> list[Atoms]:
    return failures.to_atoms({k: {"time_ps": step * timestep_fs / 1000.0} for k, step in enumerate(failures.step.tolist())})


def _sliced(
    trajectory: Trajectory, failures: Failures, function: Callable[[AtomsBatch], Tensor], width: int, test: StabilityTest
) -> tuple[SlicedMeans, Tensor]:
    """Means of a function of frames, shape (n_frames, width), before each replica's failure, and the slices that ended before it."""
    n_replicas, n_slices = len(failures.step), test.n_slices
    first = torch.where(failures.failed, failures.step, torch.iinfo(torch.int64).max)
    before = trajectory.valid & (trajectory.steps[:, None] < first)
    frames, frame, replica = trajectory.keep(before).frames()
    # The frame after the last step of a slice belongs to it.
    time_slice = (trajectory.steps[frame] - 1) * n_slices // test.n_steps
    means = SlicedMeans.none(n_replicas, n_slices, width)
    for part in torch.arange(len(frame), device=frame.device).split(FRAMES_AT_ONCE) if len(frame) else ():  # all may fail at once
        means = means + SlicedMeans.collect(function(frames.select(part)), replica[part], time_slice[part], n_replicas, n_slices)
    ends = torch.arange(1, n_slices + 1, device=first.device) * test.n_steps // n_slices
    return means, (ends < first[:, None]).cpu()


def _judge_windows(
    trajectory: Trajectory, failures: Failures, criterion: DistanceShift, test: StabilityTest
) -> Failures:
    """The failures, and those of replicas that outlived a window over which they were not like the reference."""
    means, whole = _sliced(trajectory, failures, criterion.cumulative, criterion.target.numel(), test)
    severity, worst = criterion.severity(torch.nan_to_num(means.means))
    off = whole & (means.counts > 0) & (severity > 1.0)
    step, value, names, atoms = failures.step.clone(), failures.value.clone(), list(failures.criterion), list(failures.atoms)
    for k in off.any(dim=1).nonzero()[:, 0].tolist():
        window = int(off[k].int().argmax())
        step[k] = (window + 1) * test.n_steps // test.n_slices
        value[k], names[k], atoms[k] = severity[k, window] * criterion.tolerances[worst[k, window]], criterion.name, []
    return replace(failures, step=step, value=value, criterion=names, atoms=atoms)


def summarize(
    result: StabilityResult, yardstick: Yardstick, held_out: QMErrors | None, reference: QMErrors, other: StabilityResult | None = None
) -> dict[str, object]:
    """What `evaluate --output` and result.json say of one model; plain values with units in the names.

    Parameters
    ----------
    result : StabilityResult
    yardstick : Yardstick
    held_out, reference : QMErrors
        On frames that the model has not seen, if there are any that it surely has not, and on the reference.
    other : StabilityResult, optional
        Of another model from the same starts: the observable is also given over the time in which both are stable.
    """
    statistics, name = result.statistics, yardstick.observable.name
    median, low, high = statistics.median_ps()
    target, weights = yardstick.target, yardstick.observable.weights
    error, standard_error = result.observed.distance(target, weights)
    summary = {
        "n_replicas": len(statistics.failed),
        "n_failed": statistics.n_failed,
        "failures_by_cause": dict(sorted(result.causes.items())),
        "what_broke": dict(broken(result.unstable).most_common()),
        "stable_replica_ps": statistics.stable_replica_ps,
        "hazard_per_ps": statistics.hazard_per_ps,
        "hazard_per_ps_interval": list(statistics.hazard_interval()),
        "median_stable_ps": median,
        "median_stable_ps_interval": [low, high],
        f"{name}_error": error,
        f"{name}_error_standard_error": standard_error,
        f"{name}_error_floor": yardstick.floor,
    }
    if other is not None:
        both = result.whole & other.whole
        common, common_error = result.observed.keep(both).distance(target, weights)
        summary |= {f"{name}_error_while_both_stable": common, f"{name}_error_while_both_stable_standard_error": common_error}
    for where, errors in (("held_out", held_out), ("reference", reference)):
        if errors is not None:
            summary |= {
                f"{where}_force_mae_eV_per_A": errors.force_mae_eV_per_A,
                f"{where}_energy_mae_eV": errors.energy_mae_offset_removed_eV,
                f"{where}_energy_mae_with_offset_eV": errors.energy_mae_eV,
            }
    return summary


def failures_p_value(start: StabilityResult, end: StabilityResult, causes: Iterable[str] | None = None) -> float:
    """Chance that the start has so many more failures, by these causes or by all, if both models had equal hazards.

    With equal rates the starting model's share of all failures is binomial, its chance the share of the time it was
    observed for (Przyborowski & Wilenski, Biometrika 31, 313, 1940): exact for a number of failures that was not waited for.
    """
    a, b = (r.statistics.n_failed if causes is None else sum(r.causes[c] for c in causes) for r in (start, end))
    time_start, time_end = start.statistics.stable_replica_ps, end.statistics.stable_replica_ps
    return float(binomtest(a, a + b, time_start / (time_start + time_end), alternative="greater").pvalue) if a + b else 1.0
