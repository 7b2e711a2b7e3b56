"""Observables: vectors computed from frames and compared with a reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations_with_replacement

from stabie_ase.observables.adf import AngularDistribution
from stabie_ase.observables.angles import BondAngles
from stabie_ase.observables.base import WEIGHT, Axis, Observable, checked_weight
from stabie_ase.observables.bond_moments import BondLengthMoments
from stabie_ase.observables.bonds import BondLengths
from stabie_ase.observables.coordination import Coordination
from stabie_ase.observables.density import Density
from stabie_ase.observables.dihedrals import DihedralDistribution
from stabie_ase.observables.distances import DistanceDistribution
from stabie_ase.observables.gyration import RadiusOfGyration
from stabie_ase.observables.min_distance import MinimumDistance
from stabie_ase.observables.rdf import RadialDistribution
from stabie_ase.observables.target import Target
from stabie_ase.observables.thermodynamic import HeatCapacity, PotentialEnergy, Pressure, Stress, Thermodynamic
from stabie_ase.structures.kind import MOLECULAR_LIQUID
from stabie_ase.structures.reference import Curve, Number, TargetFrames, read_target
from stabie_ase.structures.setting import Setting
from stabie_ase.system import plugins, spec

OBSERVABLES = {
    "hr": "stabie_ase.observables.distances:DistanceDistribution",
    "bond-length": "stabie_ase.observables.bonds:BondLengths",
    "rdf": "stabie_ase.observables.rdf:RadialDistribution",
    "adf": "stabie_ase.observables.adf:AngularDistribution",
    "angle": "stabie_ase.observables.angles:BondAngles",
    "dihedral": "stabie_ase.observables.dihedrals:DihedralDistribution",
    "bond-length-moments": "stabie_ase.observables.bond_moments:BondLengthMoments",
    "coordination": "stabie_ase.observables.coordination:Coordination",
    "min-distance": "stabie_ase.observables.min_distance:MinimumDistance",
    "gyration": "stabie_ase.observables.gyration:RadiusOfGyration",
    "density": "stabie_ase.observables.density:Density",
    "potential-energy": "stabie_ase.observables.thermodynamic:PotentialEnergy",
    "heat-capacity": "stabie_ase.observables.thermodynamic:HeatCapacity",
    "pressure": "stabie_ase.observables.thermodynamic:Pressure",
    "stress": "stabie_ase.observables.thermodynamic:Stress",
}
"""By their names; those of other packages are entry points of the group "stabie_ase.observables"."""

TARGET, VALUE = "target", "value"
"""The options of a specification that name a file, and a number."""

MAX_DEFAULT_ELEMENTS = 3
"""Elements, the most common ones, the distances of whose atoms are matched where nobody says which: six pairs."""

__all__ = [
    "OBSERVABLES",
    "AngularDistribution",
    "Axis",
    "BondAngles",
    "BondLengthMoments",
    "BondLengths",
    "Coordination",
    "Density",
    "DihedralDistribution",
    "DistanceDistribution",
    "HeatCapacity",
    "MinimumDistance",
    "Observable",
    "PotentialEnergy",
    "Pressure",
    "RadialDistribution",
    "RadiusOfGyration",
    "Stress",
    "Target",
    "Thermodynamic",
    "default_observable",
    "observables_from",
]


def default_observable(setting: Setting) -> str:
    """The observables that suit a system, as `observables_from` reads them.

    Of molecules, alone, in a liquid or beside a network, h(r) and the h(r) of each two elements; of a liquid or solid the radial
    distribution of each two elements, up to `MAX_DEFAULT_ELEMENTS` of them; of what is periodic in one or two directions and has no
    molecules beside it bond lengths alone.
    """
    symbols = list(setting.frames[0].symbols)
    if not any(atoms.pbc.any() for atoms in setting.frames):
        return ",".join(_distances_in([Counter(symbols)]))
    within: list[str] = []
    if setting.kind.name == MOLECULAR_LIQUID or (setting.kind.beside and setting.bonds_last):
        members = [[symbols[k] for k in atoms] for atoms in setting.molecules.members]
        within = _distances_in([Counter(molecule) for molecule in members if len(molecule) > 1])
    if not all(atoms.pbc.all() for atoms in setting.frames):
        return ",".join(within) or "bond-length"
    return ",".join([*within, *(f"rdf:{pair}" for pair in _element_pairs([Counter(symbols)]))])


def _distances_in(molecules: Sequence[Counter[str]]) -> list[str]:
    """h(r), and that of each two elements where there are several."""
    pairs = _element_pairs(molecules)
    return ["hr", *(f"hr:{pair}" for pair in pairs if len(pairs) > 1)]


def _element_pairs(molecules: Sequence[Counter[str]]) -> list[str]:
    """The pairs of the most common elements of which any molecule has two atoms; a molecule by how many atoms of each it has."""
    counts: Counter[str] = sum(molecules, Counter())
    common = sorted(symbol for symbol, _ in counts.most_common(MAX_DEFAULT_ELEMENTS))
    either = combinations_with_replacement(common, 2)
    return [f"{a}-{b}" for a, b in either if any(found[a] and found[b] > (a == b) for found in molecules)]


def observables_from(text: str | Sequence[str], setting: Setting) -> list[Observable]:
    """Observables from words, as on the command line.

    Parameters
    ----------
    text : str or sequence of str
        As "hr", "rdf:O-O,r_max=6" or "mine.py:Gyration"; several in a sequence, or separated by commas. Any of them
        takes `weight`, as in "rdf:O-O,weight=2", and `target`, a file of frames or of a curve to match it to in place of the
        reference; a curve takes `column` and `error`, the names of its columns, and `above`, from where on it counts, in Å. An
        observable of one component takes `value`, a number to match it to, with its `error`.
    setting : Setting
        The system, which decides what they are laid out for.

    Returns
    -------
    list of Observable

    Raises
    ------
    BadSpec, ValueError
        Unknown names or options, two of one name, a system for which one has no meaning, or a target that cannot be used.

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
        data, rest = _data(rest, setting)
        new = cls.from_spec(rest, setting)
        new = new if weight == 1.0 else new.weighted(weight)
        if isinstance(data, Number) and len(new.axis.values) > 1:
            raise spec.BadSpec(f"{new.name} has {len(new.axis.values)} components, and one value is given; name a file by {TARGET}=FILE")
        new = new if data is None else new.matched_to(data)
        for other in found:
            if new.name == other.name or new.subject == other.subject:
                also = "" if new.name == other.name else f", as {other.name!r} too"
                raise spec.BadSpec(f"observable {new.name!r} is given twice in {', '.join(texts)!r}{also}; name each once")
        found.append(new)
    if not found:
        raise spec.BadSpec(f"no observable is given; known: {', '.join(OBSERVABLES)}")
    return found


def _data(wanted: spec.Spec, setting: Setting) -> tuple[Curve | Number | TargetFrames | None, spec.Spec]:
    """What an observable is to be matched to, if not to the reference, and the rest of the specification."""
    name, rest = wanted.take(TARGET, str, None)
    value, rest = rest.take(VALUE, float, None)
    if value is not None:
        if name is not None:
            raise spec.BadSpec(f"{str(wanted)!r} gives both a {TARGET} and a {VALUE}; give one of them")
        error, rest = rest.take("error", float, None)
        return Number(value, error), rest
    if name is None:
        return None, rest
    given = {}
    for key, reader in {"column": str, "error": str, "above": float}.items():
        given[key], rest = rest.take(key, reader, None)
    data = read_target(name, **given)
    if isinstance(data, TargetFrames):
        data.check_system(setting.frames)
    return data, rest


def _weight(text: str) -> float:
    try:
        return checked_weight(float(text))
    except ValueError:
        raise ValueError(f"expected {WEIGHT}") from None
