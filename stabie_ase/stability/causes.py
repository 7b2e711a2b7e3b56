"""What broke, and how often, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ase import Atoms

PAIRS = {"bonds": "{}-{} bond", "contacts": "{}...{} contact", "lost-hydrogen": "{}-{} bond"}
"""Criteria that blame two atoms, and what to call what became of them."""


def broken(frames: Sequence[Atoms]) -> Counter[str]:
    """Failures by what broke.

    Parameters
    ----------
    frames : sequence of Atoms
        Unstable frames: the atoms to blame have tag 1, and info tells the `criterion`.

    Returns
    -------
    Counter of str
        Of "C-H bond", "C...H contact", or a criterion's name where it does not blame two atoms.
    """
    return Counter(_what_broke(atoms) for atoms in frames)


def _what_broke(atoms: Atoms) -> str:
    criterion = atoms.info.get("criterion", "unknown")
    elements = sorted((atoms.symbols[k] for k in (atoms.get_tags() == 1).nonzero()[0]), key=lambda s: (s == "H", s))
    return PAIRS[criterion].format(*elements) if criterion in PAIRS and len(elements) == 2 else criterion
