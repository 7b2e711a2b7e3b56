"""Reading reference frames: what was read is counted and can be printed; what cannot be used is refused in one line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read

from stabie_ase.batch import AtomsBatch
from stabie_ase.neighbors import neighbor_list

ENERGY_KEYS = ("energy", "REF_energy", "ref_energy", "dft_energy", "DFT_energy")
FORCES_KEYS = ("forces", "REF_forces", "ref_forces", "dft_forces", "DFT_forces", "force")
"""Tried in this order where the user names none."""

MAX_FORCE = 300.0
"""Component in eV/Å above which a reference force is taken for a mistake of units or a broken calculation."""

MIN_DISTANCE = 0.4
"""In Å; closer atoms do not occur in a calculation that went well (H2 has 0.74)."""


class UnusableReference(ValueError):
    """A reference file that cannot be used."""


@dataclass(frozen=True)
class Reference:
    """Reference frames with energies (eV) and forces (eV/Å).

    Attributes
    ----------
    frames : list of Atoms
    energies : ndarray, shape (n_frames,)
    forces : list of ndarray, shape (n_atoms, 3) each
    temperature_K : float or None
        As the frames' info tells it, when they all agree.
    source : str
        One line about what was read.
    """

    frames: list[Atoms]
    energies: np.ndarray
    forces: list[np.ndarray]
    temperature_K: float | None
    source: str

    def __len__(self) -> int:
        return len(self.frames)

    def subset(self, index: Sequence[int]) -> Reference:
        """Some of the frames."""
        return Reference(
            [self.frames[k] for k in index],
            self.energies[list(index)],
            [self.forces[k] for k in index],
            self.temperature_K,
            self.source,
        )

    def split(self, share: float, seed: int) -> tuple[Reference, Reference]:
        """Random split; the second part holds `share` of the frames, at least one and never all."""
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        n = min(max(1, round(share * len(self))), len(self) - 1)
        return self.subset(sorted(order[n:])), self.subset(sorted(order[:n]))


def read_reference(
    path: str | os.PathLike, energy_key: str | None = None, forces_key: str | None = None, min_frames: int = 2
) -> Reference:
    """Read frames in any format ASE knows and check that they can be trained on.

    Raises
    ------
    UnusableReference
        The file is missing, empty or no structure file; energies or forces are missing (the keys found are named), not
        finite or huge; atoms sit on top of each other; too few frames.
    """
    frames = _read_frames(path)
    if len(frames) < min_frames:
        raise UnusableReference(f"{path}: {len(frames)} frames, at least {min_frames} are needed")
    energy_key, energies = _pick(path, frames, energy_key, ENERGY_KEYS, _energy, "energy", "--energy-key")
    forces_key, forces = _pick(path, frames, forces_key, FORCES_KEYS, _forces, "forces", "--forces-key")
    for k, (atoms, energy, force) in enumerate(zip(frames, energies, forces)):
        _check_frame(path, k, atoms, energy, force)
    formulas = Counter(atoms.get_chemical_formula() for atoms in frames)
    temperature = _temperature(frames)
    source = (
        f"{len(frames)} frames of {', '.join(formulas)} from {Path(path).name} "
        f"(energies from {energy_key!r}, forces from {forces_key!r}"
        + (f", {temperature:g} K)" if temperature else ", no temperature given)")
    )
    return Reference(frames, np.array(energies, dtype=float), forces, temperature, source)


def _read_frames(path: str | os.PathLike) -> list[Atoms]:
    path = Path(path)
    if not path.exists():
        raise UnusableReference(f"{path}: no such file")
    if path.is_dir():
        raise UnusableReference(f"{path}: is a directory, expected a structure file")
    if path.stat().st_size == 0:
        raise UnusableReference(f"{path}: the file is empty")
    try:
        frames = read(path, index=":")
    except Exception as error:  # every ASE reader fails in its own way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnusableReference(f"{path}: not a structure file that ASE can read ({reason})") from error
    if not frames or not all(isinstance(atoms, Atoms) and len(atoms) for atoms in frames):
        raise UnusableReference(f"{path}: holds no frames with atoms")
    return frames


def _energy(atoms: Atoms, key: str) -> float | None:
    """ASE moves `energy` and `forces` of a file into a calculator; other keys stay in info and arrays."""
    if key in atoms.info:
        return atoms.info[key]
    return _calculated(atoms, "energy") if key == "energy" else None


def _forces(atoms: Atoms, key: str) -> np.ndarray | None:
    if key in atoms.arrays:
        return atoms.arrays[key]
    return _calculated(atoms, "forces") if key == "forces" else None


def _calculated(atoms: Atoms, name: str):
    if atoms.calc is None:
        return None
    try:
        return atoms.calc.get_property(name, atoms, allow_calculation=False)
    except PropertyNotImplementedError:
        return None


def _pick(path, frames, key, candidates, getter, what, flag):
    """The first key that every frame has, with its values."""
    for candidate in [key] if key else candidates:
        values = [getter(atoms, candidate) for atoms in frames]
        if all(value is not None for value in values):
            return candidate, values
        missing = sum(value is None for value in values)
        if missing < len(frames):
            raise UnusableReference(f"{path}: {missing} of {len(frames)} frames have no {candidate!r}; remove or complete them")
    first = frames[0]
    found = [*first.info, *(name for name in first.arrays if name not in ("numbers", "positions"))]
    found += sorted(first.calc.results) if first.calc is not None else []
    asked = f"no {what} under {key!r}" if key else f"no {what}"
    raise UnusableReference(
        f"{path}: {asked} in the reference; keys found: {', '.join(sorted(set(found))) or 'none'}. Name the right one with {flag}"
    )


def _check_frame(path, k: int, atoms: Atoms, energy, force) -> None:
    where = f"{path}: frame {k}"
    try:
        energy, force = float(energy), np.asarray(force, dtype=float)
    except (TypeError, ValueError) as error:
        raise UnusableReference(f"{where}: energy or forces are not numbers ({error})") from error
    if force.shape != (len(atoms), 3):
        raise UnusableReference(f"{where}: forces of shape {force.shape}, expected ({len(atoms)}, 3)")
    if not (np.isfinite(energy) and np.isfinite(force).all() and np.isfinite(atoms.positions).all()):
        raise UnusableReference(f"{where}: energy, forces or positions are not finite; remove the frame")
    if np.abs(force).max() > MAX_FORCE:
        raise UnusableReference(
            f"{where}: a force of {np.abs(force).max():.3g} eV/Å, more than {MAX_FORCE:g}; check its units or remove the frame"
        )
    batch = AtomsBatch.from_atoms(atoms)
    distances = neighbor_list(batch, MIN_DISTANCE).half.vectors(batch).norm(dim=1)
    if len(distances) and float(distances.min()) < MIN_DISTANCE:
        raise UnusableReference(f"{where}: two atoms are {float(distances.min()):.3f} Å apart; remove the frame")


def _temperature(frames: list[Atoms]) -> float | None:
    for key in ("temperature_K", "temperature"):
        values = {float(atoms.info[key]) for atoms in frames if np.isscalar(atoms.info.get(key))}
        if len(values) == 1 and all(key in atoms.info for atoms in frames):
            return values.pop()
    return None
