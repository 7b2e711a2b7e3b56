"""Crystals whose atoms leave their sites."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.stability.criteria.base import OneFrame, Verdict
from stabie_ase.structures.kind import MAX_SOLID_LINDEMANN
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.sites import Sites
from stabie_ase.structures.topology import Groups
from stabie_ase.system.spec import Spec

LIMIT = 0.25
"""Of the ratio; crystals melt when its mean is 0.1 to 0.15."""


@dataclass(frozen=True)
class Lindemann(OneFrame):
    """Unstable once the atoms of a crystal are too far from their sites.

    The value is √⟨u²⟩ / d of one frame (Lindemann, Phys. Z. 11, 609, 1910; Gilvarry, Phys. Rev. 102, 308, 1956): ⟨u²⟩ the mean over the
    atoms of the squared displacement from their mean positions in the reference, without the displacement of the centre of
    mass, d the mean distance of a site to its nearest neighbour. One atom of many may leave its site, a few may change places.

    Parameters
    ----------
    sites : Sites
    limit : float
        Of the value, which has no unit.
    atoms : Tensor of int64, shape (n_sites,), or None
        That have the sites, by index; None for all. Molecules beside a network have none.
    """

    sites: Sites
    limit: float = LIMIT
    atoms: Tensor | None = None
    name, unit = "lindemann", "nearest-neighbour distances"

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Lindemann:
        """`lindemann`, or `lindemann:0.2`; ValueError where the reference is no crystal of atoms, or is beyond the limit itself."""
        limit = spec.read({"limit": float}, "limit").get("limit", LIMIT)
        if not setting.kind.at_sites:
            raise ValueError(f"lindemann is for a solid whose atoms stay at their sites, but the reference is: {setting.kind.describe()}")
        atoms = None
        if setting.kind.beside:
            atoms = torch.as_tensor(np.setdiff1d(np.arange(len(setting.frames[0])), setting.kind.beside))
        sites = Sites.from_frames(setting.frames if atoms is None else [frame[atoms.numpy()] for frame in setting.frames])
        if not sites.spread / sites.spacing < limit <= 10.0:
            raise ValueError(
                f"lindemann has a limit of {limit:g}, expected more than the {sites.spread / sites.spacing:.2g} of the reference, as "
                f"{MAX_SOLID_LINDEMANN:g} to {LIMIT:g}"
            )
        return cls(sites, limit, atoms)

    def judge(self, state: MDState) -> Verdict:
        """The root-mean-square displacement; the atom that is farthest from its site is blamed."""
        batch = state.batch if self.atoms is None else Groups.of_each(self.atoms, state.batch).batch(state.batch)
        squares = self.sites.displacements(batch).square().sum(dim=2)
        value, farthest = squares.mean(dim=1).sqrt() / self.sites.spacing, squares.argmax(dim=1, keepdim=True)
        return Verdict(value / self.limit, value, farthest if self.atoms is None else self.atoms.to(farthest.device)[farthest])

    def describe(self) -> str:
        spacing = self.sites.spacing
        return f"atoms farther from their sites than {self.limit:g} of the distance of neighbours, {spacing:.3g} Å (root mean square)"
