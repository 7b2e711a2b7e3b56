"""A fine-tuning run on disk: its directory, exact resume, and the final comparison with the starting model."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from ase import Atoms
from ase.io.trajectory import Trajectory as TrajectoryFile
from scipy.stats import poisson_means_test

from stabie_ase.evaluation import StabilityResult, StabilityTest, evaluate, reference_mean
from stabie_ase.observables import OBSERVABLES, Observable
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import load_potential, save_potential, write_atomically
from stabie_ase.reference import Reference, read_reference
from stabie_ase.stability import BondLengthDeviation, criterion_from
from stabie_ase.training.config import BadOption, FinetuneConfig, from_dict
from stabie_ase.training.stabie import StabieTraining

FORMAT = 1
"""Version of the run directory's layout."""


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
        paths = {"model": self.model, "reference": self.reference, "validation": self.validation}
        return {name: hashlib.sha256(Path(p).read_bytes()).hexdigest() for name, p in paths.items() if p}


class RunDirectory:
    """Files of a run. Everything is written so that a crash at any moment leaves the last good state.

    The log and the unstable frames are appended to; `state.pt` tells how much of them belongs to it, and the rest is
    cut off when the run is resumed.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.state_path, self.config_path = self.path / "state.pt", self.path / "config.json"
        self.metrics_path, self.unstable_path = self.path / "metrics.jsonl", self.path / "unstable.traj"
        self.n_metrics = self.n_unstable = 0

    @classmethod
    def check_free(cls, path: str | os.PathLike) -> None:
        """Raise UnusableRun if a new run cannot begin there; leaves nothing behind."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UnusableRun(
                f"{path} exists and is not an empty directory; choose another --output, "
                f"or continue it with: stabie-ase finetune --resume {path}"
            )
        parent = next(p for p in [path, *path.absolute().parents] if p.exists())
        if not os.access(parent, os.W_OK):
            raise UnusableRun(f"{parent} is not writable; choose another --output")

    @classmethod
    def create(cls, path: str | os.PathLike, config: dict) -> RunDirectory:
        """Begin a run in an empty or new directory."""
        run = cls(path)
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_json("config.json", config)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike) -> tuple[RunDirectory, dict]:
        """An existing run and its config.json."""
        run = cls(path)
        if not run.config_path.is_file():
            raise UnusableRun(f"{run.path} is no run directory: it has no config.json")
        try:
            config = json.loads(run.config_path.read_text())
            found = config.get("format")
        except (json.JSONDecodeError, AttributeError) as error:
            raise UnusableRun(f"{run.config_path} is damaged ({error})") from error
        if found != FORMAT:
            raise UnusableRun(
                f"{run.path} was written in format {found}, this version of stabie_ase resumes format {FORMAT}"
            )
        return run, config

    def write_json(self, name: str, data: dict) -> None:
        """Write a JSON file whole or not at all."""
        temporary = self.path / f".{name}.tmp"
        with open(temporary, "w") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)

    def append(self, record: dict, unstable: list[Atoms]) -> None:
        """One line of metrics, and the frames that failed."""
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
        write_atomically(
            {"training": state, "n_metrics": self.n_metrics, "n_unstable": self.n_unstable}, self.state_path
        )

    def load(self) -> dict | None:
        """The last state, with everything written after it cut off; None if there is none yet."""
        if not self.state_path.exists():
            self._cut(0, 0)
            return None
        saved = torch.load(self.state_path, weights_only=True)
        self._cut(saved["n_metrics"], saved["n_unstable"])
        return saved["training"]

    def _cut(self, n_metrics: int, n_unstable: int) -> None:
        self.n_metrics, self.n_unstable = n_metrics, n_unstable
        if self.metrics_path.exists():
            lines = self.metrics_path.read_text().splitlines(keepends=True)[:n_metrics]
            temporary = self.path / ".metrics.tmp"
            temporary.write_text("".join(lines))
            os.replace(temporary, self.metrics_path)
        if not self.unstable_path.exists():
            return
        if n_unstable == 0:
            self.unstable_path.unlink()
            return
        temporary = self.path / ".unstable.tmp"
        with TrajectoryFile(self.unstable_path) as old, TrajectoryFile(temporary, "w") as new:
            for k in range(n_unstable):
                new.write(old[k])
        os.replace(temporary, self.unstable_path)


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
        return self.directory.path / ("model" + Path(self.inputs.model).suffix)

    @property
    def complete(self) -> bool:
        """Whether the run has its result already."""
        return (self.directory.path / "result.json").exists()

    def run(self, on_window: Callable[[dict], None] | None = None, on_check: Callable | None = None) -> dict:
        """Loop, final comparison, report; returns what result.json holds."""
        training, directory = self.training, self.directory
        while not training.finished:
            record, unstable = training.step()
            record["seconds"] = training.progress.seconds
            directory.append(record, unstable)
            directory.save(training.state())
            if on_window:
                on_window(record)
        result = self._compare(on_check)
        save_potential(training.potential, self.model_path)
        directory.write_json("result.json", result)
        return result

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
        for name, weights in candidates.items():
            potential.load_state_dict(weights)
            outcomes[name] = evaluate(potential, self.reference, criterion, self.observable, test, on_check)
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
    """Whether the hazard fell beyond doubt (E-test of two Poisson rates, Krishnamoorthy & Thomson 2004), and in words."""
    a, b = start.statistics, end.statistics
    p = poisson_means_test(a.n_failed, a.stable_replica_ps, b.n_failed, b.stable_replica_ps, alternative="greater").pvalue
    rates = f"{a.hazard_per_ps:.3g} -> {b.hazard_per_ps:.3g} failures per replica-ps (p = {p:.1g})"
    if p < level:
        return True, f"The model became more stable: {rates}."
    if a.n_failed == 0:
        return False, "The starting model did not fail once in the comparison; the starting model is kept."
    return False, (
        f"No gain that can be told from chance: {rates}; the starting model is kept. A longer --max-time may help, or a "
        "longer comparison (check_ps), or a looser force_error_bound."
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


def resume(path: str | os.PathLike, on_read: Callable[[str], None] | None = None) -> Finetuning:
    """Take up a run where its last saved state stands."""
    directory, description = RunDirectory.open(path)
    inputs, config = from_dict(Inputs, description["inputs"]), from_dict(FinetuneConfig, description["config"])
    for name, digest in inputs.digests().items():
        if digest != description["digests"].get(name):
            raise UnusableRun(f"the {name} file of {path} has changed since the run began: {getattr(inputs, name)}")
    finetuning = replace(_set_up(inputs, config, on_read), directory=directory)
    state = directory.load()
    if state is not None:
        finetuning.training.restore(state)
    return finetuning


def _set_up(inputs: Inputs, config: FinetuneConfig, on_read: Callable[[str], None] | None) -> Finetuning:
    if config.observable not in OBSERVABLES:
        raise BadOption(f"unknown observable {config.observable!r}; known: {', '.join(OBSERVABLES)}")
    reference, validation = inputs.read_reference(), inputs.read_validation()
    if on_read:
        on_read(reference.source)
    config = with_temperature(config, reference)
    potential = inputs.load_potential()
    potential.check_numbers(z for atoms in reference.frames for z in set(atoms.numbers))
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
        raise BadOption("the reference tells no temperature (info key temperature_K); give --temperature in K")
    return replace(config, temperature_K=reference.temperature_K)


def _describe(inputs: Inputs, setup: Finetuning) -> dict:
    packages = ("ase", "torch", "numpy", "scipy", "stabie_ase")
    return {
        "format": FORMAT,
        "config": asdict(setup.config),
        "inputs": asdict(_absolute(inputs)),
        "digests": inputs.digests(),
        "model": inputs.model,
        "reference": setup.reference.source,
        "criterion": setup.training.criterion.describe(),
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {inputs.device}",
    }


def _absolute(inputs: Inputs) -> Inputs:
    paths = {name: str(Path(p).absolute()) for name in ("model", "reference", "validation") if (p := getattr(inputs, name))}
    return replace(inputs, **paths)


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:  # not installed as a distribution, for example run from a checkout
        return "unknown"
