"""Unstable frames in ASE's GUI."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ase import Atoms
from ase.io.trajectory import Trajectory

TRAJECTORY = "unstable.traj"

T = TypeVar("T")


def view(path: str | os.PathLike) -> subprocess.Popen:
    """Start ASE's GUI on the unstable frames of a run in a process of its own, which may be waited for; ValueError as of `view_command`."""
    return subprocess.Popen(view_command(path))


def view_command(path: str | os.PathLike) -> list[str]:
    """The command that opens frames in ASE's GUI.

    Parameters
    ----------
    path : path
        A run directory, whose unstable frames are opened, or any .traj file.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        There are no frames, or no window can be opened here; one line that says what to do.
    """
    trajectory = find_trajectory(path)
    if not count_frames(trajectory):
        raise ValueError(f"{trajectory} holds no frames: no replica has become unstable")
    _check_window(trajectory)
    return [sys.executable, "-m", "ase", "gui", gui_argument(trajectory)]


def find_trajectory(path: str | os.PathLike) -> Path:
    """The file of unstable frames that a run directory or the path of a trajectory means."""
    path = Path(path)
    if path.is_dir():
        if not (path / TRAJECTORY).is_file():
            raise ValueError(f"{path} has no {TRAJECTORY}: it is no run directory, or no replica has become unstable")
        return path / TRAJECTORY
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix != ".traj":
        raise ValueError(f"{path} is neither a run directory nor a .traj file")
    return path


def count_frames(trajectory: Path) -> int:
    """Frames in a trajectory file."""
    return _of_frames(trajectory, len)


def read_frames(trajectory: Path) -> list[Atoms]:
    """Frames of a trajectory file, which may be empty."""
    return _of_frames(trajectory, list)


def _of_frames(trajectory: Path, what: Callable[[Sequence[Atoms]], T]) -> T:
    if not trajectory.stat().st_size:
        return what([])
    try:
        with Trajectory(trajectory) as frames:
            return what(frames)
    except Exception as error:  # a damaged file ends in whatever the bytes lead to
        raise ValueError(f"{trajectory} cannot be read as an ASE trajectory ({error})") from error


def gui_argument(trajectory: Path) -> str:
    """The absolute path, so that it cannot be taken for an option; what follows the last @ chooses frames."""
    name = str(trajectory.absolute())
    return name + "@:" if "@" in name else name


def _check_window(trajectory: Path) -> None:
    elsewhere = f"copy {trajectory} to a machine with a screen and run there: ase gui {trajectory.name}"
    try:
        import tkinter  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"ASE's GUI needs tkinter, which this Python lacks ({error}); install it (python3-tk on Debian), "
            f"or {elsewhere}"
        ) from error
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        raise ValueError(f"no display to open a window on ($DISPLAY is not set); log in with ssh -X, or {elsewhere}")
