"""Integrators: each step reads as its splitting. Timesteps, frictions and damping times are in ASE units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Protocol

import torch
from ase import units
from torch import Tensor

from stabie_ase.dynamics.random import NOISE, normals, normals_ahead
from stabie_ase.dynamics.state import ForceFunction, MDState, kinetic_energy


class Integrator(Protocol):
    """Anything with a timestep that advances a state by one step.

    `fix_com` says whether the centre-of-mass momentum is conserved, and so has to start at zero. A stochastic integrator
    may also have `steps(state, n_steps)`, which yields `step` for each step to come with its noise at hand.
    """

    timestep: float
    fix_com: bool

    def step(self, state: MDState, force_function: ForceFunction) -> MDState: ...


Step = Callable[[MDState, ForceFunction], MDState]


def steps_of(integrator: Integrator, state: MDState, n_steps: int) -> Iterable[Step]:
    """The next steps of an integrator, to be applied one after the other."""
    if hasattr(integrator, "steps"):
        return integrator.steps(state, n_steps)
    return repeat(integrator.step, n_steps)


def kick(state: MDState, dt: float) -> MDState:
    """p += F dt."""
    return state.replace(momenta=state.momenta + dt * state.forces)


def drift(state: MDState, dt: float) -> MDState:
    """r += p dt / m."""
    return state.move(positions=state.batch.positions + dt * state.momenta / state.batch.masses[:, None])


def update_forces(state: MDState, force_function: ForceFunction) -> MDState:
    """Energies and forces at the present positions."""
    energy, forces = force_function(state.batch)
    return state.replace(potential_energy=energy, forces=forces)


def count(state: MDState) -> MDState:
    """One more step taken."""
    return state.replace(step=state.step + 1)


@dataclass(frozen=True)
class VelocityVerlet:
    """Constant energy (NVE); Swope, Andersen, Berens & Wilson, J. Chem. Phys. 76, 637 (1982).

    Parameters
    ----------
    timestep : float
        In ASE time units.
    """

    timestep: float
    fix_com: bool = True

    def step(self, state: MDState, force_function: ForceFunction) -> MDState:
        dt = self.timestep
        state = kick(state, dt / 2)
        state = drift(state, dt)
        state = update_forces(state, force_function)
        state = kick(state, dt / 2)
        return count(state)


@dataclass(frozen=True)
class Langevin:
    """Constant temperature by Langevin's equation in the BAOAB splitting; Leimkuhler & Matthews, Appl. Math. Res. Express 2013, 34.

    The centre of mass moves; there are 3N degrees of freedom.

    Parameters
    ----------
    timestep : float
        In ASE time units.
    friction : float
        In inverse ASE time units.
    """

    timestep: float
    friction: float
    fix_com: bool = False

    def step(self, state: MDState, force_function: ForceFunction, noise: Tensor | None = None) -> MDState:
        dt = self.timestep
        state = kick(state, dt / 2)
        state = drift(state, dt / 2)
        state = self.heat_bath(state, dt, noise)
        state = drift(state, dt / 2)
        state = update_forces(state, force_function)
        state = kick(state, dt / 2)
        return count(state)

    def steps(self, state: MDState, n_steps: int) -> Iterator[Step]:
        """The next steps, their noise drawn together: it is a function of key and step only, and far cheaper so."""
        for noise in normals_ahead(state.batch, state.key, state.step, NOISE, n_steps):
            yield partial(self.step, noise=noise)

    def heat_bath(self, state: MDState, dt: float, noise: Tensor | None = None) -> MDState:
        """Ornstein-Uhlenbeck step: p := e^(-γ dt) p + sqrt((1 - e^(-2γ dt)) m k_B T) ξ."""
        batch, decay = state.batch, math.exp(-self.friction * dt)
        sigma = torch.sqrt((1.0 - decay**2) * batch.masses * units.kB * state.temperature[batch.system])
        noise = normals(batch, state.key, state.step, NOISE) if noise is None else noise
        return state.replace(momenta=decay * state.momenta + sigma[:, None] * noise)


@dataclass(frozen=True)
class NoseHooverChain:
    """Constant temperature by a chain of three Nosé-Hoover thermostats a replica.

    Martyna, Tuckerman, Tobias & Klein, Mol. Phys. 87, 1117 (1996). The chain is advanced by the plain second-order
    splitting, whose error is far below that of the timestep when the damping time is 20 timesteps or more.

    Parameters
    ----------
    timestep : float
        In ASE time units.
    damping : float
        Characteristic time τ of the thermostat in ASE time units; Q_1 = N_f k_B T τ², Q_k = k_B T τ².
    fix_com : bool
        The centre of mass is at rest: N_f = 3N - 3, else 3N.
    """

    timestep: float
    damping: float
    fix_com: bool = True

    def step(self, state: MDState, force_function: ForceFunction) -> MDState:
        dt = self.timestep
        state = self.heat_bath(state, dt / 2)
        state = kick(state, dt / 2)
        state = drift(state, dt)
        state = update_forces(state, force_function)
        state = kick(state, dt / 2)
        state = self.heat_bath(state, dt / 2)
        return count(state)

    def degrees_of_freedom(self, state: MDState) -> Tensor:
        """N_f per replica, shape (n_systems,)."""
        return (3.0 * state.batch.counts - (3.0 if self.fix_com else 0.0)).to(state.momenta.dtype)

    def heat_bath(self, state: MDState, dt: float) -> MDState:
        """Evolve the chain by dt and scale the momenta with it.

        In terms of the rates v_k = dη_k/dt = p_k/Q_k,

            dv_1/dt = [2K/(N_f k_B T) - 1]/τ² - v_1 v_2
            dv_2/dt = N_f v_1² - 1/τ² - v_2 v_3
            dv_3/dt = v_2² - 1/τ².
        """
        n_f, w = self.degrees_of_freedom(state), self.damping**-2
        heat = 2.0 * kinetic_energy(state) / (n_f * units.kB * state.temperature)
        eta, (v1, v2, v3) = state.thermostat[:, :3], state.thermostat[:, 3:].unbind(1)
        v3 = v3 + dt / 2 * (v2.square() - w)
        v2 = _damped(v2, n_f * v1.square() - w, v3, dt)
        v1 = _damped(v1, w * (heat - 1.0), v2, dt)
        scale = torch.exp(-dt * v1)
        eta = eta + dt * torch.stack([v1, v2, v3], dim=1)
        v1 = _damped(v1, w * (heat * scale.square() - 1.0), v2, dt)
        v2 = _damped(v2, n_f * v1.square() - w, v3, dt)
        v3 = v3 + dt / 2 * (v2.square() - w)
        return state.replace(
            momenta=state.momenta * scale[state.batch.system, None],
            thermostat=torch.cat([eta, torch.stack([v1, v2, v3], dim=1)], dim=1),
        )

    def conserved_energy(self, state: MDState) -> Tensor:
        """H + Σ Q_k v_k²/2 + N_f k_B T η_1 + k_B T (η_2 + η_3), shape (n_systems,), in eV: constant along a path."""
        links = state.thermostat[:, :3] + 0.5 * (self.damping * state.thermostat[:, 3:]).square()
        chain = self.degrees_of_freedom(state) * links[:, 0] + links[:, 1] + links[:, 2]
        return state.potential_energy + kinetic_energy(state) + units.kB * state.temperature * chain


def _damped(v: Tensor, force: Tensor, next_rate: Tensor, h: float) -> Tensor:
    """Half a step of h for a thermostat's rate under its own force and the friction of the next link."""
    damping = torch.exp(-h / 4 * next_rate)
    return damping * (damping * v + h / 2 * force)
