"""A fine-tuning run on disk: its directory, exact resume, and the final comparison with the starting model."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from stabie_ase.dynamics import MDState
from stabie_ase.dynamics.compilation import compile_where_wanted
from stabie_ase.observables import Observable, default_observable, observables_from
from stabie_ase.potentials.base import Potential
from stabie_ase.runs.checks import check_inputs
from stabie_ase.runs.comparison import Comparison, Outcome, verdict
from stabie_ase.runs.directory import UnusableRun, in_words
from stabie_ase.runs.evaluation import StabilityTest, Yardstick, failing_frames, summarize
from stabie_ase.runs.finetune_directory import RunDirectory
from stabie_ase.runs.inputs import (
    Inputs,
    check_unchanged,
    code_files,
    digests,
    versions,
    warn_of_other_versions,
    with_absolute_files,
)
from stabie_ase.runs.result import curves, observed, price
from stabie_ase.stability import TRAINING, Criterion, Failures, criteria_from, default_criteria
from stabie_ase.stability.sequential import replica_ps_to_tell
from stabie_ase.structures.reference import Reference
from stabie_ase.structures.setting import Setting
from stabie_ase.system.options import BadOption, from_dict, with_temperature
from stabie_ase.training.labels import LabelledFrames, qm_errors
from stabie_ase.training.loop import SIMULATION, WHY_TAKEN_BACK, TrainingLoop
from stabie_ase.training.options import FinetuneConfig
from stabie_ase.training.updates import rule_class

logger = logging.getLogger(__name__)

LONGEST_CHECK = 4.0
"""Time of each replica in a round of a final comparison that nobody has asked to be longer, in ps."""

TIGHT = 0.05
"""Fraction of the reference frames that criteria may call unstable before that is said."""


OnCheck = Callable[[str, int, int, MDState, Failures], None]
"""Told model, round, steps done, replicas and failures while a model is tested."""


@dataclass
class Finetuning:
    """A run set up and ready to go: `run()` takes it to its end from wherever it is."""

    directory: RunDirectory
    inputs: Inputs
    config: FinetuneConfig
    reference: Reference
    yardstick: Yardstick
    training: TrainingLoop
    held_out_source: str

    @property
    def criteria(self) -> Sequence[Criterion]:
        """Those of training."""
        return self.training.pools[0].condition.criteria

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
    def check_ps(self) -> float:
        """Time in ps of each replica in a round of the final comparison: as given, or so that a round fits the budget."""
        config = self.config
        if config.check.time_ps is not None:
            return config.check.time_ps
        if not self.training.md_steps:
            return LONGEST_CHECK
        runs = config.check.replicas * max(2, 2 * len(self.training.candidates()) - 2)  # with the heat among several
        time = max(self.check_seconds * self._replica_ps_per_second / runs, config.dynamics.check_every_fs / 1000.0)
        return min(LONGEST_CHECK, float(f"{time:.2g}"))

    @property
    def _replica_ps_per_second(self) -> float:
        """How fast the dynamics of the loop have been."""
        training = self.training
        return training.md_steps * self.config.dynamics.timestep_fs / 1000.0 / training.md_seconds

    def train(self, on_window: Callable[[dict], None] | None = None) -> None:
        """The loop, saved after every window."""
        training, directory = self.training, self.directory
        while not training.finished:
            record, unstable = training.step()
            record["seconds"] = training.progress.seconds
            directory.append(record, unstable)
            directory.save(training.state())
            if record["phase"] == SIMULATION != training.progress.phase and record["cycle"] == 0:
                self._warn_if_too_short(record["hazard_per_ps"])
            if on_window:
                on_window(record)

    def _warn_if_too_short(self, hazard_per_ps: float) -> None:
        """The first phase has measured the starting model: whether the final comparison has time for enough failures."""
        config, rate = self.config, self._replica_ps_per_second
        seen = min(0.5 * self.check_seconds * rate, config.check.rounds * config.check.replicas * self.check_ps)
        needed = replica_ps_to_tell(hazard_per_ps)
        if needed > seen:
            logger.warning(
                "the starting model fails about %.2g times a replica-ps by the criteria of training: to tell a model four times as "
                "stable takes about %.2g replica-ps of each, %.2g min, and the final comparison has time for %.2g; a gain may be "
                "missed; see --check-max-time and --check-rounds", hazard_per_ps, needed, 2.0 * needed / rate / 60.0, seen,
            )  # fmt: skip

    def finish(self, on_check: OnCheck | None = None) -> dict:
        """Final comparison, model and result; returns what result.json holds.

        `on_check` is called while a model is tested.
        """
        result = self._compare(on_check)
        self.directory.save_model(self.training.potential, self.model_path.name)
        self.directory.write_json(self.directory.result_path.name, result)
        return result

    def compiled_where_wanted(self, say: Callable[[str], None] | None) -> Finetuning:
        """The network compiled as asked for; always after the setup and before anything else.

        What a trial said takes the place of "auto" in the inputs: a resumed run must not measure it again.
        """
        compiled = compile_where_wanted(
            self.inputs.compilation,
            self.training.potential,
            self.reference.frames,
            self.config.dynamics.replicas,
            seconds=60.0 * self.config.max_time_min,
            say=say,
        )
        return replace(self, inputs=replace(self.inputs, compilation=compiled))

    def run(self) -> dict:
        """All of it."""
        self.train()
        return self.finish()

    def _compare(self, on_check: OnCheck | None) -> dict:
        """Hold the candidates against the starting model from equal fresh starts; the winner stays in the potential."""
        config, training = self.config, self.training
        test = StabilityTest(
            temperature_K=config.dynamics.temperature_K,
            replicas=config.check.replicas,
            time_ps=self.check_ps,
            timestep_fs=config.dynamics.timestep_fs,
            friction_per_fs=config.dynamics.friction_per_fs or 0.01,
            check_every_fs=min(config.dynamics.check_every_fs, 1000.0 * self.check_ps),
            seed=config.seed + 1,
        )
        candidates = training.candidates()
        comparison = Comparison(
            training.potential, self.reference, self.yardstick, test, self.check_seconds, config.check.rounds, on_check
        )
        outcome = comparison.run(candidates)
        gained, message = verdict(outcome, self.yardstick, [criterion.name for criterion in self.criteria])
        if training.unchanged and training.progress.updates:
            message = f"The starting model is kept: all {training.progress.updates} updates were taken back; {WHY_TAKEN_BACK}"
        models = self._summaries(outcome, candidates)
        if gained:
            message += price(models)
        training.potential.load_state_dict(candidates[outcome.chosen if gained else "start"])
        shown = {"start": outcome.start, "stabie": outcome.end}
        yardstick = self.yardstick
        return {
            "models": models,
            "curves": {name: curves(result) for name, result in shown.items()},
            "observables": {target.observable.name: observed(target, shown) for target in yardstick.targets},
            "frames": {"reference": self.reference.source, "held_out": self.held_out_source},
            "gained": gained,
            "message": message,
            "p_value": outcome.evidence.p_value,
            "test": asdict(test) | {"criterion": yardstick.describe(), "rounds": outcome.rounds},
        }

    def _summaries(self, outcome: Outcome, candidates: dict) -> dict[str, dict]:
        """Stability, observable and errors of the start and of the candidate that was compared with it."""
        potential = self.training.potential
        labelled = LabelledFrames.from_reference(self.reference, potential.device)
        models, pairs = {}, {"start": ("start", outcome.start, outcome.end), "stabie": (outcome.chosen, outcome.end, outcome.start)}
        for name, (weights, result, other) in pairs.items():
            potential.load_state_dict(candidates[weights])
            held_out, reference = (qm_errors(potential, frames) for frames in (self.training.accuracy.frames, labelled))
            models[name] = summarize(result, self.yardstick, held_out, reference, other)
        return models


@dataclass(frozen=True)
class Live:
    """What was given as objects and is in no file: a run with any of it is resumed from Python only."""

    observables: list[Observable] = field(default_factory=list)
    criteria: list[Criterion] = field(default_factory=list)

    def names(self) -> list[str]:
        """Of all objects."""
        return [x.name for x in self.observables] + [x.name for x in self.criteria]


def prepare(
    output: str | os.PathLike, inputs: Inputs, config: FinetuneConfig, say: Callable[[str], None] | None = None
) -> Finetuning:
    """Check everything that can be checked, then begin a run; on an error nothing has been written.

    `say` is told in words what was found on the way.
    """
    RunDirectory.check_free(output)
    return begin(output, inputs, config, say)


def begin(
    output: str | os.PathLike, inputs: Inputs, config: FinetuneConfig, say: Callable[[str], None] | None, live: Live | None = None
) -> Finetuning:
    """Begin a run in a directory that is known to be free, but for a folder of its inputs."""
    live = live or Live()
    setup = _set_up(inputs, with_absolute_files(config), say, live).compiled_where_wanted(say)
    directory = RunDirectory.create(output, _describe(setup) | {"live": live.names()})
    directory.claim()
    return replace(setup, directory=directory)


def model_path(directory: RunDirectory, inputs: Inputs) -> Path:
    """The fine-tuned checkpoint: `model` in the run directory with the suffix of the input."""
    return directory.path / ("model" + Path(inputs.model).suffix)


def open_run(path: str | os.PathLike) -> tuple[RunDirectory, Inputs, FinetuneConfig, dict]:
    """A run's directory and what it was begun with, read from its config.json alone; the last is all of that file."""
    directory, description = RunDirectory.open(path)
    try:
        inputs, config = from_dict(Inputs, description["inputs"]), from_dict(FinetuneConfig, description["config"])
        description["digests"].items()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnusableRun(f"{directory.config_path} is damaged ({in_words(error)})") from error
    return directory, inputs, config, description  # type: ignore[return-value]


def resume(path: str | os.PathLike, say: Callable[[str], None] | None = None, live: Live | None = None) -> Finetuning:
    """Take up a run where its last saved state stands; what was given as objects when it began has to be given again."""
    directory, inputs, config, description = open_run(path)
    live = live or Live()
    if live.names() != description.get("live", []):
        begun = ", ".join(description.get("live", [])) or "none"
        raise UnusableRun(
            f"{path} was begun in Python with these objects: {begun}; go on there with the same, "
            "stabie_ase.finetune(..., resume_run=True)"
        )
    check_unchanged(path, inputs, config, description["digests"])
    directory.claim()
    warn_of_other_versions(description.get("versions", {}))
    finetuning = replace(_set_up(inputs, config, say, live).compiled_where_wanted(say), directory=directory)
    state = directory.load()
    if state is not None:
        try:
            finetuning.training.restore(state["state"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise directory.damaged_state(error) from error
    directory.cut_to(state)
    return finetuning


def _set_up(inputs: Inputs, config: FinetuneConfig, say: Callable[[str], None] | None, live: Live) -> Finetuning:
    if say:
        for file in code_files(config):
            say(f"Code of yours: {file}")
    rule_class(config.update.rule)
    reference, validation = inputs.read_reference(), inputs.read_validation()
    config = replace(config, dynamics=with_temperature(config.dynamics, reference.temperature_K, "the reference"))
    potential = inputs.load_potential()
    reference, validation = (part and part.isolated(potential.cutoff) for part in (reference, validation))
    if say:
        say(f"Reference: {reference.source}")
    for part in (reference, validation) if validation else (reference,):
        potential.check_numbers(z for atoms in part.frames for z in set(atoms.numbers))
    check_inputs(potential, Path(inputs.model).name, reference, validation)
    setting = Setting(reference.frames, config.dynamics.temperature_K, reference.temperature_K)
    if not live.observables:
        config = replace(config, observable=config.observable or default_observable(setting))
    if not live.criteria:
        config = replace(config, criterion=config.criterion or default_criteria(setting, TRAINING))
    observables = live.observables + (observables_from(config.observable, setting) if config.observable else [])
    criteria = live.criteria + criteria_from(config.criterion or "", setting)
    for what, found in (("observables", observables), ("criteria", criteria)):
        named = [one.name for one in found]
        if len(set(named)) < len(named):
            raise BadOption(f"two {what} have one name among {', '.join(named)}; results are told by name, give each its own")
    # What only the user knows to look for counts in the verdict as it does in training.
    yardstick = Yardstick.from_reference(config.check.criterion, setting, observables).with_criteria(criteria)
    _warn_of_tight_criteria(potential, reference, criteria)
    torch.manual_seed(config.seed)
    training = TrainingLoop.from_reference(potential, reference, observables, criteria, config, validation)
    held_out = f"{len(training.accuracy.frames)} frames of the reference that are held out" if validation is None else validation.source
    return Finetuning(None, inputs, config, reference, yardstick, training, held_out)


def _warn_of_tight_criteria(potential: Potential, reference: Reference, criteria: Sequence[Criterion]) -> None:
    """Sound dynamics visit what the reference does: criteria that call that unstable teach and tell nothing."""
    causes, n = failing_frames(potential, reference.frames, criteria)
    if causes.total() > TIGHT * n:
        logger.warning(
            "%d of %d reference frames are unstable by the criteria of training (%s): their tolerances may be too tight for this "
            "temperature; see --criterion",
            causes.total(),
            n,
            ", ".join(f"{name} {count}" for name, count in causes.most_common()),
        )


def _describe(setup: Finetuning) -> dict:
    inputs = setup.inputs
    return {
        "config": asdict(setup.config),
        "inputs": asdict(inputs.absolute()),
        "digests": digests(inputs, setup.config),
        "model": inputs.model,
        "reference": setup.reference.source,
        "criterion": [criterion.describe() for criterion in setup.criteria],
        "check_criterion": setup.yardstick.describe(),
        "start_force_mae_eV_per_A": setup.training.accuracy.start_mae,
        "versions": versions(),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {inputs.device}",
    }
