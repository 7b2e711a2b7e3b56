"""Lengths of bonds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from ase.data import chemical_symbols
from torch import Tensor

from stabie_ase.observables.base import Axis, Observable
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.elements import element_pair, pair_name
from stabie_ase.structures.geometry import pair_distances
from stabie_ase.structures.neighbourhoods import formulas
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups, Topology
from stabie_ase.system.spec import Spec


@dataclass(frozen=True)
class BondLengths(Observable):
    """The length of every bond of the system, or of those between two elements.

    g_k = |r_j - r_i| of bond k, by the nearest image, in Å. An error is a mean over bonds of deviations of mean lengths.
    Among molecules that are all alike no bond differs from its like in the others: g_k is then the mean over all bonds of two
    elements, of the system or of a group of its molecules.

    Parameters
    ----------
    topology : Topology
    elements : tuple of int
        Atomic numbers of the two elements, in the order of the name; of all bonds if none are given.
    by_kind : bool
        Means over the bonds of the same two elements, the only ones that groups of atoms of a system have.
    """

    internal = True

    topology: Topology
    elements: tuple[int, int] | None = None
    by_kind: bool = False
    label = "bond length (Å)"

    def __post_init__(self):
        if not self.bonds.shape[1]:
            which = "" if self.elements is None else f"{pair_name(self.elements)} "
            raise ValueError(f"the reference has no {which}bonds, so that their lengths cannot be matched")

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> BondLengths:
        """`bond-length`, or `bond-length:O-H` for the bonds between two elements; means where there are several molecules, all alike."""
        elements, found = spec.read({"elements": element_pair}, "elements").get("elements"), formulas(setting.topology)
        return cls(setting.topology, elements, by_kind=len(found) > 1 == len(set(found)))

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
    def _kinds(self) -> tuple[Tensor, Tensor]:
        """Pairs of elements that have bonds, shape (n_kinds, 2), and which of them each bond is of, shape (n_bonds,)."""
        found = self.topology.numbers[self.bonds].sort(dim=0, descending=True).values
        kinds, kind = found.T.unique(dim=0, return_inverse=True)
        return kinds, kind

    @cached_property
    def axis(self) -> Axis:
        if self.by_kind:
            return Axis.of_names("bonds", [pair_name(pair) for pair in self._kinds[0].tolist()])
        symbols = [chemical_symbols[z] for z in self.topology.numbers.tolist()]
        return Axis.of_names("bond", [f"{symbols[i]}{i}-{symbols[j]}{j}" for i, j in self.bonds.T.tolist()])

    def values(self, batch: AtomsBatch) -> Tensor:
        """Lengths in every system, float64, shape (n_systems, n_bonds), in Å, or their means by kind, shape (n_systems, n_kinds)."""
        return self(batch) if self.by_kind else self._lengths(batch)

    def __call__(self, frames: AtomsBatch, groups: Groups | None = None) -> Tensor:
        """Lengths in every group, float64, shape (n_groups, d), in Å. By kind a group's are those of the bonds of its atoms.

        A bond that leaves a group, as none does between molecules, is half in it. ValueError for a group without one of a kind.
        """
        if not self.by_kind:
            return super().__call__(frames, groups)
        groups, lengths = groups or Groups.systems(frames), self._lengths(frames)
        kinds, kind = (x.to(lengths.device) for x in self._kinds)
        atom, of_kind = self.bonds.to(lengths.device).flatten(), torch.nn.functional.one_hot(kind, len(kinds)).double().repeat(2, 1)

        def in_groups(values: Tensor) -> Tensor:
            """Sums over the ends of bonds in each group, shape (n_groups, n_kinds), of values of ends, shape (n_frames, 2 n_bonds)."""
            of_atoms = values.new_zeros((frames.n_systems, len(self.topology.numbers), len(kinds)))
            of_atoms = of_atoms.index_add(1, atom, values[:, :, None] * of_kind).flatten(0, 1)
            return of_atoms.new_zeros((groups.n_groups, len(kinds))).index_add(0, groups.group, of_atoms[groups.atoms])

        ends = in_groups(torch.ones_like(lengths).repeat(1, 2))
        if not bool((ends > 0).all()):
            lacking = pair_name(kinds[int((ends <= 0).nonzero()[0, 1])].tolist())
            raise ValueError(f"{self.name} is to be of groups of atoms some of which have no {lacking} bond; try larger ones, or global")
        return in_groups(lengths.repeat(1, 2)) / ends

    def _lengths(self, batch: AtomsBatch) -> Tensor:
        """Of every bond, shape (n_systems, n_bonds)."""
        n = len(self.topology.numbers)
        if set(batch.sizes) != {n}:
            raise ValueError(f"bond lengths are of a system of {n} atoms, got systems of {sorted(set(batch.sizes))}")
        return pair_distances(batch, self.bonds)
