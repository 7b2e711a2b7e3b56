"""Atoms that lose or gain neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.stability.criteria.base import OneFrame, Verdict, check_tolerance
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.sites import Sites
from stabie_ase.system.spec import Spec

FIRST_SHELL_FACTOR = 1.28
"""Times the distance of nearest sites: between the last atoms that count as neighbours (bcc, 1.155) and the next (fcc, 1.414)."""

TOLERANCE = 2.0
"""Neighbours beyond what the reference shows: in long dynamics an atom has more neighbours, or fewer, than in a few frames."""


@dataclass(frozen=True)
class Coordination(OneFrame):
    """Unstable once an atom has more neighbours than any of its element in the reference, or fewer, by a tolerance.

    The coordination number is that of the first shell (Allen & Tildesley, Computer Simulation of Liquids, 2nd ed., section 2.6):
    neighbours of any element, images too, within `FIRST_SHELL_FACTOR` times the distance of the atom's site to its nearest
    neighbour in the mean of the reference, or within one distance for all atoms.

    Parameters
    ----------
    reach : Tensor of float64, shape (n_atoms,)
        In Å.
    fewest, most : Tensor of float64, shape (n_atoms,)
        Neighbours that the reference shows for the element of each atom.
    tolerance : float
    """

    reach: Tensor
    fewest: Tensor
    most: Tensor
    tolerance: float = TOLERANCE
    name, unit = "coordination", "neighbours"

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Coordination:
        """`coordination`, or `coordination:1` for a tolerance; `r_max` in Å, without which the reference must be a solid (ValueError)."""
        given = spec.read({"tolerance": float, "r_max": float}, "tolerance")
        batch = AtomsBatch.from_atoms(setting.frames)
        if not batch.same_composition:
            raise ValueError("coordination needs reference frames of one system with its atoms in one order")
        n = batch.n_atoms // batch.n_systems
        if "r_max" in given:
            check_tolerance(given["r_max"], "r_max of coordination")
            reach = torch.full((n,), given["r_max"], dtype=torch.float64)
        elif setting.kind.at_sites:
            reach = FIRST_SHELL_FACTOR * Sites.from_frames(setting.frames).nearest
        else:
            raise ValueError(
                f"coordination takes its first shell from a solid, but the reference is: {setting.kind.describe()}; give r_max in Å"
            )
        tolerance = given.get("tolerance", TOLERANCE)
        if not 0 < tolerance < n:
            raise ValueError(f"the tolerance of coordination must be a positive number of neighbours, got {tolerance:g}")
        counts = _neighbors(batch, reach)
        fewest, most = counts.amin(dim=0), counts.amax(dim=0)
        for z in set(batch.numbers.tolist()):
            of_element = batch.numbers[:n] == z
            fewest[of_element], most[of_element] = fewest[of_element].min(), most[of_element].max()
        return cls(reach, fewest, most, tolerance)

    def judge(self, state: MDState) -> Verdict:
        """The atom whose number of neighbours is farthest off; the value is by how many."""
        counts = _neighbors(state.batch, self.reach)
        beyond = torch.maximum(self.fewest.to(counts) - counts, counts - self.most.to(counts)).clamp(min=0.0)
        value, worst = beyond.max(dim=1)
        return Verdict(value / self.tolerance, value, torch.where(value > 0, worst, -1)[:, None])

    def describe(self) -> str:
        return (
            f"an atom with {self.tolerance:g} neighbours fewer or more than any of its element in the reference "
            f"({int(self.fewest.min())} to {int(self.most.max())})"
        )


def _neighbors(batch: AtomsBatch, reach: Tensor) -> Tensor:
    """Of each atom within its reach, float64, shape (n_systems, n_atoms); ValueError for systems of another size."""
    n = len(reach)
    if set(batch.sizes) != {n}:
        raise ValueError(f"coordination is of a system of {n} atoms, got systems of {sorted(set(batch.sizes))}")
    near = neighbor_list(batch, float(reach.max()))
    centre = near.pairs[0]
    within = near.vectors(batch).norm(dim=1) < reach.to(batch.device)[centre % n]
    return torch.bincount(centre[within], minlength=batch.n_atoms).view(-1, n).double()
