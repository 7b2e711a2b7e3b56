"""Angles between bonds that leave their range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.stability.criteria.base import OneFrame, Verdict, check_one_size, extreme_of_kind, tolerance_of
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.chains import bonded_chains
from stabie_ase.structures.geometry import bond_angles
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import Spec


@dataclass(frozen=True)
class AngleDeviation(OneFrame):
    """Unstable once an angle between two bonds is smaller or larger than it ever is in the reference, by more than a tolerance.

    "Ever" is counted over the angles at the same places in molecules like its own.

    Parameters
    ----------
    angles : Tensor of int64, shape (3, n_angles)
        Atoms of one system, the second at the centre; every system of a batch has the same.
    smallest, largest : Tensor of float64, shape (n_angles,)
        What the reference shows, in degrees.
    tolerance : float
        In degrees.
    """

    angles: Tensor
    smallest: Tensor
    largest: Tensor
    tolerance: float
    name, unit = "angles", "°"

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> AngleDeviation:
        """`angles:TOLERANCE`, in degrees; ValueError where that is no angle, or no atom has two bonds."""
        tolerance, topology = tolerance_of(spec, 20.0), setting.molecules
        if not 0 < tolerance < 180:
            raise ValueError(f"the tolerance of angles must be between 0 and 180 degrees, got {tolerance:g}")
        angles = bonded_chains(topology, 3)
        if not angles.shape[1]:
            raise ValueError("the reference has no atom with two bonds, so that no angle can leave its range; leave the criterion out")
        seen, places = bond_angles(AtomsBatch.from_atoms(setting.frames), angles), topology.place[angles]
        smallest, largest = (extreme_of_kind(x, places, which) for x, which in ((seen.amin(dim=0), "amin"), (seen.amax(dim=0), "amax")))
        return cls(angles, smallest, largest, tolerance)

    def judge(self, state: MDState) -> Verdict:
        """The angle that is farthest out of its range, by how much."""
        check_one_size(state, "the angle criterion")
        found = bond_angles(state.batch, self.angles)
        out = torch.maximum(self.smallest.to(found.device) - found, found - self.largest.to(found.device))
        value, worst = out.clamp(min=0.0).max(dim=1)
        return Verdict(value / self.tolerance, value, self.angles.T.to(worst.device)[worst])

    def describe(self) -> str:
        return (
            f"an angle between two bonds smaller or larger than in the reference by more than {self.tolerance:g}° "
            f"({self.angles.shape[1]} angles)"
        )
