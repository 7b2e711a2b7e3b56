"""Samples of which no failure takes the gradient from the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stabie_ase.boltzmann.samples import Samples, in_a_row, row_parts
from stabie_ase.observables import Target
from stabie_ase.system.processes import total


def evened(samples: Samples, near: float = math.inf) -> Samples:
    """Samples in which the unstable frames of each replica count alike, together as much as they did.

    One that fails at the start of a window has most of its frames unstable, one that fails at the end a few, and both failed once.

    Parameters
    ----------
    samples : Samples
    near : float
        Largest severity of these frames; those beyond count as they did.

    Returns
    -------
    Samples
        Those given if no frame is unstable, of any process.
    """
    chosen = (samples.severity > 1.0) & (samples.severity <= near)
    n = torch.bincount(samples.replica[chosen]).double()
    n_frames, n_failed = total(torch.stack([n.sum(), (n > 0).sum().to(n)]))
    if not n_failed > 0:
        return samples
    counts = torch.zeros_like(samples.severity, dtype=torch.float64)
    counts[chosen] = (n_frames / n_failed / n[samples.replica[chosen]]).log()
    known = 0.0 if samples.log_weights is None else samples.log_weights
    return replace(samples, log_weights=known + counts[samples.groups.system])


QUARTILES_APART = 1.349
"""Standard deviations, of a normal distribution."""

THRESHOLD = 4.0
"""Standard deviations of sound samples within which none is off, see `winsorized`."""


def winsorized(samples: Samples, targets: Sequence[Target], residual: Tensor) -> Samples:
    """Samples of which none is farther off than the median unstable frame, and those no farther off than sound ones fluctuate are not.

    How far off a sample is tells ψ_i = λ·(g_i - m), to first order what it adds to the loss; m is the mean of those samples of stable
    frames whose λ·g_i is between the quartiles, as averaging has some of them explode already. A frame is as far off as the worst of
    its groups; the median of the unstable frames, where that is positive, is the largest ψ (Winsor's way with outliers; Tukey, Ann. Math.
    Stat. 33, 1, 1962). Then |ψ| is less by `THRESHOLD` standard deviations, as the quartiles tell them, but no more than half of
    that largest ψ, and what is below that is zero (soft thresholding; Donoho, IEEE Trans. Inf. Theory 41, 613, 1995): of a liquid
    thousands of sound molecules would drown a few broken ones. g_i - m is scaled as its ψ is.

    Parameters
    ----------
    samples : Samples
    targets : sequence of Target
    residual : Tensor, shape (Σ width,)
        λ = ∂L/∂ḡ.

    Returns
    -------
    Samples
        Those given if all frames are stable, or none is.
    """
    values, unstable = in_a_row(samples, targets), samples.severity > 1.0
    sound = values[~unstable[samples.groups.system]]
    if not len(sound) or not bool(unstable.any()):
        return samples
    along = sound @ residual
    low, high = along.kthvalue(1 + len(along) // 4).values, along.kthvalue(len(along) - len(along) // 4).values
    off = values - sound[(along >= low) & (along <= high)].mean(dim=0)
    psi = off @ residual
    worst = psi.new_full((samples.frames.n_systems,), -math.inf).scatter_reduce(0, samples.groups.system, psi, "amax")
    limit = float(worst[unstable].median())
    limit = limit if limit > 0.0 else math.inf
    threshold = min(THRESHOLD * float(high - low) / QUARTILES_APART, 0.5 * limit)
    bounded = psi.sign() * (psi.clamp(max=limit).abs() - threshold).clamp(min=0.0)
    kept = values + off * (torch.where(psi == 0.0, 1.0, bounded / psi) - 1.0)[:, None]
    return replace(samples, values={target.observable.name: part for target, part in zip(targets, row_parts(kept, targets))})
