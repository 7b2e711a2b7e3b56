"""Bonds that leave their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ase import Atoms
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.stability.criteria.base import OneFrame, Verdict, check_tolerance, distances_in, tolerance_of
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology
from stabie_ase.system.spec import Spec


@dataclass(frozen=True)
class BondLengthDeviation(OneFrame):
    """Unstable once a bond is longer or shorter than its mean in the reference by more than a tolerance.

    Parameters
    ----------
    bonds : Tensor of int64, shape (2, n_bonds)
        Atoms of one system; every system of a batch has the same.
    lengths : Tensor, shape (n_bonds,)
        Reference lengths in Å.
    tolerance : float
        In Å.
    """

    bonds: Tensor
    lengths: Tensor
    tolerance: float
    name, unit = "bonds", "Å"

    @classmethod
    def from_reference(cls, frames: Sequence[Atoms], tolerance: float) -> BondLengthDeviation:
        """Bonds and their mean lengths from frames, a tolerance in Å; see `Topology.from_frames` for what is refused."""
        return cls.from_topology(Topology.from_frames(frames), tolerance)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> BondLengthDeviation:
        """`bonds:TOLERANCE`, in Å; of molecules beside a network, not of that."""
        return cls.from_topology(setting.molecules, tolerance_of(spec))

    @classmethod
    def from_topology(cls, topology: Topology, tolerance: float) -> BondLengthDeviation:
        """All bonds of a system.

        Parameters
        ----------
        topology : Topology
            Tells the bonds and their mean lengths.
        tolerance : float
            Deviation from the mean length that is still stable, in Å.

        Returns
        -------
        BondLengthDeviation

        Raises
        ------
        ValueError
            There are none, or the tolerance is no positive length.
        """
        check_tolerance(tolerance, "the bond tolerance")
        if not topology.bonded.any():
            raise ValueError("the reference has no bonds, so the bond criterion cannot tell when it breaks")
        return cls(topology.bonds, topology.mean[topology.bonded], tolerance)

    def judge(self, state: MDState) -> Verdict:
        """The bond that is farthest off its length."""
        distances = distances_in(state, self.bonds, "the bond criterion")
        value, worst = (distances - self.lengths.to(distances)).abs().max(dim=1)
        return Verdict(value / self.tolerance, value, self.bonds.T.to(worst.device)[worst])

    def describe(self) -> str:
        return f"a bond off its mean length by more than {self.tolerance:g} Å ({self.bonds.shape[1]} bonds)"
