"""What a potential, or the labels of a reference, tell of frames beside where their atoms are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor

from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.energies import potential_energies
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.reference.labels import calculated


@dataclass(frozen=True)
class Energetics:
    """Energies of frames, and their stress where it is asked for.

    Attributes
    ----------
    energies : Tensor of float64, shape (n_frames,)
        Potential energies in eV.
    sizes : Tensor of float64, shape (n_frames,)
        Numbers of atoms.
    volumes : Tensor of float64, shape (n_frames,)
        In Å³; zero without a cell.
    stress : Tensor of float64, shape (n_frames, 3, 3), or None
        In eV/Å³, positive under tension, without the part of the momenta.
    """

    energies: Tensor
    sizes: Tensor
    volumes: Tensor
    stress: Tensor | None = None

    @classmethod
    def by(cls, potential: Potential, frames: AtomsBatch, energies: Tensor | None = None, stress: bool = False) -> Energetics:
        """As a potential sees them.

        Parameters
        ----------
        potential : Potential
        frames : AtomsBatch
        energies : Tensor, shape (n_systems,), optional
            In eV, where they are known already.
        stress : bool
            Work that out too.

        Returns
        -------
        Energetics

        Raises
        ------
        PropertyNotImplementedError
            Stress where it is not defined.
        """
        energies = potential_energies(potential, frames) if energies is None else energies
        return cls.of_batch(frames, energies, _stress(potential, frames) if stress else None)

    @classmethod
    def of_batch(cls, frames: AtomsBatch, energies: Tensor, stress: Tensor | None = None) -> Energetics:
        """Of frames whose energies in eV, shape (n_systems,), and stresses in eV/Å³, (n_systems, 3, 3), are known."""
        return cls(energies.double(), frames.counts.double(), torch.linalg.det(frames.lattice.double()).abs(), stress)

    @classmethod
    def of(cls, images: Sequence[Atoms], energies: np.ndarray | None = None, stress: bool = False) -> Energetics:
        """As frames tell them themselves.

        Parameters
        ----------
        images : sequence of Atoms
        energies : ndarray, shape (n_frames,), optional
            In eV, where they are told otherwise; else what ASE has read is taken.
        stress : bool
            Theirs is needed too, of the atoms without the part of their momenta.

        Returns
        -------
        Energetics

        Raises
        ------
        ValueError
            Frames without.
        """
        told = [calculated(atoms, "energy") for atoms in images] if energies is None else list(energies)
        _check("energy", told)
        known = [calculated(atoms, "stress") for atoms in images] if stress else []
        _check("stress", known)
        tensors = [np.asarray(s, dtype=float) for s in known]
        full = [s if s.shape == (3, 3) else voigt_6_to_full_3x3_stress(s) for s in tensors]
        tensor = torch.as_tensor(np.array(full)) if stress else None
        return cls.of_batch(AtomsBatch.from_atoms(images), torch.as_tensor(np.array(told, dtype=float)), tensor)

    def select(self, index: Tensor) -> Energetics:
        """Some of the frames by index, shape (n,)."""
        rows = {name: x[index] for name, x in vars(self).items() if x is not None}
        return replace(self, **rows)


def _check(what: str, told: Sequence) -> None:
    lacking = [k for k, value in enumerate(told) if value is None]
    if lacking:
        raise ValueError(f"needs the {what} of its frames, and frame {lacking[0]} has none")


def _stress(potential: Potential, frames: AtomsBatch) -> Tensor:
    """Without a graph, float64, shape (n_systems, 3, 3), in eV/Å³."""
    found = []
    with potential.frozen():
        for systems in frames.chunks():
            part = frames.select(systems)
            stress = potential.compute(part, neighbor_list(part, potential.cutoff), stress=True).stress
            assert stress is not None
            found.append(stress.double())
    return torch.cat(found)
