"""Hydrogens that have left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.stability.criteria.base import OneFrame, Verdict, check_tolerance, distances_in
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology
from stabie_ase.system.spec import Spec

MAX_DISTANCE = 2.5
"""Å from the atom that it is bonded to."""


@dataclass(frozen=True)
class LostHydrogen(OneFrame):
    """Unstable once a hydrogen is farther than a distance from the heavy atom that it is bonded to in the reference.

    The measure of MLIPAudit's stability benchmark (InstaDeep, benchmarks/general/stability: 2.5 Å). A hydrogen between
    two heavy atoms belongs to the nearer one.

    Parameters
    ----------
    pairs : Tensor of int64, shape (2, n_hydrogens)
        Heavy atoms and their hydrogens, numbered within a system; every system of a batch has the same.
    distance : float
        In Å.
    """

    pairs: Tensor
    distance: float = MAX_DISTANCE
    name, unit = "lost-hydrogen", "Å"

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> LostHydrogen:
        """`lost-hydrogen`, or `lost-hydrogen:2.0` for a distance in Å."""
        return cls.from_topology(setting.topology, spec.read({"distance": float}, "distance").get("distance", MAX_DISTANCE))

    @classmethod
    def from_topology(cls, topology: Topology, distance: float = MAX_DISTANCE) -> LostHydrogen:
        """All hydrogens that are bonded to a heavy atom, a distance in Å; ValueError if there are none, or bonds are longer than that."""
        check_tolerance(distance, "the distance of a lost hydrogen")
        hydrogen = topology.numbers[topology.pairs] == 1
        chosen = topology.bonded & (hydrogen.sum(dim=0) == 1)
        if not chosen.any():
            raise ValueError("lost-hydrogen needs hydrogens that are bonded to heavier atoms, and the reference has none")
        first_is = hydrogen[0, chosen]
        pairs = torch.where(first_is, topology.pairs[:, chosen].flip(0), topology.pairs[:, chosen])
        order = topology.mean[chosen].argsort(stable=True)
        nearest = {int(h): k for k, h in zip(reversed(order.tolist()), pairs[1, order.flip(0)])}
        kept = torch.tensor([nearest[h] for h in sorted(nearest)])
        longest = float(topology.mean[chosen][kept].max())
        if distance <= longest:
            raise ValueError(f"lost-hydrogen has a distance of {distance:g} Å, but a bond of the reference has {longest:.3g} Å")
        return cls(pairs[:, kept], distance)

    def judge(self, state: MDState) -> Verdict:
        """The hydrogen that is farthest from its heavy atom."""
        value, worst = distances_in(state, self.pairs, "lost-hydrogen").max(dim=1)
        return Verdict(value / self.distance, value, self.pairs.T.to(worst.device)[worst])

    def describe(self) -> str:
        return f"a hydrogen farther than {self.distance:g} Å from its heavy atom ({self.pairs.shape[1]} hydrogens)"
