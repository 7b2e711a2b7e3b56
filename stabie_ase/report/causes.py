"""What broke, and how often, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ase import Atoms

from stabie_ase.report.table import number
from stabie_ase.stability import StabilityStatistics

PAIRS = {"bonds": "{}-{} bond", "contacts": "{}...{} contact"}
"""Criteria that blame two atoms, and what to call what became of them."""


def broken(frames: Sequence[Atoms]) -> Counter[str]:
    """Failures by what broke: "C-H bond", "C...H contact", or a criterion's name where it does not blame two atoms.

    Parameters
    ----------
    frames : sequence of Atoms
        Unstable frames: the atoms to blame have tag 1, and info tells the `criterion`.
    """
    return Counter(_what_broke(atoms) for atoms in frames)


def broken_in_words(frames: Sequence[Atoms]) -> str:
    """As `broken`, the most frequent first."""
    return ", ".join(f"{what} {n}" for what, n in broken(frames).most_common())


def _what_broke(atoms: Atoms) -> str:
    criterion = atoms.info.get("criterion", "unknown")
    elements = sorted((atoms.symbols[k] for k in (atoms.get_tags() == 1).nonzero()[0]), key=lambda s: (s == "H", s))
    return PAIRS[criterion].format(*elements) if criterion in PAIRS and len(elements) == 2 else criterion


def failures_in_words(statistics: StabilityStatistics, time_ps: float, frames: Sequence[Atoms]) -> str:
    """Three lines at most: how many replicas failed, how soon, and what broke.

    Parameters
    ----------
    statistics : StabilityStatistics
    time_ps : float
        How long a replica has run that has not failed.
    frames : sequence of Atoms
        As for `broken`.
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
        lines.append(f"What broke: {broken_in_words(frames)}")
    return "\n".join(lines)
