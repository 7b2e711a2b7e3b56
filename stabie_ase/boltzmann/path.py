"""The path gradient (experimental): how the mean of a dynamical observable depends on a potential's parameters, from paths.

A correlation in time is no mean over the Boltzmann distribution, but one over paths, and the probability of a path of Langevin
dynamics is explicit in its noise. So the score function (Glynn, Commun. ACM 33, 75, 1990; for Brownian dynamics Warren & Allen,
Phys. Rev. Lett. 109, 250601, 2012) gives ∂⟨A⟩/∂θ = ⟨∂A/∂θ⟩ + Cov(A, ∂ln P/∂θ) without backpropagation through dynamics.

**The path.** With h the timestep, c = e^(-γh), s² = (1 - c²) m k_B T, p'_t the momenta after the first half kick of step t and p''_t
those after its heat bath, BAOAB is

    p'_0 = p_0 + h/2 F(x_0),   p'_t = p''_(t-1) + h F(x_t),   p''_t = c p'_t + s ξ_t,   x_(t+1) = x_t + h/(2m) (p'_t + p''_t).

A step has half as many random numbers as positions and momenta: (x_(t+1), p_(t+1)) has no density given (x_t, p_t), since either
is a function of the other that contains θ. The path is therefore expressed in x_0, p_0, x_1, x_2, ..., x_N. In these variables

    p''_t = 2m/h (x_(t+1) - x_t) - p'_t,   ξ_t = [2m/h (x_(t+1) - x_t) - (1 + c) p'_t] / s,
    ln P = -β U(x_0) - ln Z - p_0²/(2m k_B T) - Σ_t ξ_t²/2 + constant,

with Z = ∫ exp(-β U), and at fixed positions, primes meaning half of the term k = 0,

    ∂p'_t = h Σ'_(k≤t) (-1)^(t-k) ∂F(x_k),   ∂ln P = -β (∂U(x_0) - ⟨∂U⟩) + Σ_t (1 + c)/s ξ_t · ∂p'_t.

Momenta at full steps, p_t = p'_t - h/2 F(x_t), contain θ in these variables: an observable A of momenta has the explicit derivative
Σ_t ∂A/∂p_t · (∂p'_t - h/2 ∂F(x_t)). All this is exact at any timestep. The alternating sum of forces that change little from step to
step is close to h/2 ∂F(x_t), so that variance is that of a local formula; taking h/2 ∂F(x_t) itself would leave a bias of order h.

**One backward pass.** Contracted with weights of paths and steps, all is Σ_t Σ_a W_ta · ∂F_a(x_t) and a weighted sum of ∂U(x_0).

**Cost.** Forces along whole paths are differentiated once more: some three times the time of the dynamics, as in training on forces.
Paths keep positions, momenta and noise of every step. Above all the gradient is noisy. The score is a sum over steps and atoms, so that
its variance grows in proportion to both; with A averaged over a replica's atoms, whose own variance falls, a replica of many atoms
tells about as much as one atom does. `examples/path_gradient.py` prints signal to noise: for lags of up to two periods of an
oscillator 0.03 to 0.35 a path, so that a derivative to 10 % takes a thousand to a hundred thousand paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from ase import units
from torch import Tensor

from stabie_ase.boltzmann.gradient import accumulate_gradient
from stabie_ase.dynamics import ForceFunction, Langevin, MDState, Recorder, simulate
from stabie_ase.dynamics.random import NOISE, normals
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list


@dataclass(frozen=True)
class Paths:
    """Langevin paths of a batch of replicas, step by step.

    Attributes
    ----------
    start : MDState
        Positions from the Boltzmann distribution of the potential that drives; momenta from one that does not contain its
        parameters, as `initial_state` draws them. What BAOAB itself has equilibrated differs from that by O(h²).
    integrator : Langevin
    positions : Tensor, shape (n_steps + 1, n_atoms, 3)
        In Å, unwrapped; the start first.
    momenta : Tensor, shape (n_steps + 1, n_atoms, 3)
        In amu Å / ASE time.
    noise : Tensor, shape (n_steps, n_atoms, 3)
        Standard normal numbers ξ of each step's heat bath.
    """

    start: MDState
    integrator: Langevin
    positions: Tensor
    momenta: Tensor
    noise: Tensor

    @classmethod
    def record(cls, state: MDState, integrator: Langevin, forces: ForceFunction, n_steps: int) -> tuple[Paths, MDState]:
        """Run replicas and keep every step.

        Parameters
        ----------
        state : MDState
            In equilibrium at one temperature.
        integrator : Langevin
            With friction, and a centre of mass that moves as any other degree of freedom.
        forces : ForceFunction
        n_steps : int

        Returns
        -------
        paths : Paths
        end : MDState

        Raises
        ------
        ValueError
            Another integrator; several temperatures; a replica that met numbers that are not finite.
        """
        _check(state, integrator)
        recorder = Recorder(state, n_steps, every=1, momenta=True)
        end = simulate(state, integrator, forces, n_steps, [recorder])
        kept = recorder.trajectory
        lost = int((~kept.valid).any(dim=0).sum())
        if lost:
            raise ValueError(f"{lost} of {state.n_systems} replicas met numbers that are not finite within {n_steps} steps: start others")
        positions, momenta = (torch.cat([first[None], then]) for first, then in
                              ((state.batch.positions, kept.positions), (state.momenta, kept.momenta)))  # fmt: skip
        steps = state.step + torch.arange(n_steps, device=state.batch.device)[:, None]
        return cls(state, integrator, positions, momenta, normals(state.batch, state.key, steps, NOISE)), end

    @property
    def n_steps(self) -> int:
        """Of each path."""
        return len(self.noise)

    def select(self, replicas: Tensor) -> Paths:
        """Some of the replicas by index, shape (n,)."""
        atoms = self.start.batch.atom_index(replicas)
        columns = {name: getattr(self, name)[:, atoms] for name in ("positions", "momenta", "noise")}
        return replace(self, start=self.start.select(replicas), **columns)

    def frames(self, step: Tensor, replica: Tensor) -> tuple[AtomsBatch, Tensor]:
        """Chosen frames of chosen replicas, shapes (n,), and the rows of their atoms in `positions.view(-1, 3)`."""
        batch = self.start.batch
        picked = batch.select(replica)
        rows = batch.atom_index(replica) + torch.repeat_interleave(step * batch.n_atoms, picked.counts)
        return picked.replace(positions=self.positions.reshape(-1, 3)[rows]), rows

    def sum_over_atoms(self, values: Tensor) -> Tensor:
        """Sum per-atom values, shape (n, n_atoms), into those of replicas, shape (n, n_replicas)."""
        batch = self.start.batch
        return values.new_zeros((len(values), batch.n_systems)).index_add(1, batch.system, values)


def _check(state: MDState, integrator: Langevin) -> None:
    if type(integrator) is not Langevin or integrator.fix_com or not integrator.friction > 0:
        raise ValueError(f"the probability of a path is known for Langevin(friction > 0, fix_com=False), got {integrator}")
    if bool((state.temperature != state.temperature[0]).any()):
        raise ValueError("replicas run at several temperatures: record the paths of each by themselves")


class PathObservable(Protocol):
    """A vector A of every path.

    Attributes
    ----------
    last_steps : Tensor of int64, shape (d,)
        The last step that each component looks at. Later noise cannot have a covariance with it, and is left out: that changes no
        mean and lowers the variance.
    """

    @property
    def last_steps(self) -> Tensor:
        """The last step that each component looks at, int64, shape (d,)."""
        ...

    def __call__(self, paths: Paths) -> Tensor:
        """A of every path, float64, shape (n_replicas, d); where it depends on momenta, with autograd's graph."""
        ...


@dataclass(frozen=True)
class Lagged:
    """Base of observables of the first frame and of others, so many steps later.

    Parameters
    ----------
    lags : tuple of int
        In steps.
    """

    lags: tuple[int, ...]

    @property
    def last_steps(self) -> Tensor:
        return torch.tensor(self.lags)

    def later(self, paths: Paths, values: Tensor) -> tuple[Tensor, Tensor]:
        """The first of `values`, shape (n_steps + 1, n_atoms, 3), and those at the lags; ValueError for lags outside of the paths."""
        if not self.lags or min(self.lags) < 0 or max(self.lags) > paths.n_steps:
            raise ValueError(f"lags are {list(self.lags)}, expected some from 0 to {paths.n_steps}, the steps of the paths")
        return values[0].double(), values[list(self.lags)].double()

    def mean_over_atoms(self, paths: Paths, values: Tensor) -> Tensor:
        """Of values at the lags, shape (d, n_atoms), in each replica, shape (n_replicas, d)."""
        return (paths.sum_over_atoms(values) / paths.start.batch.counts).T


class VelocityAutocorrelation(Lagged):
    """v(0) · v(τ), averaged over a replica's atoms, in (Å / ASE time)², that is eV/amu; 3 k_B T/m at τ = 0."""

    def __call__(self, paths: Paths) -> Tensor:
        first, later = self.later(paths, paths.momenta / paths.start.batch.masses[:, None])
        return self.mean_over_atoms(paths, (first * later).sum(dim=2))


class SquaredDisplacement(Lagged):
    """|x(τ) - x(0)|², averaged over a replica's atoms, in Å²; 6 D τ where diffusion has set in, the centre of mass's among it."""

    def __call__(self, paths: Paths) -> Tensor:
        first, later = self.later(paths, paths.positions)
        return self.mean_over_atoms(paths, (later - first).square().sum(dim=2))


@dataclass(frozen=True)
class PathEstimate:
    """Means of a path observable, their loss, and the weights whose ∇_θ [Σ_i w_i U(x_0^i) + Σ_ta W_ta · F_a(x_t)] is the loss's gradient.

    Attributes
    ----------
    mean : Tensor of float64, shape (d,)
        Ā over the paths.
    loss : float
    energy_weights : Tensor of float64, shape (n_replicas,)
        w_i, in units of the loss per eV.
    force_weights : Tensor of float64, shape (n_steps + 1, n_atoms, 3)
        W_ta, in units of the loss per eV/Å.
    """

    mean: Tensor
    loss: float
    energy_weights: Tensor
    force_weights: Tensor


def path_estimate(paths: Paths, observable: PathObservable, loss: Callable[[Tensor], Tensor]) -> PathEstimate:
    """Weights of the path gradient (experimental; formula and cost at the head of this file).

    Each path's A is counted from the mean of all other paths' (the leave-one-out baseline), which leaves no bias:
    (A_i - Ā_others)/N = (A_i - Ā)/(N - 1), the sample covariance. A loss that is not linear in the means takes its residual from
    the same paths, which leaves a bias of O(1/N), as in `Estimator`.

    Parameters
    ----------
    paths : Paths
        Of independent replicas.
    observable : PathObservable
    loss : callable
        From means, shape (d,), to a scalar by torch; `lambda mean: mean[0]` for the derivative of a mean itself.

    Returns
    -------
    PathEstimate

    Raises
    ------
    ValueError
        Fewer than two paths; lags outside of them.
    """
    momenta = paths.momenta.detach().requires_grad_(True)
    with torch.enable_grad():
        values = observable(replace(paths, momenta=momenta))
        mean = values.detach().double().mean(dim=0).requires_grad_(True)
        found = loss(mean)
        (residual,) = torch.autograd.grad(found, mean)
        explicit = _explicit(values, residual, momenta)
    values, mean = values.detach().double(), mean.detach()
    if len(values) < 2:
        raise ValueError(f"a covariance needs two paths or more, got {len(values)}")
    deviations = residual * (values - mean) / (len(values) - 1)
    beta = 1.0 / (units.kB * float(paths.start.temperature[0]))
    last_steps = observable.last_steps.to(values.device)
    before = torch.arange(paths.n_steps, device=values.device)[:, None] < last_steps
    force_weights = _force_weights(paths, before.double() @ deviations.T, explicit)
    return PathEstimate(mean, float(found.detach()), -beta * deviations.sum(dim=1), force_weights)


def _explicit(values: Tensor, residual: Tensor, momenta: Tensor) -> Tensor:
    """Σ_j λ_j ∂Ā_j/∂p_t, shape (n_steps + 1, n_atoms, 3): zero where A is a function of positions alone."""
    if not values.requires_grad:
        return torch.zeros_like(momenta, dtype=torch.float64)
    return torch.autograd.grad(values.mean(dim=0) @ residual.to(values.dtype), momenta)[0].double()


def _force_weights(paths: Paths, of_steps: Tensor, explicit: Tensor) -> Tensor:
    """W: of each path and step, shape (n_steps, n_replicas), times the score of the step's noise, and the explicit derivative.

    With π_t = (1 + c)/s ξ_t w_t + ∂Ā/∂p_t the derivative with respect to p'_t, that of F(x_k) is h Σ_(t≥k) (-1)^(t-k) π_t.
    """
    batch, h = paths.start.batch, paths.integrator.timestep
    decay = math.exp(-paths.integrator.friction * h)
    sigma = torch.sqrt((1.0 - decay**2) * batch.masses * units.kB * paths.start.temperature[batch.system]).double()
    pull = explicit.clone()
    pull[:-1] += (1.0 + decay) / sigma[:, None] * paths.noise * of_steps[:, batch.system, None]
    sign = (1.0 - 2.0 * (torch.arange(len(pull), device=pull.device) % 2))[:, None, None]
    weights = h * sign * (sign * pull).flip(0).cumsum(0).flip(0)
    weights[0] *= 0.5
    return (weights - 0.5 * h * explicit) * paths.start.mobile[:, None]


def accumulate_path_gradient(potential: Potential, paths: Paths, estimate: PathEstimate, chunk_size: int | None = None) -> None:
    """Add the gradient of an estimate's loss to the parameters' `.grad`, chunk by chunk: memory is that of one chunk.

    Parameters
    ----------
    potential : Potential
        That drove the paths. Its forces are differentiated once more, as in training on them.
    paths : Paths
    estimate : PathEstimate
        Of these paths.
    chunk_size : int, optional
        Frames in one backward pass, see `AtomsBatch.chunks`.
    """
    accumulate_gradient(potential, paths.start.batch, estimate.energy_weights, chunk_size=chunk_size)
    parameters = [p for p in potential.parameters() if p.requires_grad]
    step, replica = paths.sum_over_atoms(estimate.force_weights.abs().sum(dim=2)).nonzero(as_tuple=True)
    weights = estimate.force_weights.view(-1, 3)
    for chosen in torch.arange(len(step), device=step.device).split(chunk_size or paths.start.batch.systems_at_once):
        frames, rows = paths.frames(step[chosen], replica[chosen])
        forces = potential.compute(frames, neighbor_list(frames, potential.cutoff), create_graph=True).forces
        (weights[rows] * forces.double()).sum().backward(inputs=parameters)
