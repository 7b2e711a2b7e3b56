"""Batched molecular dynamics."""

from stabie_ase.dynamics.integrators import Integrator, Langevin, NoseHooverChain, VelocityVerlet
from stabie_ase.dynamics.simulate import PotentialForces, Trajectory, simulate
from stabie_ase.dynamics.state import MDState, initial_state, kinetic_energy

__all__ = [
    "Integrator",
    "Langevin",
    "MDState",
    "NoseHooverChain",
    "PotentialForces",
    "Trajectory",
    "VelocityVerlet",
    "initial_state",
    "kinetic_energy",
    "simulate",
]
