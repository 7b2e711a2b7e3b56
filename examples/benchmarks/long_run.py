#!/usr/bin/env python
"""Resident memory of the process during long dynamics: it must not grow.

    python examples/benchmarks/long_run.py                                # 1e6 steps of 64 molecules with a cheap potential
    python examples/benchmarks/long_run.py --model schnet --steps 20000   # 64 aspirin molecules with a SchNet
    python examples/benchmarks/long_run.py --quick

Langevin dynamics with a look at every replica every ten steps, as in training. The first tenth is for whatever is made once;
after it, memory is written down every tenth, with the rate. `growth` is that from the second line to the last.
"""

import argparse
import time
from pathlib import Path

import torch
from ase import units
from ase.build import molecule
from engine_step import ENERGIES, replicas

from stabie_ase.dynamics import Attached, Langevin, PotentialForces, initial_state, simulate
from stabie_ase.potentials.analytic import Morse
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.system.allocator import keep_freed_memory

INTEGRATOR = Langevin(0.5 * units.fs, friction=0.01 / units.fs)


def resident_MB():
    """Of this process, by Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))


def system(args):
    """A potential and the batch that it drives."""
    if args.model == "schnet":
        torch.manual_seed(0)
        return SchNetPotential.build(ENERGIES), replicas(args.replicas, "cpu")
    nitrogen = AtomsBatch.from_atoms([molecule("N2")] * args.replicas)
    return Morse(depth=9.8, a=2.7, r0=1.1), nitrogen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["morse", "schnet"], default="morse", help="(default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2000 steps")
    args = parser.parse_args()
    if args.quick:
        args.steps = 2000
    torch.set_num_threads(1)
    keep_freed_memory()
    potential, batch = system(args)
    state = initial_state(batch, PotentialForces(potential), 500.0, fix_com=False)
    every, seen, began = args.steps // 10, [], time.perf_counter()

    def look(done, running):
        if done % every == 0:
            seen.append(resident_MB())
            rate = done / (time.perf_counter() - began)
            print(f"{done:9d} steps of {running.n_systems} replicas   {seen[-1]:8.1f} MB   {rate:8.1f} steps/s", flush=True)

    simulate(state, INTEGRATOR, PotentialForces(potential), args.steps, [Attached(look, 10)])
    print(f"growth after the first tenth: {seen[-1] - seen[0]:+.1f} MB")


if __name__ == "__main__":
    main()
