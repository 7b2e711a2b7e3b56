"""What one window of dynamics tells: its frames, and how their energies bear on an observable that is off."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stabie_ase.boltzmann import response_weights, squared_loss
from stabie_ase.dynamics import Trajectory
from stabie_ase.observables import Observable
from stabie_ase.structures.batch import AtomsBatch


@dataclass(frozen=True)
class Samples:
    """Frames of a window with their energies and observables.

    Attributes
    ----------
    frames : AtomsBatch
    energies : Tensor of float64, shape (n_samples,)
        In eV, by the potential that drove the dynamics.
    values : Tensor of float64, shape (n_samples, d)
        The observable g.
    averages : Tensor of float64, shape (n_samples, d)
        g averaged over the near part of each frame's trajectory.
    severity : Tensor of float64, shape (n_samples,)
        By the criterion that finds most fault with a frame; above 1 it is unstable.
    replica : Tensor of int64, shape (n_samples,)
    """

    frames: AtomsBatch
    energies: Tensor
    values: Tensor
    averages: Tensor
    severity: Tensor
    replica: Tensor

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory, observable: Observable, half_width: int) -> Samples:
        """All frames of a window that are finite, averaged over `half_width` frames to either side."""
        frames, frame, replica = trajectory.frames()
        energies, severity = trajectory.potential_energy[frame, replica], trajectory.columns["severity"][frame, replica]
        values = observable(frames).double() if len(replica) else energies.new_zeros((0, 0))
        finite = (torch.isfinite(energies) & torch.isfinite(values).all(dim=1)).nonzero()[:, 0]
        values, frame, replica = values[finite], frame[finite], replica[finite]
        averages = trajectory_averages(values, frame, replica, half_width)
        return cls(frames.select(finite), energies[finite], values, averages, severity[finite], replica)

    def __len__(self) -> int:
        return len(self.replica)

    def select(self, index: Tensor) -> Samples:
        """Some of them, by index."""
        rest = {field.name: getattr(self, field.name)[index] for field in fields(self) if field.name != "frames"}
        return Samples(self.frames.select(index), **rest)

    def within(self, severity: float) -> Samples:
        """Those that no criterion finds worse than this; within 1 they are stable."""
        return self.select((self.severity <= severity).nonzero()[:, 0])

    def half(self, half: int | None) -> Tensor:
        """Indices of the samples of every second replica, or of all."""
        return torch.arange(len(self), device=self.replica.device) if half is None else (self.replica % 2 == half).nonzero()[:, 0]

    def residuals(self, target: Tensor, weights: Tensor, cross_fit: bool = False) -> list[tuple[int | None, Tensor]]:
        """∂L/∂ḡ of L = Σ_k c_k (ḡ_k - g_k^target)², shape (d,): one of all samples, or of either half of the replicas.

        Each with the half whose covariance it meets, the other one: see `stabie_ase.boltzmann.estimate`.
        """
        pairs = [(0, 1), (1, 0)] if cross_fit else [(None, None)]
        return [(own, squared_loss(self.values[self.half(other)].mean(dim=0), target, weights)[1]) for other, own in pairs]

    def weights(
        self, residuals: list[tuple[int | None, Tensor]], temperature_K: float, energy_change: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """Sample weights whose Σ_i w_i ∇_θ U_θ(Γ_i) is the gradient of the loss, and their effective number.

        The average over the near trajectory stands for g in the covariance. Its mean is that of g but for the ends; the fast
        vibrations, which are noise here, are gone from it; and a frame on the way out counts as what it is about to become.
        """
        parts = [
            response_weights(
                self.averages, residual, temperature_K, energy_change, None if half is None else self.replica % 2 == half
            )
            for half, residual in residuals
        ]
        return sum(w for w, _ in parts) / len(parts), sum(ess for _, ess in parts)


def trajectory_averages(values: Tensor, frame: Tensor, replica: Tensor, half_width: int) -> Tensor:
    """Centred moving averages along each replica's trajectory, over the frames that there are.

    Parameters
    ----------
    values : Tensor, shape (n_samples, d)
    frame, replica : Tensor of int64, shape (n_samples,)
        Which frame of which replica each sample is; each pair once.
    half_width : int
        Frames to either side; with none the values themselves.

    Returns
    -------
    Tensor of float64, shape (n_samples, d)
    """
    if half_width == 0 or not len(values):
        return values.double()
    n_frames, n_replicas = int(frame.max()) + 1, int(replica.max()) + 1
    sums = values.new_zeros((n_frames + 1, n_replicas, values.shape[1] + 1), dtype=torch.float64)
    sums[frame + 1, replica] = torch.cat([values.double(), torch.ones_like(values[:, :1], dtype=torch.float64)], dim=1)
    sums = sums.cumsum(dim=0)
    first, last = (frame - half_width).clamp(min=0), (frame + half_width + 1).clamp(max=n_frames)
    sums = sums[last, replica] - sums[first, replica]
    return sums[:, :-1] / sums[:, -1:]
