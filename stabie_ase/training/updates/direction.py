"""Steps that change energies and forces of sound frames as little as possible for what they gain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stabie_ase.boltzmann.projection import PROBE_FRACTION, displaced
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.training.labels import LabelledFrames, QMLoss

SQUARES_FLOOR = 1e-5
"""Added to the mean squares of gradients, as a part of the largest, where they precondition conjugate gradients."""


def natural_direction(
    potential: Potential,
    frames: Sequence[AtomsBatch],
    loss: QMLoss,
    iterations: int,
    damping: float = 1e-3,
    squares: Sequence[Tensor] | None = None,
    unseen: Sequence[AtomsBatch] | None = None,
    atomic_weight: float = 0.0,
) -> tuple[list[Tensor], float]:
    """The natural gradient d = (H + λ)⁻¹ g of the gradient g that the parameters hold.

    Amari, Neural Comput. 10, 251 (1998), with the metric of energies and forces instead of Fisher's: ½ δᵀH δ is the loss
    between the predictions at θ + δ and those at θ. Where the loss is small H is Gauss and Newton's matrix, and

        H v = ∇L(θ + ε v)/ε,    L the loss against the potential's own predictions at θ.

    Solved by conjugate gradients from zero. The first iterations take out the stiff directions, those in which a step of the
    plain gradient spoils forces that the energy/force steps then have to repair, and its gain with them; each further one finds
    more of what changes unstable frames and not the sound ones.

    Parameters
    ----------
    potential : Potential
        Its parameters' `grad` is g; as it was on return, but for `grad`, which is None.
    frames : sequence of AtomsBatch
        Frames whose energies and forces should not change.
    loss : QMLoss
    iterations : int
        Of conjugate gradients; with none d = g.
    damping : float
        λ as a fraction of pᵀHp/pᵀp, p the first direction.
    squares : sequence of Tensor, optional
        Mean squares of gradients of the loss, one a parameter: about as the diagonal of H, by which conjugate gradients are
        preconditioned (Martens, ICML 2010, section 4.7).
    unseen : sequence of AtomsBatch, optional
        Frames that tell the change in place of `frames`, of which a solution knows the noise.
    atomic_weight : float
        Of energies of atoms in the metric, w in w Σ_a (Δu_a - mean Δu)²/N, in 1/eV². Where g is made of some of them: no energy or force
        depends on how a potential parts its energy among atoms, so that without it the solution moves energy from one to another and
        nothing else.

    Returns
    -------
    direction : list of Tensor
        One a parameter, float64; zero where there was no gradient.
    change : float
        sqrt(dᵀH d/2): by a step of length one along d the loss grows by the square of it, so that with the default
        weights it is about the root mean square change of the forces, in eV/Å.
    """
    parameters = list(potential.parameters())
    gradient = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    if not float(gradient.norm()) > 0:
        return _unflat(gradient, parameters), 0.0
    metric = _Metric(potential, frames, loss, atomic_weight)
    x = _solved(gradient, metric, iterations, damping, _scale(squares))
    if not float(x.norm()) > 0:
        x = gradient
    product = _Metric(potential, frames if unseen is None else unseen, loss)(x)
    return _unflat(x, parameters), math.sqrt(max(0.5 * float(x @ product), 0.0))


def _scale(squares: Sequence[Tensor] | None) -> Tensor | float:
    """The diagonal that preconditions, shape (n_parameters,), or one where nothing is known."""
    known = torch.zeros(1) if squares is None else _flat(squares)
    largest = float(known.max())
    return known / largest + SQUARES_FLOOR if math.isfinite(largest) and largest > 0 else 1.0


def _solved(gradient: Tensor, metric: _Metric, iterations: int, damping: float, scale: Tensor | float) -> Tensor:
    """Preconditioned conjugate gradients for (H + λ) x = g, from zero, shape (n_parameters,)."""
    x, residual, shift = torch.zeros_like(gradient), gradient, None
    z = residual / scale
    p = z
    for _ in range(iterations):
        hp = metric(p)
        curvature = float(p @ hp)
        if shift is None:
            shift = damping * curvature / float(p @ p)
        if not (math.isfinite(curvature) and curvature > 0):
            break
        old = float(residual @ z)
        step = old / (curvature + shift * float(p @ p))
        x, residual = x + step * p, residual - step * (hp + shift * p)
        z = residual / scale
        p = z + float(residual @ z) / old * p
    return x


class _Metric:
    """H v by finite differences of the gradient."""

    def __init__(self, potential: Potential, frames: Sequence[AtomsBatch], loss: QMLoss, atomic_weight: float = 0.0):
        self.potential, self.loss, self.atomic_weight = potential, loss, atomic_weight
        self.parameters = list(potential.parameters())
        self.now = [_predicted(potential, part) for part in frames]
        self.near = [neighbor_list(x.batch, potential.cutoff) for x in self.now] if atomic_weight else []
        self.of_atoms = [potential(x.batch, near, of_atoms=True).detach() for x, near in zip(self.now, self.near)]
        self.probe = PROBE_FRACTION * (float(_flat(self.parameters).norm()) or 1.0)

    def __call__(self, v: Tensor) -> Tensor:
        epsilon = self.probe / float(v.norm())
        try:
            with displaced(self.parameters, _unflat(v, self.parameters), epsilon):
                for p in self.parameters:
                    p.grad = None
                for frames in self.now:
                    (self.loss(self.potential, frames) / len(self.now)).backward()
                for frames, near, of_atoms in zip(self.now, self.near, self.of_atoms):
                    change = self.potential(frames.batch, near, of_atoms=True) - of_atoms
                    (self.atomic_weight * change.var(correction=0) / len(self.now)).backward()
                return _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]) / epsilon
        finally:
            for p in self.parameters:
                p.grad = None


def _predicted(potential: Potential, batch: AtomsBatch) -> LabelledFrames:
    prediction = potential.compute(batch, neighbor_list(batch, potential.cutoff))
    return LabelledFrames(batch, prediction.energies, prediction.forces.double())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])


def _unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [part.view_as(x) for part, x in zip(vector.split([x.numel() for x in like]), like)]
