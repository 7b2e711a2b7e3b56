r"""What models of water say of the angle of one molecule in the liquid, beside the teacher: in it holes open that few criteria see.

    python examples/water/bend.py start=F/start.pt end=F/run/model.pt --ref F/water_test.xyz
    python examples/water/bend.py --quick

In frames of the liquid one molecule, each time another, is bent about the line that halves its angle; nothing else moves and its bonds
keep their lengths. Energies are in k_B T of 300 K, beside those at the angle nearest to equilibrium: the median over the frames and the
lowest tenth, which is where molecules go through.
"""

import argparse

import numpy as np
import torch
from ase import Atoms, units
from ase.io import read
from teacher import Water as TeacherWater
from teacher import lattice

from stabie_ase import load_potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

ANGLES = (40, 60, 80, 95, 108, 120, 135, 150, 165, 180)
REST = ANGLES.index(108)
TEMPERATURE_K = 300.0


def bent(atoms: Atoms, oxygen: int, angle: float) -> Atoms:
    """With the two hydrogens that follow an oxygen at an angle in degrees."""
    bonds = atoms.get_distances(oxygen, [oxygen + 1, oxygen + 2], mic=True, vector=True)
    lengths = np.linalg.norm(bonds, axis=1)
    first, second = bonds / lengths[:, None]
    along, across = (x / np.linalg.norm(x) for x in (first + second, first - second))
    half, atoms = np.radians(angle) / 2, atoms.copy()
    for k, (length, side) in enumerate(zip(lengths, (1, -1)), start=1):
        atoms.positions[oxygen + k] = atoms.positions[oxygen] + length * (np.cos(half) * along + side * np.sin(half) * across)
    return atoms


@torch.no_grad()
def energies(potential, frames: list[Atoms], oxygens: list[int]) -> np.ndarray:
    """In k_B T, shape (n_frames, n_angles)."""
    found = []
    for atoms, oxygen in zip(frames, oxygens):
        batch = AtomsBatch.from_atoms([bent(atoms, oxygen, angle) for angle in ANGLES])
        found.append(potential(batch, neighbor_list(batch, potential.cutoff)).double().numpy())
    found = np.array(found) / (units.kB * TEMPERATURE_K)
    return found - found[:, REST, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL")
    parser.add_argument("--ref", help="frames of water, atoms in the order O, H, H")
    parser.add_argument("--frames", type=int, default=24, help="of one molecule each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of frames and molecules (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the teacher alone, on lattices of its own")
    args = parser.parse_args()
    if not (args.quick or args.ref):
        parser.error("no frames were given; name a file of them: --ref water_test.xyz")
    torch.set_num_threads(1)
    images = [lattice(8, seed) for seed in range(2)] if args.quick else read(args.ref, ":")
    rng = np.random.default_rng(args.seed)
    frames = [images[k] for k in rng.integers(len(images), size=args.frames)]
    oxygens = [3 * int(rng.integers(len(atoms) // 3)) for atoms in frames]
    print(f"{'angle (°)':22s}" + "".join(f"{angle:8d}" for angle in ANGLES))
    for name, path in (("teacher", None), *(model.split("=", 1) for model in args.models)):
        found = energies(load_potential(path) if path else TeacherWater(), frames, oxygens)
        for what, row in (("median", np.median(found, axis=0)), ("lowest tenth", np.percentile(found, 10, axis=0))):
            print(f"{name + ', ' + what:22s}" + "".join(f"{x:8.1f}" for x in row), flush=True)


if __name__ == "__main__":
    main()
