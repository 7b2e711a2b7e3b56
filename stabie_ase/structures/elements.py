"""Pairs of elements by their symbols."""

from __future__ import annotations

from collections.abc import Sequence

from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from stabie_ase.system.spec import BadSpec, Spec


def element_pair(text: str) -> tuple[int, int]:
    """Atomic numbers of O-H and the like; ValueError for what are no two elements."""
    symbols = text.split("-")
    if len(symbols) != 2 or any(s not in atomic_numbers for s in symbols):
        raise ValueError("expected two elements, as O-H")
    return atomic_numbers[symbols[0]], atomic_numbers[symbols[1]]


def pair_name(elements: Sequence[int]) -> str:
    """O-H and the like of two atomic numbers."""
    return "-".join(chemical_symbols[z] for z in elements)


def check_known(elements: tuple[int, ...], numbers: Tensor, spec: Spec) -> None:
    """Raise BadSpec for elements that a system does not hold; `numbers` has the shape (n_atoms,)."""
    missing = [chemical_symbols[z] for z in elements if z not in numbers.tolist()]
    if missing:
        here = ", ".join(chemical_symbols[z] for z in sorted(set(numbers.tolist())))
        raise BadSpec(f"{str(spec)!r}: the reference has no {' and no '.join(missing)}, only {here}")
