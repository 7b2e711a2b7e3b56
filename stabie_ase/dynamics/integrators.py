"""Integrators: each step reads as its splitting. Timesteps, frictions and relaxation times are in ASE units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import ClassVar

import torch
from ase import units
from torch import Tensor

from stabie_ase.dynamics.random import NOISE, normals, normals_ahead
from stabie_ase.dynamics.state import ForceFunction, MDState, degrees_of_freedom, kinetic_energy, remove_com_momentum

Step = Callable[[MDState, ForceFunction], MDState]


class Integrator:
    """Base of all integrators. A subclass has a timestep in ASE time units and implements `step`.

    Attributes
    ----------
    fix_com : bool
        The centre of mass rests, where no atom is held: its momentum has to start at zero and is not counted as heat.
    needs_stress : bool
        The force function must give the stress too.
    """

    timestep: float
    fix_com: bool
    needs_stress: ClassVar[bool] = False

    def step(self, state: MDState, force_function: ForceFunction) -> MDState:
        """The state one timestep later."""
        raise NotImplementedError

    def steps(self, state: MDState, n_steps: int) -> Iterable[Step]:
        """The next steps, to be applied one after the other."""
        return repeat(self.step, n_steps)

    def check(self, state: MDState) -> None:
        """Raise ValueError for a state that this integrator cannot advance."""

    def prepare(self, state: MDState) -> MDState:
        """The state with what this integrator remembers of each replica; as it is where it has been there."""
        return state


def check_motion(state: MDState, fix_com: bool) -> None:
    """Raise ValueError if a replica has no kinetic energy that a thermostat could scale."""
    if bool((degrees_of_freedom(state, fix_com) == 0).any()):
        raise ValueError(
            "a replica has nothing that can move: all its atoms are held, or it is one atom, whose centre of mass rests "
            "(fix_com)"
        )


def kick(state: MDState, dt: float) -> MDState:
    """p += F dt, momenta of shape (n_atoms, 3); dt in ASE time units."""
    return state.replace(momenta=state.momenta.add(state.forces, alpha=dt))


def drift(state: MDState, dt: float) -> MDState:
    """r += p dt / m, positions of shape (n_atoms, 3) in Å; dt in ASE time units."""
    return state.move(positions=state.batch.positions.addcdiv(state.momenta, state.batch.masses[:, None], value=dt))


def update_forces(state: MDState, force_function: ForceFunction) -> MDState:
    """Energies and forces at the present positions."""
    energy, forces, stress = force_function(state.batch)
    return state.replace(potential_energy=energy, forces=forces * state.mobile[:, None], stress=stress)


def count(state: MDState) -> MDState:
    """One more step taken."""
    return state.replace(step=state.step + 1)


def baoab(
    state: MDState, force_function: ForceFunction, dt: float, heat_bath: Callable[[MDState, float], MDState]
) -> MDState:
    """One step with the heat bath in its middle, between two halves of the drift; dt in ASE time units, positions in Å."""
    state = kick(state, dt / 2)
    state = drift(state, dt / 2)
    state = heat_bath(state, dt)
    state = drift(state, dt / 2)
    state = update_forces(state, force_function)
    state = kick(state, dt / 2)
    return count(state)


@dataclass(frozen=True)
class VelocityVerlet(Integrator):
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
class Langevin(Integrator):
    """Constant temperature by Langevin's equation in the BAOAB splitting; Leimkuhler & Matthews, Appl. Math. Res. Express 2013, 34.

    Parameters
    ----------
    timestep : float
        In ASE time units.
    friction : float
        In inverse ASE time units.
    fix_com : bool
        The centre of mass rests: 3N - 3 degrees of freedom. Else it moves as any other: 3N.
    """

    timestep: float
    friction: float
    fix_com: bool = False

    def step(self, state: MDState, force_function: ForceFunction, noise: Tensor | None = None) -> MDState:
        return baoab(state, force_function, self.timestep, lambda state, dt: self.heat_bath(state, dt, noise))

    def steps(self, state: MDState, n_steps: int) -> Iterator[Step]:
        """The next steps, their noise drawn together: it is a function of key and step only, and far cheaper so."""
        for noise in normals_ahead(state.batch, state.key, state.step, NOISE, n_steps):
            yield partial(self.step, noise=noise)

    def check(self, state: MDState) -> None:
        if self.fix_com:
            check_motion(state, self.fix_com)

    def heat_bath(self, state: MDState, dt: float, noise: Tensor | None = None) -> MDState:
        """Ornstein-Uhlenbeck step: p := e^(-γ dt) p + sqrt((1 - e^(-2γ dt)) m k_B T) ξ, less the centre of mass's part."""
        batch, decay = state.batch, math.exp(-self.friction * dt)
        sigma = torch.sqrt((1.0 - decay**2) * state.mobile * batch.masses * units.kB * state.temperature[batch.system])
        noise = normals(batch, state.key, state.step, NOISE) if noise is None else noise
        momenta = decay * state.momenta + sigma[:, None] * noise
        return state.replace(momenta=remove_com_momentum(batch, momenta, state.mobile) if self.fix_com else momenta)


@dataclass(frozen=True)
class StochasticVelocityRescaling(Integrator):
    """Constant temperature by rescaling each replica's momenta; Bussi, Donadio & Parrinello, J. Chem. Phys. 126, 014101 (2007).

    The kinetic energy follows a stochastic equation of its own, so that it is distributed as in the canonical ensemble,
    while paths are disturbed little.

    Parameters
    ----------
    timestep : float
        In ASE time units.
    relaxation_time : float
        Relaxation time τ of the kinetic energy in ASE time units.
    fix_com : bool
        The centre of mass is at rest.
    """

    timestep: float
    relaxation_time: float
    fix_com: bool = True

    def step(self, state: MDState, force_function: ForceFunction) -> MDState:
        return baoab(state, force_function, self.timestep, self.heat_bath)

    def check(self, state: MDState) -> None:
        check_motion(state, self.fix_com)

    def heat_bath(self, state: MDState, dt: float) -> MDState:
        """K := c K + (1 - c) K̄/N_f Σ R_i² + 2 R_1 sqrt(c (1 - c) K K̄/N_f), c = e^(-dt/τ), K̄ = N_f k_B T/2 (their eq. A7).

        R_1 is taken along the diagonal of the N_f independent normal numbers: any direction is as good.
        """
        batch = state.batch
        n_f = degrees_of_freedom(state, self.fix_com)
        counted = state.mobile
        if self.fix_com:  # as many numbers as there are degrees of freedom: one atom's are left out
            counted = counted & ~(batch.all_atoms(counted)[batch.system] & (batch.index_in_system == 0))
        noise = normals(batch, state.key, state.step, NOISE) * counted[:, None]
        squares = batch.sum_over_atoms(noise.square()).sum(dim=1)
        r1 = batch.sum_over_atoms(noise).sum(dim=1) / n_f.sqrt()
        c = math.exp(-dt / self.relaxation_time)
        fraction = 0.5 * units.kB * state.temperature / kinetic_energy(state)  # K̄ / (N_f K)
        a, b = math.sqrt(c), torch.sqrt((1.0 - c) * fraction)
        scale = torch.sqrt(c + (1.0 - c) * fraction * squares + 2.0 * a * b * r1) * torch.sign(a + b * r1)
        return state.replace(momenta=state.momenta * scale[batch.system, None])


CHAIN = "nose-hoover"
"""What the chain is remembered under."""


@dataclass(frozen=True)
class NoseHooverChain(Integrator):
    """Constant temperature by a chain of three Nosé-Hoover thermostats a replica.

    Martyna, Tuckerman, Tobias & Klein, Mol. Phys. 87, 1117 (1996). The chain is advanced by the plain second-order
    splitting, whose error is far below that of the timestep when the relaxation time is 20 timesteps or more.

    Parameters
    ----------
    timestep : float
        In ASE time units.
    relaxation_time : float
        Characteristic time τ of the thermostat in ASE time units; Q_1 = N_f k_B T τ², Q_k = k_B T τ².
    fix_com : bool
        The centre of mass is at rest: N_f = 3N - 3, else 3N.
    """

    timestep: float
    relaxation_time: float
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

    def check(self, state: MDState) -> None:
        check_motion(state, self.fix_com)

    def prepare(self, state: MDState) -> MDState:
        """With the positions η (dimensionless) and rates dη/dt of a chain at rest, shape (n_systems, 6)."""
        return state if CHAIN in state.extra else state.remember(**{CHAIN: state.momenta.new_zeros((state.n_systems, 6))})

    def heat_bath(self, state: MDState, dt: float) -> MDState:
        """Evolve the chain by dt and scale the momenta with it.

        In terms of the rates v_k = dη_k/dt = p_k/Q_k,

            dv_1/dt = [2K/(N_f k_B T) - 1]/τ² - v_1 v_2
            dv_2/dt = N_f v_1² - 1/τ² - v_2 v_3
            dv_3/dt = v_2² - 1/τ².
        """
        chain = self.prepare(state).extra[CHAIN]
        n_f, w = degrees_of_freedom(state, self.fix_com), self.relaxation_time**-2
        heat = 2.0 * kinetic_energy(state) / (n_f * units.kB * state.temperature)
        eta, (v1, v2, v3) = chain[:, :3], chain[:, 3:].unbind(1)
        v3 = v3 + dt / 2 * (v2.square() - w)
        v2 = _damped(v2, n_f * v1.square() - w, v3, dt)
        v1 = _damped(v1, w * (heat - 1.0), v2, dt)
        scale = torch.exp(-dt * v1)
        eta = eta + dt * torch.stack([v1, v2, v3], dim=1)
        v1 = _damped(v1, w * (heat * scale.square() - 1.0), v2, dt)
        v2 = _damped(v2, n_f * v1.square() - w, v3, dt)
        v3 = v3 + dt / 2 * (v2.square() - w)
        chain = torch.cat([eta, torch.stack([v1, v2, v3], dim=1)], dim=1)
        return state.replace(momenta=state.momenta * scale[state.batch.system, None]).remember(**{CHAIN: chain})

    def conserved_energy(self, state: MDState) -> Tensor:
        """H + Σ Q_k v_k²/2 + N_f k_B T η_1 + k_B T (η_2 + η_3), shape (n_systems,), in eV: constant along a path."""
        chain = self.prepare(state).extra[CHAIN]
        links = chain[:, :3] + 0.5 * (self.relaxation_time * chain[:, 3:]).square()
        chain = degrees_of_freedom(state, self.fix_com) * links[:, 0] + links[:, 1] + links[:, 2]
        return state.potential_energy + kinetic_energy(state) + units.kB * state.temperature * chain


def _damped(v: Tensor, force: Tensor, next_rate: Tensor, h: float) -> Tensor:
    """Half a step of h for a thermostat's rate under its own force and the friction of the next link."""
    damping = torch.exp(-h / 4 * next_rate)
    return damping * (damping * v + h / 2 * force)


@dataclass(frozen=True)
class TemperatureRamp(Integrator):
    """Another integrator, its heat bath brought linearly from one temperature to another.

    Parameters
    ----------
    integrator : Integrator
    start, end : float
        In K.
    n_steps : int
        Of the ramp, counted from the beginning of each replica's stream; the end temperature is kept afterwards.
    """

    integrator: Integrator
    start: float
    end: float
    n_steps: int

    @property
    def timestep(self) -> float:
        """Of the integrator, in ASE time units (a multiple of fs)."""
        return self.integrator.timestep

    @property
    def fix_com(self) -> bool:
        return self.integrator.fix_com

    @property
    def needs_stress(self) -> bool:
        return self.integrator.needs_stress

    def step(self, state: MDState, force_function: ForceFunction) -> MDState:
        return self.integrator.step(self._at_temperature(state), force_function)

    def steps(self, state: MDState, n_steps: int) -> Iterator[Step]:
        for step in self.integrator.steps(state, n_steps):
            yield lambda state, forces, step=step: step(self._at_temperature(state), forces)  # type: ignore[misc]

    def check(self, state: MDState) -> None:
        self.integrator.check(state)

    def prepare(self, state: MDState) -> MDState:
        return self.integrator.prepare(state)

    def _at_temperature(self, state: MDState) -> MDState:
        fraction = (state.step.to(state.temperature.dtype) / self.n_steps).clamp(max=1.0)
        return state.replace(temperature=self.start + fraction * (self.end - self.start))
