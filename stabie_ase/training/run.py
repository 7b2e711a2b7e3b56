"""A fine-tuning run on disk: its directory, exact resume, and the final comparison with the starting model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from ase import Atoms
from ase.io.trajectory import Trajectory as TrajectoryFile
from scipy.stats import binomtest

import stabie_ase
from stabie_ase.dynamics import MDState
from stabie_ase.evaluation import StabilityResult, StabilityTest, evaluate, reference_mean
from stabie_ase.observables import OBSERVABLES, Observable
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import load_potential, save_potential, write_atomically
from stabie_ase.reference import Reference, read_reference
from stabie_ase.stability import Failures, criterion_from
from stabie_ase.training.config import BadOption, FinetuneConfig, from_dict
from stabie_ase.training.stabie import StabieTraining

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the run directory's layout."""

UNFINISHED = ".config.json.tmp"
"""All that a run leaves that was killed before it began."""


class UnusableRun(ValueError):
    """A run directory that cannot be written to or resumed."""


@dataclass(frozen=True)
class Inputs:
    """What a run was asked to work on, as config.json holds it."""

    model: str
    reference: str
    validation: str | None = None
    energy_key: str | None = None
    forces_key: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    head: str | None = None
    trust_checkpoint: bool = False

    def read_reference(self) -> Reference:
        """The reference frames."""
        return read_reference(self.reference, self.energy_key, self.forces_key, min_frames=10)

    def read_validation(self) -> Reference | None:
        """Frames to judge accuracy by, if a file was given."""
        return read_reference(self.validation, self.energy_key, self.forces_key) if self.validation else None

    def load_potential(self) -> Potential:
        """The starting model."""
        return load_potential(self.model, self.device, self.dtype, self.trust_checkpoint, self.head)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the files, so that a resumed run works on what it began with."""
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.paths().items()}

    def paths(self) -> dict[str, Path]:
        """The files by the names of the fields."""
        paths = {"model": self.model, "reference": self.reference, "validation": self.validation}
        return {name: Path(path) for name, path in paths.items() if path}

    def absolute(self) -> Inputs:
        """The same with absolute paths, so that a run can be resumed from another folder."""
        return replace(self, **{name: str(path.absolute()) for name, path in self.paths().items()})


class RunDirectory:
    """Files of a run. Everything is written so that a crash at any moment leaves the last good state.

    The log and the unstable frames are appended to; `state.pt` tells how much of them belongs to it, and the rest is
    cut off when the run is resumed.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config_path, self.state_path = self.path / "config.json", self.path / "state.pt"
        self.metrics_path, self.unstable_path = self.path / "metrics.jsonl", self.path / "unstable.traj"
        self.result_path, self.report_path = self.path / "result.json", self.path / "report.html"
        self.n_metrics = self.n_unstable = 0

    @property
    def complete(self) -> bool:
        """Whether the run has its result already."""
        return self.result_path.exists()

    @property
    def resume_command(self) -> str:
        """What to type to go on."""
        return f"stabie-ase finetune --resume {shlex.quote(str(self.path))}"

    @classmethod
    def check_free(cls, path: str | os.PathLike) -> None:
        """Raise UnusableRun if a new run cannot begin there; leaves nothing behind."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(p.name != UNFINISHED for p in path.iterdir())):
            resumable = path.is_dir() and (path / "config.json").exists()
            raise UnusableRun(
                f"{path} exists and is not an empty directory; choose another --output"
                + (f", or go on with the run in it: {cls(path).resume_command}" if resumable else "")
            )
        parent = next(p for p in [path, *path.absolute().parents] if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UnusableRun(f"cannot make {path}: {parent} is not a folder that can be written to; choose another --output")

    @classmethod
    def create(cls, path: str | os.PathLike, config: dict) -> RunDirectory:
        """Begin a run in an empty or new directory."""
        run = cls(path)
        with run._writing():
            run.path.mkdir(parents=True, exist_ok=True)
        try:
            run.write_json("config.json", config)
        except UnusableRun:
            run.path.rmdir()  # it was empty
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike) -> tuple[RunDirectory, dict]:
        """An existing run and its config.json."""
        run = cls(path)
        if not run.config_path.is_file():
            what = "it has no config.json" if run.path.is_dir() else "no such directory"
            raise UnusableRun(f"{run.path} is no run directory: {what}")
        try:
            config = json.loads(run.config_path.read_text())
            found = config["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise UnusableRun(f"{run.config_path} is damaged ({_in_words(error)})") from error
        if found != FORMAT:
            raise UnusableRun(
                f"{run.path} was written in format {found}, this version of stabie_ase resumes format {FORMAT}"
            )
        return run, config

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the file system refuses is told with the way to go on; torch's zip writer hides it behind its own error."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            reason = cause.strerror or str(cause)
            onwards = f"; nothing saved is lost, go on later with: {self.resume_command}" if self.config_path.exists() else ""
            raise UnusableRun(f"cannot write to {self.path}: {reason}{onwards}") from error

    def write_json(self, name: str, data: dict) -> None:
        """Write a JSON file whole or not at all."""
        temporary = self.path / f".{name}.tmp"
        try:
            with self._writing():
                with open(temporary, "w") as file:
                    json.dump(data, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path / name)
        finally:
            temporary.unlink(missing_ok=True)

    def append(self, record: dict, unstable: list[Atoms]) -> None:
        """One line of metrics, and the frames that failed."""
        with self._writing():
            with open(self.metrics_path, "a") as file:
                file.write(json.dumps(record) + "\n")
            if unstable:
                with TrajectoryFile(self.unstable_path, "a") as trajectory:
                    for atoms in unstable:
                        trajectory.write(atoms)
        self.n_metrics += 1
        self.n_unstable += len(unstable)

    def save(self, state: dict) -> None:
        """State to resume from."""
        with self._writing():
            write_atomically(
                {"training": state, "n_metrics": self.n_metrics, "n_unstable": self.n_unstable}, self.state_path
            )

    def save_model(self, potential: Potential, name: str) -> None:
        """The result in its native format."""
        with self._writing():
            save_potential(potential, self.path / name)

    def load(self) -> dict | None:
        """The last state, or None if there is none yet; `cut_to` is the next thing to do once it is known to fit."""
        if not self.state_path.exists():
            return None
        try:
            saved = torch.load(self.state_path, map_location="cpu", weights_only=True)
            return {"training": saved["training"]} | {name: int(saved[name]) for name in ("n_metrics", "n_unstable")}
        except Exception as error:  # what a damaged file ends in depends on where the damage is
            raise self.damaged_state(error) from error

    def damaged_state(self, error: Exception) -> UnusableRun:
        return UnusableRun(
            f"{self.state_path} is damaged ({_in_words(error)}); remove it to let the run begin again from its start"
        )

    def cut_to(self, state: dict | None) -> None:
        """Cut off what was written after a state."""
        n_metrics, n_unstable = (state["n_metrics"], state["n_unstable"]) if state else (0, 0)
        with self._writing():
            for left_over in self.path.glob(".*.tmp"):  # of a process that was killed
                left_over.unlink(missing_ok=True)
            if n_unstable == 0 or not self.unstable_path.exists():
                self.unstable_path.unlink(missing_ok=True)
                n_unstable = 0
            else:
                self._cut_unstable(n_unstable)
            if self.metrics_path.exists():
                lines = self.metrics_path.read_text().splitlines(keepends=True)[:n_metrics]
                temporary = self.path / ".metrics.tmp"
                temporary.write_text("".join(lines))
                os.replace(temporary, self.metrics_path)
        self.n_metrics, self.n_unstable = n_metrics, n_unstable

    def _cut_unstable(self, n: int) -> None:
        try:
            with TrajectoryFile(self.unstable_path) as old:
                frames = [old[k] for k in range(n)]
        except Exception as error:  # as above
            raise UnusableRun(
                f"{self.unstable_path} is damaged ({_in_words(error)}); move it away and resume again to go on without it"
            ) from error
        temporary = self.path / ".unstable.tmp"
        with TrajectoryFile(temporary, "w") as new:
            for atoms in frames:
                new.write(atoms)
        os.replace(temporary, self.unstable_path)


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {text[:200]}"


@dataclass
class Finetuning:
    """A run set up and ready to go: `run()` takes it to its end from wherever it is."""

    directory: RunDirectory
    inputs: Inputs
    config: FinetuneConfig
    reference: Reference
    observable: Observable
    training: StabieTraining

    @property
    def model_path(self) -> Path:
        """Where the result goes: named `model` with the suffix of the input."""
        return model_path(self.directory, self.inputs)

    def train(self, on_window: Callable[[dict], None] | None = None) -> None:
        """The loop, saved after every window."""
        training, directory = self.training, self.directory
        while not training.finished:
            record, unstable = training.step()
            record["seconds"] = training.progress.seconds
            directory.append(record, unstable)
            directory.save(training.state())
            if on_window:
                on_window(record)

    def finish(self, on_check: Callable[[int, int, MDState, Failures], None] | None = None) -> dict:
        """Final comparison, model and result; returns what result.json holds.

        `on_check(k, steps_done, state, failures)` is called while candidate k is tested.
        """
        result = self._compare(on_check)
        self.directory.save_model(self.training.potential, self.model_path.name)
        self.directory.write_json(self.directory.result_path.name, result)
        return result

    def run(self) -> dict:
        """All of it."""
        self.train()
        return self.finish()

    def _compare(self, on_check: Callable | None) -> dict:
        """Hold the candidates against the starting model from the same fresh starts; the winner stays in the potential."""
        config, potential = self.config, self.training.potential
        test = StabilityTest(
            temperature_K=config.temperature_K,
            replicas=config.check_replicas,
            time_ps=config.check_ps,
            timestep_fs=config.timestep_fs,
            friction_per_fs=config.friction_per_fs or 0.01,
            check_every_fs=config.check_every_fs,
            seed=config.seed + 1,
        )
        criterion = criterion_from(config.check_criterion, self.reference.frames)
        outcomes, candidates = {}, self.training.candidates()
        for k, (name, weights) in enumerate(candidates.items()):
            potential.load_state_dict(weights)
            on_block = partial(on_check, k) if on_check else None
            outcomes[name] = evaluate(potential, self.reference, criterion, self.observable, test, on_block)
        start, stabie = outcomes["start"], min(
            (name for name in outcomes if name != "start"), key=lambda n: outcomes[n][0]["hazard_per_ps"], default="start"
        )
        gained, message = verdict(start[1], outcomes[stabie][1])
        kept = stabie if gained else "start"
        potential.load_state_dict(candidates[kept])
        shown = {"start": start, "stabie": outcomes[stabie]}
        return {
            "models": {name: summary for name, (summary, _) in shown.items()},
            "curves": {name: _curves(result) for name, (_, result) in shown.items()},
            "reference": {
                "grid": self.observable.grid.tolist(),
                "observable": reference_mean(self.observable, self.reference).tolist(),
                "grid_label": self.observable.grid_label,
                "value_label": self.observable.value_label,
            },
            "gained": gained,
            "message": message,
            "test": asdict(test) | {"criterion": criterion.describe()},
        }


def verdict(start: StabilityResult, end: StabilityResult, level: float = 0.05) -> tuple[bool, str]:
    """Whether the hazard fell beyond doubt, and in words.

    With equal rates the starting model's share of all failures is binomial, its chance the share of the time it was
    observed for (Przyborowski & Wilenski, Biometrika 31, 313, 1940): exact also for a handful of failures.
    """
    a, b = start.statistics, end.statistics
    n_failed, time = a.n_failed + b.n_failed, a.stable_replica_ps + b.stable_replica_ps
    p = binomtest(a.n_failed, n_failed, a.stable_replica_ps / time, alternative="greater").pvalue if n_failed else 1.0
    rates = f"{a.hazard_per_ps:.3g} -> {b.hazard_per_ps:.3g} failures per replica-ps (p = {p:.1g})"
    if p < level:
        return True, f"The model became more stable: {rates}."
    if a.n_failed == 0:
        return False, "The starting model did not fail once in the comparison; the starting model is kept."
    return False, (
        f"No gain that can be told from chance: {rates}; the starting model is kept. A longer --max-time may help, or a "
        "longer --check-time, or a looser --force-error-bound."
    )


def _curves(result: StabilityResult) -> dict[str, list | None]:
    times, share, low, high = (x.tolist() for x in result.statistics.survival())
    mean = result.observable_mean
    return {
        "times_ps": times,
        "share": share,
        "low": low,
        "high": high,
        "observable": None if mean is None else mean.tolist(),
    }


def prepare(
    output: str | os.PathLike, inputs: Inputs, config: FinetuneConfig, on_read: Callable[[str], None] | None = None
) -> Finetuning:
    """Check everything that can be checked, then begin a run; on an error nothing has been written."""
    RunDirectory.check_free(output)
    setup = _set_up(inputs, config, on_read)
    directory = RunDirectory.create(output, _describe(inputs, setup))
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
        raise UnusableRun(f"{directory.config_path} is damaged ({_in_words(error)})") from error
    return directory, inputs, config, description


def resume(path: str | os.PathLike, on_read: Callable[[str], None] | None = None) -> Finetuning:
    """Take up a run where its last saved state stands."""
    directory, inputs, config, description = open_run(path)
    for name, file in inputs.paths().items():
        if not file.is_file():
            raise UnusableRun(f"the {name} file of {path} is gone: {file}; put it back to go on")
    for name, digest in inputs.digests().items():
        if digest != description["digests"].get(name):
            raise UnusableRun(
                f"the {name} file of {path} has changed since the run began: {getattr(inputs, name)}; begin a new run"
            )
    _warn_of_other_versions(description.get("versions", {}))
    finetuning = replace(_set_up(inputs, config, on_read), directory=directory)
    state = directory.load()
    if state is not None:
        try:
            finetuning.training.restore(state["training"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise directory.damaged_state(error) from error
    directory.cut_to(state)
    return finetuning


def _warn_of_other_versions(then: dict[str, str]) -> None:
    now = _versions()
    different = [f"{name} {then[name]} -> {now[name]}" for name in now if name in then and then[name] != now[name]]
    if different:
        logger.warning("versions have changed since the run began, so it will not end in the same bits: %s", ", ".join(different))


def _set_up(inputs: Inputs, config: FinetuneConfig, on_read: Callable[[str], None] | None) -> Finetuning:
    if config.observable not in OBSERVABLES:
        raise BadOption(f"unknown observable {config.observable!r}; known: {', '.join(OBSERVABLES)}")
    reference, validation = inputs.read_reference(), inputs.read_validation()
    if on_read:
        on_read(reference.source)
    config = with_temperature(config, reference)
    potential = inputs.load_potential()
    for part in (reference, validation) if validation else (reference,):
        potential.check_numbers(z for atoms in part.frames for z in set(atoms.numbers))
    observable = OBSERVABLES[config.observable].from_reference(reference.frames)
    criterion = criterion_from(config.criterion, reference.frames)
    criterion_from(config.check_criterion, reference.frames)
    torch.manual_seed(config.seed)
    training = StabieTraining(potential, reference, observable, criterion, config, validation)
    return Finetuning(None, inputs, config, reference, observable, training)


def with_temperature(config, reference: Reference):
    """A config whose temperature is the reference's unless one was given."""
    if config.temperature_K is not None:
        return config
    if reference.temperature_K is None:
        raise BadOption("the reference tells no single temperature (info key temperature_K); give --temperature in K")
    return replace(config, temperature_K=reference.temperature_K)


def _describe(inputs: Inputs, setup: Finetuning) -> dict:
    return {
        "format": FORMAT,
        "config": asdict(setup.config),
        "inputs": asdict(inputs.absolute()),
        "digests": inputs.digests(),
        "model": inputs.model,
        "reference": setup.reference.source,
        "criterion": setup.training.criterion.describe(),
        "versions": _versions(),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {inputs.device}",
    }


def _versions() -> dict[str, str]:
    packages = ("ase", "torch", "torch-geometric", "mace-torch", "numpy", "scipy")
    found = {name: _version(name) for name in packages}
    ours = {"stabie_ase": stabie_ase.__version__, "python": platform.python_version()}
    return {name: number for name, number in found.items() if number} | ours


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
