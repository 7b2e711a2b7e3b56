"""The places that atoms stay at, from frames, and how far from them others are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import nearest_images
from stabie_ase.structures.neighbors import neighbor_list

FIRST_REACH = 4.0
"""Å within which nearest neighbours are looked for before farther away."""


@dataclass(frozen=True)
class Sites:
    """Mean positions of the atoms of a system, by the images nearest to the first frame, without the drift of the whole.

    Attributes
    ----------
    frame : AtomsBatch
        One system, its positions are the sites.
    spread : float
        Root-mean-square displacement of the reference's atoms from them, in Å; 0 for one frame.
    """

    frame: AtomsBatch
    spread: float = 0.0

    @classmethod
    def from_frames(cls, frames: Sequence[Atoms]) -> Sites:
        """Sites of one system; ValueError for frames that are not all of the same atoms in the same order."""
        batch = AtomsBatch.from_atoms(frames)
        if not batch.same_composition:
            raise ValueError("sites need reference frames of one system with its atoms in one order")
        first = cls(batch.select([0]))
        moved = first.displacements(batch)
        mean = moved.mean(dim=0)
        variance = (moved - mean).square().sum() / (moved.shape[1] * max(len(moved) - 1, 1))
        return cls(first.frame.replace(positions=first.frame.positions + mean), float(variance.sqrt()))

    @cached_property
    def spacing(self) -> float:
        """Mean distance from a site to its nearest neighbour, in Å."""
        return float(self.nearest.mean())

    @cached_property
    def nearest(self) -> Tensor:
        """Distance from each site to its nearest neighbour, shape (n_atoms,), in Å; infinite where there is none."""
        frame, reach = self.frame, FIRST_REACH
        size = float(frame.positions.norm(dim=1).max() + frame.cells.norm(dim=2).sum())
        while True:
            near = neighbor_list(frame, reach)
            found = torch.full((frame.n_atoms,), torch.inf, dtype=torch.float64)
            found.scatter_reduce_(0, near.pairs[0], near.vectors(frame).norm(dim=1), "amin")
            if bool(torch.isfinite(found).all()) or reach > 2.0 * size:
                return found
            reach *= 2.0

    def displacements(self, batch: AtomsBatch) -> Tensor:
        """From the sites to the atoms of systems like it, in Å.

        Sites go with the cell. The image of each atom is that nearest to its site once the whole has been moved by what
        the first atom has; then the displacement of the centre of mass is taken out. That is right while no atom is farther
        from its site than a quarter of the cell, however far all of them drift together.

        Parameters
        ----------
        batch : AtomsBatch
            Systems of the same atoms.

        Returns
        -------
        Tensor of float64, shape (n_systems, n_atoms, 3)
        """
        n, device = len(self.frame.numbers), batch.device
        if set(batch.sizes) != {n}:
            raise ValueError(f"the sites are those of {n} atoms, got systems of {sorted(set(batch.sizes))}")
        moved = batch.positions.double().view(-1, n, 3) - self._in_cells(batch)
        moved = nearest_images(moved - moved[:, :1], batch)
        masses = self.frame.masses.double().to(device)
        return moved - torch.einsum("snx,n->sx", moved, masses / masses.sum())[:, None]

    def _in_cells(self, batch: AtomsBatch) -> Tensor:
        """The sites in the cell of each system, which may be another than the reference's, shape (n_systems, n_atoms, 3)."""
        frame = self.frame.to(batch.device)
        positions = frame.positions.double().expand(batch.n_systems, -1, -1)
        if not bool(batch.pbc.all() and frame.pbc.all()):
            return positions
        return positions @ torch.linalg.solve(frame.cells.double(), batch.cells.double())
