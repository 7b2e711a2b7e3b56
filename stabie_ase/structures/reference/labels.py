"""Where the energies, forces and temperatures of frames are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.db import connect
from ase.io.formats import filetype

from stabie_ase.structures.reference.frames import DATABASES, FileNames, UnusableReference, files_of

KEYS = (
    ("energy", "forces"),
    ("REF_energy", "REF_forces"),
    ("ref_energy", "ref_forces"),
    ("dft_energy", "dft_forces"),
    ("DFT_energy", "DFT_forces"),
    ("energy", "force"),
    ("Energy", "forces"),
    ("free_energy", "forces"),
)
"""Tried in this order where the user names none; both of a pair, so that they come from the same calculation."""

TEMPERATURE_KEYS = ("temperature_K", "temperature", "temp", "T")

SAME_UNITS = {"ev", "ev/ang", "ev/a", "ev/å", "ev/angstrom", "ang", "a", "å", "angstrom"}
"""How databases write eV, eV/Å and Å, in small letters."""


def energy_of(atoms: Atoms, key: str) -> float | None:
    """ASE moves the results of a calculation into a calculator; other keys stay in info and arrays."""
    return atoms.info[key] if key in atoms.info else calculated(atoms, key)


def forces_of(atoms: Atoms, key: str) -> np.ndarray | None:
    """Forces as they were calculated, in the unit of the file, whatever the constraints; None if there are none."""
    return atoms.arrays[key] if key in atoms.arrays else calculated(atoms, key)


def calculated(atoms: Atoms, name: str):
    """What ASE has read by that name, or None. From the results: a calculator that is asked forgets them where a position is no number."""
    return None if atoms.calc is None else atoms.calc.results.get(name)


def choose_keys(
    source: str, frames: Sequence[Atoms], energy_key: str | None = None, forces_key: str | None = None
) -> tuple[str, str]:
    """The first pair of keys that every frame has, the ones given by the user taken as they are."""
    pairs = [(energy_key or e, forces_key or f) for e, f in KEYS]
    lacking = [_lacking(frames, *pair) for pair in pairs]
    for pair, (no_energy, no_forces) in zip(pairs, lacking):
        if not no_energy and not no_forces:
            return pair
    pair, (no_energy, no_forces) = min(zip(pairs, lacking), key=lambda entry: sum(entry[1]))
    n = len(frames)
    if no_energy < n and no_forces < n:
        missing, key = max((no_energy, pair[0]), (no_forces, pair[1]))
        raise UnusableReference(f"{source}: {missing} of {n} frames have no {key!r}; remove or complete them")
    what, key, flag = ("energy", energy_key, "--energy-key") if no_energy == n else ("forces", forces_key, "--forces-key")
    asked = f"no {what} under {key!r}" if key else f"no {what}"
    raise UnusableReference(
        f"{source}: {asked} in the reference; keys found: {', '.join(_keys_found(frames[0])) or 'none'}. "
        f"Name the right one with {flag}"
    )


def _lacking(frames, energy_key: str, forces_key: str) -> tuple[int, int]:
    """How many frames are without energy and without forces."""
    return (
        sum(energy_of(atoms, energy_key) is None for atoms in frames),
        sum(forces_of(atoms, forces_key) is None for atoms in frames),
    )


def _keys_found(atoms: Atoms) -> list[str]:
    found = {*atoms.info, *atoms.arrays} - {"numbers", "positions", "masses", "momenta", "tags"}
    return sorted(found | set(atoms.calc.results if atoms.calc is not None else ()))


def numbers_in(where: str, atoms: Atoms, energy_key: str, forces_key: str) -> tuple[float, np.ndarray]:
    """The energy in eV and the forces, shape (n_atoms, 3), in eV/Å of a frame; UnusableReference unless they are numbers."""
    try:
        energy = float(np.asarray(energy_of(atoms, energy_key), dtype=float).reshape(()))
        forces = np.array(forces_of(atoms, forces_key), dtype=float)
    except (TypeError, ValueError) as error:
        raise UnusableReference(f"{where}: energy or forces are not numbers ({error})") from error
    if forces.shape != (len(atoms), 3):
        raise UnusableReference(f"{where}: forces of shape {forces.shape}, expected ({len(atoms)}, 3)")
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        raise UnusableReference(f"{where}: energy or forces are not finite; remove the frame")
    return energy, forces


def check_declared_units(names: FileNames, energy_key: str, forces_key: str) -> None:
    """Raise UnusableReference if a database says, as SchNetPack's do, that it is in other units than eV and Å."""
    for path in files_of(names):
        if path.suffix.lower() == ".npz" or filetype(str(path)) not in DATABASES:  # archives have been converted
            continue
        with connect(str(path), serial=True) as database:
            declared = database.metadata
        units = declared.get("_property_unit_dict") or {}
        found = {key: units.get(key) for key in (energy_key, forces_key)} | {"positions": declared.get("_distance_unit")}
        for what, unit in found.items():
            if unit and str(unit).lower() not in SAME_UNITS:
                raise UnusableReference(f"{path}: declares {what!r} in {unit}; expected eV and Å, convert them")


def common_temperature(frames: Sequence[Atoms], where: Sequence[str] | None = None) -> float | None:
    """The temperature that the frames' info tells, if they all agree.

    Parameters
    ----------
    frames : sequence of Atoms
    where : sequence of str, optional
        What to call each of them in messages.

    Returns
    -------
    float or None
        In K.

    Raises
    ------
    UnusableReference
        A frame tells two.
    """
    found = {_temperature(where[k] if where else f"frame {k}", atoms) for k, atoms in enumerate(frames)}
    return found.pop() if len(found) == 1 else None


def _temperature(where: str, atoms: Atoms) -> float | None:
    told = {key: _number(atoms.info[key]) for key in TEMPERATURE_KEYS if key in atoms.info}
    told = {key: value for key, value in told.items() if value is not None}
    if len(set(told.values())) > 1:
        values = " and ".join(f"{key}={value:g}" for key, value in told.items())
        raise UnusableReference(f"{where} tells two temperatures, {values}; remove one of them")
    return next(iter(told.values()), None)


def _number(value) -> float | None:
    """A finite number, or None for anything else."""
    try:
        number = float(value) if not isinstance(value, (bool, np.bool_)) else np.nan
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None
