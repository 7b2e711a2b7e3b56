#!/usr/bin/env python
"""Time of a neighbour list on a CPU: the k-d tree of this package against matscipy, system by system.

    pip install matscipy
    python examples/benchmarks/neighbor_lists.py
    python examples/benchmarks/neighbor_lists.py --quick

Periodic water of growing size, and 64 replicas of small crystals, at 7 Å. Here a list is that of the whole batch, each pair
once and sorted; of matscipy it is the bare call, each pair twice and as it comes. Medians over the rounds, and the ratio
within a round with its quartiles.
"""

import argparse
import time

import numpy as np
import torch
from ase.build import bulk, molecule
from matscipy.neighbours import neighbour_list

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import kd_tree
from stabie_ase.system.allocator import keep_freed_memory

CUTOFF = 7.0


def systems(quick):
    """Names and images."""
    water = molecule("H2O", cell=[3.104] * 3, pbc=True)
    for n in (4,) if quick else (4, 8, 12, 20):
        yield f"water, {3 * n**3} atoms", [water.repeat(n)]
    silicon = bulk("Si", "diamond", 5.43, cubic=True)
    for n in (1,) if quick else (1, 2):
        yield f"64 x silicon, {8 * n**3} atoms", [silicon.repeat(n)] * 64


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two systems, two rounds")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    torch.set_num_threads(1)
    keep_freed_memory()
    rng = np.random.default_rng(0)
    print(f"{'':28s} {'k-d tree':>10s} {'matscipy':>10s}   matscipy / k-d tree (quartiles)")
    for name, images in systems(args.quick):
        for atoms in images:
            atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
        batch = AtomsBatch.from_atoms(images)
        ways = (
            lambda: kd_tree.half_list(batch, CUTOFF),
            lambda: [neighbour_list("ijS", atoms, CUTOFF) for atoms in images],
        )
        times = np.array([[seconds(way) for way in ways] for _ in range(rounds)])
        ours, theirs = 1e3 * np.median(times, axis=0)
        low, ratio, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
        print(f"{name:28s} {ours:7.2f} ms {theirs:7.2f} ms   {ratio:.2f} ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
