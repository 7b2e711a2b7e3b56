"""Molecules and atoms that stand alone, also in a periodic box."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

MIN_IMAGE_DISTANCE = 10.0
"""In Å; an atom whose periodic images are farther away is isolated."""


def is_isolated_atom(atoms: Atoms) -> bool:
    """Whether a frame is that of a single atom, as they are calculated for the energies of the elements."""
    if len(atoms) != 1:
        return False
    kind = str(atoms.info.get("config_type", "")).lower().replace("_", "").replace(" ", "")
    return kind == "isolatedatom" or not atoms.pbc.any() or without_images(atoms, MIN_IMAGE_DISTANCE) is not None


def isolated(frames: Sequence[Atoms], cutoff: float) -> Sequence[Atoms]:
    """Periodic frames as isolated molecules, made whole, if no atom of any has a periodic image within a cutoff (Å); else as they are."""
    if not np.isfinite(cutoff) or not any(atoms.pbc.any() for atoms in frames):
        return frames
    found = []
    for atoms in frames:
        alone = without_images(atoms, cutoff) if atoms.pbc.any() else atoms
        if alone is None:
            return frames
        found.append(alone)
    return found


def without_images(atoms: Atoms, cutoff: float) -> Atoms | None:
    """A molecule in a periodic box as an isolated one, whole where the box's border cuts it.

    Parameters
    ----------
    atoms : Atoms
    cutoff : float
        In Å; what is closer belongs together.

    Returns
    -------
    Atoms or None
        None if an atom and a periodic image of it belong together, or if not all atoms do.
    """
    neighbors = neighbor_list(AtomsBatch.from_atoms(atoms), cutoff)
    (i, j), shifts = neighbors.pairs.numpy(), neighbors.shifts.numpy()
    vectors = neighbors.vectors(AtomsBatch.from_atoms(atoms)).numpy()
    near = np.linalg.norm(vectors, axis=1) < cutoff
    i, j, shifts = i[near], j[near], shifts[near]
    image, reached = np.zeros((len(atoms), 3), dtype=int), np.arange(len(atoms)) == 0
    while (new := reached[i] & ~reached[j]).any():
        image[j[new]] = image[i[new]] + shifts[new]
        reached[j[new]] = True
    if not reached.all() or (image[j] - image[i] != shifts).any():
        return None
    whole = Atoms(atoms.numbers, atoms.positions + image @ atoms.cell.array, masses=atoms.get_masses(), info=atoms.info)
    whole.set_momenta(atoms.get_momenta(), apply_constraint=False)
    return whole
