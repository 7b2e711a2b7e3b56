"""Frames of one temperature told at another."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stabie_ase.boltzmann.state_point import StatePoint

MIN_EFFECTIVE_FRACTION = 0.1
"""Least part of the frames that count. With Gaussian energies the fraction is exp(-s²), and frames as they are at the other temperature
lie s = |Δβ| σ_U standard deviations out, 1.5 for a tenth. Where there are few so far out the fraction that is found is that of these few.

57 harmonic oscillators of 300 K, mean energy (the worst case) at the coldest and the hottest temperature allowed, in standard errors,
means over 100 sets of 800 frames: off by 0.6 and -1.4, without weights by 18 and -11; with a limit of a twentieth by 1.1 and -2.7. Of 200
frames 1.2 and -4.1, without weights 13 and -12: what is left at the hot end is no small part where frames are few.
"""

MIN_EFFECTIVE_FRAMES = 20
"""The same of a few frames: the means of 50 at the limit are off by 2.1 and -4.6 errors with ten, by 0.8 and -1.7 with twenty."""


class PoorOverlap(ValueError):
    """Frames that tell too little of another temperature."""


def temperature_weights(energies: Tensor | np.ndarray, from_K: float, to_K: float) -> tuple[Tensor, float]:
    """Weights that make frames of one temperature those of another, p_i ∝ exp(-(β' - β) U_i) (Raja et al., arXiv 2402.13984, A.9).

    Means under them know themselves worse than their errors tell where few frames count, since those that would count most are missing.
    Where the volumes of the frames differ, those of the other temperature are at the pressure P T'/T.

    Parameters
    ----------
    energies : Tensor or ndarray, shape (n_frames,)
        U of independent frames of one system, in eV; an offset plays no part.
    from_K : float
        Temperature T of the frames, in K.
    to_K : float
        Temperature T' wanted, in K.

    Returns
    -------
    weights : Tensor of float64, shape (n_frames,)
        With a sum of one.
    effective_samples : float
        Kish's, 1 / Σ p_i².

    Raises
    ------
    PoorOverlap
        Fewer than 20 effective frames, or than a tenth of all.

    Examples
    --------
    >>> import numpy as np
    >>> from stabie_ase.boltzmann import temperature_weights
    >>> weights, effective = temperature_weights(np.linspace(0.0, 0.1, 50), 300.0, 330.0)
    >>> round(float(weights.sum()), 6), round(effective, 1)
    (1.0, 49.5)
    """
    energies = torch.as_tensor(energies, dtype=torch.float64)
    weights, effective = _weights(energies, from_K, to_K)
    n, least = len(energies), _least(len(energies))
    if effective >= least:
        return weights, effective
    if n < MIN_EFFECTIVE_FRAMES:
        needed = f"at least {MIN_EFFECTIVE_FRAMES} are needed"
        raise PoorOverlap(f"{n} frames are too few to be reweighted from {from_K:g} to {to_K:g} K; {needed}")
    raise PoorOverlap(
        f"of {n} frames of {from_K:g} K only {effective:.2g} count effectively at {to_K:g} K, at least {least:.3g} are needed; "
        f"the nearest temperature that they tell of is {nearest_temperature(energies, from_K, to_K):g} K"
    )


def nearest_temperature(energies: Tensor, from_K: float, to_K: float) -> float:
    """The temperature nearest to one, in whole K, at which enough of the frames of another count effectively.

    By bisection: 1 / Σ p_i² falls with the distance from the frames' own temperature, since log Σ exp(-Δβ U_i) is convex in Δβ.

    Parameters
    ----------
    energies : Tensor, shape (n_frames,)
        In eV, of 20 frames or more.
    from_K : float
        Temperature of the frames, in K.
    to_K : float
        Temperature wanted, at which too few count, in K.

    Returns
    -------
    float
    """
    near, far = from_K, to_K
    while abs(far - near) > 0.01:
        middle = 0.5 * (near + far)
        near, far = (middle, far) if _weights(energies, from_K, middle)[1] >= _least(len(energies)) else (near, middle)
    whole = math.floor(near) if to_K > from_K else math.ceil(near)
    return float(whole) if min(from_K, to_K) <= whole <= max(from_K, to_K) else near


def _least(n_frames: int) -> float:
    return max(MIN_EFFECTIVE_FRACTION * n_frames, MIN_EFFECTIVE_FRAMES)


def _weights(energies: Tensor, from_K: float, to_K: float) -> tuple[Tensor, float]:
    """Weights and their effective number."""
    log_p = StatePoint(to_K).exponent(energies) - StatePoint(from_K).exponent(energies)
    p = torch.softmax(log_p, dim=0)
    return p, float(1.0 / p.square().sum())
