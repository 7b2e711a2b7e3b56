"""Neighbour lists of whole batches by linked cells, in torch: on the device, for any cell, in time linear in the atoms.

Quentrec & Brot, J. Comput. Phys. 13, 430 (1973): atoms are sorted into bins no narrower than the cutoff, and only
neighbouring bins are searched. Cells narrower than the cutoff have one bin and several images of it.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch
from ase.geometry import complete_cell
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch

FAR_AWAY = 1e9
"""In Å; where an atom further from the origin than this is does not matter any more: float64 knows it to 1e-7 Å only."""


def half_list(batch: AtomsBatch, cutoff: float) -> tuple[Tensor, Tensor]:
    """Every pair closer than the cutoff once: i < j, or the first of the two opposite images of an atom itself.

    Parameters
    ----------
    batch : AtomsBatch
        Positions need not lie inside the cell; systems whose lattice is not finite have no pairs.
    cutoff : float
        In Å, finite.

    Returns
    -------
    pairs : Tensor of int64, shape (2, n_pairs)
        Sorted by i, j and shift.
    shifts : Tensor of int64, shape (n_pairs, 3)
    """
    with torch.no_grad():
        bins = _Bins(batch, cutoff)
        found = [bins.pairs(offset) for offset in bins.offsets()]
        return in_order(torch.cat([pairs for pairs, _ in found], dim=1), torch.cat([shifts for _, shifts in found]))


def in_order(pairs: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs that are there once, with i < j and sorted by i, j and shift: the same list, however it was found.

    Of the two opposite images of an atom itself the one in positive direction is kept.
    """
    (i, j), (x, y, z) = pairs, shifts.T
    backward = (x < 0) | (x == 0) & ((y < 0) | (y == 0) & (z < 0))
    swap = (i > j) | (i == j) & backward
    i, j, shifts = torch.where(swap, j, i), torch.where(swap, i, j), torch.where(swap[:, None], -shifts, shifts)
    order = _sorting(torch.cat([torch.stack([i, j]), shifts.T]))
    return torch.stack([i, j])[:, order], shifts[order]


def _sorting(keys: Tensor) -> Tensor:
    """Order by the first row of integers, then by the second, and so on; as one number each where that holds them all."""
    if keys.shape[1] == 0:
        return keys.new_zeros(0)
    keys = keys - keys.amin(dim=1, keepdim=True)
    extents = (keys.amax(dim=1) + 1).tolist()
    if math.prod(extents) < 2**63:
        rows = keys.unbind()
        keys = rows[0]
        for row, extent in zip(rows[1:], extents[1:]):
            keys = keys * extent + row
        keys = keys[None]
    order = torch.arange(keys.shape[1], device=keys.device)
    for key in keys.flip(0):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def made_finite(batch: AtomsBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Positions and complete cells (Å) in float64 without infinite numbers, and which systems' lattices had none."""
    positions, cells = batch.positions.detach().double(), batch.lattice.detach().double()
    finite = torch.isfinite(cells).flatten(1).all(dim=1)
    positions = torch.where(positions.abs() < FAR_AWAY, positions, 0.0)
    return positions, _complete(torch.where(finite[:, None, None], cells, 0.0)), finite


class _Bins:
    """Atoms sorted into the bins of their systems."""

    def __init__(self, batch: AtomsBatch, cutoff: float):
        self.cutoff, self.system, self.pbc = cutoff, batch.system, batch.pbc
        positions, self.cells, self.finite = made_finite(batch)
        inverse = torch.linalg.inv(self.cells)
        scaled = torch.einsum("nx,nxy->ny", positions, inverse[self.system])
        self.wraps = torch.where(self.pbc[self.system], scaled.floor(), 0.0)
        self.positions = positions - torch.einsum("nx,nxy->ny", self.wraps, self.cells[self.system])
        lowest, width = self._box(batch, scaled - self.wraps)
        extent = width / torch.linalg.vector_norm(inverse, dim=1)  # between opposite faces
        most = (2.0 * batch.counts.double()).pow(1 / 3).ceil()[:, None]  # of bins, so that they are not more than atoms
        self.n_bins = torch.minimum((extent / cutoff).floor(), most).clamp(min=1).long()
        reach = (cutoff * self.n_bins / extent).ceil().long()
        self.reach = torch.where(self.pbc, reach, torch.minimum(reach, self.n_bins - 1))
        fraction = (scaled - self.wraps - lowest[self.system]) / width[self.system]
        n_bins = self.n_bins[self.system]
        self.bin = torch.minimum((fraction * n_bins).long().clamp(min=0), n_bins - 1)
        per_system = self.n_bins.prod(dim=1)
        self.first = torch.cumsum(per_system, 0) - per_system
        index = self._index(self.bin)
        self.order = torch.argsort(index, stable=True)
        self.counts = torch.bincount(index, minlength=int(per_system.sum()))
        self.starts = torch.cumsum(self.counts, 0) - self.counts

    def _box(self, batch: AtomsBatch, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Lower corner and width of what is divided into bins, in scaled coordinates, shape (n_systems, 3)."""
        index = self.system[:, None].expand_as(scaled)
        empty = scaled.new_zeros((batch.n_systems, 3))
        low = empty.scatter_reduce(0, index, scaled, "amin", include_self=False)
        high = empty.scatter_reduce(0, index, scaled, "amax", include_self=False)
        return torch.where(self.pbc, 0.0, low), torch.where(self.pbc, 1.0, (high - low).clamp(min=1e-9))

    def _index(self, bins: Tensor) -> Tensor:
        """Running number of each atom's bin among those of all systems."""
        n = self.n_bins[self.system]
        return self.first[self.system] + (bins[:, 0] * n[:, 1] + bins[:, 1]) * n[:, 2] + bins[:, 2]

    def offsets(self) -> list[tuple[int, ...]]:
        """Steps from a bin to others that may hold neighbours: one of each two opposite ones, and none at all."""
        furthest = self.reach.amax(dim=0).tolist()
        return [o for o in product(*(range(-n, n + 1) for n in furthest)) if o >= (0, 0, 0)]

    def pairs(self, offset: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Pairs of all atoms with those of the bins this far away, and their shifts."""
        step = torch.tensor(offset, device=self.bin.device)
        n_bins, target = self.n_bins[self.system], self.bin + step
        images = torch.div(target, n_bins, rounding_mode="floor")
        there = (self.pbc[self.system] | (images == 0)) & (step.abs() <= self.reach[self.system])
        atoms = (there.all(dim=1) & self.finite[self.system]).nonzero()[:, 0]
        other = self._index(target - images * n_bins)[atoms]
        counts = self.counts[other]
        i = torch.repeat_interleave(atoms, counts)
        running = torch.arange(len(i), device=i.device) - torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
        j = self.order[torch.repeat_interleave(self.starts[other], counts) + running]
        if not any(offset):
            once = i < j
            i, j = i[once], j[once]
        moved = torch.einsum("px,pxy->py", images[i].double(), self.cells[self.system[i]])
        near = (self.positions[j] - self.positions[i] + moved).square().sum(dim=1) < self.cutoff**2
        i, j = i[near], j[near]
        return torch.stack([i, j]), images[i] + (self.wraps[i] - self.wraps[j]).long()


def _complete(cells: Tensor) -> Tensor:
    """Cells with unit vectors in place of missing ones."""
    missing = (cells == 0).all(dim=2)
    if not missing.any():
        return cells
    cells = torch.where(missing.all(dim=1)[:, None, None], torch.eye(3).to(cells), cells)
    for k in (missing.any(dim=1) & ~missing.all(dim=1)).nonzero()[:, 0].tolist():
        cells[k] = torch.from_numpy(np.asarray(complete_cell(cells[k].cpu().numpy()))).to(cells)
    return cells
