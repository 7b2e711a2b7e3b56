#!/usr/bin/env python
"""Cost of a step against size: of an aspirin with the number of replicas, of an atom with the size of a box of water.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --quick
    python examples/benchmarks/scaling.py --model my.pt --device cuda --replicas 32 128 512 2048

Replicas run with a SchNet and, if mace-torch is there, a MACE. The water is periodic and held together by a cheap pair
potential (Lennard-Jones, 6 Å), so that neighbour lists weigh as much as they ever can; it is warm enough for several new
lists in the time that is measured. Sizes take turns; figures are medians over the rounds with their quartiles, the ratio is to
the first size within a round.
"""

import numpy as np
import torch
from ase import units
from ase.build import molecule
from engine_step import INTEGRATORS, for_dynamics, parse, potentials, replicas, seconds

from stabie_ase.dynamics import PotentialForces, initial_state
from stabie_ase.dynamics.graphs import blocks
from stabie_ase.potentials.analytic import LennardJones
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.system.allocator import keep_freed_memory

INTEGRATOR = INTEGRATORS["Langevin"]
WATER = (4, 8, 12, 20)  # molecules along each edge: 192 to 24 000 atoms


def water(n, device):
    """A periodic box of n³ molecules with the density of water."""
    atoms = molecule("H2O", cell=[3.104] * 3, pbc=True)
    return AtomsBatch.from_atoms(atoms.repeat(n), device=device, dtype=torch.float32)


def steps(potential, batch, temperature, n_steps):
    """A function that goes on for so many steps, and how many lists it has built."""
    forces = PotentialForces(potential)
    take = blocks(forces, INTEGRATOR, n_steps)
    state = initial_state(batch, forces, temperature, fix_com=False)

    def run():
        nonlocal state
        with potential.frozen():
            state = take(state, n_steps)

    return run, forces.neighbors


def table(title, sizes, entries, n_steps, args):
    """Measure the functions of all sizes in turns and print microseconds a unit of size and step."""
    for run in entries:
        run()
    times = np.array([[seconds(run, args.device) for run in entries] for _ in range(args.rounds)])
    costs = 1e6 * times / n_steps / np.array(sizes)
    for size, own in zip(sizes, costs.T):
        low, median, high = np.quantile(own, [0.25, 0.5, 0.75])
        ratio = np.median(own / costs[:, 0])
        print(f"{title:30s} {size:8d}   {median:10.2f} ({low:.2f} to {high:.2f})   {ratio:.3f}", flush=True)


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"{'':30s} {'size':>8s}   µs a unit of size and step (quartiles)   times the first")
    for name, potential in potentials(args.model, args.device, args.dtype):
        entries = [
            steps(for_dynamics(potential, n, args), replicas(n, args.device), 500.0, args.steps)[0] for n in args.replicas
        ]
        table(f"replicas of aspirin, {name}", args.replicas, entries, args.steps, args)
    cheap, edges = LennardJones(1e-3, 0.85, 6.0, dtype=torch.float32).to(args.device), WATER[: 1 if args.quick else None]
    n_steps = 4 * args.steps
    entries, lists = zip(*(steps(cheap, water(n, args.device), 300.0, n_steps) for n in edges))
    table("atoms of water, Lennard-Jones", [3 * n**3 for n in edges], entries, n_steps, args)
    built = ", ".join(str(verlet.n_builds) for verlet in lists)
    print(f"neighbour lists built in {(args.rounds + 1) * n_steps * INTEGRATOR.timestep / units.fs:g} fs: {built}")


if __name__ == "__main__":
    main()
