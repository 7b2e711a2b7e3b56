"""Criteria from words, as on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ase import Atoms

from stabie_ase.stability.criteria.base import Criterion
from stabie_ase.stability.criteria.bonds import BondLengthDeviation
from stabie_ase.stability.criteria.contacts import Contacts
from stabie_ase.stability.criteria.energy import EnergyRange
from stabie_ase.stability.criteria.temperature import KineticTemperature
from stabie_ase.structures.topology import Topology


@dataclass(frozen=True)
class Setting:
    """What a criterion is made of: the frames of one molecule, their topology, and the temperatures of dynamics and frames."""

    frames: Sequence[Atoms]
    topology: Topology
    temperature_K: float
    reference_temperature_K: float | None


WITH_TOLERANCE: dict[str, Callable[[Setting, float], Criterion]] = {
    "bonds": lambda setting, tolerance: BondLengthDeviation.from_topology(setting.topology, tolerance),
    "contacts": lambda setting, tolerance: Contacts.from_topology(setting.topology, tolerance),
}
WITHOUT: dict[str, Callable[[Setting], Criterion]] = {
    "energy": lambda s: EnergyRange.from_reference(s.frames, s.temperature_K, s.reference_temperature_K),
    "temperature": lambda s: KineticTemperature.for_atoms(len(s.frames[0]), s.reference_temperature_K),
}


def criteria_from(
    spec: str,
    frames: Sequence[Atoms],
    temperature_K: float,
    reference_temperature_K: float | None = None,
    others: str = "",
    topology: Topology | None = None,
) -> list[Criterion]:
    """Criteria from NAME or NAME:TOLERANCE, several separated by commas, and the reference frames of one molecule.

    Parameters
    ----------
    spec : str
        As in "bonds:0.25,contacts:0.25,energy,temperature".
    frames : sequence of Atoms
    temperature_K : float
        Of the dynamics to be judged.
    reference_temperature_K : float, optional
        Of the frames.
    others : str
        Such a list again: criteria that are added where `spec` does not name them.
    topology : Topology, optional
        That of the frames, where it is known already.

    Raises
    ------
    ValueError
        Unknown or repeated names, a tolerance that is no positive number, or a reference without meaning for one.
    """
    wanted = _parse(others) | _parse(spec)
    if not wanted:
        return []
    setting = Setting(frames, topology or Topology.from_frames(frames), temperature_K, reference_temperature_K)
    return [
        WITHOUT[name](setting) if name in WITHOUT else WITH_TOLERANCE[name](setting, tolerance)
        for name, tolerance in wanted.items()
    ]


def _parse(spec: str) -> dict[str, float | None]:
    """Names with their tolerances."""
    found = {}
    for part in spec.split(",") if spec else ():
        name, colon, text = part.strip().partition(":")
        known = ", ".join((*WITH_TOLERANCE, *WITHOUT))
        if name not in WITH_TOLERANCE and name not in WITHOUT:
            raise ValueError(f"unknown criterion {name!r}; known: {known} (as in bonds:0.25,energy)")
        if name in found:
            raise ValueError(f"criterion {name!r} is given twice in {spec!r}; name each once")
        if name in WITHOUT and colon:
            raise ValueError(f"criterion {name!r} takes no tolerance, got {part.strip()!r}; write {name}")
        try:
            found[name] = float(text) if name in WITH_TOLERANCE else None
        except ValueError:
            raise ValueError(
                f"criterion {part.strip()!r} has no tolerance that is a number; write it as in {name}:0.25"
            ) from None
    return found
