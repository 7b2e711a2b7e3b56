"""Directories of long work: written so that a crash at any moment leaves the last good state, opened and cut back."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from ase import Atoms
from ase.io.trajectory import Trajectory as TrajectoryFile

from stabie_ase.system.files import as_json, replaced, uninterrupted, write_atomically

logger = logging.getLogger(__name__)

FORMAT = 9
"""Version of the directories' layout."""

UNFINISHED = ".config.json.*tmp"
"""All that is left by work that was killed before it began, as a pattern."""


class UnusableRun(ValueError):
    """A directory that cannot be written to, or from which work cannot be gone on with."""


class Log(Protocol):
    """A file that is appended to; `length` is what belongs to the state at hand, in any unit."""

    path: Path
    length: int

    def cut(self, length: int) -> None: ...


class TextLog:
    """Lines of text; its length is their number."""

    def __init__(self, path: Path):
        self.path, self.length = path, 0

    def append(self, *lines: str) -> None:
        with open(self.path, "a") as file:
            file.writelines(line + "\n" for line in lines)
        self.length += len(lines)

    def cut(self, length: int) -> None:
        """Drop what comes after the first `length` lines."""
        if self.path.exists():
            with open(self.path, "r+b") as file:
                for _ in range(length):
                    file.readline()
                file.truncate(file.tell())
        self.length = length


class FrameLog:
    """Frames in ASE's trajectory format; its length is their number."""

    def __init__(self, path: Path):
        self.path, self.length = path, 0

    def append(self, frames: Sequence[Atoms]) -> None:
        if not frames:
            return
        with TrajectoryFile(self.path, "a") as trajectory:
            for atoms in frames:
                trajectory.write(atoms)
        self.length += len(frames)

    def cut(self, length: int) -> None:
        """Drop what comes after the first `length` frames."""
        if length == 0 or not self.path.exists():
            self.path.unlink(missing_ok=True)
            self.length = 0
            return
        try:
            with TrajectoryFile(self.path) as old:
                if len(old) != length:
                    with replaced(self.path) as temporary, TrajectoryFile(temporary, "w") as new:
                        for k in range(length):
                            new.write(old[k])
        except OSError:
            raise
        except Exception as error:  # what a damaged file ends in depends on where the damage is
            raise UnusableRun(
                f"{self.path} is damaged ({in_words(error)}); move it away and resume again to go on without it"
            ) from error
        self.length = length


class WorkDirectory:
    """`config.json`, what the work was asked for; `state.pt`, to go on from; and logs.

    Logs are appended to; `state.pt` tells how much of them belongs to it, and the rest is cut off when the work is
    taken up again.
    """

    command: ClassVar[str]
    """Of `stabie-ase`, by which work in such a directory is begun and, with `--resume`, gone on with."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config_path, self.state_path = self.path / "config.json", self.path / "state.pt"
        self.logs: dict[str, Log] = {}

    @property
    def resume_command(self) -> str:
        """What to type to go on."""
        return f"stabie-ase {self.command} --resume {shlex.quote(str(self.path))}"

    @classmethod
    def check_free(cls, path: str | os.PathLike, own: Collection[str] = ()) -> None:
        """Raise UnusableRun if new work cannot begin there; leaves nothing behind. Its `own` may be in the directory already."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(not p.match(UNFINISHED) and p.name not in own for p in path.iterdir())):
            resumable = path.is_dir() and (path / "config.json").exists()
            raise UnusableRun(
                f"{path} exists and is not an empty directory; choose another --output"
                + (f", or go on with the run in it: {cls(path).resume_command}" if resumable else "")
            )
        parent = next(p for p in [path, *path.absolute().parents] if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UnusableRun(f"cannot make {path}: {parent} is not a folder that can be written to; choose another --output")

    @classmethod
    def create(cls, path: str | os.PathLike, config: dict) -> WorkDirectory:
        """Begin in an empty or new directory."""
        run = cls(path)
        with run.writing():
            run.path.mkdir(parents=True, exist_ok=True)
            for left_over in run.path.glob(UNFINISHED):
                left_over.unlink()
        try:
            run.write_json("config.json", {"format": FORMAT, "command": cls.command} | config)
        except UnusableRun:
            with suppress(OSError):  # what else is in it goes with whoever put it there
                run.path.rmdir()
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike) -> tuple[WorkDirectory, dict]:
        """An existing directory and its config.json."""
        run = cls(path)
        if not run.config_path.is_file():
            what = "it has no config.json" if run.path.is_dir() else "it is a file" if run.path.exists() else "no such directory"
            raise UnusableRun(f"{run.path} is no run directory: {what}")
        try:
            config = json.loads(run.config_path.read_text())
            found, command = config["format"], config.get("command", cls.command)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnusableRun(f"{run.config_path} is damaged ({in_words(error)})") from error
        if found != FORMAT:
            raise UnusableRun(
                f"{run.path} was written in format {found}, this version of stabie_ase resumes format {FORMAT}"
            )
        if command != cls.command:
            raise UnusableRun(f"{run.path} belongs to stabie-ase {command}, not to stabie-ase {cls.command}")
        return run, config

    def claim(self) -> None:
        """Keep other processes from working here until this one ends, however it ends.

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
    def writing(self) -> Iterator[None]:
        """What the file system refuses is told with the way to go on; torch's zip writer hides it behind its own error.

        A ctrl-C or a SIGTERM waits until all is written.
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
        """Write a JSON file whole or not at all (`as_json`)."""
        with self.writing(), replaced(self.path / name) as temporary, open(temporary, "w") as file:
            file.write(as_json(data, indent=1))

    def save(self, state: dict) -> None:
        """State to resume from, and how much of the logs belongs to it."""
        with self.writing():
            write_atomically(
                {"state": state, "lengths": {name: log.length for name, log in self.logs.items()}}, self.state_path
            )

    def load(self) -> dict | None:
        """The last state, or None if there is none yet; `cut_to` is the next thing to do once it is known to fit."""
        if not self.state_path.exists():
            return None
        try:
            saved = torch.load(self.state_path, map_location="cpu", weights_only=True)
            return {"state": saved["state"], "lengths": {name: int(saved["lengths"][name]) for name in self.logs}}
        except Exception as error:  # what a damaged file ends in depends on where the damage is
            raise self.damaged_state(error) from error

    def damaged_state(self, error: Exception) -> UnusableRun:
        """What to raise when state.pt cannot be used."""
        return UnusableRun(
            f"{self.state_path} is damaged ({in_words(error)}); remove it to let the run begin again from its start"
        )

    def cut_to(self, saved: dict | None) -> None:
        """Cut off what was written after a state that `load` returned."""
        with self.writing():
            for left_over in self.path.glob(".*.tmp"):  # of a process that was killed
                left_over.unlink(missing_ok=True)
            for name, log in self.logs.items():
                log.cut(saved["lengths"][name] if saved else 0)


def in_words(error: Exception) -> str:
    """An error's kind and text, in one line."""
    text = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {text[:200]}"
