"""What the samples of a window have told, and how much that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabie_ase.boltzmann import Estimate, Estimator, Samples
from stabie_ase.observables import Target
from stabie_ase.observables.averages import SlicedMeans, jackknife_errors
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.system.processes import total
from stabie_ase.training.condition import Condition


@dataclass(frozen=True)
class Found:
    """What the samples of a condition have told.

    Attributes
    ----------
    condition : Condition
    estimator : Estimator
    targets : list of Target
    estimate : Estimate
    sound : AtomsBatch
        Frames that are stable.
    change : Tensor of float64, shape (n_groups,)
        Energies of its samples by the present potential beside those by the one that drove the dynamics, in eV.
    effective : float
        Effective number of its samples before any change. Those that were drawn to favour rare ones, or count alike by replicas, are
        fewer than there are from the beginning.
    """

    condition: Condition
    estimator: Estimator
    targets: list[Target]
    estimate: Estimate
    sound: AtomsBatch
    change: Tensor
    effective: float

    def raised(self, change: Tensor) -> float:
        """By how many k_B T what is to become rarer has risen beside what is to become more common, from now to another `change`.

        That is samples of w_i < 0 and w_i > 0; each counts by w_i², so that the few far off are not lost among the many that fluctuate. One
        that was drawn for v_i others counts as many times by (w_i/v_i)².

        Parameters
        ----------
        change : Tensor of float64, shape (n_groups,)
            As the attribute, by the potential of now, in eV.

        Returns
        -------
        float
            Zero where nothing is to become rarer, or nothing more common.
        """
        estimate = self.estimate
        squares = estimate.weights.square()
        if self.estimator.drawn is not None and estimate.samples.log_weights is not None:
            squares = squares / estimate.samples.log_weights.exp()
        up, down, n_up, n_down = self._sides(squares, self._rise(change))
        return up / n_up - down / n_down if n_up > 0.0 and n_down > 0.0 else 0.0

    def rarer(self, change: Tensor) -> float:
        """Minus the logarithm of the factor by which what is to become rarer has become so, from now to another `change`.

        -ln Σ p_i exp(-β ΔU_i), p_i ∝ |w_i| of samples of w_i < 0. Where some failures are lifted far and others are not it is small; their
        mean rise is not.

        Parameters
        ----------
        change : Tensor of float64, shape (n_groups,)
            As the attribute, by the potential of now, in eV.

        Returns
        -------
        float
            Zero where nothing is to become rarer, or nothing more common.
        """
        weights, rise = self.estimate.weights.abs(), self._rise(change)
        _, common, n_rarer, n_common = self._sides(weights, rise)
        if not (n_rarer > 0.0 and n_common > 0.0):
            return 0.0
        left, *_ = self._sides(weights, torch.exp(common / n_common - rise))
        return math.log(n_rarer / left) if left > 0.0 else math.inf

    def _rise(self, change: Tensor) -> Tensor:
        """Of energies from now to another `change`, in k_B T."""
        return self.condition.point.beta * (change - self.change)

    def _sides(self, counts: Tensor, x: Tensor) -> list[float]:
        """Sums of counts times x and of counts, of what is to become rarer and of the rest, of all processes: they take the same step."""
        rarer = self.estimate.weights < 0.0
        return total(torch.stack([y[part].sum() for y in (counts * x, counts) for part in (rarer, ~rarer)])).tolist()


def is_noise(known: dict[str, float]) -> bool:
    """Whether a gradient is shorter than its standard error.

    Parameters
    ----------
    known : dict of str to float
        "gradient_norm" and "gradient_norm_error" of it; empty where nothing is known.

    Returns
    -------
    bool
    """
    return known.get("gradient_norm", math.inf) < known.get("gradient_norm_error", 0.0)


def squared_errors(here: Tensor, known: Tensor, samples: Samples) -> Tensor:
    """Squares of the standard errors of the mean of some samples; of few replicas the variances of all that is known.

    Parameters
    ----------
    here : Tensor, shape (n_groups, d)
        Values of the samples.
    known : Tensor, shape (n, d)
        Those and values of the reference.
    samples : Samples

    Returns
    -------
    Tensor of float64, shape (d,)
    """
    replica = samples.replica[samples.groups.system].unique(return_inverse=True)[1]
    n = int(replica.max()) + 1 if len(replica) else 0
    cells = SlicedMeans.collect(here, replica, torch.zeros_like(replica), n, 1)
    errors = jackknife_errors(cells.sums[:, 0], cells.counts)
    return known.var(dim=0, correction=0) if errors is None else errors.to(known).square()


def ess_fraction(estimates: list[Found]) -> float:
    """What changes of energies have left of the effective number of samples, of the condition where that is least.

    Parameters
    ----------
    estimates : list of Found
        One or more.

    Returns
    -------
    float
    """
    return min(found.estimate.effective_samples / found.effective for found in estimates)
