"""Frames from numpy's archives, as MD17, rMD17 and sGDML write them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator

from stabie_ase.structures.reference.unusable import UnusableReference

KEYS = {"positions": ("R", "coords"), "numbers": ("z", "nuclear_charges"), "energies": ("E", "energies"), "forces": ("F", "forces")}
"""Names in the archive of each, one of which is there."""

ENERGY_UNITS = {
    "ev": 1.0, "kcal/mol": units.kcal / units.mol, "kj/mol": units.kJ / units.mol, "hartree": units.Hartree, "ha": units.Hartree,
    "mev": 1e-3,
}  # fmt: skip
"""In eV, by small letters."""

LENGTH_UNITS = {"ang": 1.0, "angstrom": 1.0, "å": 1.0, "a": 1.0, "bohr": units.Bohr, "nm": 10.0}
"""In Å, by small letters."""

CONVERTED = "converted_from"
"""Name in a frame's info of the units that it was converted from."""


def npz_frames(path: Path, source: str) -> list[Atoms]:
    """All frames of an archive, converted to eV and Å by the units that it tells.

    Parameters
    ----------
    path : Path
        With R or coords, shape (n_frames, n_atoms, 3), z or nuclear_charges, shape (n_atoms,), and, where there are labels, E or
        energies, shape (n_frames,) or (n_frames, 1), F or forces, and their units e_unit and r_unit.
    source : str
        What to call it in messages.

    Returns
    -------
    list of Atoms
        With energies and forces as ASE keeps them.

    Raises
    ------
    UnusableReference
        No archive of plain arrays, no units, or shapes that do not belong together.
    """
    content = _content(path, source)
    if "lattice" in content:
        raise UnusableReference(f"{source}: periodic archives (lattice) are not read; write the frames as extended xyz")
    found: dict[str, Any] = {what: next((content[key] for key in keys if key in content), None) for what, keys in KEYS.items()}
    for what in ("positions", "numbers"):
        if found[what] is None:
            raise UnusableReference(f"{source}: no {what} under {' or '.join(KEYS[what])}; keys found: {', '.join(content) or 'none'}")
    _check_shapes(found, source)
    e_unit, r_unit = (_unit(content, key, known, source) for key, known in (("e_unit", ENERGY_UNITS), ("r_unit", LENGTH_UNITS)))
    energy, length = ENERGY_UNITS[e_unit.lower()], LENGTH_UNITS[r_unit.lower()]
    told = {} if energy == length == 1.0 else {CONVERTED: f"{e_unit} and {r_unit}"}
    frames = []
    for k, positions in enumerate(found["positions"]):
        atoms = Atoms(found["numbers"].astype(int), positions * length, info=dict(told))
        factors = {"energies": ("energy", energy), "forces": ("forces", energy / length)}
        labels = {name: found[what][k] * factor for what, (name, factor) in factors.items() if found[what] is not None}
        if labels:
            atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    return frames


def _content(path: Path, source: str) -> dict[str, np.ndarray]:
    """The archive's arrays; of pickled objects, which could run code, none are read."""
    content = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = {"e_unit", "r_unit", "lattice"}.union(*KEYS.values())
            content = {key: archive[key] if key in wanted else np.empty(0) for key in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnusableReference(f"{source}: no archive of plain arrays ({reason})") from error
    return content


def _unit(content: dict[str, np.ndarray], key: str, known: dict[str, float], source: str) -> str:
    if key not in content:
        raise UnusableReference(
            f"{source}: tells no {key}, and archives come in several (MD17 and rMD17 in kcal/mol and Ang); add it: "
            f"np.savez(FILE, **np.load({str(source)!r}), e_unit='kcal/mol', r_unit='Ang')"
        )
    unit = content[key].tolist()
    unit = unit.decode() if isinstance(unit, bytes) else str(unit)
    if unit.lower() not in known:
        raise UnusableReference(f"{source}: {key} is {unit!r}, expected one of {', '.join(known)}")
    return unit


def _check_shapes(found: dict[str, Any], source: str) -> None:
    positions, energies, forces = found["positions"], found["energies"], found["forces"]
    n_frames, n_atoms = positions.shape[:2] if positions.ndim == 3 else (0, 0)
    if energies is not None and energies.shape == (n_frames, 1):
        found["energies"] = energies = energies[:, 0]
    fits = positions.shape == (n_frames, n_atoms, 3) and found["numbers"].shape == (n_atoms,)
    fits &= energies is None or energies.shape == (n_frames,)
    fits &= forces is None or forces.shape == positions.shape
    if not fits or any(x is not None and x.dtype.kind not in "fiu" for x in found.values()):
        shapes = ", ".join(f"{what} {x.shape}" for what, x in found.items() if x is not None)
        raise UnusableReference(
            f"{source}: numbers of the shapes {shapes}; expected (n_frames, n_atoms, 3), (n_atoms,), (n_frames,) and as the positions"
        )
