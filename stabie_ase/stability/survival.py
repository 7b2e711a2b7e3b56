"""Times to the first failure: Kaplan-Meier, the hazard, and whether one model's is lower than another's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import units
from scipy import stats

from stabie_ase.stability.watch import Failures


@dataclass(frozen=True)
class StabilityStatistics:
    """Times to first failure of many replicas; those that outlive the run are censored.

    Attributes
    ----------
    times_ps : ndarray, shape (n_replicas,)
        To the failure, or to the end of the run.
    failed : ndarray of bool, shape (n_replicas,)
    """

    times_ps: np.ndarray
    failed: np.ndarray

    @classmethod
    def pool(cls, parts: Sequence[StabilityStatistics]) -> StabilityStatistics:
        """Replicas of several runs."""
        return cls(np.concatenate([p.times_ps for p in parts]), np.concatenate([p.failed for p in parts]))

    @property
    def n_failed(self) -> int:
        """Number of replicas that failed; the others are censored."""
        return int(self.failed.sum())

    @property
    def stable_replica_ps(self) -> float:
        """Time in ps that all replicas together spent before their first failure."""
        return float(self.times_ps.sum())

    @property
    def hazard_per_ps(self) -> float:
        """Failures per stable replica-ps: the maximum-likelihood rate if failures came at a constant rate."""
        return self.n_failed / self.stable_replica_ps

    def hazard_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Exact Poisson interval of the hazard (Garwood, Biometrika 28, 437, 1936), per ps."""
        tail, n = (1.0 - level) / 2.0, self.n_failed
        low = stats.chi2.ppf(tail, 2 * n) / 2.0 if n else 0.0
        high = stats.chi2.ppf(1.0 - tail, 2 * n + 2) / 2.0
        return float(low / self.stable_replica_ps), float(high / self.stable_replica_ps)

    def survival(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Kaplan-Meier estimate: times in ps, surviving fraction and its 95 % band (log-log), low and high."""
        if not self.n_failed:
            ends = np.array([0.0, self.times_ps.max()])
            return ends, np.ones(2), np.ones(2), np.ones(2)
        curve = stats.ecdf(stats.CensoredData.right_censored(self.times_ps, ~self.failed)).sf
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore")  # where nobody is left the log-log band is undefined: [0, 1] below
            band = curve.confidence_interval(method="log-log")
        # The band has no width where all or none survive: there it is what it was before.
        low = np.where(curve.probabilities == 1.0, 1.0, np.nan_to_num(band.low.probabilities))
        high = np.minimum.accumulate(np.nan_to_num(band.high.probabilities, nan=1.0))
        return (
            np.concatenate([[0.0], curve.quantiles]),
            np.concatenate([[1.0], curve.probabilities]),
            np.concatenate([[1.0], low]),
            np.concatenate([[1.0], high]),
        )

    def median_ps(self) -> tuple[float | None, float | None, float | None]:
        """Median stable time and its 95 % band, in ps; None where the curve does not come down to one half."""
        times, fraction, low, high = self.survival()

        def crossing(curve):
            below = np.flatnonzero(curve <= 0.5 + 1e-12)
            return float(times[below[0]]) if len(below) else None

        return crossing(fraction), crossing(low), crossing(high)


def stability_statistics(failures: Failures, n_steps: int, timestep: float) -> StabilityStatistics:
    """Statistics of one run of `n_steps` steps of `timestep` (ASE units)."""
    step, failed = failures.step.cpu().numpy(), failures.failed.cpu().numpy()
    return StabilityStatistics(np.where(failed, step, n_steps) * timestep / (1000.0 * units.fs), failed)


def fewer_p_value(n_start: int, n_end: int, time_start: float, time_end: float) -> float:
    """Chance (a fraction) that one of two models has so many more failures in its time (ps) if their rates were equal.

    With equal rates the starting model's fraction of all failures is binomial, its chance the fraction of the time it was
    observed for (Przyborowski & Wilenski, Biometrika 31, 313, 1940): exact for a number of failures that was not waited for.
    """
    n = n_start + n_end
    return float(stats.binomtest(n_start, n, time_start / (time_start + time_end), alternative="greater").pvalue) if n else 1.0
