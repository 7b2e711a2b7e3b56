"""The bonds of one molecule, from frames of it, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch

BOND_FACTOR = 1.25
"""Two atoms are bonded when their mean distance is below this factor times the sum of their covalent radii."""

BROKEN = 1.0
"""Å beyond the longest bond at which a bond of other frames is taken for another order of the atoms."""

OFTEN = 0.1
"""Fraction of the frames in which two atoms are within a bond's length that makes a bond which other frames must keep."""


@dataclass(frozen=True)
class Topology:
    """Bonds of a molecule and the shortest distance of every pair of its atoms in the frames it was taken from.

    Attributes
    ----------
    numbers : Tensor of int64, shape (n_atoms,)
    pairs : Tensor of int64, shape (2, n_pairs)
        All pairs i < j.
    mean, shortest : Tensor of float64, shape (n_pairs,)
        Distances over the frames, in Å.
    bonded : Tensor of bool, shape (n_pairs,)
    """

    numbers: Tensor
    pairs: Tensor
    mean: Tensor
    shortest: Tensor
    bonded: Tensor

    @classmethod
    def from_frames(cls, frames: Sequence[Atoms]) -> Topology:
        """Bonds from the distances averaged over all frames.

        In a single hot frame a bond can be stretched beyond any sensible threshold.

        Raises
        ------
        ValueError
            Periodic frames, several compositions, or frames whose bonds are not those of the others.
        """
        batch = AtomsBatch.from_atoms(frames)
        if not batch.same_composition:
            raise ValueError("bonds need reference frames of one molecule with its atoms in one order")
        if batch.pbc.any():
            raise ValueError("bonds are those of isolated molecules, but the reference is periodic")
        numbers = batch.numbers[: batch.n_atoms // batch.n_systems]
        pairs = torch.triu_indices(len(numbers), len(numbers), offset=1)
        reach = BOND_FACTOR * covalent_sums(numbers, pairs)
        total, near = torch.zeros_like(reach), torch.zeros_like(reach)
        shortest, longest = torch.full_like(reach, torch.inf), torch.zeros_like(reach)
        for distances in _distances(batch, pairs):  # never all frames at once: pairs grow with the square of the atoms
            total += distances.sum(dim=0)
            near += (distances < reach).sum(dim=0)
            shortest = torch.minimum(shortest, distances.amin(dim=0))
            longest = torch.maximum(longest, distances.amax(dim=0))
        torn = (near > OFTEN * batch.n_systems) & (longest > reach + BROKEN)
        if torn.any():
            _refuse(batch, pairs[:, torn], reach[torn])
        mean = total / batch.n_systems
        return cls(numbers, pairs, mean, shortest, mean < reach)

    @cached_property
    def separation(self) -> Tensor:
        """Bonds on the shortest path between the two atoms of each pair, shape (n_pairs,), infinite between molecules."""
        n, bonds = len(self.numbers), self.pairs[:, self.bonded].numpy()
        graph = coo_array((np.ones(bonds.shape[1]), (bonds[0], bonds[1])), shape=(n, n)).tocsr()
        paths = shortest_path(graph, directed=False, unweighted=True)
        return torch.as_tensor(paths[self.pairs[0].numpy(), self.pairs[1].numpy()])


def covalent_sums(numbers: Tensor, pairs: Tensor) -> Tensor:
    """Sums of the covalent radii of pairs (Cordero et al., Dalton Trans., 2832, 2008), float64, shape (n_pairs,), in Å."""
    return torch.as_tensor(covalent_radii)[numbers.cpu()][pairs.cpu()].sum(dim=0)


def _distances(batch: AtomsBatch, pairs: Tensor, at_once: int = 2**17) -> Iterator[Tensor]:
    """Distances of the pairs in some frames at a time, shape (n_frames, n_pairs)."""
    positions = batch.positions.view(batch.n_systems, -1, 3)
    for part in positions.split(max(1, at_once // max(1, pairs.shape[1]))):
        yield (part[:, pairs[1]] - part[:, pairs[0]]).norm(dim=2)


def _refuse(batch: AtomsBatch, pairs: Tensor, reach: Tensor) -> None:
    """Name a frame that stands apart by the bonds that are not there."""
    distances = torch.cat(list(_distances(batch, pairs)))
    lost = distances > reach + BROKEN
    often = (distances <= reach).sum(dim=0)
    frame = int((lost * often).sum(dim=1).argmax())  # one that lacks what most have, not one that lacks what few have
    k = int(torch.where(lost[frame], distances[frame] - reach, -torch.inf).argmax())
    i, j = pairs[:, k].tolist()
    raise ValueError(
        f"frame {frame}: atoms {i} and {j} are {float(distances[frame, k]):.2f} Å apart, but bonded in "
        f"{int(often[k])} of {batch.n_systems} frames; are its atoms in another order? Bring the "
        "frames to one order of the atoms, or leave out those in which a bond is broken"
    )
