"""Molecules put into a sound conformation where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import molecule_vectors
from stabie_ase.structures.reference import spread
from stabie_ase.structures.topology import Groups, Topology

MAX_SHAPES = 8
"""Of each molecule. Rigid ones need one; of flexible ones that is taken which moves atoms least, so that neighbours are not in the way."""


@dataclass(frozen=True)
class Conformers:
    """Sound conformations of the molecules of a system, to be put in place of what dynamics make of them.

    Attributes
    ----------
    molecule : Tensor of int64, shape (n_atoms,)
        That each atom of the system belongs to.
    shapes : Tensor of float64, shape (n_shapes, n_atoms, 3)
        Positions beside the centre of mass of their molecule, in Å.
    """

    molecule: Tensor
    shapes: Tensor

    @classmethod
    def of(cls, frames: Sequence[Atoms], topology: Topology) -> Conformers:
        """Those of some frames of a reference with these bonds, at most `MAX_SHAPES`; across faces of the cell see `molecule_vectors`."""
        batch = AtomsBatch.from_atoms([frames[k] for k in spread(len(frames), MAX_SHAPES)])
        vectors, centres = molecule_vectors(batch, topology.molecule)
        return cls(topology.molecule, vectors - centres[:, topology.molecule])

    def at_rest(self, frames: AtomsBatch, groups: Groups) -> AtomsBatch:
        """A frame for every group, in which that molecule has the nearest of its conformations and all else is where it was.

        The centre of mass stays, and the conformation is turned so that the mass-weighted displacement is least (Kabsch, Acta Cryst.
        A 32, 922, 1976).

        Parameters
        ----------
        frames : AtomsBatch
            Systems like the reference.
        groups : Groups
            Molecules of them.

        Returns
        -------
        AtomsBatch
            Of n_groups systems.
        """
        there, own = groups.apart(frames)
        if not groups.n_groups:
            return there
        molecule, shapes, n = self.molecule.to(frames.device), self.shapes.to(frames.device), len(self.molecule)
        inside = own.spread(torch.ones(own.n_groups, device=frames.device), there).view(-1, n) > 0
        vectors, centres = molecule_vectors(there, molecule)
        off = vectors - centres[:, molecule]
        masses = torch.where(inside, there.masses.double().view(-1, n), 0.0)
        turns = _turns(torch.einsum("ga,sai,gaj->gsij", masses, shapes, off))
        # Σ m |R s - v|² is least where Σ m (v·R s - |s|²/2) is largest.
        overlap = torch.einsum("ga,gai,gsij,saj->gs", masses, off, turns, shapes)
        nearest = (overlap - 0.5 * masses @ shapes.square().sum(dim=2).T).argmax(dim=1)
        turned = torch.einsum("gij,gaj->gai", turns[torch.arange(len(nearest)), nearest], shapes[nearest])
        positions = there.positions.double().view(-1, n, 3)
        moved = positions - off + turned
        return there.replace(positions=torch.where(inside[:, :, None], moved, positions).view(-1, 3).to(there.dtype))


def _turns(moments: Tensor) -> Tensor:
    """The rotations R that bring s nearest to v, from Σ m s vᵀ, both of shape (..., 3, 3)."""
    u, _, v = torch.linalg.svd(moments)
    sign = torch.det(v.mT @ u.mT).sign()
    return (v.mT * torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], dim=-1)[..., None, :]) @ u.mT
