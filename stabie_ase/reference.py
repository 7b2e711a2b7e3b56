"""Reading reference frames: what was read is counted and can be printed; what cannot be used is refused in one line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read

from stabie_ase.batch import AtomsBatch
from stabie_ase.neighbors import neighbor_list

KEYS = (
    ("energy", "forces"),
    ("REF_energy", "REF_forces"),
    ("ref_energy", "ref_forces"),
    ("dft_energy", "dft_forces"),
    ("DFT_energy", "DFT_forces"),
    ("energy", "force"),
)
"""Tried in this order where the user names none; both of a pair, so that they come from the same calculation."""

MAX_FORCE = 300.0
"""Component in eV/Å above which a reference force is taken for a mistake of units or a broken calculation."""

MIN_DISTANCE = 0.4
"""In Å; closer atoms do not occur in a calculation that went well (H2 has 0.74)."""

TELLING = 40
"""Frames to hold out if that is no more than a fifth of all: fewer do not tell a growth of the force error by 5 % from chance."""


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

    def split(self, share: float | None = None, most: int | None = None) -> tuple[Reference, Reference]:
        """Random split, the same at all times: what pretraining has held out must be held out of fine-tuning too.

        Parameters
        ----------
        share : float, optional
            Of the frames in the second part, at least one and never all. If not given a tenth, and of few frames more:
            up to a fifth of them, to make 40.
        most : int, optional
            Frames in the second part at most; they are some of those that there would be without this limit.
        """
        size = len(self)
        order = np.random.default_rng(0).permutation(size).tolist()
        n = round(share * size) if share is not None else max(round(size / 10), min(round(size / 5), TELLING))
        n = min(max(1, n), size - 1, most or size)
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
    frames = read_frames(path)
    if len(frames) < min_frames:
        raise UnusableReference(f"{path}: {len(frames)} frames, at least {min_frames} are needed")
    energy_key, forces_key = _choose_keys(path, frames, energy_key, forces_key)
    energies = [_energy(atoms, energy_key) for atoms in frames]
    forces = [_forces(atoms, forces_key) for atoms in frames]
    for k, (atoms, energy, force) in enumerate(zip(frames, energies, forces)):
        _check_frame(path, k, atoms, energy, force)
    formulas = list(Counter(atoms.get_chemical_formula() for atoms in frames))
    shown = ", ".join(formulas[:5]) + (f" and {len(formulas) - 5} other compositions" if len(formulas) > 5 else "")
    temperature = common_temperature(frames)
    source = (
        f"{len(frames)} frames of {shown} from {Path(path).name} "
        f"(energies from {energy_key!r}, forces from {forces_key!r}"
        + (f", {temperature:g} K)" if temperature is not None else ", no single temperature given)")
    )
    return Reference(
        frames,
        np.array([float(energy) for energy in energies]),
        [np.array(force, dtype=float) for force in forces],
        temperature,
        source,
    )


def read_frames(path: str | os.PathLike) -> list[Atoms]:
    """Structures in any format ASE knows; UnusableReference if there are none."""
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
    """From the results as they are: asked properly, a calculator forgets them where a position is not a number."""
    return None if atoms.calc is None else atoms.calc.results.get(name)


def _choose_keys(path, frames, energy_key: str | None, forces_key: str | None) -> tuple[str, str]:
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
        raise UnusableReference(f"{path}: {missing} of {n} frames have no {key!r}; remove or complete them")
    what, key, flag = ("energy", energy_key, "--energy-key") if no_energy == n else ("forces", forces_key, "--forces-key")
    asked = f"no {what} under {key!r}" if key else f"no {what}"
    raise UnusableReference(
        f"{path}: {asked} in the reference; keys found: {', '.join(_keys_found(frames[0])) or 'none'}. "
        f"Name the right one with {flag}"
    )


def _lacking(frames, energy_key: str, forces_key: str) -> tuple[int, int]:
    """How many frames are without energy and without forces."""
    return (
        sum(_energy(atoms, energy_key) is None for atoms in frames),
        sum(_forces(atoms, forces_key) is None for atoms in frames),
    )


def _keys_found(atoms: Atoms) -> list[str]:
    found = {*atoms.info, *atoms.arrays} - {"numbers", "positions", "masses", "momenta", "tags"}
    return sorted(found | set(atoms.calc.results if atoms.calc is not None else ()))


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
    try:
        near = neighbor_list(batch, MIN_DISTANCE).half
    except ValueError as error:  # a cell that spans no volume
        raise UnusableReference(f"{where}: {error}") from error
    distances = near.vectors(batch).norm(dim=1)
    if len(distances) and float(distances.min()) < MIN_DISTANCE:
        raise UnusableReference(f"{where}: two atoms are {float(distances.min()):.3f} Å apart; remove the frame")


def common_temperature(frames: list[Atoms]) -> float | None:
    """The temperature in K that the frames' info tells, if they all agree."""
    for key in ("temperature_K", "temperature"):
        try:
            values = {float(atoms.info[key]) for atoms in frames}
        except (KeyError, TypeError, ValueError):
            continue
        if len(values) == 1:
            return values.pop()
    return None
