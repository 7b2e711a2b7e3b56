"""Molecules that come too close to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.stability.criteria.base import OneFrame, Verdict, check_tolerance
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import Spec

DISTANCE_MARGIN = 0.25
"""Å below the smallest distance in the reference, where no smallest one is given."""

MAX_DISTANCE_FACTOR = 2.0
"""Times the smallest distance allowed up to which molecules are looked for; beyond it a distance is not told."""


@dataclass(frozen=True)
class IntermolecularDistance(OneFrame):
    """Unstable once two atoms of different molecules are closer than a distance (Raja et al., arXiv 2402.13984, for water: 1.2 Å).

    Parameters
    ----------
    molecule : Tensor of int64, shape (n_atoms,)
        Of each atom of a system; every system of a batch has the same.
    smallest : float
        In Å.
    """

    molecule: Tensor
    smallest: float
    name, unit = "intermolecular", "Å"

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> IntermolecularDistance:
        """`intermolecular:1.2`, the distance in Å; without one, a little below the smallest in the reference.

        ValueError where the reference is one molecule.
        """
        molecule = setting.topology.molecule
        if int(molecule.max()) == 0:
            raise ValueError("the reference is one molecule: there is no distance to others; contacts are for the atoms within one")
        smallest = spec.read({"distance": float}, "distance").get("distance")
        if smallest is None:
            smallest = float(_smallest(AtomsBatch.from_atoms(setting.frames), molecule, 3.0)[0].min()) - DISTANCE_MARGIN
        check_tolerance(smallest, "the smallest distance of molecules")
        return cls(molecule, smallest)

    def judge(self, state: MDState) -> Verdict:
        """The two atoms of different molecules that are closest; the severity is the smallest distance allowed over theirs."""
        distance, atoms = _smallest(state.batch, self.molecule, MAX_DISTANCE_FACTOR * self.smallest)
        return Verdict(self.smallest / distance, distance, atoms)

    def describe(self) -> str:
        return f"two molecules closer than {self.smallest:.3g} Å ({int(self.molecule.max()) + 1} molecules)"


def _smallest(batch: AtomsBatch, molecule: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Smallest distance of molecules in each system, at most `cutoff`, shape (n_systems,), and its two atoms (-1: none)."""
    near = neighbor_list(batch, cutoff).half
    i, j = near.pairs
    molecule = molecule.to(batch.device).repeat(batch.n_systems)
    distances = near.vectors(batch).norm(dim=1).double()
    apart = (molecule[i] != molecule[j]) & (distances < cutoff)
    system, distances, i, j = batch.system[i[apart]], distances[apart], i[apart], j[apart]
    smallest = distances.new_full((batch.n_systems,), cutoff).scatter_reduce(0, system, distances, "amin")
    atoms = system.new_full((batch.n_systems, 2), -1)
    closest = distances == smallest[system]
    atoms[system[closest]] = batch.index_in_system[torch.stack([i[closest], j[closest]], dim=1)]
    return smallest, atoms
