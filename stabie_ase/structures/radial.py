"""Neighbours counted by their distance, and what an ideal gas has of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import NeighborList, neighbor_list

MAX_BINS = 100_000
"""On a grid of distances or angles; more is a width that nobody means."""


def count_bins(reach: float, width: float, name: str) -> int:
    """As many bins of a width as reach a distance, both in Å.

    Parameters
    ----------
    reach : float
    width : float
    name : str
        What the grid is of, for messages.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        More than `MAX_BINS`, or a range or width that is not positive.
    """
    if not (0.0 < width < reach <= width * MAX_BINS):
        raise ValueError(f"{name} needs r_max > bin_width > 0 and at most {MAX_BINS} bins, got r_max={reach:g}, bin_width={width:g} Å")
    return math.ceil(reach / width - 1e-9)


@dataclass(frozen=True)
class Shells:
    """Spherical shells of equal width around an atom.

    Attributes
    ----------
    n : int
    width : float
        In Å.
    """

    n: int
    width: float

    @classmethod
    def up_to(cls, r_max: float, width: float) -> Shells:
        """As many of a width as reach a distance, both in Å; ValueError as by `count_bins`."""
        return cls(count_bins(r_max, width, "a radial distribution function"), width)

    @property
    def reach(self) -> float:
        """Outer radius of the last one, in Å."""
        return self.n * self.width

    @cached_property
    def volumes(self) -> Tensor:
        """Shape (n,), float64, in Å³."""
        edges = torch.arange(self.n + 1, dtype=torch.float64) * self.width
        return 4.0 / 3.0 * math.pi * (edges[1:] ** 3 - edges[:-1] ** 3)

    def neighbors(self, batch: AtomsBatch) -> NeighborList:
        """All pairs that are within reach, over all images."""
        return neighbor_list(batch, self.reach)

    def count(self, batch: AtomsBatch, near: NeighborList, elements: tuple[int, int], row: Tensor, n_rows: int) -> Tensor:
        """Neighbours of one element around atoms of another, by shell.

        Parameters
        ----------
        batch : AtomsBatch
        near : NeighborList
            As `neighbors` gives it.
        elements : tuple of int
            Atomic numbers of the atoms in the centres and of their neighbours.
        row : Tensor of int64, shape (n_atoms,)
            Where the neighbours of each atom are counted: in a row of its own, or in that of its system.
        n_rows : int

        Returns
        -------
        Tensor of float64, shape (n_rows, n)
        """
        i, j = near.pairs
        wanted = (batch.numbers[i] == elements[0]) & (batch.numbers[j] == elements[1])
        shell = (near.vectors(batch).norm(dim=1)[wanted] / self.width).long()
        flat = (row[i[wanted]] * self.n + shell)[shell < self.n]
        return torch.bincount(flat, minlength=n_rows * self.n).view(n_rows, self.n).double()


def partner_density(batch: AtomsBatch, elements: tuple[int, int]) -> Tensor:
    """Possible partners of one atom of the first element over the volume, float64, shape (n_systems,), in 1/Å³.

    An atom is no partner of itself, so that g(r) = 1 in an ideal gas.
    """
    volume = torch.linalg.det(batch.cells.double()).abs()
    partners = batch.sum_over_atoms((batch.numbers == elements[1]).double()) - float(elements[0] == elements[1])
    return partners.clamp(min=0.0) / volume


def radial_distributions(batch: AtomsBatch, kinds: list[tuple[int, int]], shells: Shells) -> Tensor:
    """g_ab(r) of every system for some pairs of elements, float64, shape (n_systems, n_kinds, n_shells).

    As `RadialDistribution` defines it; zero where a system has no such pair.
    """
    near, found = shells.neighbors(batch), []
    volumes = shells.volumes.to(batch.device)
    for kind in kinds:
        counts = shells.count(batch, near, kind, batch.system, batch.n_systems)
        centres = batch.sum_over_atoms((batch.numbers == kind[0]).double())
        ideal = (centres * partner_density(batch, kind))[:, None] * volumes
        found.append(torch.where(ideal > 0, counts / ideal.clamp(min=1e-300), 0.0))
    return torch.stack(found, dim=1)
