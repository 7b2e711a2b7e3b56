"""Chains of bonded atoms: bonds, angles, torsions."""

from __future__ import annotations

import torch
from torch import Tensor

from stabie_ase.structures.topology import Topology


def bonded_chains(topology: Topology, n: int, elements: tuple[int, ...] | None = None) -> Tensor:
    """Chains of bonded atoms: bonds of two, angles of three, torsions of four.

    Parameters
    ----------
    topology : Topology
    n : int
        Atoms in a chain, all of them different.
    elements : tuple of int, optional
        Their atomic numbers, in this order or the reverse.

    Returns
    -------
    Tensor of int64, shape (n, n_chains)
        Each chain in one of its two directions.
    """
    directed = torch.cat([topology.bonds, topology.bonds.flip(0)], dim=1)
    chains, starts = directed, Places(directed[0], len(topology.numbers))
    for _ in range(n - 2):
        chain, bond = starts.join(chains[-1])
        longer = torch.cat([chains[:, chain], directed[1:, bond]])
        chains = longer[:, (longer[:-1] != longer[-1]).all(dim=0)]
    chains = chains[:, chains[0] < chains[-1]]
    if elements is None:
        return chains
    found, wanted = topology.numbers[chains], torch.tensor(elements)[:, None]
    return chains[:, (found == wanted).all(dim=0) | (found == wanted.flip(0)).all(dim=0)]


class Places:
    """Where in a list each number is, for looking up many at once.

    Parameters
    ----------
    numbers : Tensor of int64, shape (n_numbers,)
        From 0 on.
    n : int
        More than any of them.
    """

    def __init__(self, numbers: Tensor, n: int):
        self.order, self.count = numbers.argsort(stable=True), torch.bincount(numbers, minlength=n)
        self.start = self.count.cumsum(0) - self.count

    def join(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs of a wanted number and the same in the list.

        Parameters
        ----------
        wanted : Tensor of int64, shape (n_wanted,)

        Returns
        -------
        Tensor, Tensor of int64, shape (n_pairs,)
            Places in `wanted`, in order, and in the list.
        """
        repeats = self.count[wanted]
        first = torch.arange(len(wanted), device=wanted.device).repeat_interleave(repeats)
        within = torch.arange(len(first), device=wanted.device) - (repeats.cumsum(0) - repeats)[first]
        return first, self.order[self.start[wanted[first]] + within]
