"""The Boltzmann estimator: how the mean of an observable depends on a potential's parameters, from samples.

∂⟨g⟩/∂θ = -β Cov(g, ∂U/∂θ) + ⟨∂g/∂θ⟩, the second term where g itself contains θ. Contracted with the gradient of a loss in ⟨g⟩ the first
is a weighted sum of ∂U/∂θ over the samples, so it costs one backward pass and no backpropagation through dynamics. So is the second of an
energy; of a stress it is one of ∂σ/∂θ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabie_ase.boltzmann.samples import Samples, in_a_row, row_parts
from stabie_ase.boltzmann.state_point import StatePoint
from stabie_ase.boltzmann.weights import probabilities, response_weights, weighted_mean
from stabie_ase.boltzmann.winsorizing import evened, winsorized
from stabie_ase.observables import Target
from stabie_ase.observables.averages import precision_weights
from stabie_ase.system.processes import total


@dataclass(frozen=True)
class Estimate:
    """Means of observables, their losses, and the weights whose ∇_θ Σ_i w_i U_θ(γ_i) is the gradient of the sum of losses.

    Attributes
    ----------
    means : dict of str to Tensor of float64, shape (d,)
        What is compared under the present potential, ḡ or its `statistic`, by the observable's name.
    losses : dict of str to float
        L = w Σ_k c_k (ḡ_k - g_k^ref)².
    samples : Samples
        Those whose energies are changed.
    weights : Tensor of float64, shape (n_groups,)
        w_i of these, in units of the loss per eV.
    effective_samples : float
        Kish's effective number of these, 1 / Σ p_i².
    residuals : list of (int or None, Tensor of shape (Σ width,))
        ∂L/∂ḡ of all targets in a row, and the half of the replicas whose covariance it meets.
    all_samples : Samples
        Those that these were drawn from; the same ones where none were drawn.
    stress_weights : Tensor of float64, shape (n_frames, 3, 3), or None
        s_i of stresses σ_i (eV/Å³), whose ∇_θ Σ_i s_i·σ_i belongs to the gradient; None where no observable is made of them.
    """

    means: dict[str, Tensor]
    losses: dict[str, float]
    samples: Samples
    weights: Tensor
    effective_samples: float
    residuals: list[tuple[int | None, Tensor]]
    all_samples: Samples
    stress_weights: Tensor | None = None

    @property
    def loss(self) -> float:
        """Of all targets together, a scalar."""
        return sum(self.losses.values())


@dataclass(frozen=True)
class Estimator:
    """The estimator of Raja et al. (arXiv 2402.13984, eq. 3 to 5), reweighted if the potential has changed since samples were drawn.

    With groups γ_i of atoms and their energies U(γ_i), ḡ = Σ_i p_i g_i and p_i ∝ v_i exp(-β [U_θ(γ_i) - U_θ0(γ_i)]) (Zwanzig,
    J. Chem. Phys. 22, 1420, 1954; Thaler & Zavadlav, Nat. Commun. 12, 6884, 2021), v_i the weight of a sample that was favoured or
    else one (`Samples.favouring`),

        ∇_θ L = Σ_i w_i ∇_θ U_θ(γ_i),    w_i = -β p_i Σ_k 2 c_k (ḡ_k - g_k^ref) (g_k(γ_i) - ḡ_k) · B.

    B = N_eff / (N_eff - 1) is Bessel's correction with Kish's N_eff; without a change of energies it is N / (N - 1), and 1 where
    samples were favoured. Where g is made of energies or stresses (`Observable.needs`), p_i Σ_k λ_k ∂g_k/∂U_i is added to w_i, and
    p_i Σ_k λ_k ∂g_k/∂σ_i is `Estimate.stress_weights`, with λ = ∂L/∂ḡ; the samples' values are then to be those of θ (`of_present`).
    Where a statistic s(ḡ) is compared, λ = ∂L/∂s ∂s/∂ḡ. β is written, never absorbed: the gradient may be added to another loss's.
    With `within` each sample is compared with its own trajectory (`Samples.trajectory`) alone: Cov is the mean of the covariances within
    trajectories, and p_i is normalised within each, which counts by how many samples it has. Windows are short, and which of the slow
    states a trajectory is in was set by its start, not by the parameters; between a few starts that differ in everything ∂U/∂θ is noise.
    Of long trajectories both are the same but for 1/N_eff of each.

    Where a group is the whole system this is exact; that a molecule, or a neighbourhood, is Boltzmann distributed in its own local energy
    is the paper's approximation.

    Parameters
    ----------
    point : StatePoint
    cross_fit : bool
        The residual and the covariance from the same samples leave a bias of O(1/N). So each half of the replicas has its residual
        met by the covariance of the other half, and the mean of the two has no bias where replicas are independent. To first
        order the variance stays the same; that of the product of both noises, of order 1/N², doubles.
    half_width : int
        Frames to either side over which a g is averaged along its own trajectory where it stands in the covariance.
    near : float
        Frames of a higher severity say what is off, and their energies are not changed.
    within : bool
        Covariances within trajectories instead of that of all samples.
    winsorized : bool
        No failure takes the gradient from the others: each replica's counts alike, see `evened`, and no sample is farther off than the
        median unstable frame, or off at all where sound ones fluctuate as much, see `winsorized`; means and losses stay those of the
        samples. Not where samples are cross-fitted. What explodes is orders of magnitude farther off than a bond that is too long, and
        what fails early has ten times as many frames.
    drawn : int or None
        Of more samples so many stand for all in the covariance, the rare ones among them favoured (`Samples.favouring`); means and
        losses are those of all. Not where a change of energies is given. Conditional energies take a system for each sample.
    """

    point: StatePoint
    cross_fit: bool = False
    half_width: int = 0
    near: float = math.inf
    within: bool = False
    winsorized: bool = False
    drawn: int | None = None

    def __post_init__(self):
        if self.cross_fit and self.winsorized:
            raise ValueError("samples are cross-fitted, so that a gradient has no bias, or winsorized, which is one; choose one of them")

    def __call__(self, samples: Samples, targets: Sequence[Target], energy_change: Tensor | None = None) -> Estimate:
        """Means, losses and weights.

        Parameters
        ----------
        samples : Samples
        targets : sequence of Target
            Of observables that the samples hold.
        energy_change : Tensor, shape (n_groups,), optional
            U_θ - U_θ0 in eV.

        Returns
        -------
        Estimate

        Raises
        ------
        ValueError
            Fewer than two samples, in a half where there are halves.
        """
        values = in_a_row(samples, targets)
        mean = self._mean(samples, values, energy_change)
        if self.winsorized:
            samples = evened(samples, self.near)
        pairs = [(0, 1), (1, 0)] if self.cross_fit else [(None, None)]
        residuals = [(own, residual_of(self._mean(samples, values, energy_change, other), targets)) for own, other in pairs]
        means = {t.observable.name: t.observable.statistic(part) for t, part in zip(targets, row_parts(mean, targets))}
        losses = {t.observable.name: float(t.weight * (t.metric * (means[t.observable.name] - t.value).square()).sum()) for t in targets}
        near = samples.averaged(self.half_width)
        change = energy_change
        if self.near < math.inf:
            change = None if change is None else change[(samples.severity <= self.near)[samples.groups.system]]
            near = near.within(self.near)
        if self.winsorized:
            near = winsorized(near, targets, residuals[0][1])
        there = near
        if self.drawn is not None and change is None and len(near) > self.drawn:
            off = in_a_row(near, targets) @ torch.stack([residual for _, residual in residuals]).mean(dim=0)
            near = near.favouring(off, self.drawn, seed=0, apart=near.half(1) if self.cross_fit else None)
        return self.reweighted(Estimate(means, losses, near, mean.new_zeros(0), math.nan, residuals, there), targets, change)

    def _mean(self, samples: Samples, values: Tensor, energy_change: Tensor | None, half: int | None = None) -> Tensor:
        """ḡ of all samples, or of those of half of the replicas, shape (Σ d,)."""
        chosen = samples.half(half)
        if energy_change is None and samples.log_weights is None:
            return total(values[chosen].sum(dim=0)) / total(chosen.sum())
        return weighted_mean(values, self.point, energy_change, chosen, samples.log_weights, self.strata(samples))[0]

    def strata(self, samples: Samples) -> Tensor | None:
        """What samples are compared with the mean of, shape (n_groups,); None where that is all of them."""
        return samples.trajectory if self.within else None

    def reweighted(self, estimate: Estimate, targets: Sequence[Target], energy_change: Tensor | None) -> Estimate:
        """The same residuals with the covariance under other parameters.

        Parameters
        ----------
        estimate : Estimate
            Under the parameters that the residuals are of.
        targets : sequence of Target
            Those of the estimate, in the same order.
        energy_change : Tensor, shape (n_groups,), or None
            Of the estimate's samples, U_θ - U_θ0 in eV; None where the parameters are those that the samples were drawn with.

        Returns
        -------
        Estimate
            With other weights and another effective number of samples.
        """
        near, n = estimate.samples, len(estimate.residuals)
        values, weights, effective, stress = in_a_row(near, targets), torch.zeros(()), 0.0, None
        strata = self.strata(near)
        for half, residual in estimate.residuals:
            chosen = None if half is None else near.half(half)
            found, ess = response_weights(values, residual, self.point, energy_change, chosen, near.log_weights, strata)
            weights, effective = weights + found / n, effective + ess
            if any(target.observable.needs for target in targets):
                p = probabilities(values, self.point, energy_change, chosen, near.log_weights, strata)
                explicit = explicit_weights(near, targets, residual, p / n)
                weights = weights + explicit[0]
                stress = explicit[1] if stress is None or explicit[1] is None else stress + explicit[1]
        return replace(estimate, weights=weights, effective_samples=effective, stress_weights=stress)


def residual_of(mean: Tensor, targets: Sequence[Target]) -> Tensor:
    """∂L/∂ḡ of L = Σ w Σ_k c_k (s_k(ḡ) - g_k^ref)², shape (Σ width,), differentiable in ḡ if that asks for a gradient."""
    parts = []
    for target, part in zip(targets, row_parts(mean, targets)):
        with torch.enable_grad():
            at = part if part.requires_grad else part.detach().requires_grad_()
            compared = target.observable.statistic(at)
            slope = 2.0 * target.weight * target.metric * (compared - target.value)
            parts.append(torch.autograd.grad(compared, at, slope, create_graph=True)[0])
    row = torch.cat(parts)
    return row if mean.requires_grad else row.detach()


def explicit_weights(
    samples: Samples, targets: Sequence[Target], residual: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weights of ∇_θ U_i and ∇_θ σ_i whose sums over the samples are Σ_k λ_k ⟨∂g_k/∂θ⟩ for a residual λ.

    Parameters
    ----------
    samples : Samples
        Of whole frames, with their energetics.
    targets : sequence of Target
    residual : Tensor, shape (Σ width,)
        λ = ∂L/∂ḡ.
    probabilities : Tensor, shape (n_frames,)
        p.

    Returns
    -------
    energies : Tensor of float64, shape (n_frames,)
    stress : Tensor of float64, shape (n_frames, 3, 3), or None
        None where no stress is known.
    """
    known = samples.energetics
    assert known is not None
    energies = known.energies.detach().clone().requires_grad_()
    stress = None if known.stress is None else known.stress.detach().clone().requires_grad_()
    here, total_ = replace(known, energies=energies, stress=stress), torch.zeros((), dtype=torch.float64, device=energies.device)
    with torch.enable_grad():
        for target, part in zip(targets, row_parts(residual, targets)):
            if target.observable.needs:
                total_ = total_ + probabilities @ (target.observable.sample(samples.frames, None, here) @ part)
    wanted = [energies] if stress is None else [energies, stress]
    found = torch.autograd.grad(total_, wanted, allow_unused=True)
    weights = [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(wanted, found)]
    return weights[0], weights[1] if stress is not None else None


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
    return precision_weights(values.double().var(dim=0, correction=0), weights, floor)
