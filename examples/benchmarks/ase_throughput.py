#!/usr/bin/env python
"""Replica-steps a second: batched Langevin dynamics here against ASE's, one replica at a time.

    python examples/benchmarks/ase_throughput.py
    python examples/benchmarks/ase_throughput.py --quick
    python examples/benchmarks/ase_throughput.py --model my.pt --device cuda --replicas 8 64 256

ASE's `Langevin` runs with this package's calculator and, for MACE, with mace-torch's own `MACECalculator` around the
same network. All run in turns, with the same molecule, timestep and precision. Rates are medians over the rounds with
their quartiles.
"""

import numpy as np
import torch
from ase import units
from ase.io import read
from ase.md.langevin import Langevin as ASELangevin
from engine_step import ASPIRIN, INTEGRATORS, for_dynamics, parse, potentials, replicas, seconds

from stabie_ase.dynamics import PotentialForces, initial_state
from stabie_ase.dynamics.graphs import blocks
from stabie_ase.potentials.calculator import StABIECalculator
from stabie_ase.system.allocator import keep_freed_memory

INTEGRATOR = INTEGRATORS["Langevin"]


def batched(potential, n_replicas, args):
    """A function that takes `args.steps` steps of all replicas."""
    potential = for_dynamics(potential, n_replicas, args)
    forces = PotentialForces(potential)
    take = blocks(forces, INTEGRATOR, args.steps)
    state = initial_state(replicas(n_replicas, args.device), forces, 500.0, fix_com=False)

    def run():
        with potential.frozen():
            take(state, args.steps)

    return run


def one_by_one(calculator, args):
    """A function that takes `args.steps` steps of one replica with ASE, which starts cold: only the time counts."""
    atoms = read(ASPIRIN, 0)
    atoms.calc = calculator
    dynamics = ASELangevin(
        atoms,
        INTEGRATOR.timestep,
        temperature_K=500.0,
        friction=INTEGRATOR.friction,
        fixcm=False,
        rng=np.random.default_rng(1),
    )
    return lambda: dynamics.run(args.steps)


def mace_calculator(potential, args):
    from mace.calculators import MACECalculator

    dtype = "float64" if args.dtype == torch.float64 else "float32"
    return MACECalculator(models=[potential.network], device=args.device, default_dtype=dtype)


def contestants(potential, args):
    """What runs, as name, replicas and function."""
    for n in args.replicas:
        yield f"batch of {n}", n, batched(potential, n, args)
    yield "ASE, StABIECalculator", 1, one_by_one(StABIECalculator(potential), args)
    if potential.family == "mace":
        yield "ASE, MACECalculator", 1, one_by_one(mace_calculator(potential, args), args)


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"{'potential':18s} {'engine':22s}   replica-steps/s (quartiles)   ns/day of all replicas at 0.5 fs")
    for name, potential in potentials(args.model, args.device, args.dtype):
        entries = list(contestants(potential, args))
        for _, _, run in entries:
            run()
        rates = np.array(
            [[n * args.steps / seconds(run, args.device) for _, n, run in entries] for _ in range(args.rounds)]
        )
        for (label, _, _), own in zip(entries, rates.T):
            low, median, high = np.quantile(own, [0.25, 0.5, 0.75])
            per_day = median * 86400 * INTEGRATOR.timestep / (1e6 * units.fs)
            print(f"{name:18s} {label:22s}   {median:8.1f} ({low:.1f} to {high:.1f})   {per_day:10.2f}", flush=True)


if __name__ == "__main__":
    main()
