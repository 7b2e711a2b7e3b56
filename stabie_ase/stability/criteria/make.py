"""Criteria from words, as on the command line."""

from __future__ import annotations

from stabie_ase.stability.criteria.base import Criterion
from stabie_ase.structures.kind import ATOMIC_LIQUID, ISOLATED, MOLECULAR_LIQUID, SOLID
from stabie_ase.structures.setting import Setting
from stabie_ase.system import plugins
from stabie_ase.system.spec import BadSpec, parse

CRITERIA = {
    "bonds": "stabie_ase.stability.criteria.bonds:BondLengthDeviation",
    "angles": "stabie_ase.stability.criteria.angles:AngleDeviation",
    "contacts": "stabie_ase.stability.criteria.contacts:Contacts",
    "energy": "stabie_ase.stability.criteria.energy:EnergyRange",
    "temperature": "stabie_ase.stability.criteria.temperature:KineticTemperature",
    "intermolecular": "stabie_ase.stability.criteria.intermolecular:IntermolecularDistance",
    "rdf": "stabie_ase.stability.criteria.rdf:RDFDeviation",
    "lindemann": "stabie_ase.stability.criteria.lindemann:Lindemann",
    "coordination": "stabie_ase.stability.criteria.coordination:Coordination",
    "lost-hydrogen": "stabie_ase.stability.criteria.lost_hydrogen:LostHydrogen",
    "energy-spike": "stabie_ase.stability.criteria.energy_spike:EnergySpike",
}
"""By their names; those of other packages are entry points of the group "stabie_ase.criteria"."""


TRAINING, VERDICT = 0.25, 0.5
"""Tolerances in Å of bonds and contacts: what a loop optimises is not what it may be judged by."""

DEGREES_PER_A = 80.0
"""Tolerance of angles for one of lengths: the end of a bond of 0.72 Å, as short as any, moves by the one if it turns by the other."""


def default_criteria(setting: Setting, tolerance: float, windows: bool = False, chosen: bool = False) -> str:
    """The criteria that suit a kind of system, as `criteria_from` reads them.

    The energy and the temperature, always. Bonds and contacts where bonds make molecules, beside a network too. In a periodic system
    the angles of these, which averages over many molecules hide, and the smallest distance between them, or between atoms where there
    are no bonds, and how far atoms are from their sites where they stay there.

    Parameters
    ----------
    setting : Setting
    tolerance : float
        Of bonds and contacts, in Å; angles have `DEGREES_PER_A` times that.
    windows : bool
        Those too that judge windows of time, which a final verdict has and training has not: radial distributions in a liquid
        or a solid of which there are several frames, where the time step is known. A surface has none that a bulk system's
        tolerance would suit.
    chosen : bool
        Others have been named: where bonds of the reference form or break, only what needs no bonds stands beside them.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        Bonds of the reference form or break, and nothing is named for such a system.
    """
    kind, names = setting.kind, []
    by_bonds = kind.bonding != "network" and not ((chosen or kind.beside) and not setting.bonds_last)
    if by_bonds and bool(setting.molecules.bonded.any()):
        names.append(f"bonds:{tolerance:g}")
    if by_bonds and kind.name == ISOLATED:
        names.append(f"contacts:{tolerance:g}")
    elif by_bonds:
        members = setting.molecules.members
        if kind.bonding != "none" and max(len(atoms) for atoms in members) > 2:
            names += [f"angles:{DEGREES_PER_A * tolerance:g}", f"contacts:{tolerance:g}"]
        if len(members) > 1 and not kind.beside:
            names.append("intermolecular")
    if kind.at_sites:
        names.append("lindemann")
    names += ["energy", "temperature"]
    known = setting.timestep_fs is not None and len(setting.frames) > 1
    return ",".join([*names, "rdf"] if windows and known and kind.name in (MOLECULAR_LIQUID, ATOMIC_LIQUID, SOLID) else names)


def criteria_from(text: str, setting: Setting, others: str = "") -> list[Criterion]:
    """Criteria from NAME, NAME:TOLERANCE or FILE.py:CLASS, several separated by commas.

    Parameters
    ----------
    text : str
        As in "bonds:0.25,contacts:0.25,energy,temperature".
    setting : Setting
    others : str
        Such a list again: criteria that are added where `text` does not name them.

    Returns
    -------
    list of Criterion

    Raises
    ------
    BadSpec, ValueError
        Unknown or repeated names, a tolerance that is no positive number, or a reference without meaning for one.

    Examples
    --------
    >>> from ase.io import read
    >>> from stabie_ase import Setting, criteria_from
    >>> criteria = criteria_from("bonds:0.25,contacts:0.25", Setting(read("aspirin.xyz", ":"), 500.0))
    >>> print(criteria[0].describe())
    a bond off its mean length by more than 0.25 Å (21 bonds)
    """
    wanted = parse(text)
    named = [spec.name for spec in wanted]
    wanted = [spec for spec in parse(others) if spec.name not in named] + wanted
    order = {spec.name: k for k, spec in enumerate(parse(others))}
    wanted.sort(key=lambda spec: order.get(spec.name, len(order)))
    found: list[Criterion] = []
    for spec in wanted:
        criterion = plugins.find(spec, "criterion", "stabie_ase.criteria", CRITERIA).from_spec(spec, setting)
        if criterion.name in [other.name for other in found]:
            raise BadSpec(f"criterion {criterion.name!r} is given twice in {text!r}; name each once")
        found.append(criterion)
    return found
