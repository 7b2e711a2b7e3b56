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


def natural_direction(
    potential: Potential, frames: Sequence[AtomsBatch], loss: QMLoss, iterations: int, damping: float = 1e-3
) -> tuple[list[Tensor], float]:
    """The natural gradient d = (H + λ)⁻¹ g of the gradient g that the parameters hold.

    Amari, Neural Comput. 10, 251 (1998), with the metric of energies and forces instead of Fisher's: ½ δᵀH δ is the loss
    between the predictions at θ + δ and those at θ. Where the loss is small H is Gauss and Newton's matrix, and

        H v = ∇L(θ + ε v)/ε,    L the loss against the potential's own predictions at θ.

    Solved by conjugate gradients from zero: a few iterations take out the stiff directions, those in which a step of the
    plain gradient spoils forces that the energy/force steps then have to repair, and its gain with them.

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
        λ as a fraction of gᵀHg/gᵀg.

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
    metric = _Metric(potential, frames, loss)
    x, product = torch.zeros_like(gradient), torch.zeros_like(gradient)  # d and H d
    residual, p, shift = gradient.clone(), gradient.clone(), None
    for _ in range(iterations):
        hp = metric(p)
        curvature = float(p @ hp)
        if shift is None:
            shift = damping * curvature / float(p @ p)
        if not (math.isfinite(curvature) and curvature > 0):
            break
        step = float(residual @ residual) / (curvature + shift * float(p @ p))
        x, product = x + step * p, product + step * hp
        new = residual - step * (hp + shift * p)
        p = new + float(new @ new) / float(residual @ residual) * p
        residual = new
    if not float(x.norm()) > 0:
        x, product = gradient, metric(gradient)
    return _unflat(x, parameters), math.sqrt(max(0.5 * float(x @ product), 0.0))


class _Metric:
    """H v by finite differences of the gradient."""

    def __init__(self, potential: Potential, frames: Sequence[AtomsBatch], loss: QMLoss):
        self.potential, self.loss = potential, loss
        self.parameters = list(potential.parameters())
        self.now = [_predicted(potential, part) for part in frames]
        self.probe = PROBE_FRACTION * (float(_flat(self.parameters).norm()) or 1.0)

    def __call__(self, v: Tensor) -> Tensor:
        epsilon = self.probe / float(v.norm())
        try:
            with displaced(self.parameters, _unflat(v, self.parameters), epsilon):
                for p in self.parameters:
                    p.grad = None
                for frames in self.now:
                    (self.loss(self.potential, frames) / len(self.now)).backward()
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
