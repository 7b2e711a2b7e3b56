"""What the samples of a window have told, and how much that is."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabie_ase.boltzmann import Estimate, Estimator, Grouping, Samples, fluctuation_weights, of_present
from stabie_ase.boltzmann.estimate import residual_of
from stabie_ase.boltzmann.gradient import energy_change, with_group_energies
from stabie_ase.boltzmann.samples import in_a_row
from stabie_ase.boltzmann.weights import response_weights, weighted_mean
from stabie_ase.observables import Target
from stabie_ase.observables.averages import SlicedMeans, jackknife_errors, linearised
from stabie_ase.potentials.base import Potential
from stabie_ase.stability.frames import blamed
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.system.processes import total
from stabie_ase.training.condition import Condition
from stabie_ase.training.options import FinetuneOptions
from stabie_ase.training.updates.base import Work

logger = logging.getLogger(__name__)

ROUNDING = 1e-6
"""Of β times the loss: weights whose sum is less than that are errors of rounding, as where all samples are winsorized to the same.

They are of its order where samples differ by as much as their mean is off. A direction has no length, and a step is as long by rounding: a
model of aspirin went nowhere in 8 minutes of them.
"""


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

    @property
    def of_atoms(self) -> bool:
        """Whether energies of its samples are sums over their atoms."""
        samples = self.estimate.samples
        return samples.parts is not None and samples.conformers is None

    def reweighted(self, potential: Potential, afresh: bool = False) -> Found:
        """The same samples by the potential as it is now, whose energies and with them weights are others.

        Parameters
        ----------
        potential : Potential
        afresh : bool
            Whether residuals are those that linear response leaves, not those of the window.

        Returns
        -------
        Found
        """
        change, samples = energy_change(potential, self.estimate.samples), self.estimate.samples
        residuals = self.estimate.residuals
        if afresh:
            here, there, _ = self._response(change)
            residuals = [(half, residual + there - here) for half, residual in residuals]
        samples = of_present(potential, samples, [target.observable for target in self.targets])
        estimate = replace(self.estimate, samples=samples, residuals=residuals)
        return replace(self, estimate=self.estimator.reweighted(estimate, self.targets, change), change=change)

    def of_groups(self, grouping: Grouping) -> Found:
        """The same frames in groups of their atoms, each of which weighs what its frame does, or the sample that is around it."""
        samples, estimate = self.estimate.samples, self.estimate
        groups = grouping(samples.frames)
        weights = estimate.weights[groups.system] if samples.parts is None else estimate.weights
        inside = replace(samples, groups=groups, values={}, group_energies=None, log_weights=None, conformers=grouping.conformers)
        return replace(self, estimate=replace(estimate, samples=inside, weights=weights))

    def to_blame(self, potential: Potential) -> tuple[Tensor, Tensor]:
        """Samples that hold what criteria blame in unstable frames: weights alone do not tell it from what is off by chance there.

        Parameters
        ----------
        potential : Potential
            That drove the dynamics.

        Returns
        -------
        alone : Tensor of bool, shape (n_groups,)
            Those that hold all the atoms to blame of their frame.
        together : Tensor of bool, shape (n_groups,)
            Those that hold some, and others the rest. Both where all atoms of a frame are to blame.
        """
        samples, condition = self.estimate.samples, self.condition
        groups, frames, unstable = samples.groups, samples.frames, (samples.severity > 1.0).nonzero()[:, 0]
        atoms = samples.severity.new_zeros(frames.n_atoms)
        if len(unstable):
            criteria = [criterion.for_model(potential) for criterion in condition.criteria]
            where, energies, temperature_K = frames.atom_index(unstable), samples.energies[unstable], condition.point.temperature_K
            atoms[where] = blamed(frames.select(unstable), criteria, energies, temperature_K).to(atoms)
        own = atoms.new_zeros(groups.n_groups).index_add(0, groups.group, atoms[groups.atoms])
        of_frame = frames.sum_over_atoms(atoms)[groups.system]
        everything = of_frame == frames.counts[groups.system]
        return (own > 0) & (everything | (own == of_frame)), (own > 0) & (everything | (own < of_frame))

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

    def slopes(self, change: Tensor) -> tuple[float, float]:
        """Slope of the loss along a step, from now to another `change`, at its beginning and at its end, by linear response.

        Δḡ = -β Cov(g, ΔU), which holds for a part of a step that is as long as one likes.

        Parameters
        ----------
        change : Tensor of float64, shape (n_groups,)
            As the attribute, by the potential at the end, in eV.

        Returns
        -------
        (float, float)
            λ·Δḡ with the residuals λ at ḡ and at ḡ + Δḡ, in units of the loss a step.
        """
        here, there, moved = self._response(change)
        return float(here @ moved), float(there @ moved)

    def _response(self, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """λ at ḡ and at ḡ + Δḡ, and Δḡ, of a step from now to another `change`, each of shape (Σ d,)."""
        samples, point = self.estimate.samples, self.estimator.point
        values, known = in_a_row(samples, self.targets), (samples.log_weights, self.estimator.strata(samples))
        mean = weighted_mean(values, point, self.change, None, *known)[0]
        step = (change - self.change)[:, None]
        moved = total(response_weights(step, step.new_ones(1), point, self.change, None, *known)[0] @ values)
        return residual_of(mean, self.targets), residual_of(mean + moved, self.targets), moved

    def _rise(self, change: Tensor) -> Tensor:
        """Of energies from now to another `change`, in k_B T."""
        return self.condition.point.beta * (change - self.change)

    def _sides(self, counts: Tensor, x: Tensor) -> list[float]:
        """Sums of counts times x and of counts, of what is to become rarer and of the rest, of all processes: they take the same step."""
        rarer = self.estimate.weights < 0.0
        return total(torch.stack([y[part].sum() for y in (counts * x, counts) for part in (rarer, ~rarer)])).tolist()


def find(work: Work, condition: Condition, samples: Samples) -> list[Found]:
    """The estimate of a window, or one for each kind of energies (`Samples.by_energies`).

    All frames tell what is off. Only the energies of those not far outside the criteria are changed for it: where
    replicas get lost is a matter of the way out, and what they find further on takes no learning, but most of a step.

    Parameters
    ----------
    work : Work
        Its potential is the one that drove the dynamics.
    condition : Condition
    samples : Samples
        All of the window.

    Returns
    -------
    list of Found
        None where too little of the window is near, or all samples are alike to the estimator.
    """
    own, whole = work.config.estimator, condition.grouping.whole
    near = samples.within(own.near_factor)
    if min(int(near.half(k).sum()) for k in ((0, 1) if own.cross_fit else (None,))) < 2:
        logger.warning("all replicas broke at once: %d frames are too few to learn from", len(near))
        return []
    half_width, within = work.config.half_width(whole), work.config.within(whole)
    estimator = Estimator(
        condition.point, own.cross_fit, half_width, own.near_factor, within, work.config.winsorized, condition.grouping.drawn
    )
    stable, found = near.within(1.0), []
    for part, targets in samples.by_energies(_weighted(work.config, condition, stable)):
        estimate = estimator(part, targets)
        if not float(total(estimate.weights.abs().sum())) > ROUNDING * condition.point.beta * estimate.loss:
            continue  # all that is off is within the fluctuations of sound frames
        estimate = replace(estimate, samples=with_group_energies(work.potential, estimate.samples))
        change, effective = torch.zeros_like(estimate.weights), estimate.effective_samples
        found.append(Found(condition, estimator, targets, estimate, stable.frames, change, effective))
    return found


def _weighted(config: FinetuneOptions, condition: Condition, stable: Samples) -> list[Target]:
    """Deviations count in units of the fluctuations of all frames that are as they should be.

    A few reference frames do not know the tails, and what looks rarer than it is drowns the failures in noise. By chance sound
    replicas are as far off by every observable, whatever its unit, as by the first: Σ_k c_k σ_k² with the standard errors σ_k of their
    means. What is slow, as the structure of a liquid is, is known worse than what is fast, and counts for less.
    """
    weighted, typical, floor = [], [], config.fluctuation_floor(condition.grouping.whole)
    for target in condition.targets:
        here = stable.values[target.observable.name].to(target.value)
        known = here if target.samples is None else torch.cat([target.samples, here])
        mean, statistic = known.mean(dim=0), target.observable.statistic
        known = linearised(statistic, mean, known)
        by_errors = target.components  # a curve that tells its errors
        components = fluctuation_weights(known, target.measure, floor).to(target.value) if by_errors is None else by_errors
        errors = squared_errors(linearised(statistic, mean, here), known, stable) if len(known) else components.new_zeros(())
        typical.append(float((components * errors).sum()))
        scale = typical[0] / typical[-1] if min(typical[0], typical[-1]) > 0 else 1.0
        weighted.append(replace(target, components=components * scale))
    return weighted


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
