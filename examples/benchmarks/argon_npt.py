#!/usr/bin/env python
"""Liquid argon at constant pressure: density, its fluctuation and enthalpy, here and by OpenMM, and at two temperatures.

    pip install openmm
    python examples/benchmarks/argon_npt.py
    python examples/benchmarks/argon_npt.py --quick    # seconds; too short to tell anything

The same Lennard-Jones potential (cut at 2.5 σ and shifted), number of atoms, temperature and pressure: here replicas with
stochastic cell rescaling, in OpenMM one after the other with its Monte Carlo barostat. Means over replicas with their standard
errors, and the difference in units of its own. A Lennard-Jones fluid at kT = 0.8 ε and no pressure is a liquid.

The last line is a consistency check that needs no other program (Shirts, J. Chem. Theory Comput. 9, 909, 2013): of two runs
at the same pressure, ln P₂(H)/P₁(H) is linear in the enthalpy with slope β₁ - β₂, whatever the potential. The slope is
fitted by maximum likelihood (logistic regression); its error comes from leaving out one replica at a time.
"""

import argparse
from importlib.util import find_spec

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from scipy.optimize import minimize

from stabie_ase.dynamics import Attached, PotentialForces, StochasticCellRescaling, initial_state, simulate
from stabie_ase.potentials.analytic import LennardJones
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.system.allocator import keep_freed_memory

EPSILON, SIGMA, CUTOFF = 119.8 * units.kB, 3.405, 2.5 * 3.405
TEMPERATURES = 0.8 * 119.8, 0.84 * 119.8
PRESSURE = 0.0
TIMESTEP = 5.0 * units.fs
COLUMNS = ("volume per atom (Å³)", "its variance x N (Å⁶)", "energy per atom (meV)")


def liquid(n):
    """A crystal of 4 n³ atoms with the volume of the liquid, in which it melts at once."""
    return bulk("Ar", "fcc", a=6.02, cubic=True).repeat(n)


def ours(atoms, args):
    """Volumes and potential energies, shape (2, n_samples, n_replicas, 2): the first axis is the temperature."""
    potential = LennardJones(EPSILON, SIGMA, CUTOFF)
    temperatures = np.repeat(TEMPERATURES, args.replicas)
    batch = AtomsBatch.from_atoms([atoms] * len(temperatures))
    integrator = StochasticCellRescaling(
        TIMESTEP, friction=0.002 / units.fs, relaxation_time=500 * units.fs, compressibility=2.0 / units.GPa
    )
    state = initial_state(batch, PotentialForces(potential, stress=True), 2 * temperatures, fix_com=False)
    state = state.replace(temperature=torch.as_tensor(temperatures))
    forces = PotentialForces(potential, stress=True)
    state = simulate(state, integrator, forces, args.equilibration)
    samples = []

    def look(done, running):
        volume = torch.linalg.det(running.batch.cells)
        samples.append(torch.stack([volume, running.potential_energy], dim=1).numpy().reshape(2, args.replicas, 2))

    simulate(state, integrator, forces, args.steps, [Attached(look, args.every)])
    return np.stack(samples, axis=1)


def openmm(atoms, args):
    """The same of OpenMM at the first temperature, shape (n_samples, n_replicas, 2)."""
    import openmm as mm
    from openmm import unit

    to_kJ = units.mol / units.kJ
    system = mm.System()
    force = mm.CustomNonbondedForce("4*epsilon*((sigma/r)^12-(sigma/r)^6)-shift")
    ratio = (SIGMA / CUTOFF) ** 6
    for name, value in (
        ("epsilon", EPSILON * to_kJ),
        ("sigma", 0.1 * SIGMA),
        ("shift", 4.0 * EPSILON * to_kJ * (ratio**2 - ratio)),
    ):
        force.addGlobalParameter(name, value)
    force.setNonbondedMethod(mm.CustomNonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(0.1 * CUTOFF)
    for mass in atoms.get_masses():
        system.addParticle(mass)
        force.addParticle([])
    system.addForce(force)
    system.setDefaultPeriodicBoxVectors(*(0.1 * atoms.cell.array))
    barostat = mm.MonteCarloBarostat(PRESSURE / units.bar, TEMPERATURES[0], 10)
    system.addForce(barostat)
    samples = []
    for k in range(args.replicas):
        barostat.setRandomNumberSeed(k + 1)
        integrator = mm.LangevinMiddleIntegrator(TEMPERATURES[0], 2.0, TIMESTEP / units.fs * 1e-3)
        integrator.setRandomNumberSeed(k + 1)
        context = mm.Context(system, integrator, mm.Platform.getPlatformByName("CPU"), {"Threads": "1"})
        context.setPositions(0.1 * atoms.positions)
        context.setVelocitiesToTemperature(2 * TEMPERATURES[0], k + 1)
        integrator.step(args.equilibration)
        samples.append([])
        for _ in range(args.steps // args.every):
            integrator.step(args.every)
            state = context.getState(energy=True)
            volume = 1e3 * state.getPeriodicBoxVolume().value_in_unit(unit.nanometer**3)
            samples[-1].append((volume, state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) / to_kJ))
    return np.swapaxes(samples, 0, 1)


def properties(samples, n_atoms):
    """Of each replica, shape (n_replicas, 3): mean volume per atom, its variance and mean energy, as in COLUMNS."""
    volume, energy = samples[..., 0], samples[..., 1]
    variance = (volume - volume.mean()) ** 2
    return np.stack([volume.mean(0) / n_atoms, variance.mean(0) / n_atoms, 1e3 * energy.mean(0) / n_atoms], axis=1)


def slope(enthalpies):
    """Maximum-likelihood slope of ln P₂/P₁ in units of β₁ - β₂; `enthalpies` has shape (2, n_samples, n_replicas)."""
    x = enthalpies - enthalpies.mean()
    scale = x.std()

    def minus_log_likelihood(parameters):
        z = parameters[0] + parameters[1] * x / scale
        return np.logaddexp(0.0, z[0]).mean() + np.logaddexp(0.0, -z[1]).mean()

    beta = 1.0 / (units.kB * np.array(TEMPERATURES))
    return minimize(minus_log_likelihood, [0.0, 0.0]).x[1] / scale / (beta[0] - beta[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=16, help="at each temperature (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8000, help="of 5 fs (default: %(default)s)")
    parser.add_argument("--equilibration", type=int, default=2000, help="steps before (default: %(default)s)")
    parser.add_argument("--every", type=int, default=20, help="steps between two samples (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="too short to tell anything")
    args = parser.parse_args()
    if args.quick:
        args.replicas, args.steps, args.equilibration = 4, 40, 20
    torch.set_num_threads(1)
    keep_freed_memory()
    atoms: Atoms = liquid(3)
    samples = {"stabie_ase": ours(atoms, args)}
    found = {"stabie_ase": properties(samples["stabie_ase"][0], len(atoms))}
    if find_spec("openmm") is None:
        print("openmm is not installed: no comparison")
    else:
        found["OpenMM"] = properties(openmm(atoms, args), len(atoms))
    for k, column in enumerate(COLUMNS):
        means, errors = zip(*((x[:, k].mean(), x[:, k].std(ddof=1) / len(x) ** 0.5) for x in found.values()))
        cells = [f"{name} {mean:9.3f} ± {error:.3f}" for name, mean, error in zip(found, means, errors)]
        if len(means) == 2:
            cells.append(f"difference {(means[0] - means[1]) / np.hypot(*errors):+.1f} standard errors")
        print(f"{column:24s} " + "   ".join(cells))
    enthalpies = samples["stabie_ase"][..., 1] + PRESSURE * samples["stabie_ase"][..., 0]
    n = args.replicas
    without = [slope(np.delete(enthalpies, k, axis=2)) for k in range(n)]
    error = np.sqrt((n - 1) * np.var(without))
    print(f"slope of ln P₂(H)/P₁(H) at {TEMPERATURES[0]:.1f} and {TEMPERATURES[1]:.1f} K: {slope(enthalpies):.3f} ± {error:.3f} of β₁ - β₂")


if __name__ == "__main__":
    main()
