"""Make frames of an argon-like liquid, labelled by a Lennard-Jones potential: a periodic reference that takes seconds.

    python examples/data/make_argon.py --output argon.xyz

32 atoms at 90 K and the density of the liquid, from Langevin dynamics of as many replicas as there are frames, so that these are
independent of each other.
"""

import argparse

import torch
from ase import units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from stabie_ase.dynamics import Langevin, PotentialForces, initial_state, simulate
from stabie_ase.potentials.analytic import LennardJones
from stabie_ase.structures.batch import AtomsBatch

EPSILON, SIGMA, CUTOFF = 0.0103, 3.40, 5.5
"""eV and Å (Rahman, Phys. Rev. 136, A405, 1964); a cutoff below half the box, beyond which there is nothing."""

TEMPERATURE_K, LATTICE = 90.0, 5.72
"""K, and Å of an fcc cell with the density of the liquid, 1.42 g/cm³."""


def teacher() -> LennardJones:
    """The truth."""
    return LennardJones(EPSILON, SIGMA, CUTOFF)


def frames(n: int, steps: int, seed: int = 0) -> list:
    """Labelled frames with their temperature; each the end of a trajectory of its own."""
    crystal = bulk("Ar", "fcc", a=LATTICE, cubic=True).repeat(2)
    forces = PotentialForces(teacher())
    state = initial_state(AtomsBatch.from_atoms([crystal] * n), forces, 2 * TEMPERATURE_K, seed=seed, fix_com=False)
    state = state.replace(temperature=torch.full_like(state.temperature, TEMPERATURE_K))
    state = simulate(state, Langevin(5.0 * units.fs, 0.01 / units.fs), forces, steps)
    images = state.batch.to_atoms()
    for atoms, energy, force in zip(images, state.potential_energy.tolist(), state.forces.split(state.batch.sizes)):
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=force.numpy())
        atoms.info["temperature_K"] = TEMPERATURE_K
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--frames", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of 5 fs, of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 frames of 100 steps")
    args = parser.parse_args()
    if args.quick:
        args.frames, args.steps = 20, 100
    images = frames(args.frames, args.steps, args.seed)
    write(args.output, images)
    print(f"{len(images)} frames of {len(images[0])} atoms at {TEMPERATURE_K:g} K: {args.output}")


if __name__ == "__main__":
    main()
