"""How well a gradient is known: its projection on a direction, with the standard error of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stabie_ase.boltzmann.estimate import Estimate, residual_of
from stabie_ase.boltzmann.gradient import energies_of, of_present
from stabie_ase.boltzmann.samples import Samples, in_a_row
from stabie_ase.boltzmann.state_point import StatePoint
from stabie_ase.boltzmann.weights import bessel_of, probabilities, stratum_means
from stabie_ase.observables import Target
from stabie_ase.potentials.base import Potential
from stabie_ase.system.processes import total

PROBE_FRACTION = 2e-4
"""Length of a finite difference along a direction of the parameters, as a fraction of their norm."""


@contextmanager
def displaced(parameters: Sequence[Tensor], direction: Sequence[Tensor], length: float) -> Iterator[None]:
    """Within this block parameters are so much further along a direction of their shapes; afterwards they are, to the bit, as before."""
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, base, part in zip(parameters, before, direction):
                p.copy_(base + (length * part).to(p.dtype))
        yield
    finally:
        with torch.no_grad():
            for p, base in zip(parameters, before):
                p.copy_(base)


@dataclass(frozen=True)
class Projection:
    """A gradient's component along a direction, and the standard error of that, both in the loss per length of the direction."""

    value: float
    error: float

    @property
    def signal_to_noise(self) -> float:
        """Their ratio, without a unit."""
        return self.value / self.error if self.error > 0 else float("inf")


def projection(
    potential: Potential, estimate: Estimate, targets: Sequence[Target], point: StatePoint, direction: Sequence[Tensor],
    strata: Tensor | None = None,
) -> Projection:
    """d·∇_θ L and its standard error over replicas.

    With u = d·∇_θ U and h = d·∇_θ g, by central differences, d·∇_θ L = λ·D with D = d·∂ḡ/∂θ = -β Cov(g, u) + ⟨h⟩ and λ = ∂L/∂ḡ. A
    sample moves it by its influence (Hampel, J. Am. Stat. Assoc. 69, 383, 1974)

        φ_i = λ·[-β ((g_i - ḡ) (u_i - ū) - Cov(g, u)) + h_i - ⟨h⟩] + (g_i - ḡ)·(∂λ/∂ḡ) D,

    and as frames of one replica are correlated while replicas are not, the variance is R/(R - 1) Σ_r (Σ_{i∈r} φ_i / N)² over the R
    replicas. Where samples were drawn from more, the last term is of all of these: so are ḡ and λ. On a gradient's own direction the
    value is its length, which noise alone makes positive.

    Parameters
    ----------
    potential : Potential
        As it is on return.
    estimate : Estimate
        Under the potential that has driven the dynamics.
    targets : sequence of Target
        Those of the estimate.
    point : StatePoint
    direction : sequence of Tensor
        d, one a parameter.
    strata : Tensor of int64, shape (n_groups,), optional
        Within which samples were compared (`Estimator.strata`): ḡ and ū next to β, and Cov, are then those of the stratum.

    Returns
    -------
    Projection
        Without an error, not a number, of a single replica.
    """
    samples, beta = estimate.samples, point.beta
    u, h = _derivatives(potential, samples, targets, direction)
    values = in_a_row(samples, targets)
    p = probabilities(values, point, log_weights=samples.log_weights)
    mean, mean_u, mean_h = (total(p @ x) for x in (values, u, h))
    compared, off = values - mean, u - mean_u
    if strata is not None:
        compared = values - stratum_means(values, p, strata)
        off = (u - stratum_means(u, p, strata)) * bessel_of(p, strata)
    slope = -beta * total((p * off) @ compared) + mean_h
    residual = torch.stack([residual for _, residual in estimate.residuals]).mean(dim=0)
    known = in_a_row(estimate.all_samples, targets)
    shares = probabilities(known, point, log_weights=estimate.all_samples.log_weights)
    known_mean = total(shares @ known)
    with torch.enable_grad():
        at = known_mean.detach().requires_grad_()
        along = residual_of(at, targets) @ slope
    curvature = torch.autograd.grad(along, at)[0]
    sums = _by_replica(samples, p * ((-beta * off[:, None] * compared + h - slope) @ residual))
    others = _by_replica(estimate.all_samples, shares * ((known - known_mean) @ curvature))
    n = int(total((torch.bincount(estimate.all_samples.replica) > 0).sum()))
    sums = others.index_add(0, torch.arange(len(sums), device=sums.device), sums)
    squares = float(total(sums.square().sum()))
    return Projection(float(residual @ slope), (squares * n / (n - 1)) ** 0.5 if n > 1 else float("nan"))


def _by_replica(samples: Samples, influence: Tensor) -> Tensor:
    """Sums over what is of each replica, up to the last that there is."""
    replica = samples.replica[samples.groups.system]
    sums = torch.zeros(int(replica.max()) + 1 if len(replica) else 0, dtype=torch.float64, device=influence.device)
    return sums.index_add(0, replica, influence)


def _derivatives(
    potential: Potential, samples: Samples, targets: Sequence[Target], direction: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """d·∇_θ of the energy of each group, shape (n_groups,), and of its values, (n_groups, Σ width)."""
    parameters = list(potential.parameters())
    norm, size = (sum(float(x.detach().double().square().sum()) for x in xs) ** 0.5 for xs in (direction, parameters))
    step = PROBE_FRACTION * (size or 1.0) / norm
    sides, observables = [], [target.observable for target in targets]
    for length in (step, -step):
        with displaced(parameters, direction, length):
            there = of_present(potential, samples, observables)
            sides.append((energies_of(potential, samples), in_a_row(there, targets)))
    (above, values_above), (below, values_below) = sides
    return (above - below) / (2.0 * step), (values_above - values_below) / (2.0 * step)
