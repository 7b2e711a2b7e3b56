"""Kinds of bonds, angles and torsions: chains of bonded atoms of given elements, and how they are named."""

from __future__ import annotations

import torch
from torch import Tensor

from stabie_ase.observables.local import Places
from stabie_ase.structures.elements import pair_name
from stabie_ase.structures.topology import Topology

YES_OR_NO = {"yes": True, "no": False}


def yes_or_no(text: str) -> bool:
    """Whether a text says yes; ValueError if it says neither."""
    if text not in YES_OR_NO:
        raise ValueError("expected yes or no")
    return YES_OR_NO[text]


def in_one_order(elements: tuple[int, ...]) -> tuple[int, ...]:
    """The same for a chain and its reverse, of atomic numbers."""
    return min(elements, elements[::-1])


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


def name_of_kind(what: str, elements: tuple[int, ...] | None) -> str:
    """As "angle", or "angle:H-O-H" of a kind."""
    return what if elements is None else f"{what}:{pair_name(elements)}"


def refuse_none(chains: Tensor, what: str, elements: tuple[int, ...] | None) -> None:
    """Raise ValueError where a reference has no such chains, shape (n, n_chains)."""
    if not chains.shape[1]:
        which = "" if elements is None else f"{pair_name(elements)} "
        raise ValueError(f"the reference has no {which}{what}, so that they cannot be matched")
