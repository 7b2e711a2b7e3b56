"""Integrators: each step reads as its splitting. Timesteps, frictions and damping times are in ASE units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from ase import units
from torch import Tensor

from stabie_ase.dynamics.random import NOISE, normals
from stabie_ase.dynamics.state import ForceFunction, MDState, kinetic_energy


class Integrator(Protocol):
    """Anything with a timestep that advances a state by one step.

    `fix_com` says whether the centre-of-mass momentum is conserved, and so has to start at zero.
    """

    timestep: float
    fix_com: bool

    def step(self, state: MDState, force_function: ForceFunction) -> MDState: ...


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

    def step(self, state: MDState, force_function: ForceFunction) -> MDState:
        dt = self.timestep
        state = kick(state, dt / 2)
        state = drift(state, dt / 2)
        state = self.heat_bath(state, dt)
        state = drift(state, dt / 2)
        state = update_forces(state, force_function)
        state = kick(state, dt / 2)
        return count(state)

    def heat_bath(self, state: MDState, dt: float) -> MDState:
        """Ornstein-Uhlenbeck step: p := e^(-γ dt) p + sqrt((1 - e^(-2γ dt)) m k_B T) ξ."""
        batch, decay = state.batch, math.exp(-self.friction * dt)
        sigma = torch.sqrt((1.0 - decay**2) * batch.masses * units.kB * state.temperature[batch.system])
        noise = normals(batch, state.key, state.step, NOISE)
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
        """Per replica, shape (n_systems,)."""
        return 3.0 * state.batch.counts - (3.0 if self.fix_com else 0.0)

    def heat_bath(self, state: MDState, dt: float) -> MDState:
        """Evolve the chain by dt and scale the momenta with it."""
        kT, n_f, masses = self._chain(state)
        eta, p = list(state.thermostat[:, :3].unbind(1)), list(state.thermostat[:, 3:].unbind(1))
        twice_kinetic = 2.0 * kinetic_energy(state)
        p[2] = p[2] + dt / 2 * (p[1].square() / masses[1] - kT)
        p[1] = _damped(p[1], p[0].square() / masses[0] - kT, p[2] / masses[2], dt)
        p[0] = _damped(p[0], twice_kinetic - n_f * kT, p[1] / masses[1], dt)
        scale = torch.exp(-dt * p[0] / masses[0])
        eta = [x + dt * q / m for x, q, m in zip(eta, p, masses)]
        p[0] = _damped(p[0], twice_kinetic * scale.square() - n_f * kT, p[1] / masses[1], dt)
        p[1] = _damped(p[1], p[0].square() / masses[0] - kT, p[2] / masses[2], dt)
        p[2] = p[2] + dt / 2 * (p[1].square() / masses[1] - kT)
        return state.replace(
            momenta=state.momenta * scale[state.batch.system, None], thermostat=torch.stack([*eta, *p], dim=1)
        )

    def conserved_energy(self, state: MDState) -> Tensor:
        """H + Σ p_k²/2Q_k + N_f k_B T η_1 + k_B T (η_2 + η_3), shape (n_systems,), in eV: constant along a path."""
        kT, n_f, masses = self._chain(state)
        eta, p = state.thermostat[:, :3], state.thermostat[:, 3:]
        chain = 0.5 * (p.square() / torch.stack(masses, dim=1)).sum(dim=1)
        return state.potential_energy + kinetic_energy(state) + chain + kT * (n_f * eta[:, 0] + eta[:, 1] + eta[:, 2])

    def _chain(self, state: MDState) -> tuple[Tensor, Tensor, list[Tensor]]:
        kT, n_f = units.kB * state.temperature, self.degrees_of_freedom(state).to(state.momenta.dtype)
        link = kT * self.damping**2
        return kT, n_f, [n_f * link, link, link]


def _damped(p: Tensor, force: Tensor, rate: Tensor, h: float) -> Tensor:
    """Half a step of a thermostat momentum under its own force and the friction of the next link."""
    damping = torch.exp(-h / 4 * rate)
    return damping * (damping * p + h / 2 * force)
