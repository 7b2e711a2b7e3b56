"""How many replicas failed, how soon, and what broke, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from ase import Atoms

from stabie_ase.runs.report.table import number
from stabie_ase.runs.report.view import read_frames
from stabie_ase.stability import StabilityStatistics
from stabie_ase.stability.causes import broken


def broken_in_words(counts: Mapping[str, int]) -> str:
    """What broke how often, the most frequent first; "nothing" if nothing did."""
    return ", ".join(f"{what} {n}" for what, n in Counter(counts).most_common()) or "nothing"


def broken_in(trajectory: Path) -> Counter[str]:
    """What broke in the frames of a trajectory file, which is read once as long as it stays as it is."""
    now = trajectory.stat()
    return _broken_in(trajectory.absolute(), now.st_mtime_ns, now.st_size)


@lru_cache(maxsize=1)
def _broken_in(trajectory: Path, mtime_ns: int, size: int) -> Counter[str]:
    return broken(read_frames(trajectory))


def failures_in_words(statistics: StabilityStatistics, time_ps: float, frames: Sequence[Atoms]) -> str:
    """Three lines at most: how many replicas failed, how soon, and what broke.

    Parameters
    ----------
    statistics : StabilityStatistics
    time_ps : float
        How long a replica has run that has not failed.
    frames : sequence of Atoms
        As for `broken`.

    Returns
    -------
    str
    """
    lines = [f"{statistics.n_failed} of {len(statistics.failed)} replicas failed"]
    if statistics.stable_replica_ps > 0:
        low, high = (number(x, digits=2) for x in statistics.hazard_interval())
        lines[0] += f": {number(statistics.hazard_per_ps)} failures per replica-ps (95 % interval {low} to {high})"
        beyond = f"> {time_ps:g}"
        median, low, high = (beyond if x is None else number(x, digits=2) for x in statistics.median_ps())
        band = "" if low == high else f" (95 % band {low} to {high})"
        lines.append(f"Median stable time: {median} ps{band}")
    if frames:
        lines.append(f"What broke: {broken_in_words(broken(frames))}")
    return "\n".join(lines)
