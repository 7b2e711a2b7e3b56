"""Elements by their symbols, as O-H."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from stabie_ase.system.spec import BadSpec, Spec

EXAMPLES = {2: "two elements, as O-H", 3: "three elements, as H-O-H", 4: "four elements, as C-C-C-C"}


def element_chain(n: int) -> Callable[[str], tuple[int, ...]]:
    """What reads the atomic numbers of so many elements, as H-O-H; ValueError for anything else."""

    def read(text: str) -> tuple[int, ...]:
        symbols = text.split("-")
        if len(symbols) != n or any(s not in atomic_numbers or not atomic_numbers[s] for s in symbols):
            raise ValueError(f"expected {EXAMPLES[n]}")
        return tuple(atomic_numbers[s] for s in symbols)

    return read


def element_pair(text: str) -> tuple[int, int]:
    """Atomic numbers of O-H and the like; ValueError for what are no two elements."""
    a, b = element_chain(2)(text)
    return a, b


def pair_name(elements: Sequence[int]) -> str:
    """O-H and the like of two atomic numbers."""
    return "-".join(chemical_symbols[z] for z in elements)


def check_known(elements: tuple[int, ...], numbers: Tensor, spec: Spec) -> None:
    """Raise BadSpec for elements that a system does not hold; `numbers` has the shape (n_atoms,)."""
    missing = [chemical_symbols[z] for z in elements if z not in numbers.tolist()]
    if missing:
        here = ", ".join(chemical_symbols[z] for z in sorted(set(numbers.tolist())))
        raise BadSpec(f"{str(spec)!r}: the reference has no {' and no '.join(missing)}, only {here}")
