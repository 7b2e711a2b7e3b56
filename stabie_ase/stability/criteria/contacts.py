"""Atoms of a molecule that come closer than they ever are, without being bonded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.stability.criteria.base import OneFrame, Verdict, check_tolerance, distances_in, extreme_of_kind, tolerance_of
from stabie_ase.structures.kind import ISOLATED
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology, covalent_sums
from stabie_ase.system.spec import Spec

NEW_BOND_FACTOR = 1.15
"""Times the sum of the covalent radii: two atoms that were not bonded are so now."""

MAX_CONTACT_EXCESS = 0.9
"""Å beyond the sum of the covalent radii from which on a distance is no contact, even if the reference never has it.

A few frames do not know how close two atoms come that are usually far apart: a hydrogen bond may form.
"""


@dataclass(frozen=True)
class Contacts(OneFrame):
    """Unstable once two atoms that are not bonded are closer than they ever are in the reference, by a tolerance.

    All pairs of an isolated system count, of a periodic one those within a molecule, by the nearest image. "Ever" is counted for
    atoms with a common neighbour over the pairs at their places in molecules like theirs, for all others over the pairs of the same
    two elements; and a pair that the reference keeps far apart may come as close as `MAX_CONTACT_EXCESS` beyond the sum of its
    covalent radii. The tolerance is less where it would allow a new bond, `NEW_BOND_FACTOR` times that sum.

    Parameters
    ----------
    pairs : Tensor of int64, shape (2, n_pairs)
        Atoms of one system that are not bonded; every system of a batch has the same.
    shortest : Tensor of float64, shape (n_pairs,)
        What the reference allows, in Å.
    tolerances : Tensor of float64, shape (n_pairs,)
        In Å.
    tolerance : float
        The largest of them.
    """

    pairs: Tensor
    shortest: Tensor
    tolerances: Tensor
    tolerance: float
    name, unit = "contacts", "Å"

    @classmethod
    def from_reference(cls, frames: Sequence[Atoms], tolerance: float) -> Contacts:
        """From frames of one molecule, a tolerance in Å; see `Topology.from_frames` for what is refused."""
        return cls.from_topology(Topology.from_frames(frames), tolerance)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Contacts:
        """`contacts:TOLERANCE`, in Å; ValueError where the reference is periodic and has no molecules."""
        kind, topology = setting.kind, setting.molecules
        if kind.name != ISOLATED:
            if kind.bonding not in ("molecules", "both"):
                raise ValueError(
                    f"contacts are for the atoms within molecules, but the reference is periodic and has none ({kind.describe()}); "
                    "see intermolecular, coordination and lindemann"
                )
            topology = topology.within_molecules(setting.frames)
        return cls.from_topology(topology, tolerance_of(spec))

    @classmethod
    def from_topology(cls, topology: Topology, tolerance: float) -> Contacts:
        """All its pairs that are never a bond, a tolerance in Å; ValueError if that is no positive length."""
        check_tolerance(tolerance, "the tolerance of contacts")
        sums = covalent_sums(topology.numbers, topology.pairs)
        free = ~topology.bonded & (topology.shortest > NEW_BOND_FACTOR * sums)  # a proton that hops is neither
        pairs, sums, shortest = topology.pairs[:, free], sums[free], topology.shortest[free]
        far = topology.separation[free] > 2
        kinds = torch.where(far, topology.numbers[pairs].sort(dim=0).values, topology.place[pairs])
        ever = extreme_of_kind(shortest, torch.cat([kinds, far[None].long()]), "amin")
        shortest = torch.where(far, torch.minimum(ever, sums + MAX_CONTACT_EXCESS), ever)
        # A kind that the reference shows close to a bond keeps a margin of its own.
        tolerances = torch.minimum(torch.full_like(shortest, tolerance), (shortest - NEW_BOND_FACTOR * sums).clamp(min=0.05))
        return cls(pairs, shortest, tolerances, tolerance)

    def judge(self, state: MDState) -> Verdict:
        """The pair that is closest, measured by its tolerance."""
        distances = distances_in(state, self.pairs, "the contact criterion")
        if not self.pairs.shape[1]:
            nothing = distances.new_zeros(state.n_systems)
            return Verdict(nothing, nothing, state.step.new_zeros((state.n_systems, 0)))
        pairs, shortest, tolerances = (x.to(distances.device) for x in (self.pairs, self.shortest, self.tolerances))
        closer = shortest - distances
        severity, worst = (closer / tolerances).max(dim=1)
        value = closer.gather(1, worst[:, None])[:, 0]
        return Verdict(severity.clamp(min=0.0), value.clamp(min=0.0), pairs.T[worst])

    def describe(self) -> str:
        return (
            f"two atoms that are not bonded closer than in the reference by more than {self.tolerance:g} Å, or a new bond "
            f"({self.pairs.shape[1]} pairs)"
        )
