"""Observables: vectors computed from frames and compared with a reference."""

from __future__ import annotations

from collections.abc import Sequence

from stabie_ase.observables.base import WEIGHT, Axis, Observable, Target, checked_weight
from stabie_ase.observables.bonds import BondLengths
from stabie_ase.observables.distances import DistanceDistribution
from stabie_ase.observables.rdf import RadialDistribution
from stabie_ase.structures.setting import Setting
from stabie_ase.system import plugins, spec

OBSERVABLES = {
    "hr": "stabie_ase.observables.distances:DistanceDistribution",
    "bond-length": "stabie_ase.observables.bonds:BondLengths",
    "rdf": "stabie_ase.observables.rdf:RadialDistribution",
}
"""By their names; those of other packages are entry points of the group "stabie_ase.observables"."""

__all__ = [
    "OBSERVABLES",
    "Axis",
    "BondLengths",
    "DistanceDistribution",
    "Observable",
    "RadialDistribution",
    "Target",
    "default_observable",
    "observables_from",
]


def default_observable(setting: Setting) -> str:
    """The observable that suits a system, as `observables_from` reads it."""
    return "rdf" if any(atoms.pbc.any() for atoms in setting.frames) else "hr"


def observables_from(text: str | Sequence[str], setting: Setting) -> list[Observable]:
    """Observables from words, as on the command line.

    Parameters
    ----------
    text : str or sequence of str
        As "hr", "rdf:O-O,r_max=6" or "mine.py:Gyration"; several in a sequence, or separated by commas. Any of them
        takes `weight`, as in "rdf:O-O,weight=2".
    setting : Setting
        The system, which decides what they are laid out for.

    Returns
    -------
    list of Observable

    Raises
    ------
    BadSpec, ValueError
        Unknown names or options, two of one name, or a system for which one has no meaning.

    Examples
    --------
    >>> from ase.io import read
    >>> from stabie_ase import Setting, observables_from
    >>> hr, bonds = observables_from("hr,bond-length:C-O", Setting(read("aspirin.xyz", ":"), 500.0))
    >>> hr.name, bonds.name, len(bonds.axis.values)
    ('hr', 'bond-length:C-O', 5)
    """
    texts = [text] if isinstance(text, str) else list(text)
    found = []
    for wanted in (wanted for part in texts for wanted in spec.parse(part)):
        cls = plugins.find(wanted, "observable", "stabie_ase.observables", OBSERVABLES)
        weight, rest = wanted.take("weight", _weight, 1.0)
        new = cls.from_spec(rest, setting)
        new = new if weight == 1.0 else new.weighted(weight)
        for other in found:
            if new.name == other.name or new.subject == other.subject:
                also = "" if new.name == other.name else f", as {other.name!r} too"
                raise spec.BadSpec(f"observable {new.name!r} is given twice in {', '.join(texts)!r}{also}; name each once")
        found.append(new)
    if not found:
        raise spec.BadSpec(f"no observable is given; known: {', '.join(OBSERVABLES)}")
    return found


def _weight(text: str) -> float:
    try:
        return checked_weight(float(text))
    except ValueError:
        raise ValueError(f"expected {WEIGHT}") from None
