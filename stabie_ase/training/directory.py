"""The directory of a fine-tuning run: what is in it, and how it is written, opened and cut back."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from ase import Atoms
from ase.io.trajectory import Trajectory as TrajectoryFile

from stabie_ase.files import replaced, uninterrupted, write_atomically
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import save_potential

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the run directory's layout."""

UNFINISHED = ".config.json.*tmp"
"""All that a run leaves that was killed before it began, as a pattern."""


class UnusableRun(ValueError):
    """A run directory that cannot be written to or resumed."""


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
        if path.exists() and (not path.is_dir() or any(not p.match(UNFINISHED) for p in path.iterdir())):
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
            for left_over in run.path.glob(UNFINISHED):
                left_over.unlink()
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
            raise UnusableRun(f"{run.config_path} is damaged ({in_words(error)})") from error
        if found != FORMAT:
            raise UnusableRun(
                f"{run.path} was written in format {found}, this version of stabie_ase resumes format {FORMAT}"
            )
        return run, config

    def claim(self) -> None:
        """Keep other processes from working on the run until this one ends, however it ends.

        Where the system knows no locks nobody is kept out.
        """
        try:
            import fcntl

            self._claimed = open(self.config_path, "r+")
            fcntl.lockf(self._claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UnusableRun(
                f"cannot go on in {self.path}: another process is working on it, or it cannot be written to ({error.strerror})"
            ) from error
        except (ImportError, OSError):
            logger.debug("%s cannot be locked", self.config_path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the file system refuses is told with the way to go on; torch's zip writer hides it behind its own error.

        A ctrl-C waits until all is written.
        """
        try:
            with uninterrupted():
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
        with self._writing(), replaced(self.path / name) as temporary, open(temporary, "w") as file:
            json.dump(data, file, indent=1)

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
        """What to raise when state.pt cannot be used."""
        return UnusableRun(
            f"{self.state_path} is damaged ({in_words(error)}); remove it to let the run begin again from its start"
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
                with replaced(self.metrics_path) as temporary:
                    temporary.write_text("".join(lines))
        self.n_metrics, self.n_unstable = n_metrics, n_unstable

    def _cut_unstable(self, n: int) -> None:
        try:
            with TrajectoryFile(self.unstable_path) as old:
                frames = [old[k] for k in range(n)]
        except Exception as error:  # as above
            raise UnusableRun(
                f"{self.unstable_path} is damaged ({in_words(error)}); move it away and resume again to go on without it"
            ) from error
        with replaced(self.unstable_path) as temporary, TrajectoryFile(temporary, "w") as new:
            for atoms in frames:
                new.write(atoms)


def in_words(error: Exception) -> str:
    """An error's kind and text, in one line."""
    text = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {text[:200]}"
