"""Boltzmann estimators: the gradient of an observable's mean with respect to a potential's parameters, from samples.

For a g that does not itself contain θ, ∂⟨g⟩/∂θ = -β Cov(g, ∂U/∂θ). Contracted with the gradient of a loss in ⟨g⟩ this
is a weighted sum of ∂U/∂θ over the samples, so it costs one backward pass and no backpropagation through dynamics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ase import units
from torch import Tensor

from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list


@dataclass(frozen=True)
class Estimate:
    """Mean of an observable, its loss, and the sample weights whose ∇_θ Σ_i w_i U_θ(Γ_i) is the loss's gradient.

    Attributes
    ----------
    mean : Tensor of float64, shape (d,)
        ḡ under the present potential.
    loss : Tensor of float64, scalar
        L = Σ_k c_k (ḡ_k - g_k^ref)².
    sample_weights : Tensor of float64, shape (n_samples,)
        w_i, in units of the loss per eV.
    effective_samples : float
        Kish's effective sample size, 1 / Σ p_i².
    """

    mean: Tensor
    loss: Tensor
    sample_weights: Tensor
    effective_samples: float


def estimate(
    values: Tensor,
    reference: Tensor,
    weights: Tensor,
    temperature_K: float,
    energy_change: Tensor | None = None,
    fold: Tensor | None = None,
) -> Estimate:
    """Global Boltzmann estimator, reweighted if the potential has changed since the samples were drawn.

    With ḡ = Σ_i p_i g_i and p_i ∝ exp(-β [U_θ(Γ_i) - U_θ0(Γ_i)]) (Zwanzig, J. Chem. Phys. 22, 1420, 1954; Thaler &
    Zavadlav, Nat. Commun. 12, 6884, 2021),

        ∇_θ L = Σ_i w_i ∇_θ U_θ(Γ_i),    w_i = -β p_i Σ_k 2 c_k (ḡ_k - g_k^ref) (g_k(Γ_i) - ḡ_k) · B.

    B = N_eff / (N_eff - 1) is Bessel's correction with Kish's N_eff; without energy change it is N / (N - 1) and
    w_i is that of Raja et al., eq. 3-4. β is written, never absorbed: the gradient may be added to another loss's.

    Parameters
    ----------
    values : Tensor, shape (n_samples, d)
        g of every sample.
    reference, weights : Tensor, shape (d,)
        g^ref and c.
    temperature_K : float
    energy_change : Tensor, shape (n_samples,), optional
        U_θ - U_θ0 in eV.
    fold : Tensor of bool, shape (n_samples,), optional
        Cross-fitting. The residual and the covariance from the same samples leave a bias of O(1/N). With a fold, each
        half's residual meets the other half's covariance, and the mean of the two has no bias when the halves are
        independent (choose halves of the replicas). To first order in the noise of residual and covariance the
        variance stays the same; that of the product of both, of order 1/N², doubles.

    Raises
    ------
    ValueError
        Fewer than two samples, in a fold where there is one.
    """
    values, reference, weights = values.double(), reference.double(), weights.double()
    mean, p, ess = _weighted_mean(values, temperature_K, energy_change)
    loss, residual = squared_loss(mean, reference, weights)
    if fold is None:
        return Estimate(mean, loss, _covariance_weights(values, residual, mean, p, ess, temperature_K), ess)
    halves = [_weighted_mean(values, temperature_K, energy_change, half) for half in (fold, ~fold)]
    parts = [
        _covariance_weights(values, squared_loss(other[0], reference, weights)[1], *own, temperature_K)
        for other, own in (halves, halves[::-1])
    ]
    return Estimate(mean, loss, sum(parts) / 2.0, ess)


def squared_loss(mean: Tensor, reference: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """L = Σ_k c_k (ḡ_k - g_k^ref)² and its residual ∂L/∂ḡ, shape (d,)."""
    deviation = mean - reference
    return (weights * deviation.square()).sum(), 2.0 * weights * deviation


def response_weights(
    values: Tensor,
    residual: Tensor,
    temperature_K: float,
    energy_change: Tensor | None = None,
    chosen: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Weights w_i of samples with Σ_i w_i ∇_θ U_θ(Γ_i) = Σ_k λ_k ∂ḡ_k/∂θ for a residual λ known from elsewhere.

    Parameters
    ----------
    values : Tensor, shape (n_samples, d)
        g of every sample.
    residual : Tensor, shape (d,)
        λ = ∂L/∂ḡ.
    temperature_K : float
    energy_change : Tensor, shape (n_samples,), optional
        U_θ - U_θ0 in eV.
    chosen : Tensor of bool, shape (n_samples,), optional
        Samples that count; the weights of the others are zero.

    Returns
    -------
    weights : Tensor of float64, shape (n_samples,)
    effective_samples : float
        Kish's effective sample size of the chosen.

    Raises
    ------
    ValueError
        Fewer than two samples.
    """
    values, residual = values.double(), residual.double()
    mean, p, ess = _weighted_mean(values, temperature_K, energy_change, chosen)
    return _covariance_weights(values, residual, mean, p, ess, temperature_K), ess


def _weighted_mean(
    values: Tensor, temperature_K: float, energy_change: Tensor | None, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Mean over the chosen samples, their normalised probabilities (zero elsewhere), and Kish's sample size."""
    n = len(values) if chosen is None else int(chosen.sum())
    if n < 2:
        raise ValueError(f"a covariance needs two samples or more, got {n}")
    log_p = values.new_zeros(len(values)) if energy_change is None else -energy_change.double() / (units.kB * temperature_K)
    if chosen is not None:
        log_p = torch.where(chosen, log_p, -torch.inf)
    p = torch.softmax(log_p, dim=0)
    return p @ values, p, float(1.0 / p.square().sum())


def _covariance_weights(
    values: Tensor, residual: Tensor, mean: Tensor, p: Tensor, ess: float, temperature_K: float
) -> Tensor:
    bessel = ess / (ess - 1.0) if ess > 1.0 + 1e-9 else 1.0
    beta = 1.0 / (units.kB * temperature_K)
    return -beta * bessel * p * (values @ residual - mean @ residual)  # no copy of the values


def fluctuation_weights(values: Tensor, weights: Tensor, floor: float) -> Tensor:
    """Weights c_k of the loss that count a deviation in units of how much the reference itself fluctuates there.

    c_k ∝ weights_k / (v_k/v̄ + floor), v_k the variance of g_k over the reference frames and v̄ its mean: the diagonal
    of the efficient weight matrix of the generalized method of moments (Hansen, Econometrica 50, 1029, 1982). With equal
    weights the few bins in which a stretched bond shows, empty in the reference, drown in the noise of the others.

    Parameters
    ----------
    values : Tensor, shape (n_frames, d)
        g of the reference frames.
    weights : Tensor, shape (d,)
        The observable's own: the bin width, or 1/d.
    floor : float
        Share of v̄ added to every variance; far above one all components count by `weights` alone.

    Returns
    -------
    Tensor, shape (d,)
        With the same sum as `weights`.
    """
    variance = values.double().var(dim=0, correction=0)
    mean, weights = variance.mean(), weights.to(values.device, torch.float64)
    if not mean > 0:
        return weights
    scaled = weights / (variance / mean + floor)
    return scaled * (weights.sum() / scaled.sum())


def potential_energies(potential: Potential, frames: AtomsBatch, chunk_size: int = 64) -> Tensor:
    """U_θ of every frame without a graph, float64, shape (n_systems,), in eV."""
    with torch.no_grad():
        return torch.cat([potential(part, neighbor_list(part, potential.cutoff)) for part in _split(frames, chunk_size)])


def accumulate_gradient(
    potential: Potential, frames: AtomsBatch, sample_weights: Tensor, chunk_size: int = 64
) -> Tensor:
    """Add ∇_θ Σ_i w_i U_θ(Γ_i) to the parameters' `.grad`, chunk by chunk; returns U_θ of every frame.

    Memory is that of one chunk, whatever the number of samples, and the observable does not occur in it.

    Parameters
    ----------
    potential : Potential
    frames : AtomsBatch
    sample_weights : Tensor, shape (n_systems,)
    chunk_size : int
        Frames in one backward pass.
    """
    energies, parameters = [], [p for p in potential.parameters() if p.requires_grad]
    for part, weights in zip(_split(frames, chunk_size), sample_weights.split(chunk_size)):
        energy = potential(part, neighbor_list(part, potential.cutoff))
        # Some families ask for position gradients whenever they are called; here they would only cost time.
        (weights * energy).sum().backward(inputs=parameters)
        energies.append(energy.detach())
    return torch.cat(energies)


def _split(frames: AtomsBatch, chunk_size: int):
    for systems in torch.arange(frames.n_systems, device=frames.device).split(chunk_size):
        yield frames.select(systems)
