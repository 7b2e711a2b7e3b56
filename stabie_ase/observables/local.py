"""Means of local quantities, each of which belongs to an atom: a bond, an angle, a number of neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stabie_ase.observables.base import Observable
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.chains import Places
from stabie_ase.structures.geometry import in_parts
from stabie_ase.structures.topology import Groups, Topology

Terms = tuple[Tensor, Tensor]
"""Atoms of a batch and the quantity x that belongs to each, shape (n_terms,) each."""


class LocalMean(Observable):
    """The mean of a quantity x over the terms that belong to the atoms of a group, g = Σ_t f(x_t) / Σ_t 1.

    Weighted by its number of terms, the mean over the groups of a frame is that of the whole frame, if each atom is in one of
    them. A group without any term has none: zero. A subclass gives `terms` and, unless f is x itself, `summed`.
    """

    def terms(self, frames: AtomsBatch) -> Iterator[Terms]:
        """All terms, some at a time."""
        raise NotImplementedError

    def summed(self, x: Tensor, group: Tensor, n_groups: int) -> Tensor:
        """Σ f(x) in each group, float64, shape (n_groups, d), of terms of these groups, shape (n_terms,)."""
        return x.new_zeros((n_groups, 1)).index_add(0, group, x[:, None])

    def values(self, batch: AtomsBatch) -> Tensor:
        """g of every system, float64, shape (n_systems, d)."""
        return self(batch)

    def __call__(self, frames: AtomsBatch, groups: Groups | None = None) -> Tensor:
        """g of every group, float64, shape (n_groups, d); of every system if none are given."""
        groups = groups or Groups.systems(frames)
        members = Places(groups.atoms, frames.n_atoms)
        total = torch.zeros((groups.n_groups, len(self.measure)), dtype=torch.float64, device=frames.device)
        count = total.new_zeros(groups.n_groups)
        for atoms, x in self.terms(frames.to(dtype=torch.float64)):
            term, member = members.join(atoms)
            group = groups.group[member]
            total += self.summed(x[term], group, groups.n_groups)
            count += torch.bincount(group, minlength=groups.n_groups)
        return total / count.clamp(min=1.0)[:, None]


class LocalDensity(LocalMean):
    """The probability density of a quantity on a grid; a bin holds the mean over its width.

    What is not on the grid, or not finite, is missing from the integral.

    Attributes
    ----------
    bin_width : float
        In the unit of the quantity.
    """

    bin_width: float

    def bins(self, x: Tensor) -> Tensor:
        """The bin of each finite value, int64, shape (n_terms,)."""
        return (x / self.bin_width).long()

    @property
    def measure(self) -> Tensor:
        """The bin width each, shape (n_bins,): a distance is an integral."""
        return torch.full((len(self.axis.values),), self.bin_width, dtype=torch.float64)

    def summed(self, x: Tensor, group: Tensor, n_groups: int) -> Tensor:
        """Terms by bin over the bin width, float64, shape (n_groups, n_bins)."""
        n_bins = len(self.axis.values)
        finite = torch.isfinite(x)
        bins, group = self.bins(x[finite]), group[finite]
        on_grid = (bins >= 0) & (bins < n_bins)
        flat = group[on_grid] * n_bins + bins[on_grid]
        return torch.bincount(flat, minlength=n_groups * n_bins).view(n_groups, n_bins).double() / self.bin_width


def terms_of_topology(
    frames: AtomsBatch, topology: Topology, owners: Tensor, quantity: Callable[[AtomsBatch], Tensor], vectors: int
) -> Iterator[Terms]:
    """Terms of systems that all have one topology, some systems at a time.

    Parameters
    ----------
    frames : AtomsBatch
    topology : Topology
    owners : Tensor of int64, shape (n_owners, n_terms)
        Atoms of a system that each term belongs to, in equal parts: there it is a term of each of them.
    quantity : callable
        x of some systems, shape (n_systems, n_terms).
    vectors : int
        That are worked out for one system.

    Yields
    ------
    Tensor, Tensor
        See `Terms`.
    """
    first, n = 0, len(topology.numbers)
    for part in in_parts(frames, vectors):
        x = quantity(part)
        starts = first + n * torch.arange(part.n_systems, device=frames.device)
        atoms = owners.to(frames.device)[:, None, :] + starts[None, :, None]
        yield atoms.flatten(), x.expand(atoms.shape).flatten()
        first += part.n_atoms


def check_size(batch: AtomsBatch, topology: Topology, name: str) -> None:
    """Raise ValueError for systems that are not of the size of a topology."""
    if set(batch.sizes) != {len(topology.numbers)}:
        raise ValueError(f"{name} is of a system of {len(topology.numbers)} atoms, got systems of {sorted(set(batch.sizes))}")


def pairs_expected(batch: AtomsBatch, cutoff: float) -> int:
    """About how many pairs within a cutoff, in Å, the largest of some systems has."""
    n = max(batch.sizes)
    if not bool(batch.pbc.all()):
        return n * n
    volume = float(torch.linalg.det(batch.cells.double()).abs().nan_to_num(nan=math.inf).min())
    return math.ceil(n * max(1.0, 4.0 / 3.0 * math.pi * cutoff**3 * n / max(volume, 1e-9)))
