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
    p = probabilities(values, point, energy_change, chosen, log_weights, strata)
    ess, projected = effective_number(p), values @ residual  # no copy of the values
    if strata is None:
        mean, bessel = total(p @ values) @ residual, values.new_tensor(ess / (ess - 1.0) if ess > 1.0 + 1e-9 else 1.0)
    else:
        mean, bessel = stratum_means(projected, p, strata), bessel_of(p, strata)
    if log_weights is not None:
        # Favoured samples tell their mean far better than so many independent ones: so corrected, the covariance would be too large.
        bessel = bessel.clamp(max=1.0)
    return -point.beta * bessel * p * (projected - mean), ess


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
    p = probabilities(values, point, energy_change, chosen, log_weights, strata)
    return total(p @ values), p, effective_number(p)


def probabilities(
    values: Tensor,
    point: StatePoint,
    energy_change: Tensor | None = None,
    chosen: Tensor | None = None,
    log_weights: Tensor | None = None,
    strata: Tensor | None = None,
) -> Tensor:
    """p of as many samples as there are values, shape (n_samples,), as `weighted_mean` has them."""
    n = int(total(torch.as_tensor(len(values)) if chosen is None else chosen.sum()))
    if n < 2:
        raise ValueError(f"a covariance needs two samples or more, got {n}")
    counted = values.new_zeros(len(values)) if log_weights is None else log_weights.to(values)
    if chosen is not None:
        counted = torch.where(chosen, counted, -torch.inf)
    # Volumes do not change with the parameters: P V cancels.
    log_p = counted if energy_change is None else counted - point.beta * energy_change.double()
    if strata is None:
        return softmax(log_p)
    highest = log_p.new_full((_number(strata),), -torch.inf).scatter_reduce(0, strata, log_p, "amax")
    p = (log_p - highest.clamp(min=torch.finfo(log_p.dtype).min)[strata]).exp()
    tiny = torch.finfo(p.dtype).tiny
    return p * stratum_sums(softmax(counted), strata) / stratum_sums(p, strata).clamp(min=tiny)


def effective_number(probabilities: Tensor) -> float:
    """Kish's, 1 / Σ p_i², of probabilities over all processes, shape (n_samples,)."""
    return float(1.0 / total(probabilities.square().sum()))


def stratum_sums(x: Tensor, strata: Tensor) -> Tensor:
    """The sum over its stratum for each sample, in the shape of x, (n_samples, ...)."""
    return x.new_zeros((_number(strata), *x.shape[1:])).index_add(0, strata, x)[strata]


def stratum_means(values: Tensor, probabilities: Tensor, strata: Tensor) -> Tensor:
    """Σ_j p_j x_j / Σ_j p_j over the stratum of each sample, in the shape of the values, (n_samples, ...)."""
    p = probabilities.view(-1, *(1 for _ in values.shape[1:]))
    return stratum_sums(p * values, strata) / stratum_sums(p, strata).clamp(min=torch.finfo(p.dtype).tiny)


def bessel_of(probabilities: Tensor, strata: Tensor) -> Tensor:
    """N/(N - 1) with Kish's N of the stratum of each sample, shape (n_samples,); 0 where one is alone, which has no covariance."""
    squares = stratum_sums(probabilities.square(), strata).clamp(min=torch.finfo(probabilities.dtype).tiny)
    effective = stratum_sums(probabilities, strata).square() / squares
    return torch.where(effective > 1.0 + 1e-9, effective / (effective - 1.0), 0.0)


def _number(strata: Tensor) -> int:
    return int(strata.max()) + 1 if len(strata) else 0
