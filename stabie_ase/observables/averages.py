"""Means of an observable over replicas and stretches of time, their distance from a target, and the errors of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_GROUPS = 4
"""Independent groups of samples that an error takes: that of four is itself known to 40 %."""


Statistic = Callable[[Tensor], Tensor]
"""What is compared, shape (..., m), from means, shape (..., d)."""


def unchanged(means: Tensor) -> Tensor:
    """The means themselves, in their unit."""
    return means


def linearised(statistic: Statistic, mean: Tensor, values: Tensor) -> Tensor:
    """A statistic to first order around a mean.

    Parameters
    ----------
    statistic : callable
        See `Statistic`.
    mean : Tensor, shape (d,)
        Around which.
    values : Tensor, shape (n, d)
        Of samples, or of means of some of them.

    Returns
    -------
    Tensor, shape (n, m)
        Its mean over samples whose mean is `mean` is the statistic of that; the samples themselves where they are the statistic.
    """
    if (at := statistic(mean)) is mean:
        return values
    slope = torch.func.jacfwd(statistic)(mean)
    return at + (values - mean) @ slope.T


@dataclass(frozen=True)
class SlicedMeans:
    """Sums of a vector over the frames of each replica in each slice of time.

    Attributes
    ----------
    sums : Tensor of float64, shape (n_replicas, n_slices, d)
    counts : Tensor of int64, shape (n_replicas, n_slices)
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    def collect(cls, values: Tensor, replica: Tensor, time_slice: Tensor, n_replicas: int, n_slices: int) -> SlicedMeans:
        """From frames: values, shape (n_frames, d), with the replica and the slice of each, shape (n_frames,)."""
        cell = replica * n_slices + time_slice
        sums = values.new_zeros((n_replicas * n_slices, values.shape[1]), dtype=torch.float64).index_add(0, cell, values.double())
        counts = torch.bincount(cell, minlength=n_replicas * n_slices)
        return cls(sums.view(n_replicas, n_slices, values.shape[1]).cpu(), counts.view(n_replicas, n_slices).cpu())

    @classmethod
    def none(cls, n_replicas: int, n_slices: int, width: int) -> SlicedMeans:
        """No frames yet."""
        return cls(
            torch.zeros((n_replicas, n_slices, width), dtype=torch.float64),
            torch.zeros((n_replicas, n_slices), dtype=torch.int64),
        )

    def __add__(self, other: SlicedMeans) -> SlicedMeans:
        """More frames of the same replicas."""
        return SlicedMeans(self.sums + other.sums, self.counts + other.counts)

    @classmethod
    def pool(cls, parts: Sequence[SlicedMeans]) -> SlicedMeans:
        """Replicas of several runs of one length."""
        return cls(torch.cat([part.sums for part in parts]), torch.cat([part.counts for part in parts]))

    @property
    def means(self) -> Tensor:
        """Of every cell, shape (n_replicas, n_slices, d); not a number where there is no frame."""
        return self.sums / self.counts[..., None]

    def keep(self, chosen: Tensor) -> SlicedMeans:
        """Only some cells, shape (n_replicas, n_slices)."""
        return SlicedMeans(torch.where(chosen[..., None], self.sums, 0.0), self.counts * chosen)  # 0 · nan would be nan

    def mean(self) -> Tensor | None:
        """Over all frames, shape (d,); None if there are none."""
        n = int(self.counts.sum())
        return self.sums.sum(dim=(0, 1)) / n if n else None

    def distance(self, target: Tensor, weights: Tensor, statistic: Statistic = unchanged) -> tuple[float | None, float | None]:
        """Σ_k c_k |s_k - g_k| of a statistic s of the means, shape (m,), and its standard error by leaving out one replica at a time."""
        mean = self.mean()
        if mean is None:
            return None, None

        def distance(means: Tensor) -> Tensor:
            return (weights * (statistic(means) - target).abs()).sum(dim=-1)

        return float(distance(mean)), jackknife_error(self.sums.sum(dim=1), self.counts.sum(dim=1), distance)


def jackknife_errors(
    sums: Tensor, counts: Tensor, statistic: Statistic = unchanged, min_groups: int = MIN_GROUPS
) -> Tensor | None:
    """Standard errors of a function of pooled means, by leaving out one group at a time.

    Frames of one replica are correlated, replicas are not: they are the groups (delete-one jackknife; Efron and Stein,
    Ann. Stat. 9, 586, 1981).

    Parameters
    ----------
    sums : Tensor of float64, shape (n_groups, d)
        Over the samples of each group.
    counts : Tensor, shape (n_groups, d) or (n_groups, 1)
        Samples of each group; a group without any in the first component does not count.
    statistic : callable
        From means, shape (n, d), to values, shape (n, m).
    min_groups : int
        That it takes.

    Returns
    -------
    Tensor of float64, shape (m,), or None
        None of fewer groups; not a number where the values of one are not.
    """
    some = counts[:, 0] > 0
    sums, counts = sums[some], counts[some]
    n = len(counts)
    if n < min_groups:
        return None
    without = statistic((sums.sum(dim=0) - sums) / (counts.sum(dim=0) - counts))
    return ((n - 1) * without.var(dim=0, correction=0)).sqrt()


def jackknife_error(sums: Tensor, counts: Tensor, statistic: Callable[[Tensor], Tensor]) -> float | None:
    """The same of one number: counts of shape (n_groups,), a statistic of shape (n_groups,); None of fewer than two groups."""
    errors = jackknife_errors(sums, counts[:, None], lambda means: statistic(means)[:, None], min_groups=2)
    return None if errors is None else float(errors)


def precision_weights(variance: Tensor, weights: Tensor, floor: float) -> Tensor:
    """Weights of components by how well each is known, c_k ∝ weights_k / (v_k/v̄ + floor), v̄ the mean of the variances v_k.

    Parameters
    ----------
    variance : Tensor, shape (d,)
        In the unit of the components, squared; where all are zero nothing is known of them and `weights` are returned.
    weights : Tensor, shape (d,)
        What they would count by otherwise; what has none keeps none, and its variance is not looked at.
    floor : float
        Fraction of v̄ added to every variance; far above one all components count by `weights` alone.

    Returns
    -------
    Tensor of float64, shape (d,)
        With the same sum as `weights`.
    """
    variance, weights = variance.double(), weights.to(variance.device, torch.float64)
    counted = weights > 0
    mean = variance[counted].mean()
    if not mean > 0:
        return weights
    scaled = torch.where(counted, weights / (variance / mean + floor), 0.0)
    return scaled * (weights.sum() / scaled.sum())


def noise_floor(values: Tensor, weights: Tensor, n_splits: int = 100, probabilities: Tensor | None = None) -> float | None:
    """Distance Σ_k c_k |ḡ_k - g_k| that a perfect model would show, since n reference frames do not know their own mean.

    The mean ḡ = Σ_i p_i g_i of independent frames has the variance Σ_i p_i² δ_i² with δ_i = g_i - ḡ (to first order in 1/n, where
    the p are normalised weights). So has Σ_i s_i p_i δ_i with signs s of which a random half is plus, the other minus; with equal
    weights it is half the difference of the means of two random halves: their variances are 2σ²/n each, that of the whole mean
    σ²/n. The absolute value of that, averaged over many choices of signs, is the floor.

    Parameters
    ----------
    values : Tensor, shape (n_frames, d)
        g of independent reference frames.
    weights : Tensor, shape (d,)
        c.
    n_splits : int
        Random halvings that are averaged over.
    probabilities : Tensor, shape (n_frames,), optional
        p, with a sum of one; equal if not given.

    Returns
    -------
    float or None
        None of fewer than four frames.
    """
    n, n_frames = len(values) // 2, len(values)
    if n < 2:
        return None
    p = values.new_full((n_frames,), 1.0 / n_frames) if probabilities is None else probabilities.to(values)
    generator = torch.Generator().manual_seed(0)
    signs = torch.zeros((n_splits, n_frames), dtype=values.dtype)
    for row in signs:
        order = torch.randperm(n_frames, generator=generator)
        row[order[:n]], row[order[n : 2 * n]] = 1.0, -1.0
    differences = signs.to(values.device) @ (p[:, None] * (values - p @ values))
    distances = (weights.to(values) * differences.abs()).sum(dim=1)
    return float(distances.mean()) * math.sqrt(n_frames / (2 * n))  # of an odd number one is left out
