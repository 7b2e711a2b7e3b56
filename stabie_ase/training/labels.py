"""Energies and forces: labelled frames, the loss and the errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.reference import Reference


@dataclass(frozen=True)
class LabelledFrames:
    """Frames with reference energies, shape (n_systems,), in eV, and forces, shape (n_atoms, 3), in eV/Å."""

    batch: AtomsBatch
    energies: Tensor
    forces: Tensor

    @classmethod
    def from_reference(cls, reference: Reference, device: str | torch.device = "cpu") -> LabelledFrames:
        """All frames of a reference."""
        return cls(
            AtomsBatch.from_atoms(reference.frames, device),
            torch.as_tensor(reference.energies, dtype=torch.float64, device=device),
            torch.as_tensor(np.concatenate(reference.forces), dtype=torch.float64, device=device),
        )

    def __len__(self) -> int:
        return self.batch.n_systems

    def select(self, systems: Tensor) -> LabelledFrames:
        """Some of the frames by index, shape (n,)."""
        return LabelledFrames(self.batch.select(systems), self.energies[systems], self.forces[self.batch.atom_index(systems)])

    def chunks(self, size: int | None = None) -> Iterator[LabelledFrames]:
        """All frames, `size` at a time (`AtomsBatch.chunks`)."""
        for systems in self.batch.chunks(size):
            yield self.select(systems)


@dataclass(frozen=True)
class QMLoss:
    """L_QM = mean over frames of w_E (ΔU)²/N + w_F Σ_a ‖ΔF_a‖²/(3N), with N the atoms of the frame.

    The first term grows linearly with size for independent errors of the atoms, hence one division by N. It parts into what all atoms
    have in common, δ = Σ ΔU/Σ N over the frames, and the rest,

        mean (ΔU)²/N = mean (ΔU - N δ)²/N + mean(N) δ²,

    and what they have in common may count less: no dynamics depend on it.

    Parameters
    ----------
    energy_weight : float
        w_E in 1/eV².
    forces_weight : float
        w_F in Å²/eV².
    offset_weight : float
        Factor on mean(N) δ². Of a single frame nothing else is known, and all of ΔU counts.
    """

    energy_weight: float = 1.0
    forces_weight: float = 1.0
    offset_weight: float = 1.0

    def __call__(self, potential: Potential, frames: LabelledFrames) -> Tensor:
        """The loss, float64, with its graph."""
        return self.with_offset(potential, frames)[0]

    def with_offset(self, potential: Potential, frames: LabelledFrames) -> tuple[Tensor, Tensor]:
        """The loss and δ, in eV, float64, with their graph."""
        batch = frames.batch
        prediction = potential.compute(batch, neighbor_list(batch, potential.cutoff), create_graph=True)
        difference, counts = prediction.energies - frames.energies, batch.counts.double()
        offset = difference.sum() / counts.sum()
        energy_term = (difference.square() / counts).mean()
        if len(frames) > 1:
            energy_term = energy_term - (1.0 - self.offset_weight) * counts.mean() * offset.square()
        squared = (prediction.forces.double() - frames.forces).square().sum(dim=1)
        forces_term = (batch.sum_over_atoms(squared) / (3 * batch.counts)).mean()
        return self.energy_weight * energy_term + self.forces_weight * forces_term, offset


@dataclass(frozen=True)
class QMErrors:
    """Mean absolute errors; forces in eV/Å over components, energies in eV a frame, before and after removing the mean offset."""

    force_mae_eV_per_A: float
    energy_mae_eV: float
    energy_mae_offset_removed_eV: float
    force_rmse_eV_per_A: float


def qm_errors(potential: Potential, frames: LabelledFrames, chunk_size: int | None = None) -> QMErrors:
    """Errors of a potential on labelled frames."""
    energy, force = _deviations(potential, frames, chunk_size)
    return QMErrors(
        float(force.abs().mean()),
        float(energy.abs().mean()),
        float((energy - energy.mean()).abs().mean()),
        float(force.square().mean().sqrt()),
    )


def errors_by_frame(potential: Potential, frames: LabelledFrames, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Absolute errors of each frame.

    Parameters
    ----------
    potential : Potential
    frames : LabelledFrames
    chunk_size : int, optional
        Frames that are worked out at once, see `AtomsBatch.chunks`.

    Returns
    -------
    energies : Tensor of float64, shape (n_frames,)
        Of the energy less the mean offset over all frames, in eV.
    forces : Tensor of float64, shape (n_frames,)
        Mean over the force components, in eV/Å.
    """
    energy, force = _deviations(potential, frames, chunk_size)
    return (energy - energy.mean()).abs(), frames.batch.sum_over_atoms(force.abs().mean(dim=1)) / frames.batch.counts


def force_errors_by_frame(potential: Potential, frames: LabelledFrames, chunk_size: int | None = None) -> Tensor:
    """Mean absolute error of the force components of each frame, float64, shape (n_frames,), in eV/Å."""
    return errors_by_frame(potential, frames, chunk_size)[1]


@torch.no_grad()
def energy_offset(potential: Potential, frames: LabelledFrames) -> float:
    """δ of `QMLoss` over some frames, in eV."""
    total = sum(float((potential(x.batch, neighbor_list(x.batch, potential.cutoff)) - x.energies).sum()) for x in frames.chunks())
    return total / frames.batch.n_atoms


def predictions(potential: Potential, frames: LabelledFrames, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """What a potential says of the frames: energies, shape (n_frames,), in eV, and forces, shape (n_atoms, 3), in eV/Å, float64."""
    energies, forces = [], []
    with potential.frozen():
        for part in frames.chunks(chunk_size):
            prediction = potential.compute(part.batch, neighbor_list(part.batch, potential.cutoff))
            energies.append(prediction.energies)
            forces.append(prediction.forces.double())
    return torch.cat(energies), torch.cat(forces)


def _deviations(potential: Potential, frames: LabelledFrames, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    """Predictions minus labels: energies, shape (n_frames,), and forces, shape (n_atoms, 3)."""
    energies, forces = predictions(potential, frames, chunk_size)
    return energies - frames.energies, forces - frames.forces


def upper_limit(differences: Tensor, confidence: float) -> float:
    """Upper limit of the mean that a sample, shape (n,), was drawn from, by Student's t; of a single number, that number."""
    n, mean = len(differences), float(differences.mean())
    return mean if n < 2 else mean + float(student.ppf(confidence, n - 1)) * float(differences.std()) / math.sqrt(n)


def minibatch(n: int, size: int, seed: int, step: int) -> Tensor:
    """Frames of training step `step`, shape (size,): epochs of shuffled frames, a pure function of its arguments."""
    size = min(size, n)
    per_epoch = n // size
    epoch, k = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return torch.as_tensor(order[k * size : (k + 1) * size])
