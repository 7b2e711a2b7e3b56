"""Radii of gyration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabie_ase.observables.base import Axis
from stabie_ase.observables.local import LocalMean, Terms, check_size, terms_of_topology
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import first_atoms, pair_vectors
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology
from stabie_ase.system.spec import Spec


@dataclass(frozen=True)
class RadiusOfGyration(LocalMean):
    """Radius of gyration of a molecule, or the mean over the molecules of a system of two atoms or more, in Å.

    R_g = (Σ_a m_a |r_a - r_c|² / Σ_a m_a)^½ with the centre of mass r_c (IUPAC Compendium of Chemical Terminology, "radius of
    gyration"; Rubinstein & Colby, Polymer Physics, section 2.4, for equal masses). Molecules are put together along their
    bonds by the nearest image, whatever their size. A molecule belongs to its first atom.

    Parameters
    ----------
    topology : Topology
    """

    internal = True

    topology: Topology
    name, label = "gyration", "radius of gyration (Å)"
    axis = Axis.of_names("", ["R_g"])

    def __post_init__(self):
        if not len(self.first):
            raise ValueError("the reference has no bonds and so no molecules, of which to have radii of gyration")

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> RadiusOfGyration:
        """`gyration`."""
        spec.read({})
        return cls(setting.topology)

    @cached_property
    def first(self) -> Tensor:
        """The first atom of each molecule of two atoms or more, shape (n_molecules,)."""
        molecule = self.topology.molecule
        atoms = torch.arange(len(molecule))
        return atoms[(first_atoms(molecule)[molecule] == atoms) & (torch.bincount(molecule)[molecule] > 1)]

    @cached_property
    def _levels(self) -> list[Tensor]:
        """Bonds that lead from an atom to one whose place follows from it, shape (2, n), outwards from the first atoms."""
        directed, levels = torch.cat([self.topology.bonds, self.topology.bonds.flip(0)], dim=1), []
        seen = torch.zeros(len(self.topology.numbers), dtype=torch.bool)
        parent = torch.zeros_like(self.topology.numbers)
        seen[self.first] = True
        while True:
            bonds = directed[:, seen[directed[0]] & ~seen[directed[1]]]
            if not bonds.shape[1]:
                return levels
            parent[bonds[1]] = bonds[0]  # in a ring an atom may be reached from two others: one of them
            reached = bonds[1].unique()
            levels.append(torch.stack([parent[reached], reached]))
            seen[reached] = True

    def radii(self, batch: AtomsBatch) -> Tensor:
        """R_g of every molecule, float64, shape (n_systems, n_molecules), in Å."""
        places = batch.positions.new_zeros((batch.n_systems, len(self.topology.numbers), 3), dtype=torch.float64)
        for bonds in self._levels:
            places[:, bonds[1]] = places[:, bonds[0]] + pair_vectors(batch, bonds)
        molecule = self.topology.molecule.to(batch.device)
        masses = batch.masses.double().view(batch.n_systems, -1)
        n = int(molecule.max()) + 1

        def weighted(x: Tensor) -> Tensor:
            """Mean of x by mass in each molecule, shape (n_systems, n_molecules, k)."""
            total = x.new_zeros((batch.n_systems, n, x.shape[2])).index_add(1, molecule, masses[..., None] * x)
            return total / masses.new_zeros((batch.n_systems, n)).index_add(1, molecule, masses)[..., None]

        squares = (places - weighted(places)[:, molecule]).square().sum(dim=2, keepdim=True)
        return weighted(squares)[:, molecule[self.first], 0].sqrt()

    def terms(self, frames: AtomsBatch) -> Iterator[Terms]:
        """R_g in Å, of the first atom of every molecule."""
        check_size(frames, self.topology, self.name)
        return terms_of_topology(frames, self.topology, self.first[None], self.radii, len(self.topology.numbers))
