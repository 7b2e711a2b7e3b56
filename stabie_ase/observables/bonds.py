"""Lengths of bonds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from stabie_ase.observables.base import Axis, Observable
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import pair_distances
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology
from stabie_ase.system.spec import BadSpec, Spec


@dataclass(frozen=True)
class BondLengths(Observable):
    """The length of every bond of the system, or of those between two elements.

    g_k = |r_j - r_i| of bond k, by the nearest image, in Å. An error is a mean over bonds of deviations of mean lengths.

    Parameters
    ----------
    topology : Topology
    elements : tuple of int
        Atomic numbers of the two elements, in the order of the name; of all bonds if none are given.
    """

    topology: Topology
    elements: tuple[int, int] | None = None
    label = "bond length (Å)"

    def __post_init__(self):
        if not self.bonds.shape[1]:
            which = "" if self.elements is None else f"{pair_name(self.elements)} "
            raise ValueError(f"the reference has no {which}bonds, so that their lengths cannot be matched")

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> BondLengths:
        """`bond-length`, or `bond-length:O-H` for the bonds between two elements."""
        return cls(setting.topology, spec.read({"elements": element_pair}, "elements").get("elements"))

    @property
    def name(self) -> str:
        """"bond-length", or with its two elements."""
        return "bond-length" if self.elements is None else f"bond-length:{pair_name(self.elements)}"

    @property
    def subject(self) -> str:
        """Of two elements in any order."""
        return self.name if self.elements is None else f"bond-length:{pair_name(sorted(self.elements))}"

    @cached_property
    def bonds(self) -> Tensor:
        """Shape (2, n_bonds)."""
        bonds = self.topology.bonds
        if self.elements is None:
            return bonds
        found = self.topology.numbers[bonds].sort(dim=0).values
        return bonds[:, (found == torch.tensor(sorted(self.elements))[:, None]).all(dim=0)]

    @cached_property
    def axis(self) -> Axis:
        symbols = [chemical_symbols[z] for z in self.topology.numbers.tolist()]
        return Axis.of_names("bond", [f"{symbols[i]}{i}-{symbols[j]}{j}" for i, j in self.bonds.T.tolist()])

    def values(self, batch: AtomsBatch) -> Tensor:
        """Lengths in every system, float64, shape (n_systems, n_bonds), in Å."""
        n = len(self.topology.numbers)
        if set(batch.sizes) != {n}:
            raise ValueError(f"bond lengths are of a system of {n} atoms, got systems of {sorted(set(batch.sizes))}")
        return pair_distances(batch, self.bonds)


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
