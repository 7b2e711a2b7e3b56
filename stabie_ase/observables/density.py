"""Mass density."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ase.units import _amu
from torch import Tensor

from stabie_ase.observables.base import Axis, Observable
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups
from stabie_ase.system.spec import Spec

G_PER_CM3 = _amu * 1e3 / 1e-24
"""One u/Å³, CODATA as in `ase.units`."""


@dataclass(frozen=True)
class Density(Observable):
    """Mass density ρ = Σ_i m_i / V of a periodic system, in g/cm³ (IUPAC Green Book, 3rd ed., section 2.2).

    A number that changes at constant pressure only. A group of atoms has the density of its system.
    """

    name, label = "density", "density (g/cm³)"
    axis = Axis.of_names("", ["density"])

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Density:
        """`density`."""
        spec.read({})
        if not all(atoms.pbc.all() for atoms in setting.frames):
            raise ValueError("a density needs a reference that is periodic in all directions; a molecule has no volume")
        return cls()

    def values(self, batch: AtomsBatch) -> Tensor:
        """Densities, float64, shape (n_systems, 1), in g/cm³."""
        if not bool(batch.pbc.all()):
            raise ValueError("a density needs frames that are periodic in all directions")
        return (G_PER_CM3 * batch.sum_over_atoms(batch.masses.double()) / torch.linalg.det(batch.cells.double()).abs())[:, None]

    def __call__(self, frames: AtomsBatch, groups: Groups | None = None) -> Tensor:
        """The density of the system of every group, float64, shape (n_groups, 1), in g/cm³."""
        return self.values(frames) if groups is None else self.values(frames)[groups.system]
