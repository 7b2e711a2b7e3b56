"""Whether one model fails less often than another, asked again and again as failures come in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import norm

from stabie_ase.stability.survival import StabilityStatistics

ERROR_RATE = 0.05
"""Chance of a wrong answer, however often it is asked for."""

GAIN_RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0, 8.0, 15.0, 30.0)
"""Ratios of the hazards that a gain is thought possible to have, equally likely beforehand."""

MIN_GAIN_RATIO = 1.5
"""The least ratio that is worth a training: to rule it out is an answer too."""

NO_GAIN_RATIOS = (1.0, 0.8, 0.5, 0.2)
"""Ratios thought possible where there is no such gain."""


@dataclass
class HazardComparison:
    """Evidence on the ratio ρ of two models' hazards, start over end, collected in rounds of replicas.

    The anytime-valid logrank test (ter Schure, Perez-Ortiz, Ly & Grünwald, arXiv 2011.06931; Grünwald, de Heide &
    Koolen, J. R. Stat. Soc. B 86, 1091, 2024). With Y_s and Y_e replicas of either model at risk when a replica fails, it is
    the starting model's with the chance ρ Y_s / (ρ Y_s + Y_e), whatever the common hazard does in time (Cox's partial
    likelihood). The product over all failures of the likelihood ratio of a mixture of ρ > 1 against ρ = 1 is a
    martingale if there is no gain; it exceeds 1/α once in its life with a chance of α at most (Ville). So the answer may be
    looked at after every round, and its error rate stays what is said.

    Attributes
    ----------
    gain : ndarray, shape (len(GAIN_RATIOS),)
        log likelihood ratios of each gain against none.
    no_gain : ndarray, shape (len(NO_GAIN_RATIOS),)
        log likelihood ratios of each lesser ratio against the least that is worth having.
    """

    gain: np.ndarray = field(default_factory=lambda: np.zeros(len(GAIN_RATIOS)))
    no_gain: np.ndarray = field(default_factory=lambda: np.zeros(len(NO_GAIN_RATIOS)))

    def add(self, start: StabilityStatistics, end: StabilityStatistics) -> None:
        """The failures of one round; time is counted from its beginning."""
        times = np.concatenate([start.times_ps[start.failed], end.times_ps[end.failed]])
        of_start = np.arange(len(times)) < start.n_failed
        at_risk = [np.array([(s.times_ps >= t - 1e-12).sum() for t in times], dtype=float) for s in (start, end)]
        self.gain = self.gain + _log_likelihood(GAIN_RATIOS, of_start, *at_risk) - _log_likelihood((1.0,), of_start, *at_risk)
        self.no_gain = self.no_gain + _log_likelihood(NO_GAIN_RATIOS, of_start, *at_risk)
        self.no_gain -= _log_likelihood((MIN_GAIN_RATIO,), of_start, *at_risk)

    @property
    def p_value(self) -> float:
        """Of no gain, a fraction valid whenever it is asked for: 1/e of the evidence, at most 1."""
        return min(1.0, 1.0 / max(_mean_exp(self.gain), 1e-300))

    @property
    def hopeless(self) -> bool:
        """Whether a gain by the factor `MIN_GAIN_RATIO` or more can be ruled out."""
        return _mean_exp(self.no_gain) >= 1.0 / ERROR_RATE

    @property
    def gained(self) -> bool:
        """Whether a gain is known at the stated level, bool."""
        return self.p_value <= ERROR_RATE

    @property
    def decided(self) -> bool:
        """Whether the answer is known, either way, bool."""
        return self.gained or self.hopeless


def _log_likelihood(ratios: tuple[float, ...], of_start: np.ndarray, at_start: np.ndarray, at_end: np.ndarray) -> np.ndarray:
    """Cox's partial likelihood of who failed, for ratios of the hazards, shape (n_ratios,), but for a common constant."""
    ratio = np.array(ratios)[:, None]
    return (np.where(of_start, np.log(ratio), 0.0) - np.log(ratio * at_start + at_end)).sum(axis=1)


def _mean_exp(logs: np.ndarray) -> float:
    top = logs.max()
    return math.exp(min(top, 600.0)) * float(np.exp(logs - top).mean())


def replica_ps_to_tell(hazard_per_ps: float, ratio: float = 4.0, power: float = 0.8) -> float:
    """Time of each of two models after which a ratio of their hazards is told from chance with 95 % confidence.

    From the normal approximation of the binomial fraction of the worse model among n failures,
    n = [(z_α/2 + z_β √(p (1 - p))) / (p - 1/2)]² with p = ratio/(1 + ratio), in replica-ps.

    Parameters
    ----------
    hazard_per_ps : float
        Of the worse model, in failures per replica-ps.
    ratio : float
        Of the two hazards, above 1.
    power : float
        Chance that the difference is found, 1 - β.

    Returns
    -------
    float
        In replica-ps; infinite where nothing fails.
    """
    p = ratio / (1.0 + ratio)
    z_alpha, z_beta = norm.isf(ERROR_RATE), norm.ppf(power)
    n_failures = ((0.5 * z_alpha + z_beta * math.sqrt(p * (1.0 - p))) / (p - 0.5)) ** 2
    return math.inf if hazard_per_ps <= 0 else n_failures / (hazard_per_ps * (1.0 + 1.0 / ratio))
