"""Families of potentials: how their files are recognised, read and written, and how new ones are built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabie_ase.system.plugins import named, others

if TYPE_CHECKING:
    from stabie_ase.potentials.base import Potential
    from stabie_ase.structures.reference import Reference

logger = logging.getLogger(__name__)

GROUP = "stabie_ase.potentials"

OWN = {"schnet": "stabie_ase.potentials.schnet:FAMILY", "mace": "stabie_ase.potentials.mace:FAMILY"}
"""The package's families; those of other packages are entry points of `GROUP` that name a `Family`."""


@dataclass(frozen=True)
class Family:
    """What there is to know of one family. Neither making nor asking it imports the package that it wraps.

    Attributes
    ----------
    name : str
        As the `family` of its potentials says it.
    files : str
        One line that says which files it reads.
    pickled_names : frozenset of str
        Names in its pickled modules that are recorded, never called (see `unpickle`); exact, without patterns.
    recognise : callable
        Whether something is of the family: what a file holds, or a live torch module.
    load : callable
        The potential of such a thing; a live module is shared.
    save : callable
        Writes a potential to a path in the family's own format, whole or not at all.
    suffix : str
        Of such files.
    build : callable or None
        A small potential with random weights for a reference, to be trained from nothing.
    pretraining : mapping
        Options of `PretrainOptions` that suit it better than the defaults.
    """

    name: str
    files: str
    pickled_names: frozenset[str]
    recognise: Callable[[Any], bool]
    load: Callable[[Any], Potential]
    save: Callable[[Potential, str | Path], None]
    suffix: str = ".pt"
    build: Callable[[Reference], Potential] | None = None
    pretraining: Mapping[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """Of all families, without importing any."""
    return list({**OWN, **others(GROUP)})


@cache
def families() -> dict[str, Family]:
    """All families by name; one of another package that cannot be used is warned of, and the others go on."""
    found = {}
    for name, where in {**others(GROUP), **OWN}.items():
        try:
            family = named(where)
            if not isinstance(family, Family):
                raise TypeError(f"{where} is no Family")
            found[name] = family
        except Exception as error:  # somebody else's package may raise anything
            if name in OWN:
                raise
            logger.warning("the family %r of another package cannot be used: %s: %s", name, type(error).__name__, error)
    return {name: found[name] for name in (*OWN, *found) if name in found}


def family_of(potential: Potential) -> Family | None:
    """The family that a potential belongs to, if its files are known."""
    return families().get(potential.family)
