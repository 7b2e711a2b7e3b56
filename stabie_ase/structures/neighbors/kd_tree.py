"""Neighbour lists of whole batches on a CPU, by scipy's k-d tree of all atoms and of the images that are near a cell."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors.cell_list import in_order, made_finite


def half_list(batch: AtomsBatch, cutoff: float) -> tuple[Tensor, Tensor]:
    """What `cell_list.half_list` returns; the cutoff is in Å."""
    positions, cells, finite = (x.numpy() for x in made_finite(batch))
    system, pbc = batch.system.numpy(), batch.pbc.numpy()
    inverse = np.linalg.inv(cells)
    scaled = np.einsum("nx,nxy->ny", positions, inverse[system])
    wraps = np.where(pbc[system], np.floor(scaled), 0.0)
    scaled -= wraps
    # In lengths of the cell; beyond it no image can be near. No system is near another along a fourth axis.
    reach = np.where(pbc & finite[:, None], cutoff * np.linalg.norm(inverse, axis=1), 0.0)
    places = np.column_stack([np.einsum("nx,nxy->ny", scaled, cells[system]), 2.0 * cutoff * system])
    image_of, shifts = _images(scaled, reach[system])
    moved = places[image_of]
    moved[:, :3] += np.einsum("nx,nxy->ny", shifts, cells[system[image_of]])
    sound = finite[system].nonzero()[0]
    found = _tree(places[sound]).sparse_distance_matrix(_tree(moved), cutoff, output_type="ndarray")
    i, image = sound[found["i"]], found["j"]
    j, shifts = image_of[image], shifts[image]
    # Of two opposite images one was looked at, of two atoms in the cell both; the tree's cutoff is inclusive.
    kept = ((i < j) | shifts.any(axis=1)) & (found["v"] < cutoff)
    i, j, shifts = i[kept], j[kept], shifts[kept]
    return in_order(torch.from_numpy(np.stack([i, j])), torch.from_numpy((shifts + wraps[i] - wraps[j]).astype(np.int64)))


def _tree(points: np.ndarray) -> cKDTree:
    return cKDTree(points, balanced_tree=False, compact_nodes=False)  # sooner built, and asked once


def _images(scaled: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of which an image is near its cell, and where that is, in cells: one of each two opposite shifts, and none."""
    furthest = np.ceil(reach)
    atoms, shifts = [], []
    for shift in product(*(range(-n, n + 1) for n in furthest.max(axis=0, initial=0.0).astype(int).tolist())):
        if shift < (0, 0, 0):
            continue
        place, shift = scaled + shift, np.array(shift, dtype=float)
        near = (shift == 0) | (abs(shift) <= furthest) & (place >= -reach) & (place <= 1.0 + reach)
        atoms.append(near.all(axis=1).nonzero()[0])
        shifts.append(np.broadcast_to(shift, (len(atoms[-1]), 3)))
    return np.concatenate(atoms), np.concatenate(shifts)
