"""Smallest distance of molecules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabie_ase.observables.grid import SmearedDensity
from stabie_ase.observables.local import pairs_expected
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import in_parts
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import Spec

MARGIN = 0.5
"""Å by which the grid goes beyond the largest that the reference has."""

MAX_RANGE = 64.0
"""Å up to which the molecules of a reference are looked for."""


@dataclass(frozen=True)
class MinimumDistance(SmearedDensity):
    """Distribution over frames of the smallest distance of two atoms of different molecules, d = min r_ij.

    p(r) = δ(r - d), smeared by a normalised Gaussian, in 1/Å: the mean over frames is the density of d, with integral one. A bin
    holds the mean over its width. A distance beyond the last bin is missing from the integral. It is a distribution and
    not the mean ⟨d⟩, because what a model gets wrong are its rare close contacts (Raja et al., arXiv 2402.13984, stop water at 1.2 Å), a
    tail that hardly moves the mean. A minimum of the whole: it depends on the size of the system and has no meaning for groups.

    Parameters
    ----------
    molecule : Tensor of int64, shape (n_atoms,)
        Of each atom of a system; every system of a batch has the same.
    r_max : float
        End of the grid in Å.
    bin_width : float
        In Å.
    smearing : float
        Standard deviation of the Gaussian in Å.
    """

    molecule: Tensor
    r_max: float
    bin_width: float = 0.02
    smearing: float = 0.02
    name, label = "min-distance", "p(smallest intermolecular distance) (1/Å)"

    def __post_init__(self):
        super().__post_init__()
        if int(self.molecule.max()) == 0:
            raise ValueError("the reference is one molecule: there is no distance to others; hr is for the atoms within one")

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> MinimumDistance:
        """`min-distance`, with `r_max`, `bin_width` and `smearing` in Å; the grid goes beyond what the reference shows."""
        given = spec.read({"r_max": float, "bin_width": float, "smearing": float})
        if "r_max" in given:
            return cls(setting.topology.molecule, **given)
        wide, batch = cls(setting.topology.molecule, 4.0), AtomsBatch.from_atoms(setting.frames)
        while wide.r_max <= MAX_RANGE:
            largest = float(wide.distances(batch).max())
            if largest < math.inf:
                return cls(wide.molecule, math.ceil(2.0 * (largest + MARGIN)) / 2.0, **given)
            wide = replace(wide, r_max=2.0 * wide.r_max)
        raise ValueError(f"the molecules of some reference frame are further apart than {MAX_RANGE:g} Å; give min-distance,r_max=, in Å")

    def distances(self, batch: AtomsBatch) -> Tensor:
        """The smallest distance in every system, float64, shape (n_systems,), in Å; infinite beyond the grid."""
        if set(batch.sizes) != {len(self.molecule)}:
            raise ValueError(f"{self.name} is of a whole system of {len(self.molecule)} atoms, got systems of {sorted(set(batch.sizes))}")
        reach = self.r_max + 6.0 * self.smearing
        batch = batch.to(dtype=torch.float64)
        return torch.cat([self._smallest(part, reach) for part in in_parts(batch, pairs_expected(batch, reach))])

    def _smallest(self, batch: AtomsBatch, reach: float) -> Tensor:
        near = neighbor_list(batch, reach).half
        molecule = self.molecule.to(batch.device)[batch.index_in_system[near.pairs]]
        distances = near.vectors(batch).norm(dim=1)
        apart = (molecule[0] != molecule[1]) & (distances < reach)
        smallest = distances.new_full((batch.n_systems,), math.inf)
        return smallest.scatter_reduce(0, batch.system[near.pairs[0, apart]], distances[apart], "amin")

    def values(self, batch: AtomsBatch) -> Tensor:
        """p(r) of every system, float64, shape (n_systems, n_bins), in 1/Å."""
        edges = torch.arange(self.n_bins + 1, dtype=torch.float64, device=batch.device) * self.bin_width
        below = 0.5 * torch.erf((edges - self.distances(batch)[:, None]) / (math.sqrt(2.0) * self.smearing))
        return below.diff(dim=1) / self.bin_width
