"""Ensembles by their names, in everyday units."""

from __future__ import annotations

from ase import units

from stabie_ase.dynamics.barostat import StochasticCellRescaling
from stabie_ase.dynamics.integrators import Integrator, Langevin, NoseHooverChain, StochasticVelocityRescaling, VelocityVerlet


def integrator_for(
    ensemble: str,
    timestep_fs: float,
    friction_per_fs: float = 0.01,
    relaxation_time_fs: float = 50.0,
    fix_com: bool = False,
    pressure_relaxation_time_fs: float = 1000.0,
    compressibility_per_GPa: float = 0.46,
) -> Integrator:
    """The integrator of an ensemble.

    Parameters
    ----------
    ensemble : str
        nve, nvt (Langevin), nvt-nose-hoover, nvt-rescaling, npt (Langevin and stochastic cell rescaling) or npt-flexible.
    timestep_fs : float
        In fs.
    friction_per_fs : float
        Of Langevin dynamics, in 1/fs.
    relaxation_time_fs : float
        Characteristic time of the other thermostats, in fs.
    fix_com : bool
        The centre of mass rests in Langevin dynamics; the others conserve its momentum anyway.
    pressure_relaxation_time_fs : float
        Relaxation time of the volume, in fs.
    compressibility_per_GPa : float
        Estimate that sets the speed of the cell only, in 1/GPa.

    Returns
    -------
    Integrator

    Raises
    ------
    ValueError
        No such ensemble.
    """
    dt, friction, relaxation_time = timestep_fs * units.fs, friction_per_fs / units.fs, relaxation_time_fs * units.fs
    if ensemble == "nve":
        return VelocityVerlet(dt)
    if ensemble == "nvt":
        return Langevin(dt, friction, fix_com)
    if ensemble == "nvt-nose-hoover":
        return NoseHooverChain(dt, relaxation_time)
    if ensemble == "nvt-rescaling":
        return StochasticVelocityRescaling(dt, relaxation_time)
    if ensemble not in ("npt", "npt-flexible"):
        raise ValueError(f"unknown ensemble {ensemble!r}; known: nve, nvt, nvt-nose-hoover, nvt-rescaling, npt, npt-flexible")
    return StochasticCellRescaling(
        dt,
        friction,
        fix_com,
        relaxation_time=pressure_relaxation_time_fs * units.fs,
        compressibility=compressibility_per_GPa / units.GPa,
        flexible=ensemble == "npt-flexible",
    )
