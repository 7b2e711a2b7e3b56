#!/usr/bin/env python
"""Replica-steps a second of the same MACE: this engine against torch-sim's, both batched Langevin dynamics.

    pip install torch-sim-atomistic==0.3.0
    python examples/benchmarks/torchsim_throughput.py
    python examples/benchmarks/torchsim_throughput.py --quick
    python examples/benchmarks/torchsim_throughput.py --device cuda --replicas 64 512

Each engine works in a process of its own, as its users would run it: here with `keep_freed_memory`, as the commands of
this package do, without it, and compiled, as with their --compile; torch-sim as it comes, but without the stress, which
nobody needs here. The processes take turns, so that whatever else the machine does meets all. Rates are medians over the
rounds with their quartiles, the ratio is that within a round. On one CPU thread time is that of the process.
"""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import torch
from ase import units
from ase.io import read
from ase_throughput import INTEGRATOR, batched
from engine_step import ASPIRIN, ENERGIES, parse, seconds

from stabie_ase.potentials.mace import MACEPotential
from stabie_ase.system.allocator import keep_freed_memory


def torch_sim(potential, n, args):
    """Steps of torch-sim."""
    from torch_sim.integrators import nvt_langevin
    from torch_sim.io import atoms_to_state
    from torch_sim.models.mace import MaceModel

    device = torch.device(args.device)
    model = MaceModel(potential.network, device=device, dtype=args.dtype, compute_stress=False)
    dt, kT = (torch.tensor(x, device=device, dtype=args.dtype) for x in (INTEGRATOR.timestep, 500.0 * units.kB))
    begin, step = nvt_langevin(model, dt=dt, kT=kT, gamma=torch.tensor(INTEGRATOR.friction).to(dt))
    frames = read(ASPIRIN, ":")
    first = begin(atoms_to_state([frames[k % len(frames)] for k in range(n)], device, args.dtype), seed=0)

    def run():
        state = first.clone()
        for _ in range(args.steps):
            state = step(state)

    return run


ENGINES = {
    "stabie_ase": batched,
    "stabie_ase, freed memory returned": batched,
    "stabie_ase, compiled": batched,
    "torch-sim": torch_sim,
}


def work(engine, args):
    """The process of one engine: for every line read, a round whose seconds are written."""
    torch.set_num_threads(args.threads)
    if engine in ("stabie_ase", "stabie_ase, compiled"):
        keep_freed_memory()
    torch.manual_seed(0)
    args.compile = engine == "stabie_ase, compiled"
    potential = MACEPotential.build(ENERGIES, avg_num_neighbors=15.0, dtype=args.dtype).to(args.device)
    run = ENGINES[engine](potential, args.replicas[0], args)
    run()
    for _ in sys.stdin:
        print("seconds", seconds(run, args.device), flush=True)


def start(engine, n, arguments):
    """A worker, which has to be asked."""
    command = [sys.executable, __file__, *arguments, "--replicas", str(n), "--worker", engine]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def ask(worker):
    """Seconds of one round."""
    worker.stdin.write("go\n")
    worker.stdin.flush()
    for line in worker.stdout:  # MACE prints too
        if line.startswith("seconds"):
            return float(line.split()[1])
    raise SystemExit(f"a worker ended with code {worker.wait()}; run it by hand: {' '.join(worker.args)}")


def main():
    arguments = sys.argv[1:]
    if "--worker" in arguments:
        k = arguments.index("--worker")
        return work(arguments[k + 1], parse(arguments[:k]))
    args = parse(arguments)
    if find_spec("torch_sim") is None:
        print("torch-sim is not installed: pip install torch-sim-atomistic")
        return
    print(f"{'engine':34s} replicas   replica-steps/s (quartiles)   times torch-sim's (quartiles)")
    for n in args.replicas:
        workers = {engine: start(engine, n, arguments) for engine in ENGINES}
        for worker in workers.values():
            ask(worker)
        rates = np.array([[n * args.steps / ask(worker) for worker in workers.values()] for _ in range(args.rounds)])
        for worker in workers.values():
            worker.communicate()
        for engine, own in zip(ENGINES, rates.T):
            rate, ratio = (np.quantile(x, [0.25, 0.5, 0.75]) for x in (own, own / rates[:, -1]))
            print(
                f"{engine:34s} {n:8d}   {rate[1]:8.1f} ({rate[0]:.1f} to {rate[2]:.1f})   "
                f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
