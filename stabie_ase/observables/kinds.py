"""Kinds of bonds, angles and torsions, by their elements, and how they are named."""

from __future__ import annotations

from torch import Tensor

from stabie_ase.structures.elements import pair_name

YES_OR_NO = {"yes": True, "no": False}


def yes_or_no(text: str) -> bool:
    """Whether a text says yes; ValueError if it says neither."""
    if text not in YES_OR_NO:
        raise ValueError("expected yes or no")
    return YES_OR_NO[text]


def in_one_order(elements: tuple[int, ...]) -> tuple[int, ...]:
    """The same for a chain and its reverse, of atomic numbers."""
    return min(elements, elements[::-1])


def name_of_kind(what: str, elements: tuple[int, ...] | None) -> str:
    """As "angle", or "angle:H-O-H" of a kind."""
    return what if elements is None else f"{what}:{pair_name(elements)}"


def refuse_none(chains: Tensor, what: str, elements: tuple[int, ...] | None) -> None:
    """Raise ValueError where a reference has no such chains, shape (n, n_chains)."""
    if not chains.shape[1]:
        which = "" if elements is None else f"{pair_name(elements)} "
        raise ValueError(f"the reference has no {which}{what}, so that they cannot be matched")
