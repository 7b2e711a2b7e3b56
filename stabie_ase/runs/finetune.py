"""A fine-tuning run on disk: its directory, exact resume, and the final comparison with the starting model."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ase import Atoms

from stabie_ase.dynamics.compilation import compile_where_wanted
from stabie_ase.potentials.base import Potential
from stabie_ase.runs.checks import check_inputs
from stabie_ase.runs.comparison import Comparison, Outcome, Trial, together
from stabie_ase.runs.conditions import Plan, frames_of, planned
from stabie_ase.runs.evaluation import StabilityTest, failing_frames
from stabie_ase.runs.finetune_directory import RunDirectory
from stabie_ase.runs.goals import GOALS
from stabie_ase.runs.inputs import Inputs, code_files
from stabie_ase.runs.monitor import Monitor
from stabie_ase.runs.progress import CheckProgress, LoopProgress
from stabie_ase.runs.result import curves, observed, price, summaries_together
from stabie_ase.runs.run import Live, Run, tell_targets
from stabie_ase.stability import Criterion
from stabie_ase.stability.criteria.base import span_ps
from stabie_ase.stability.sequential import replica_ps_to_tell
from stabie_ase.structures.reference import Reference
from stabie_ase.training.labels import LabelledFrames, qm_errors
from stabie_ase.training.loop import SIMULATION, WHY_TAKEN_BACK, TrainingLoop
from stabie_ase.training.options import FinetuneOptions
from stabie_ase.training.updates import ignored, rule_class

logger = logging.getLogger(__name__)

MAX_CHECK_PS, MAX_CHECK_REPLICAS, MIN_CHECK_REPLICAS = 4.0, 64, 8
"""Time of each replica, in ps, and replicas of a round of a final comparison that nobody has asked to be larger, or smaller."""

MAX_UNSTABLE_REFERENCE_FRACTION = 0.05
"""Fraction of the reference frames that criteria may call unstable before that is said."""


@dataclass
class Finetuning(Run):
    """A run of `stabie-ase finetune`: `run()` takes it to its end from wherever it is."""

    directory_class = RunDirectory
    inputs_class = Inputs
    config_class = FinetuneOptions

    inputs: Inputs
    config: FinetuneOptions
    reference: Reference
    plans: list[Plan]
    training: TrainingLoop
    held_out_source: str

    @classmethod
    def set_up(cls, inputs: Inputs, config: FinetuneOptions, monitor: Monitor, live: Live) -> Finetuning:
        """Everything that can be wrong, looked at before anything is written."""
        for file in code_files(config):
            monitor.message(f"Code of yours: {file}")
        if changes := config.of_the_recipe():
            monitor.message(f"Recipe {config.recipe}: {changes}")
        if config.update.rule is not None:
            rule_class(config.update.rule)
        reference, validation = inputs.read_reference(), inputs.read_validation()
        potential = inputs.load_potential()
        reference, validation = (part and part.isolated(potential.cutoff) for part in (reference, validation))
        monitor.message(f"Reference: {reference.source}")
        for part in (reference, validation) if validation else (reference,):
            potential.check_numbers(z for atoms in part.frames for z in set(atoms.numbers))
        check_inputs(potential, Path(inputs.model).name, reference, validation)
        config, plans = planned(config, reference, potential, live)
        for plan in plans:
            _tell(plan, len(plans), potential, monitor)
        monitor.message(f"Update: {config.update.rule}")
        if unused := ignored(str(config.update.rule), config):
            monitor.message(f"Not used by this update: {', '.join(unused)}")
        torch.manual_seed(config.seed)
        training = TrainingLoop.at([plan.condition for plan in plans], potential, reference, config, validation)
        held_out = f"{len(training.accuracy.frames)} frames of the reference that are held out" if validation is None else validation.source
        return cls(inputs, config, reference, plans, training, held_out)

    @property
    def model_path(self) -> Path:
        """Where the result goes: named `model` with the suffix of the input."""
        return model_path(self.directory, self.inputs)

    @property
    def check_seconds(self) -> float:
        """Budget of the final comparison, in seconds."""
        config = self.config
        return 60.0 * (config.max_time_min if config.check.max_time_min is None else config.check.max_time_min)

    @property
    def check_round(self) -> tuple[int, float]:
        """Replicas in a round of the final comparison, and the time in ps of each: as given, or so that a round fits the budget.

        There are fewer replicas before their time is shorter, in which less is seen of what takes its time; it is never too short for
        the criteria to be judged.
        """
        check = self.config.check
        replicas, time = check.replicas or MAX_CHECK_REPLICAS, check.time_ps or MAX_CHECK_PS
        if not self.training.md_steps:
            return replicas, time
        models = max(2, 2 * len(self.training.candidates()) - 2)  # with the heat among several
        affordable = self.check_seconds * self._replica_ps_per_second / (models * len(self._judged))
        if check.replicas is None:
            replicas = min(replicas, max(int(affordable / time), MIN_CHECK_REPLICAS))
        if check.time_ps is None:
            least = max(self.config.dynamics.check_every_fs / 1000.0, self._span_ps)
            time = min(time, max(float(f"{affordable / replicas:.2g}"), least))
        return replicas, time

    @property
    def _span_ps(self) -> float:
        """Time that it takes until every criterion of the comparison can be judged."""
        return max(span_ps(plan.yardstick.criteria) for plan in self._judged)

    @property
    def _replica_ps_per_second(self) -> float:
        """How fast the dynamics of the loop have been."""
        training = self.training
        return training.md_steps * self.config.dynamics.timestep_fs / 1000.0 / training.md_seconds

    def train(self, monitor: Monitor | None = None, on_window: Callable[[dict], None] | None = None) -> None:
        """The loop, saved after every window."""
        training, directory, monitor = self.training, self.directory, monitor or Monitor()
        progress = LoopProgress(training, monitor)
        while not training.finished:
            record, unstable = training.step()
            record["seconds"] = training.progress.seconds
            directory.append(record, unstable)
            directory.save(training.state())
            logger.info("%s", _in_a_line(record))
            if record["phase"] == SIMULATION != training.progress.phase and record["cycle"] == 0:
                self._warn_if_too_short(record["hazard_per_ps"])
            if on_window:
                on_window(record)
        progress.end()

    def _warn_if_too_short(self, hazard_per_ps: float) -> None:
        """The first phase has measured the starting model: whether the final comparison has time for enough failures."""
        config, rate = self.config, self._replica_ps_per_second
        seen = min(0.5 * self.check_seconds * rate, config.check.rounds * math.prod(self.check_round))
        needed = replica_ps_to_tell(hazard_per_ps)
        if needed > seen:
            logger.warning(
                "the starting model fails about %.2g times a replica-ps by the criteria of training: to tell a model four times as "
                "stable takes about %.2g replica-ps of each, %.2g min, and the final comparison has time for %.2g; a gain may be "
                "missed; see --check-max-time and --check-rounds", hazard_per_ps, needed, 2.0 * needed / rate / 60.0, seen,
            )  # fmt: skip

    def finish(self, monitor: Monitor | None = None) -> dict:
        """Final comparison, model and result; returns what result.json holds."""
        result = self._compare(monitor or Monitor())
        self.directory.save_model(self.training.potential, self.model_path.name)
        self.directory.write_json(self.directory.result_path.name, result)
        return result

    def settle(self, monitor: Monitor) -> None:
        """The network compiled as asked for; always after the setup and before anything else.

        What a trial said takes the place of "auto" in the inputs: a resumed run must not measure it again.
        """
        compiled = compile_where_wanted(
            self.inputs.compilation,
            self.training.potential,
            frames_of(self.plans),
            self.config.dynamics.replicas,
            seconds=60.0 * self.config.max_time_min,
            say=monitor.message,
        )
        self.inputs = replace(self.inputs, compilation=compiled)

    def run(self, monitor: Monitor | None = None, on_window: Callable[[dict], None] | None = None) -> dict:
        """All of it; returns what result.json holds."""
        monitor = monitor or Monitor()
        loop, check = self.config.max_time_min, self.check_seconds / 60.0
        monitor.message(f"Time: up to {loop:.3g} min for the loop, then up to about {check:.3g} min for the comparison")
        self.train(monitor, on_window)
        return self.finish(monitor)

    def described(self) -> dict[str, Any]:
        """What config.json tells beside inputs and options."""
        return {
            "model": self.inputs.model,
            "reference": self.reference.source,
            "at": [plan.name for plan in self.plans],
            "observable": _each(target.observable.describe() for plan in self.plans for target in plan.condition.targets),
            "criterion": _each(criterion.describe() for plan in self.plans for criterion in plan.condition.criteria),
            "check_criterion": _each(line for plan in self._judged for line in plan.yardstick.describe()),
            "start_force_mae_eV_per_A": self.training.accuracy.start_mae,
            "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {self.inputs.device}",
        }

    def restore(self, state: dict) -> None:
        """Go on from what state.pt holds."""
        self.training.restore(state)

    def _compare(self, monitor: Monitor) -> dict:
        """Hold the candidates against the starting model from equal fresh starts; the winner stays in the potential."""
        config, training, trials = self.config, self.training, self._trials()
        test = trials[0].test
        if (test.replicas, test.time_ps) != (config.check.replicas or MAX_CHECK_REPLICAS, config.check.time_ps or MAX_CHECK_PS):
            size = (test.replicas, test.time_ps)
            logger.info("the comparison has %d replicas of %.2g ps, so that a round fits its time; see --check-max-time", *size)
        for plan in self._judged:
            plan.yardstick.warn_if_blind(test.time_ps)
        candidates, told = training.candidates(), CheckProgress(test, config.check.rounds, self.check_seconds, monitor)
        goal = GOALS[config.goal](trials)
        outcome = Comparison(training.potential, trials, self.check_seconds, config.check.rounds, goal, told.on_check).run(candidates)
        told.end()
        gained, message = goal.verdict(outcome, {criterion.name for plan in self.plans for criterion in plan.condition.criteria})
        if training.unchanged and training.progress.updates:
            message = f"The starting model is kept: all {training.progress.updates} updates were taken back; {WHY_TAKEN_BACK}"
        models = self._summaries(outcome, trials, candidates)
        if gained:
            message += price(models)
        training.potential.load_state_dict(candidates[outcome.chosen if gained else "start"])
        shown = {"start": outcome.start, "stabie": outcome.end}
        return {
            "models": models,
            "curves": {name: curves(together(results)[0]) for name, results in shown.items()},
            "observables": observed(trials, shown),
            "frames": {"reference": self.reference.source, "held_out": self.held_out_source},
            "gained": gained,
            "message": message,
            "p_value": goal.p_value(outcome),
            "test": asdict(test) | {"at": [trial.name for trial in trials], "criterion": _judges(trials), "rounds": outcome.rounds},
        }

    @property
    def _judged(self) -> list[Plan]:
        """Where models are compared."""
        return [plan for plan in self.plans if plan.options.judge]

    def _trials(self) -> list[Trial]:
        """Comparisons that differ in nothing but what the state point makes different."""
        config, (replicas, time) = self.config, self.check_round
        test = StabilityTest(
            temperature_K=self.plans[0].condition.point.temperature_K,
            replicas=replicas,
            time_ps=time,
            timestep_fs=config.dynamics.timestep_fs,
            friction_per_fs=config.dynamics.friction_per_fs or 0.01,
            check_every_fs=min(config.dynamics.check_every_fs, 1000.0 * time),
            seed=config.seed + 1,
        )
        return [plan.trial(test) for plan in self._judged]

    def _summaries(self, outcome: Outcome, trials: Sequence[Trial], candidates: dict) -> dict[str, dict]:
        """Stability, observable and errors of the start and of the candidate that was compared with it."""
        potential = self.training.potential
        labelled = LabelledFrames.from_reference(self.reference, potential.device)
        models, pairs = {}, {"start": ("start", outcome.start, outcome.end), "stabie": (outcome.chosen, outcome.end, outcome.start)}
        for name, (weights, results, others) in pairs.items():
            potential.load_state_dict(candidates[weights])
            held_out, reference = (qm_errors(potential, frames) for frames in (self.training.accuracy.frames, labelled))
            models[name] = summaries_together(trials, results, others, held_out, reference)
        return models


def model_path(directory: RunDirectory, inputs: Inputs) -> Path:
    """The fine-tuned checkpoint: `model` in the run directory with the suffix of the input."""
    return directory.path / ("model" + Path(inputs.model).suffix)


def _each(lines: Iterable[str]) -> list[str]:
    """Without those that have been said."""
    return list(dict.fromkeys(lines))


def _judges(trials: Sequence[Trial]) -> list[str]:
    return _each(line for trial in trials for line in trial.yardstick.describe())


def _tell(plan: Plan, n_plans: int, potential: Potential, monitor: Monitor) -> None:
    """What is matched at a state point."""
    at = f" at {plan.name}" if n_plans > 1 else ""
    targets = plan.yardstick.targets
    monitor.message(f"System{at}: {plan.kind.describe()}")
    monitor.message(f"Observables{at}: {', '.join(target.observable.describe() for target in targets)}")
    tell_targets(targets, monitor)
    monitor.message(f"Estimator{at}: {plan.condition.grouping.describe()}")
    _warn_of_tight_criteria(potential, plan.condition.starts, plan.condition.criteria)


def _warn_of_tight_criteria(potential: Potential, frames: Sequence[Atoms], criteria: Sequence[Criterion]) -> None:
    """Sound dynamics visit what the reference does: criteria that call that unstable teach and tell nothing."""
    causes, n = failing_frames(potential, frames, criteria)
    if causes.total() > MAX_UNSTABLE_REFERENCE_FRACTION * n:
        logger.warning(
            "%d of %d reference frames are unstable by the criteria of training (%s): their tolerances may be too tight for this "
            "temperature; see --criterion",
            causes.total(),
            n,
            ", ".join(f"{name} {count}" for name, count in causes.most_common()),
        )


def _in_a_line(record: dict) -> str:
    """What a window has come to, for the log."""
    skip = ("phase", "cycle", "window")
    values = (f"{name} {value:.4g}" for name, value in record.items() if name not in skip and isinstance(value, (int, float)))
    return f"cycle {record['cycle'] + 1} {record['phase']} {record['window']}: {', '.join(values)}"
