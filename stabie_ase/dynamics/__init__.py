"""Batched molecular dynamics."""

from stabie_ase.dynamics.barostat import StochasticCellRescaling
from stabie_ase.dynamics.forces import PotentialForces
from stabie_ase.dynamics.integrators import (
    Integrator,
    Langevin,
    NoseHooverChain,
    StochasticVelocityRescaling,
    TemperatureRamp,
    VelocityVerlet,
)
from stabie_ase.dynamics.simulate import Trajectory, simulate
from stabie_ase.dynamics.state import MDState, initial_state, kinetic_energy, mobile_atoms

__all__ = [
    "Integrator",
    "Langevin",
    "MDState",
    "NoseHooverChain",
    "PotentialForces",
    "StochasticCellRescaling",
    "StochasticVelocityRescaling",
    "TemperatureRamp",
    "Trajectory",
    "VelocityVerlet",
    "initial_state",
    "kinetic_energy",
    "mobile_atoms",
    "simulate",
]
