"""What samples count for: their probabilities, and the weights of their energies in a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from stabie_ase.boltzmann.state_point import StatePoint
from stabie_ase.system.processes import softmax, total


def response_weights(
    values: Tensor,
    residual: Tensor,
    point: StatePoint,
    energy_change: Tensor | None = None,
    chosen: Tensor | None = None,
    log_weights: Tensor | None = None,
    strata: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Weights w_i of samples with Σ_i w_i ∇_θ U_θ(γ_i) = Σ_k λ_k ∂ḡ_k/∂θ for a residual λ.

    Parameters
    ----------
    values : Tensor, shape (n_samples, d)
        g of every sample.
    residual : Tensor, shape (d,)
        λ = ∂L/∂ḡ.
    point : StatePoint
    energy_change : Tensor, shape (n_samples,), optional
        U_θ - U_θ0 in eV.
    chosen : Tensor of bool, shape (n_samples,), optional
        Samples that count; the weights of the others are zero.
    log_weights : Tensor, shape (n_samples,), optional
        Of samples that do not count alike (`Samples.log_weights`).
    strata : Tensor of int64, shape (n_samples,), optional
        Within which samples are compared; all are one by default.

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
    if strata is not None:
        _, p, ess = weighted_mean(values[:, :0], point, energy_change, chosen, log_weights, strata)
        projected, correction = values @ residual, bessel_of(p, strata)
        correction = correction if log_weights is None else correction.clamp(max=1.0)
        return -point.beta * correction * p * (projected - stratum_means(projected[:, None], p, strata)[:, 0]), ess
    mean, p, ess = weighted_mean(values, point, energy_change, chosen, log_weights)
    # Favoured samples tell their mean far better than so many independent ones: corrected like those, the covariance would be too large.
    bessel = ess / (ess - 1.0) if log_weights is None and ess > 1.0 + 1e-9 else 1.0
    return -point.beta * bessel * p * (values @ residual - mean @ residual), ess  # no copy of the values


def weighted_mean(
    values: Tensor,
    point: StatePoint,
    energy_change: Tensor | None = None,
    chosen: Tensor | None = None,
    log_weights: Tensor | None = None,
    strata: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Mean over the chosen samples, p_i ∝ v_i exp(-β [U_θ - U_θ0]) each.

    Parameters
    ----------
    values : Tensor, shape (n_samples, d)
        Averaged over the samples.
    point : StatePoint
        Gives β.
    energy_change : Tensor, shape (n_samples,), optional
        U_θ - U_θ0 in eV; equal probabilities without it.
    chosen : Tensor of bool, shape (n_samples,), optional
        Samples that count; all by default.
    log_weights : Tensor, shape (n_samples,), optional
        ln v_i, up to a constant; zero by default.
    strata : Tensor of int64, shape (n_samples,), optional
        Each counts by its number of samples, or their v, whatever the energies do.

    Returns
    -------
    mean : Tensor, shape (d,)
    probabilities : Tensor, shape (n_samples,)
        Normalised; zero of those that do not count.
    effective_samples : float
        Kish's, 1 / Σ p_i².

    Of several processes all samples count, and the probabilities are those of this one's (`system.processes`).

    Raises
    ------
    ValueError
        Fewer than two samples.
    """
    n = int(total(torch.as_tensor(len(values)) if chosen is None else chosen.sum()))
    if n < 2:
        raise ValueError(f"a covariance needs two samples or more, got {n}")
    # Volumes do not change with the parameters: P V cancels.
    log_p = values.new_zeros(len(values)) if energy_change is None else -point.beta * energy_change.double()
    if log_weights is not None:
        log_p = log_p + log_weights
    if chosen is not None:
        log_p = torch.where(chosen, log_p, -torch.inf)
    p = softmax(log_p) if strata is None else within_strata(log_p, strata, log_weights, chosen)
    return total(p @ values), p, float(1.0 / total(p.square().sum()))


def within_strata(log_p: Tensor, strata: Tensor, log_weights: Tensor | None, chosen: Tensor | None) -> Tensor:
    """Probabilities that are normalised within strata, each of which has the share of its samples, or of their weights."""
    share = torch.ones_like(log_p) if log_weights is None else (log_weights - log_weights.max()).exp()
    share = share if chosen is None else share * chosen
    n = int(strata.max()) + 1 if len(strata) else 0
    highest = log_p.new_full((n,), -torch.inf).scatter_reduce(0, strata, log_p, "amax")
    p = (log_p - highest.clamp(min=torch.finfo(log_p.dtype).min)[strata]).exp()
    sums, shares = (p.new_zeros(n).index_add(0, strata, x) for x in (p, share))
    p = p * (shares / sums.clamp(min=torch.finfo(p.dtype).tiny))[strata]
    return p / total(share.sum())


def stratum_means(values: Tensor, probabilities: Tensor, strata: Tensor) -> Tensor:
    """Σ_j p_j x_j / Σ_j p_j over the stratum of each sample, shape (n_samples, d)."""
    n = int(strata.max()) + 1 if len(strata) else 0
    sums = values.new_zeros((n, values.shape[1])).index_add(0, strata, probabilities[:, None] * values)
    shares = probabilities.new_zeros(n).index_add(0, strata, probabilities)
    return (sums / shares.clamp(min=torch.finfo(shares.dtype).tiny)[:, None])[strata]


def bessel_of(probabilities: Tensor, strata: Tensor) -> Tensor:
    """N/(N - 1) with Kish's N of the stratum of each sample, shape (n_samples,); 0 where one is alone, which has no covariance."""
    n = int(strata.max()) + 1 if len(strata) else 0
    sums, squares = (probabilities.new_zeros(n).index_add(0, strata, x) for x in (probabilities, probabilities.square()))
    effective = sums.square() / squares.clamp(min=torch.finfo(sums.dtype).tiny)
    return torch.where(effective > 1.0 + 1e-9, effective / (effective - 1.0), 0.0)[strata]
