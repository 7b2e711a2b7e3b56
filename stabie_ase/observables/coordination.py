"""Coordination numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabie_ase.observables.base import Axis
from stabie_ase.observables.local import LocalMean, Terms, pairs_expected
from stabie_ase.observables.shells import first_shell
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.elements import check_known, element_pair, pair_name
from stabie_ase.structures.geometry import in_parts
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import BadSpec, Spec

REACH = 30.0
"""Widths beyond the cutoff up to which a smooth count goes: what is left out is 1e-13 of a neighbour."""


@dataclass(frozen=True)
class Coordination(LocalMean):
    """Mean number of atoms B around an atom A, or the probability of each number.

    g = 1/N_A Σ_{i∈A} n_i with n_i = Σ_{j∈B, j≠i} s(r_ij), over all images; s is one up to `r_cut` and zero beyond (Hansen &
    McDonald, Theory of Simple Liquids, 4th ed., section 2.5: 4πρ ∫_0^r_cut g(r) r² dr), or with a width w the smooth
    s(r) = 1 / (1 + exp((r - r_cut) / w)) (Sprik, Faraday Discuss. 110, 437, 1998). With `n_max` it is P(n) for n = 0, 1, ... n_max, the
    fraction of the atoms A with so many neighbours by the sharp count, the last with n_max or more. A number belongs to its atom A.

    Parameters
    ----------
    elements : tuple of int
        Atomic numbers of A and B.
    r_cut : float
        In Å.
    width : float
        In Å; zero for a sharp count.
    n_max : int, optional
        For the distribution.
    """

    elements: tuple[int, int]
    r_cut: float
    width: float = 0.0
    n_max: int | None = None

    def __post_init__(self):
        if not (0 < self.r_cut < math.inf and 0 <= self.width < math.inf):
            raise ValueError(f"{self.name} needs r_cut > 0 and width >= 0, got r_cut={self.r_cut:g}, width={self.width:g} Å")
        if self.n_max is not None and (self.n_max < 1 or self.width):
            raise ValueError(f"{self.name} needs n_max >= 1 and a sharp count, got n_max={self.n_max}, width={self.width:g} Å")

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Coordination:
        """`coordination:A-B`, with `r_cut` and `width` in Å; with `n_max` the distribution.

        Without `r_cut` it is the end of the first shell of B around A in the reference, the same for all models (`first_shell`).
        """
        given = spec.read({"elements": element_pair, "r_cut": float, "width": float, "n_max": int}, "elements")
        if "elements" not in given:
            raise BadSpec(f"{str(spec)!r} names no elements; write coordination:A-B for the number of B around A")
        check_known(given["elements"], AtomsBatch.from_atoms(setting.frames).numbers, spec)
        return cls(**given) if "r_cut" in given else cls(r_cut=first_shell(given["elements"], setting, "r_cut"), **given)

    @property
    def name(self) -> str:
        """"coordination:" or "coordination-distribution:" and the two elements."""
        return f"coordination{'' if self.n_max is None else '-distribution'}:{pair_name(self.elements)}"

    @property
    def label(self) -> str:
        """Of the values, which have no unit."""
        a, b = (pair_name([z]) for z in self.elements)
        return f"{b} around {a}" if self.n_max is None else f"P(n), {b} around {a}"

    @cached_property
    def axis(self) -> Axis:
        """One number, or the numbers of neighbours."""
        if self.n_max is None:
            return Axis.of_names("", ["mean"])
        return Axis(torch.arange(self.n_max + 1, dtype=torch.float64), "n")

    @property
    def measure(self) -> Tensor:
        """One each, shape (d,)."""
        return torch.ones(len(self.axis.values), dtype=torch.float64)

    def summed(self, x: Tensor, group: Tensor, n_groups: int) -> Tensor:
        """Sums of numbers of neighbours or atoms with each number, float64, shape (n_groups, d)."""
        if self.n_max is None:
            return super().summed(x, group, n_groups)
        d = self.n_max + 1
        flat = group * d + x.long().clamp(max=self.n_max)
        return torch.bincount(flat, minlength=n_groups * d).view(n_groups, d).double()

    def terms(self, frames: AtomsBatch) -> Iterator[Terms]:
        """Neighbours, of every atom A."""
        first, reach = 0, self.r_cut + REACH * self.width
        for part in in_parts(frames, pairs_expected(frames, reach)):
            near = neighbor_list(part, reach)
            (i, j), distances = near.pairs, near.vectors(part).norm(dim=1)
            wanted = (part.numbers[i] == self.elements[0]) & (part.numbers[j] == self.elements[1]) & (distances < reach)
            counts = distances.new_zeros(part.n_atoms).index_add(0, i[wanted], self._counted(distances[wanted]))
            atoms = (part.numbers == self.elements[0]).nonzero()[:, 0]
            yield first + atoms, counts[atoms]
            first += part.n_atoms

    def _counted(self, distances: Tensor) -> Tensor:
        return torch.sigmoid((self.r_cut - distances) / self.width) if self.width else torch.ones_like(distances)
