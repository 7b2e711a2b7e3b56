#!/usr/bin/env python
"""What the Boltzmann estimator's gradient costs: time and memory against one energy backward over the same frames.

    python examples/benchmarks/estimator_cost.py
    python examples/benchmarks/estimator_cost.py --quick
    python examples/benchmarks/estimator_cost.py --frames 1000 --bins 50 5000

Each point runs in a process of its own, whose peak memory the operating system keeps. The energy backward is the plain
gradient of the sum of all energies, in the same chunks. The two run in turns; the ratio is that of each round. `memory`
is the peak after the energy backward, `more` what the estimator adds to it, `values` the size of the observables' values.

A second table holds gradients against others: of five observables against one of them, for aspirin, and of groups of atoms
against whole systems, for a box of 27 waters. `memory` is then the peak after the other, `more` what the one adds to it.
"""

import argparse
import json
import resource
import subprocess
import sys

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from engine_step import potentials, replicas, seconds

from stabie_ase.boltzmann import Estimator, Samples, StatePoint, accumulate_gradient, grouping_from
from stabie_ase.observables import DistanceDistribution, Target, observables_from
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups


def peak_MB():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def moved(frames):
    """The same frames, each atom a little elsewhere."""
    generator = torch.Generator().manual_seed(0)
    return frames.replace(
        positions=frames.positions + 0.02 * torch.randn(frames.positions.shape, generator=generator, dtype=frames.dtype)
    )


def waters(n_frames, n=3):
    """n³ molecules in a cell."""
    rng, box = np.random.default_rng(0), Atoms(cell=[3.1 * n] * 3, pbc=True)
    for k in np.ndindex(n, n, n):
        water = molecule("H2O")
        water.euler_rotate(*rng.uniform(0.0, 360.0, 3))
        water.positions += 3.1 * np.array(k)
        box += water
    return AtomsBatch.from_atoms(box).repeat(n_frames)


def model(args):
    return next(potentials([args.model] if args.model else None, "cpu", torch.float32))[1]


def gradient(potential, frames, observables, groups, args):
    """A function that works out the gradient from samples, and the bytes of their values."""
    values = {observable.name: observable(frames, groups) for observable in observables}
    targets = [Target(o, values[o.name][: groups.n_groups // 2].mean(dim=0)) for o in observables]
    nothing, index = torch.zeros(frames.n_systems, dtype=torch.float64), torch.arange(frames.n_systems)
    samples = Samples(frames, groups, values, nothing, nothing, 0 * index, index)

    def work():
        result = Estimator(StatePoint(500.0))(samples, targets)
        accumulate_gradient(potential, frames, result.weights, samples.parts, chunk_size=args.chunk)

    return work, sum(x.nbytes for x in values.values())


def measure(n_frames, n_bins, args):
    """The estimator of h(r) after an energy backward."""
    potential, frames, r_max = model(args), moved(replicas(n_frames, "cpu")), 11.0
    hr = DistanceDistribution(r_max, bin_width=r_max / n_bins, smearing=max(0.02, r_max / n_bins))
    ones = torch.ones(n_frames, dtype=torch.float64)
    estimator, size = gradient(potential, frames, [hr], Groups.systems(frames), args)
    return in_turns(lambda: accumulate_gradient(potential, frames, ones, chunk_size=args.chunk), estimator, size, args)


def compare(n_frames, what, args):
    """One of `COMPARED`."""
    potential = model(args)
    if what == "five":
        frames = moved(replicas(n_frames, "cpu"))
        setting = Setting(replicas(10, "cpu").to_atoms(), 500.0)
        observables = observables_from("hr,bond-length:C-C,bond-length:C-H,bond-length:C-O,bond-length:O-H", setting)
        whole = Groups.systems(frames)
        (first, _), (second, size) = (gradient(potential, frames, some, whole, args) for some in (observables[:1], observables))
    else:
        frames = moved(waters(n_frames))
        setting = Setting(frames.select(range(10)).to_atoms(), 300.0)
        observables = observables_from("bond-length:O-H,rdf:O-O", setting)
        ways = (grouping_from(text, setting)(frames) for text in ("global", what))
        (first, _), (second, size) = (gradient(potential, frames, observables, groups, args) for groups in ways)
    return in_turns(first, second, size, args)


COMPARED = {"five": "five observables / one", "molecules": "27 molecules / global", "nearest:6": "nearest:6 / global"}


def in_turns(first, second, size, args):
    """Times of both in s, shape (rounds, 2), and memory in MB."""
    first(), first()
    before = peak_MB()
    second()
    after = peak_MB()
    times = [[seconds(first, "cpu"), seconds(second, "cpu")] for _ in range(args.rounds)]
    return {"times": times, "before": before, "after": after, "values": size / 1e6}


def point(n_frames, what, args):
    """A measurement in a fresh process, as a line."""
    command = [sys.executable, __file__, *sys.argv[1:], "--point", str(n_frames), str(what)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    times = np.array(found["times"])
    first, second = np.median(times, axis=0)
    low, ratio, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
    spread = f"{ratio:.3f} ({low:.3f} to {high:.3f})"
    return (
        f"{first:7.2f} s {second:8.2f} s   {spread:24s} {found['values']:5.0f} MB "
        f"{found['before']:6.0f} MB {found['after'] - found['before']:5.0f} MB"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FILE", help="a checkpoint for aspirin and water; a random SchNet if not given")
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--bins", type=int, nargs="+", default=[50, 500, 5000])
    parser.add_argument("--compared-frames", type=int, nargs="+", default=[50, 200, 800], help="of the second table")
    parser.add_argument("--chunk", type=int, default=64, help="frames in one backward (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one small point of each kind")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.frames, args.bins, args.compared_frames, args.rounds = [100], [500], [20], 2
    if args.point:
        torch.set_num_threads(args.threads)
        n_frames, what = args.point
        print(json.dumps(measure(int(n_frames), int(what), args) if what.isdigit() else compare(int(n_frames), what, args)))
        return
    columns = f"{'ratio (quartiles)':24s} {'values':>8s} {'memory':>9s} {'more':>8s}"
    print(f"{'frames':>7s} {'bins':>5s} {'energy':>9s} {'estimator':>10s}   {columns}")
    for n_frames in args.frames:
        for n_bins in args.bins:
            print(f"{n_frames:7d} {n_bins:5d} {point(n_frames, n_bins, args)}", flush=True)
    print(f"\n{'frames':>7s} {'gradient of / of':24s} {'the other':>9s} {'the one':>10s}   {columns}")
    for what, title in COMPARED.items():
        for n_frames in args.compared_frames:
            print(f"{n_frames:7d} {title:24s} {point(n_frames, what, args)}", flush=True)


if __name__ == "__main__":
    main()
