"""Mean and variance of the lengths of bonds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabie_ase.observables.base import Axis
from stabie_ase.observables.kinds import in_one_order, name_of_kind, refuse_none
from stabie_ase.observables.local import LocalMean, Terms, check_size, terms_of_topology
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.chains import bonded_chains
from stabie_ase.structures.elements import element_chain
from stabie_ase.structures.geometry import pair_distances
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology
from stabie_ase.system.spec import Spec

MIN_SPREAD = 1e-6
"""Å; below that bonds are as good as rigid."""


@dataclass(frozen=True)
class BondLengthMoments(LocalMean):
    """Mean and variance of the lengths of all bonds, or those between two elements, pooled.

    g = (⟨r⟩, σ/2 + ⟨(r - r̄)²⟩ / 2σ) with r̄ and σ the mean and the standard deviation of the reference, both in Å. The variance is
    taken about the reference's mean, not a frame's own: so it is a mean over frames, which an estimator needs, and is not lost
    where a frame or a group has one bond. It is told by the standard deviation it belongs to, to first order about σ (from
    v = σ² + 2σ δ), because two components of one unit and of like size can be weighed against each other. For the
    reference they are r̄ and σ; the variance is σ (2 g_2 - σ). By the nearest image. A bond belongs to both its atoms.

    Parameters
    ----------
    topology : Topology
    mean, spread : float
        r̄ and σ in Å.
    elements : tuple of int
        Atomic numbers of the two elements; all bonds if none are given.
    """

    internal = True

    topology: Topology
    mean: float
    spread: float
    elements: tuple[int, int] | None = None
    label = "bond length (Å)"
    axis = Axis.of_names("moment", ["mean", "standard deviation"])

    def __post_init__(self):
        refuse_none(self.bonds, "bonds", self.elements)
        if not self.spread > MIN_SPREAD:
            raise ValueError(
                f"{self.name} needs bonds whose lengths differ, in the reference their standard deviation is {self.spread:g} Å"
            )

    @classmethod
    def from_reference(cls, setting: Setting, elements: tuple[int, int] | None = None) -> BondLengthMoments:
        """About the mean and the standard deviation of the reference; ValueError if it has no such bonds, or rigid ones."""
        topology = setting.topology
        bonds = bonded_chains(topology, 2, elements)
        refuse_none(bonds, "bonds", elements)
        lengths = pair_distances(AtomsBatch.from_atoms(setting.frames), bonds)
        return cls(topology, float(lengths.mean()), float(lengths.std(correction=0)), elements)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> BondLengthMoments:
        """`bond-length-moments`, or `bond-length-moments:O-H` for the bonds between two elements."""
        return cls.from_reference(setting, spec.read({"elements": element_chain(2)}, "elements").get("elements"))

    @property
    def name(self) -> str:
        """"bond-length-moments", or with its two elements."""
        return name_of_kind("bond-length-moments", self.elements)

    @property
    def subject(self) -> str:
        """Of two elements in any order."""
        return name_of_kind("bond-length-moments", self.elements and in_one_order(self.elements))

    @cached_property
    def bonds(self) -> Tensor:
        """Shape (2, n_bonds)."""
        return bonded_chains(self.topology, 2, self.elements)

    def summed(self, x: Tensor, group: Tensor, n_groups: int) -> Tensor:
        """Sums of the two components, float64, shape (n_groups, 2), in Å."""
        deviation = 0.5 * self.spread + (x - self.mean).square() / (2.0 * self.spread)
        return x.new_zeros((n_groups, 2)).index_add(0, group, torch.stack([x, deviation], dim=1))

    def terms(self, frames: AtomsBatch) -> Iterator[Terms]:
        """Lengths in Å, of both atoms of a bond each."""
        check_size(frames, self.topology, self.name)
        return terms_of_topology(frames, self.topology, self.bonds, lambda part: pair_distances(part, self.bonds), self.bonds.shape[1])
