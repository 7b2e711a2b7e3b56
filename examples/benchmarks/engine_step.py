#!/usr/bin/env python
"""What a step of the engine costs beyond the forces: full steps against bare energy and force calls.

    python examples/benchmarks/engine_step.py            # SchNet and, if mace-torch is there, MACE
    python examples/benchmarks/engine_step.py --quick    # seconds
    python examples/benchmarks/engine_step.py --model my.pt --device cuda --compile

Both run on the same potential and batch in turns, so that whatever else the machine does meets both, and in turns with
steps whose forces are known beforehand: `own` is what such a step costs. Times are medians over the rounds; step/bare
is the ratio within a round, with its quartiles, and own/bare the overhead in percent, which a noisy machine blurs less.
Weights are random unless a model is given: only the time counts.
"""

import argparse
import copy
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from ase import units
from ase.io import read

import stabie_ase
from stabie_ase.dynamics import Langevin, NoseHooverChain, PotentialForces, initial_state
from stabie_ase.dynamics.compilation import make_ready
from stabie_ase.dynamics.graphs import WARMUP_BLOCKS, blocks
from stabie_ase.dynamics.steps import advance
from stabie_ase.potentials.base import Prediction
from stabie_ase.potentials.checkpoint import load_potential
from stabie_ase.potentials.mace import MACEPotential
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.structures.batch import AtomsBatch

ASPIRIN = Path(stabie_ase.__file__).parent / "data" / "aspirin_xtb_train.xyz"
ENERGIES = {1: -13.0, 6: -1000.0, 8: -2000.0}
INTEGRATORS = {
    "Langevin": Langevin(0.5 * units.fs, friction=0.01 / units.fs),
    "Nose-Hoover": NoseHooverChain(0.5 * units.fs, relaxation_time=50 * units.fs),
}


def potentials(paths, device, dtype):
    """Names and potentials: the models given, or a SchNet and a MACE of ordinary size with random weights."""
    for path in paths or ():
        yield Path(path).name, load_potential(path, device, dtype)
    if paths:
        return
    torch.manual_seed(0)
    yield "SchNet 64x3", SchNetPotential.build(ENERGIES).to(device=device, dtype=dtype)
    if find_spec("mace") is None:
        print("mace-torch is not installed: SchNet only")
        return
    yield "MACE 32x0e+32x1o", MACEPotential.build(ENERGIES, avg_num_neighbors=15.0, dtype=dtype).to(device)


def replicas(n, device):
    """Aspirin n times, from the packaged frames."""
    frames = read(ASPIRIN, ":")
    return AtomsBatch.from_atoms([frames[k % len(frames)] for k in range(n)], device=device)


def seconds(function, device):
    """Time of a call: of the process on one CPU thread, where other people's load shows least, else of the wall clock."""
    on_cpu = torch.device(device).type == "cpu"
    synchronize = (lambda: None) if on_cpu else torch.cuda.synchronize
    clock = time.process_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter
    synchronize()
    start = clock()
    function()
    synchronize()
    return clock() - start


def for_dynamics(potential, n_replicas, args):
    """The potential itself, or a compiled copy if asked for."""
    if not args.compile:
        return potential
    compiled = copy.deepcopy(potential)
    make_ready(compiled, read(ASPIRIN, ":"), n_replicas)
    return compiled


def compare(potential, integrator, n_replicas, args):
    """Seconds of a bare call, of a full step, and of a step with known forces, shape (rounds, 3)."""
    batch, driving = replicas(n_replicas, args.device), for_dynamics(potential, n_replicas, args)
    forces = PotentialForces(driving)
    take = blocks(forces, integrator, args.steps)
    state = initial_state(batch, forces, 500.0, fix_com=integrator.fix_com)
    neighbors = forces.neighbors(batch)

    def known_forces(batch):
        forces.neighbors(batch)
        return Prediction(state.potential_energy, state.forces, None)

    def bare():
        for _ in range(args.steps):
            potential.compute(batch, neighbors)

    def full():
        take(state, args.steps)

    def own():
        advance(state, integrator, known_forces, args.steps)

    with potential.frozen(), driving.frozen():
        bare(), own(), [full() for _ in range(WARMUP_BLOCKS + 1)]
        rounds = [[seconds(run, args.device) for run in (bare, full, own)] for _ in range(args.rounds)]
    return np.array(rounds) / args.steps


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="FILE", help="a checkpoint to time; may be given again")
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--steps", type=int, default=5, help="in one measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each kind (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="replicas by a compiled network, peers by the plain one")
    parser.add_argument("--quick", action="store_true", help="8 replicas, few rounds")
    args = parser.parse_args(arguments)
    if args.quick:
        args.replicas, args.rounds, args.steps = [8], 3, 5
    args.dtype = getattr(torch, args.dtype)
    return args


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    print(f"{'potential':17s} {'integrator':12s} replicas  bare call       step       own   step/bare (quartiles)    own/bare")
    for name, potential in potentials(args.model, args.device, args.dtype):
        for n_replicas in args.replicas:
            for label, integrator in INTEGRATORS.items():
                times = compare(potential, integrator, n_replicas, args)
                bare, step, own = 1e3 * np.median(times, axis=0)
                low, ratio, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
                print(
                    f"{name:17s} {label:12s} {n_replicas:8d} {bare:7.2f} ms {step:7.2f} ms {own:6.2f} ms   "
                    f"{ratio:.3f} ({low:.3f} to {high:.3f})   {100 * own / bare:6.1f} %",
                    flush=True,
                )


if __name__ == "__main__":
    main()
