#!/usr/bin/env python
"""What the Boltzmann estimator's gradient costs: time and memory against one energy backward over the same frames.

    python examples/benchmarks/estimator_cost.py
    python examples/benchmarks/estimator_cost.py --quick
    python examples/benchmarks/estimator_cost.py --frames 1000 --bins 50 5000

Each point runs in a process of its own, whose peak memory the operating system keeps. The energy backward is the plain
gradient of the sum of all energies, in the same chunks. The two run in turns; the ratio is that of each round. `memory`
is the peak after the energy backward, `more` what the estimator adds to it, `h(r)` the size of the observable's values.
"""

import argparse
import json
import resource
import subprocess
import sys

import numpy as np
import torch
from engine_step import potentials, replicas, seconds

from stabie_ase.boltzmann import Estimator, Samples, StatePoint, accumulate_gradient
from stabie_ase.observables import DistanceDistribution, Target
from stabie_ase.structures.topology import Groups


def peak_MB():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(n_frames, n_bins, args):
    """One point: times of both in s, shape (rounds, 2), and memory in MB."""
    torch.set_num_threads(args.threads)
    _, potential = next(potentials([args.model] if args.model else None, "cpu", torch.float32))
    frames = replicas(n_frames, "cpu")
    generator = torch.Generator().manual_seed(0)
    frames = frames.replace(
        positions=frames.positions + 0.02 * torch.randn(frames.positions.shape, generator=generator, dtype=frames.dtype)
    )
    ones, r_max = torch.ones(n_frames, dtype=torch.float64), 11.0
    observable = DistanceDistribution(r_max, bin_width=r_max / n_bins, smearing=max(0.02, r_max / n_bins))
    values = observable(frames)
    target = Target(observable, values[: n_frames // 2].mean(dim=0))
    nothing, index = torch.zeros(n_frames, dtype=torch.float64), torch.arange(n_frames)
    samples = Samples(frames, Groups.systems(frames), {"hr": values}, nothing, nothing, 0 * index, index)

    def energy():
        accumulate_gradient(potential, frames, ones, chunk_size=args.chunk)

    def estimator():
        result = Estimator(StatePoint(500.0))(samples, [target])
        accumulate_gradient(potential, frames, result.weights, chunk_size=args.chunk)

    energy(), energy()
    before = peak_MB()
    estimator()
    after = peak_MB()
    times = [[seconds(energy, "cpu"), seconds(estimator, "cpu")] for _ in range(args.rounds)]
    return {"times": times, "before": before, "after": after, "values": values.nbytes / 1e6}


def point(n_frames, n_bins):
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--point", str(n_frames), str(n_bins)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FILE", help="a checkpoint for aspirin; a random SchNet if not given")
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--bins", type=int, nargs="+", default=[50, 500, 5000])
    parser.add_argument("--chunk", type=int, default=64, help="frames in one backward (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one small point")
    parser.add_argument("--point", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.frames, args.bins, args.rounds = [100], [500], 2
    if args.point:
        print(json.dumps(measure(*args.point, args)))
        return
    print(f"{'frames':>7s} {'bins':>5s} {'energy':>9s} {'estimator':>10s}   {'ratio (quartiles)':24s} ", end="")
    print(f"{'h(r)':>8s} {'memory':>9s} {'more':>8s}")
    for n_frames in args.frames:
        for n_bins in args.bins:
            found = point(n_frames, n_bins)
            times = np.array(found["times"])
            energy, estimator = np.median(times, axis=0)
            low, ratio, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
            spread = f"{ratio:.3f} ({low:.3f} to {high:.3f})"
            print(
                f"{n_frames:7d} {n_bins:5d} {energy:7.2f} s {estimator:8.2f} s   {spread:24s} {found['values']:5.0f} MB "
                f"{found['before']:6.0f} MB {found['after'] - found['before']:5.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
