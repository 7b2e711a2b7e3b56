"""The StABIE loop (Raja et al., arXiv 2402.13984, section 3.2): find where replicas fail, learn there, go on.

    pretrained potential
    repeat: simulation phase   run replicas; stop each that fails and rewind it to the start of that window
            learning phase     run all from there, broken ones too; update the potential by what they tell; back to the same
                               start; until the failures are gone
    keep the best state by measured stability
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.boltzmann import Grouping, Samples
from stabie_ase.dynamics import Trajectory
from stabie_ase.observables import Observable
from stabie_ase.potentials.base import Potential
from stabie_ase.stability import Criterion, OnLook
from stabie_ase.structures.reference import Reference
from stabie_ase.training.accuracy import Accuracy, Bounds, hold_out
from stabie_ase.training.condition import Condition
from stabie_ase.training.labels import LabelledFrames, QMLoss
from stabie_ase.training.options import FinetuneOptions
from stabie_ase.training.pool import SEED_STRIDE, ReplicaPool, Window
from stabie_ase.training.schedule import FINISHED, LEARNING, MATCHING, OBSERVABLES, SIMULATION, Matching, Progress, Schedule
from stabie_ase.training.updates import Work, chosen_rule, rule_class
from stabie_ase.training.updates.base import ENERGY_WEIGHT, OFFSET_WEIGHT

logger = logging.getLogger(__name__)

MIN_DOUBTFUL_UPDATES = 5
"""Updates all taken back from the first on, after which it is said what that most likely means."""

WHY_TAKEN_BACK = (
    "each raised the force or energy error on the frames it is judged by beyond its bound: most likely the model was trained on "
    "those frames; give --valid FILE with frames it has not seen, or a looser --force-error-bound or --energy-error-bound"
)


class TrainingLoop:
    """The loop, one window of every condition a call of `step`; everything it needs to go on is in `state()`.

    Parameters
    ----------
    potential : Potential
        Trained in place.
    conditions : sequence of Condition
        Replicas of all of them are run, and all their targets bear on each update.
    labelled : LabelledFrames
        Energies and forces to train on.
    held_out : LabelledFrames
        Energies and forces to judge accuracy by.
    config : FinetuneOptions
        With a temperature.
    """

    def __init__(
        self,
        potential: Potential,
        conditions: Sequence[Condition],
        labelled: LabelledFrames,
        held_out: LabelledFrames,
        config: FinetuneOptions,
    ):
        self.potential, self.config = potential, config
        rule, spec = rule_class(chosen_rule(config, [condition.grouping for condition in conditions]))
        self.accuracy = Accuracy(potential, held_out, config.labels.force_error_confidence)
        bounds = Bounds(config.labels.force_error_bound, config.labels.energy_error_bound)
        loss = QMLoss(ENERGY_WEIGHT, offset_weight=OFFSET_WEIGHT)
        self.work = Work(potential, labelled, loss, self.accuracy, bounds, config, self._seconds_left)
        self.rule = rule.from_spec(spec, self.work)
        dynamics, phases = config.dynamics, config.phases
        length, looks, samples = map(dynamics.steps, (phases.window_fs, dynamics.check_every_fs, dynamics.sample_every_fs))
        window = Window(length, looks, samples, phases.escape_factor)
        self.pools = [
            ReplicaPool(condition, potential, window, config.seed + SEED_STRIDE * k, round(phases.bank * condition.replicas))
            for k, condition in enumerate(conditions)
        ]
        limits = {field.name: getattr(phases, field.name) for field in fields(Schedule)}
        limits["lower_fraction"] = phases.lower(self.rule.lower_fraction)
        self.schedule = Matching() if config.goal == OBSERVABLES else Schedule(**limits)
        self.progress = Progress(self.schedule.first)
        self.start_weights = self._weights()
        self.best: dict[str, Any] = {"hazard": math.inf, "cycle": 0, "weights": self._weights()}
        self._began: float | None = None

    @classmethod
    def from_reference(
        cls,
        potential: Potential,
        reference: Reference,
        observables: Sequence[Observable],
        criteria: Sequence[Criterion],
        config: FinetuneOptions,
        validation: Reference | None = None,
        grouping: Grouping | None = None,
    ) -> TrainingLoop:
        """A loop at one condition: from the frames of a reference, which are also its targets and what is trained on.

        Accuracy is judged by the frames of `validation`; without them some of the reference are held out (`hold_out`).
        Without a grouping it is the one that the options name, or that suits (`choose_grouping`).
        """
        condition = Condition.from_reference(potential, reference, observables, criteria, config, grouping)
        return cls.at([condition], potential, reference, config, validation)

    @classmethod
    def at(
        cls,
        conditions: Sequence[Condition],
        potential: Potential,
        reference: Reference,
        config: FinetuneOptions,
        validation: Reference | None = None,
    ) -> TrainingLoop:
        """A loop at some conditions that trains on the labels of a reference, less those held out where there is no `validation`."""
        trained, held_out = (
            hold_out(potential, reference, config.labels.validation_fraction) if validation is None else (reference, validation)
        )
        labelled, unseen = (LabelledFrames.from_reference(part, potential.device) for part in (trained, held_out))
        return cls(potential, conditions, labelled, unseen, config)

    def on_look(self, function: OnLook | None) -> None:
        """Have a function told of every look at the replicas of any pool."""
        for pool in self.pools:
            pool.on_look = function

    # -- the two phases

    def step(self) -> tuple[dict[str, object], list[Atoms]]:
        """Run one window of the present phase; returns a record for the log and the frames that failed in it."""
        self._began = time.monotonic()
        if not self.rule.needs_dynamics:
            record, unstable = self._update_alone(), []
        else:
            record, unstable = (self._simulate if self.progress.phase == SIMULATION else self._learn)()
        self.progress.seconds, self._began = self.seconds, None
        if self._budget_spent():
            self.progress.phase = FINISHED
        return record, unstable

    @property
    def seconds(self) -> float:
        """Time spent, that of the window under way included; progress.seconds is that of finished ones."""
        return self.progress.seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    @property
    def finished(self) -> bool:
        return self.progress.phase == FINISHED

    def _simulate(self) -> tuple[dict[str, object], list[Atoms]]:
        """One window of those that have not failed."""
        progress, unstable = self.progress, []
        for pool in self.pools:
            if progress.window == 0:
                pool.reset_some(self.config.phases.random_resets)
            failures, going, began = pool.simulate()
            unstable += pool.failing_frames(failures, going, began, self.config.dynamics.timestep_fs, **self._where(pool))
        progress.window += 1
        fraction = self.unstable_fraction
        record = self._record(unstable_fraction=fraction, hazard_per_ps=self._hazard())
        if (following := self.schedule.after(SIMULATION, progress.window, fraction, fraction)) != SIMULATION:
            self._remember_if_best()
            self._enter(following)
        return record, unstable

    def _samples(self, condition: Condition, trajectory: Trajectory) -> Samples:
        observables, groups = [target.observable for target in condition.targets], condition.grouping
        return Samples.from_trajectory(trajectory, observables, groups, self.potential, groups.conformers)

    def _learn(self) -> tuple[dict[str, object], list[Atoms]]:
        """One window of the lesson from the start of the phase, then updates on its samples."""
        progress, matching = self.progress, self.progress.phase == MATCHING
        windows = [pool.learn(everyone=matching) for pool in self.pools]
        progress.window += 1
        fraction = _fraction([failures.failed for _, _, failures in windows])
        if progress.window == 1 and not matching:
            self._warn_if_few_failed_again(windows)
        record = self._record(unstable_fraction=fraction)
        learned, updates = self.schedule.teaches(fraction, self.unstable_fraction), progress.updates
        if learned:
            samples = [(pool.condition, self._samples(pool.condition, trajectory)) for pool, (_, trajectory, _) in zip(self.pools, windows)]
            before = self._weights() if matching and self.work.accurate() else None
            record |= {"n_samples": sum(len(s) for _, s in samples)} | self._apply(samples)
            if before and record.get("observable_loss", math.inf) < self.best.get("loss", math.inf):
                self.best |= {"loss": record["observable_loss"], "cycle": progress.cycle, "weights": before}
        following = self.schedule.after(progress.phase, progress.window, fraction, self.unstable_fraction)
        if following == LEARNING and progress.updates == updates:
            following = SIMULATION  # another window would be this one again
        if following != LEARNING:
            for pool, (ends, _, failures) in zip(self.pools, windows):
                pool.go_on_from(ends, failures)
            progress.cycle += 1
            self.rule.next_phase()
            self._enter(following)
        if learned:
            for pool in self.pools:
                progress.update_calls += pool.renew_forces()
            record["force_calls"] = self.force_calls
        return record, []

    def _warn_if_few_failed_again(self, windows: list) -> None:
        again = min(pool.failed_again(failures) for pool, (_, _, failures) in zip(self.pools, windows))
        if again < 0.5:
            logger.warning("only %.0f %% of the replicas that had failed did so again: there is little to learn from them", 100 * again)

    def _update_alone(self) -> dict[str, object]:
        """One update without any dynamics."""
        self.progress.phase = LEARNING
        self.progress.window += 1
        return self._record() | self._apply([])

    def _apply(self, windows: list) -> dict[str, object]:
        """The update rule's work on some windows, counted."""
        progress, info = self.progress, self.rule.apply_counted_(windows)
        progress.updates += info.updates
        progress.taken_back += info.taken_back
        progress.update_calls += info.force_calls
        if info.updates and progress.taken_back == progress.updates == MIN_DOUBTFUL_UPDATES:
            logger.warning("the first %d updates had to be taken back; %s", MIN_DOUBTFUL_UPDATES, WHY_TAKEN_BACK)
        return {"updates": progress.updates, "force_calls": self.force_calls, **info.figures}

    # -- between the phases

    def _enter(self, phase: str) -> None:
        self.progress.phase, self.progress.window = phase, 0
        if phase != LEARNING:
            for pool in self.pools:
                pool.forget_failures()

    def _remember_if_best(self) -> None:
        """The simulation phase has measured the hazard of the weights it ran with."""
        if self.work.accurate() and self._hazard() < self.best["hazard"]:
            self.best = {"hazard": self._hazard(), "cycle": self.progress.cycle, "weights": self._weights()}

    def candidates(self) -> dict[str, dict[str, Tensor]]:
        """Weights worth a comparison: those at the start, the best measured in the loop, and the last if accurate.

        By candidate and parameter, in the shapes of the parameters.
        """
        candidates = {"start": self.start_weights}
        if self.unchanged:
            return candidates
        if self.best["cycle"] > 0:
            candidates["best"] = self.best["weights"]
        if self.work.accurate():
            candidates["last"] = self._weights()
        return candidates

    @property
    def unchanged(self) -> bool:
        """Whether no update has been kept."""
        return self.progress.updates == self.progress.taken_back

    @property
    def unstable_fraction(self) -> float:
        """Unstable fraction of the replicas in this simulation phase, or the one before this learning phase."""
        return _fraction([pool.failed for pool in self.pools])

    @property
    def n_replicas(self) -> int:
        """Of all conditions."""
        return sum(pool.condition.replicas for pool in self.pools)

    @property
    def md_steps(self) -> int:
        """Of all replicas so far."""
        return sum(pool.counters.md_steps for pool in self.pools)

    @property
    def force_calls(self) -> int:
        """Evaluations of a frame so far: one in each step of a replica, and those of the updates."""
        return self.md_steps + self.progress.update_calls

    @property
    def md_seconds(self) -> float:
        """Seconds that dynamics have taken so far."""
        return sum(pool.counters.md_seconds for pool in self.pools)

    def _weights(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self.potential.state_dict().items()}

    def _hazard(self) -> float:
        """Failures per replica-ps in this simulation phase, with half a failure added so that none is not zero."""
        ps = sum(pool.counters.stable_steps for pool in self.pools) * self.config.dynamics.timestep_fs / 1000.0
        return (sum(pool.counters.failures for pool in self.pools) + 0.5) / max(ps, 1e-9)

    def _seconds_left(self) -> float:
        return 60.0 * self.config.max_time_min - self.seconds

    def _budget_spent(self) -> bool:
        config, progress = self.config, self.progress
        return (
            self._seconds_left() <= 0.0
            or (config.max_cycles is not None and progress.cycle >= config.max_cycles)
            or (config.max_updates is not None and progress.updates >= config.max_updates)
        )

    # -- what leaves the loop

    def _record(self, **values: object) -> dict[str, object]:
        progress = self.progress
        return {
            "phase": progress.phase,
            "cycle": progress.cycle,
            "window": progress.window,
            "md_replica_ps": self.md_steps * self.config.dynamics.timestep_fs / 1000.0,
            "force_calls": self.force_calls,
            **values,
        }

    def _where(self, pool: ReplicaPool) -> dict[str, float]:
        """What unstable frames tell beside when and which replica: the cycle, and of several state points which."""
        several = {"temperature_K": pool.condition.point.temperature_K} if len(self.pools) > 1 else {}
        return {"cycle": self.progress.cycle, **several}

    def state(self) -> dict:
        """Everything an exact continuation needs; tensors and plain values only."""
        return {
            "weights": self._weights(),
            "rule": self.rule.state(),
            "pools": [pool.state() for pool in self.pools],
            "progress": vars(self.progress).copy(),
            "best": self.best,
            "accuracy": self.accuracy.state(),
        }

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.potential.load_state_dict(state["weights"])
        self.rule.restore(state["rule"])
        for pool, saved in zip(self.pools, state["pools"]):
            pool.restore(saved)
        self.progress = Progress(**state["progress"])
        self.best = state["best"]
        self.accuracy.restore(state["accuracy"])


def _fraction(flags: Sequence[Tensor]) -> float:
    return float(torch.cat(list(flags)).double().mean())
