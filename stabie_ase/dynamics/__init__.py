"""Batched molecular dynamics."""

from stabie_ase.dynamics.barostat import StochasticCellRescaling
from stabie_ase.dynamics.ensembles import integrator_for
from stabie_ase.dynamics.forces import PotentialForces
from stabie_ase.dynamics.integrators import (
    Integrator,
    Langevin,
    NoseHooverChain,
    StochasticVelocityRescaling,
    TemperatureRamp,
    VelocityVerlet,
)
from stabie_ase.dynamics.observers import Attached, Observer, Recorder, Trajectory
from stabie_ase.dynamics.simulate import simulate
from stabie_ase.dynamics.state import ForceFunction, MDState, initial_state, kinetic_energy, mobile_atoms

__all__ = [
    "Attached",
    "ForceFunction",
    "Integrator",
    "Langevin",
    "MDState",
    "NoseHooverChain",
    "Observer",
    "PotentialForces",
    "Recorder",
    "StochasticCellRescaling",
    "StochasticVelocityRescaling",
    "TemperatureRamp",
    "Trajectory",
    "VelocityVerlet",
    "initial_state",
    "integrator_for",
    "kinetic_energy",
    "mobile_atoms",
    "simulate",
]
