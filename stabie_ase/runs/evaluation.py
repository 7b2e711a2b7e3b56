"""What a model is worth in dynamics: time to first failure, observables up to it, energy and force errors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.boltzmann import targets_at
from stabie_ase.dynamics import Integrator, PotentialForces, Trajectory, initial_state, integrator_for
from stabie_ase.dynamics.starts import start
from stabie_ase.observables import Observable, Target
from stabie_ase.observables.averages import SlicedMeans
from stabie_ase.observables.energetics import Energetics
from stabie_ase.potentials.base import Potential
from stabie_ase.stability import (
    VERDICT,
    Criterion,
    Failures,
    OnLook,
    StabilityStatistics,
    criteria_from,
    default_criteria,
    look,
    stability_statistics,
    watched,
    with_memory,
)
from stabie_ase.stability.criteria.base import span_ps
from stabie_ase.stability.criteria.distribution import DistanceShift
from stabie_ase.stability.survival import fewer_p_value
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.kind import ISOLATED
from stabie_ase.structures.reference import TargetFrames, spread
from stabie_ase.structures.setting import Setting
from stabie_ase.system.options import HasTimestep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StabilityTest(HasTimestep):
    """How stability is measured.

    Attributes
    ----------
    temperature_K : float
    pressure_GPa : float or None
        At constant volume there is none.
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
    pressure_GPa: float | None = None

    @property
    def integrator(self) -> Integrator:
        return integrator_for("nvt" if self.pressure_GPa is None else "npt", self.timestep_fs, self.friction_per_fs)

    @property
    def n_steps(self) -> int:
        """Of each replica."""
        return self.steps(1000.0 * self.time_ps)

    @property
    def n_slices(self) -> int:
        """Stretches of time, of equal length, at most MAX_SLICES and with a frame each."""
        n_frames = self.n_steps // self.steps(self.sample_every_fs)
        return max(1, min(round(self.time_ps / self.slice_ps), MAX_SLICES, n_frames))


MAX_SLICES = 80
"""Stretches of time whose means are kept."""

FRAMES_AT_ONCE = 1024
"""Whose observables are worked out before they are summed."""


@dataclass(frozen=True)
class Yardstick:
    """What models are held against: criteria, and what is known of observables.

    Attributes
    ----------
    criteria : sequence of Criterion
        Judged while the dynamics run; a replica stops at the first that it fails.
    targets : sequence of Target
    distribution : DistanceShift or None
        Judges windows after the run; None where the reference is periodic (see "rdf") or of another temperature.
    """

    criteria: Sequence[Criterion]
    targets: Sequence[Target]
    distribution: DistanceShift | None = None

    @classmethod
    def from_reference(cls, text: str | None, setting: Setting, observables: Sequence[Observable]) -> Yardstick:
        """The criteria that suit the system, those that `text` names with its tolerances, and the observables' means over the reference.

        ValueError as of `criteria_from`; a reference that tells another temperature is warned of.
        """
        usual = default_criteria(setting, VERDICT, windows=setting.one_temperature, chosen=bool(text))
        criteria = criteria_from(text or "", setting, usual)
        known = TargetFrames(setting.frames, temperature_K=setting.reference_temperature_K, source="the reference")
        return cls.of(criteria, setting, targets_at(observables, known, setting.temperature_K))

    @classmethod
    def of(cls, criteria: Sequence[Criterion], setting: Setting, targets: Sequence[Target]) -> Yardstick:
        """These, and the distances of the reference over windows where the dynamics are of its temperature."""
        frames = setting.frames
        comparable = setting.one_temperature and setting.kind.name == ISOLATED
        if not setting.one_temperature:
            logger.warning(
                "the reference is of %g K, the dynamics are of %g K: distances over windows are not judged",
                setting.reference_temperature_K, setting.temperature_K,
            )  # fmt: skip
        return cls(criteria, targets, DistanceShift.from_reference(frames, setting.topology) if comparable else None)

    def with_criteria(self, criteria: Sequence[Criterion]) -> Yardstick:
        """With those whose names it does not have yet."""
        names = [criterion.name for criterion in self.criteria]
        return replace(self, criteria=[*self.criteria, *(criterion for criterion in criteria if criterion.name not in names)])

    def warn_if_blind(self, time_ps: float) -> None:
        """Warn of criteria that have judged nothing when replicas have run their time, in ps."""
        for criterion in self.criteria:
            needed = span_ps([criterion])
            if needed > time_ps:
                logger.warning("replicas run %.3g ps, and %s judges windows of %.3g ps: it finds nothing", time_ps, criterion.name, needed)

    def describe(self) -> list[str]:
        """All criteria, in words."""
        known: list[Any] = [*self.criteria, *([self.distribution] if self.distribution else [])]
        return [criterion.describe() for criterion in known]


MAX_JUDGED_FRAMES = 200
"""Reference frames that are held against criteria: enough to see that these do not suit them."""


def failing_frames(potential: Potential, frames: Sequence[Atoms], criteria: Sequence[Criterion]) -> tuple[Counter[str], int]:
    """How many reference frames criteria call unstable, by criterion, and how many were looked at."""
    chosen = [frames[k] for k in spread(len(frames), MAX_JUDGED_FRAMES)]
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
    observed : dict of str to SlicedMeans
        Of each observable by its name, over the frames before each replica's failure.
    whole : Tensor of bool, shape (n_replicas, n_slices)
        Slices that ended before the replica's failure.
    """

    statistics: StabilityStatistics
    causes: Counter[str]
    unstable: list[Atoms]
    observed: dict[str, SlicedMeans]
    whole: Tensor

    @classmethod
    def pool(cls, results: Sequence[StabilityResult]) -> StabilityResult:
        """Several runs of one test, with other seeds, as one."""
        return cls(
            StabilityStatistics.pool([r.statistics for r in results]),
            sum((r.causes for r in results), Counter()),
            [atoms for r in results for atoms in r.unstable],
            {name: SlicedMeans.pool([r.observed[name] for r in results]) for name in results[0].observed},
            torch.cat([r.whole for r in results]),
        )

    def stretch(self, part: int, parts: int) -> Tensor:
        """Cells of `observed` that belong to one of some equal parts of the time, shape (n_replicas, n_slices)."""
        chosen = torch.arange(self.whole.shape[1]) * parts // self.whole.shape[1] == part
        return chosen.expand_as(self.whole)


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
        start(potential, frames, test.replicas, test.temperature_K, integrator, test.seed, test.pressure_GPa or 0.0),
        integrator,
        PotentialForces.driving(potential, integrator),
        test.n_steps,
        [criterion.for_model(potential) for criterion in yardstick.criteria],
        check_every=test.steps(test.check_every_fs),
        sample_every=min(test.steps(test.sample_every_fs), test.n_steps),
        on_look=on_look,
    )
    unstable = _with_times(failures, test.timestep_fs)
    if yardstick.distribution:
        failures = _judge_windows(trajectory, failures, yardstick.distribution, test)
    observed = {
        o.name: _sliced(trajectory, failures, _sampler(o, potential), o.width, test) for o in (t.observable for t in yardstick.targets)
    }
    whole = _whole_slices(failures, test)
    return StabilityResult(
        stability_statistics(failures, test.n_steps, integrator.timestep), failures.causes, unstable, observed, whole
    )


def _with_times(failures: Failures, timestep_fs: float) -> list[Atoms]:
    return failures.to_atoms({k: {"time_ps": step * timestep_fs / 1000.0} for k, step in enumerate(failures.step.tolist())})


def _sampler(observable: Observable, potential: Potential) -> Callable[[AtomsBatch, Tensor], Tensor]:
    """A function of frames and their energies by a potential, shape (n_frames,) in eV, that gives an observable's samples."""

    def sample(frames: AtomsBatch, energies: Tensor) -> Tensor:
        needs = observable.needs
        return observable.sample(frames, None, Energetics.by(potential, frames, energies, "stress" in needs) if needs else None)

    return sample


def _sliced(
    trajectory: Trajectory, failures: Failures, function: Callable[[AtomsBatch, Tensor], Tensor], width: int, test: StabilityTest
) -> SlicedMeans:
    """Means of a function of frames and their energies, shape (n_frames, width), before each replica's failure."""
    n_replicas, n_slices = len(failures.step), test.n_slices
    before = trajectory.valid & (trajectory.steps[:, None] < _first(failures))
    frames, frame, replica = trajectory.keep(before).frames()
    energies = trajectory.potential_energy[frame, replica]
    # The frame after the last step of a slice belongs to it.
    time_slice = (trajectory.steps[frame] - 1) * n_slices // test.n_steps
    means = SlicedMeans.none(n_replicas, n_slices, width)
    for part in torch.arange(len(frame), device=frame.device).split(FRAMES_AT_ONCE) if len(frame) else ():  # all may fail at once
        values = function(frames.select(part), energies[part])
        means = means + SlicedMeans.collect(values, replica[part], time_slice[part], n_replicas, n_slices)
    return means


def _first(failures: Failures) -> Tensor:
    """Steps to each replica's failure; of one that did not fail more than there are, shape (n_replicas,)."""
    return torch.where(failures.failed, failures.step, torch.iinfo(torch.int64).max)


def _whole_slices(failures: Failures, test: StabilityTest) -> Tensor:
    """Slices of time that ended before each replica's failure, shape (n_replicas, n_slices), bool."""
    ends = torch.arange(1, test.n_slices + 1, device=failures.step.device) * test.n_steps // test.n_slices
    return (ends < _first(failures)[:, None]).cpu()


def _judge_windows(trajectory: Trajectory, failures: Failures, criterion: DistanceShift, test: StabilityTest) -> Failures:
    """The failures, and those of replicas that outlived a window over which they were not like the reference."""
    means = _sliced(trajectory, failures, lambda frames, energies: criterion.cumulative(frames), criterion.target.numel(), test)
    whole = _whole_slices(failures, test)
    severity, worst = criterion.severity(torch.nan_to_num(means.means))
    off = whole & (means.counts > 0) & (severity > 1.0)
    step, value, names, atoms = failures.step.clone(), failures.value.clone(), list(failures.criterion), list(failures.atoms)
    for k in off.any(dim=1).nonzero()[:, 0].tolist():
        window = int(off[k].int().argmax())
        step[k] = (window + 1) * test.n_steps // test.n_slices
        value[k], names[k], atoms[k] = severity[k, window] * criterion.tolerances[worst[k, window]], criterion.name, []
    return replace(failures, step=step, value=value, criterion=names, atoms=atoms)


def failures_p_value(start: StabilityResult, end: StabilityResult) -> float:
    """Chance (a fraction) that the start has so many more failures if both models had equal hazards."""
    a, b = start.statistics, end.statistics
    return fewer_p_value(a.n_failed, b.n_failed, a.stable_replica_ps, b.stable_replica_ps)
