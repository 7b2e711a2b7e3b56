"""Make reference sets of liquid water from the flexible SPC/Fw of teacher.py, by this package's own dynamics.

    python examples/water/make_water.py --output FOLDER                      # 64 molecules at 300 K, about 15 minutes on a core
    python examples/water/make_water.py --output FOLDER --pressure 1e-4      # the cell as it is at 1 bar
    python examples/water/make_water.py --output FOLDER --quick              # a trial, seconds

Replicas start from lattices of molecules that are turned at random, each from another one, and run at 400 K for the first third
of the equilibration. Langevin dynamics then gives the frames of water_train.xyz, water_valid.xyz and water_test.xyz, which
come from different replicas; each header tells temperature_K, method, replica and time_fs. Its BAOAB splitting samples
stiff bonds well even at 1 fs. The first replica goes on for water_dynamics.traj: dense frames with momenta, energies and forces at
half the time step and constant volume, with a velocity rescaling of 1 ps that hardly disturbs correlations.

Energies of the equilibration's last third and of both halves of the sampling, with standard errors over replicas, tell whether
the liquid is stationary.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from teacher import CONSTANTS, Water, lattice

from stabie_ase.dynamics import (
    Attached,
    MDState,
    PotentialForces,
    Recorder,
    StochasticVelocityRescaling,
    initial_state,
    integrator_for,
    simulate,
)
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.system.allocator import keep_freed_memory

TIMESTEP_FS, FRICTION_PER_FS = 1.0, 0.005

HOT = 4 / 3
"""Times the temperature, at which replicas forget their lattice."""

LOOK_FS = 50
"""Time between two energies of the report."""

AT_ONCE = 25
"""Frames that are labelled together."""


def steps(ps: float) -> int:
    return round(1000 * ps / TIMESTEP_FS)


def equilibrated(args: argparse.Namespace, forces: PotentialForces) -> tuple[MDState, np.ndarray]:
    """Replicas at their temperature, and their potential energies in the last third, shape (n_looks, n_replicas), in eV."""
    batch = AtomsBatch.from_atoms([lattice(args.waters, args.seed + k) for k in range(args.replicas)])
    pressure = 0.0 if args.pressure is None else args.pressure
    state = initial_state(batch, forces, HOT * args.temperature, seed=args.seed, pressure_GPa=pressure)
    third = max(1, steps(args.equilibration) // 3)
    state, _ = run(state, integrator_for("nvt", TIMESTEP_FS, FRICTION_PER_FS, fix_com=True), forces, third)
    state = state.replace(temperature=torch.full_like(state.temperature, args.temperature))
    state, _ = run(state, sampling(args), forces, third)
    return run(state, sampling(args), forces, third)


def sampling(args: argparse.Namespace):
    return integrator_for("nvt" if args.pressure is None else "npt", TIMESTEP_FS, FRICTION_PER_FS, fix_com=True)


def run(state: MDState, integrator, forces: PotentialForces, n_steps: int, observers=()) -> tuple[MDState, np.ndarray]:
    """The last state, and potential energies on the way, shape (n_looks, n_replicas), in eV."""
    energies = []
    every = min(round(LOOK_FS / TIMESTEP_FS), max(1, n_steps // 2))
    look = Attached(lambda done, running: energies.append(running.potential_energy.numpy()), every)
    return simulate(state, integrator, forces, n_steps, [look, *observers]), np.array(energies)


def labelled(frames: AtomsBatch, water: Water, temperature: float, method: str) -> list[Atoms]:
    """Each system with its energy and forces, in eV and eV/Å, and in its header a temperature in K and where labels are from."""
    images = []
    for chosen in torch.arange(frames.n_systems).split(AT_ONCE):
        part = frames.select(chosen)
        found = water.compute(part, neighbor_list(part, water.cutoff))
        for atoms, energy, forces in zip(part.to_atoms(), found.energies.tolist(), found.forces.split(part.sizes)):
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces.numpy())
            atoms.info.update(temperature_K=temperature, method=method)
            images.append(atoms)
    return images


def sampled(state: MDState, args: argparse.Namespace, forces: PotentialForces) -> tuple[MDState, list[Atoms], np.ndarray]:
    """Replicas at the end, their frames one replica after the other, and potential energies as `run` gives them."""
    each = -(-(args.train + args.valid + args.test) // args.replicas)
    spacing = steps(args.spacing)
    recorder = Recorder(state, each * spacing, spacing)
    state, energies = run(state, sampling(args), forces, each * spacing, [recorder])
    frames, frame, replica = recorder.trajectory.frames()
    images = labelled(frames, forces.potential, args.temperature, f"{args.constants} water")
    for atoms, k, r in zip(images, recorder.trajectory.steps[frame].tolist(), replica.tolist()):
        atoms.info.update(replica=r, time_fs=k * TIMESTEP_FS)
    return state, sorted(images, key=lambda atoms: (atoms.info["replica"], atoms.info["time_fs"])), energies


def dynamics(state: MDState, args: argparse.Namespace, forces: PotentialForces) -> tuple[list[Atoms], np.ndarray]:
    """Dense frames of the first replica with their momenta, and potential energies as `run` gives them."""
    timestep = 0.5 * TIMESTEP_FS
    every = round(args.every / timestep)
    n_steps = round(1000 * args.dynamics / timestep) // every * every
    state = state.select([0])
    recorder = Recorder(state, n_steps, every, momenta=True)
    integrator = StochasticVelocityRescaling(timestep * units.fs, 1000 * units.fs)
    _, energies = run(state, integrator, forces, n_steps, [recorder])
    kept = recorder.trajectory
    images = labelled(kept.frames()[0], forces.potential, args.temperature, f"{args.constants} water")
    for atoms, momenta, step in zip(images, kept.momenta.numpy(), kept.steps.tolist()):
        atoms.set_momenta(momenta)
        atoms.info["time_fs"] = step * timestep
    return images, energies


def split(images: list[Atoms], args: argparse.Namespace) -> dict[str, list[Atoms]]:
    """Each set from replicas of its own as far as they go, in an order that tells nothing of time."""
    cuts = np.cumsum([0, args.train, args.valid, args.test])
    rng, sets = np.random.default_rng(args.seed), {}
    for name, first, last in zip(("train", "valid", "test"), cuts, cuts[1:]):
        sets[name] = [images[k] for k in first + rng.permutation(last - first)]
    return sets


def tell(name: str, energies: np.ndarray, args: argparse.Namespace) -> None:
    """Mean energy of a molecule, its error over replicas."""
    means = 1000 * energies.mean(axis=0) / args.waters
    error = f" ± {means.std(ddof=1) / len(means) ** 0.5:.2f}" if len(means) > 1 else ""
    print(f"{name}: potential energy {means.mean():.2f}{error} meV per molecule", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder to write to (default: this one)")
    parser.add_argument("--constants", choices=CONSTANTS, default="spcfw", help="(default: %(default)s)")
    parser.add_argument("--waters", type=int, default=64, help="molecules (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=300.0, help="in K (default: %(default)s)")
    parser.add_argument("--pressure", type=float, help="in GPa; the volume is constant if not given")
    parser.add_argument("--train", type=int, default=100, help="frames (default: %(default)s)")
    parser.add_argument("--valid", type=int, default=100, help="frames (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="frames (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--equilibration", type=float, default=12.0, help="ps of each replica (default: %(default)s)")
    parser.add_argument("--spacing", type=float, default=0.2, help="ps between two frames of a replica (default: %(default)s)")
    parser.add_argument("--dynamics", type=float, default=10.0, help="ps of dense frames; 0: none (default: %(default)s)")
    parser.add_argument("--every", type=float, default=4.0, help="fs between two of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="8 molecules, hardly equilibrated")
    args = parser.parse_args()
    if args.quick:
        args.waters, args.replicas, args.equilibration, args.spacing, args.dynamics = 8, 2, 0.15, 0.02, 0.1
        args.train, args.valid, args.test = 12, 4, 4
    torch.set_num_threads(1)
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    forces = PotentialForces(Water(CONSTANTS[args.constants]), stress=args.pressure is not None)
    started = time.monotonic()
    state, energies = equilibrated(args, forces)
    tell("last third of the equilibration", energies, args)
    state, images, energies = sampled(state, args, forces)
    for name, half in zip(("first", "second"), np.array_split(energies, 2)):
        tell(f"{name} half of the sampling", half, args)
    density = np.mean([atoms.get_masses().sum() / atoms.get_volume() for atoms in images]) / units.kg * 1e27
    print(f"density {density:.3f} g/cm³")
    for name, frames in split(images, args).items():
        write(args.output / f"water_{name}.xyz", frames)
        print(f"{len(frames)} frames of {len(frames[0])} atoms: {args.output / f'water_{name}.xyz'}")
    if args.dynamics:
        frames, energies = dynamics(state, args, forces)
        tell("dynamics", energies, args)
        write(args.output / "water_dynamics.traj", frames)
        kinetic = np.mean([atoms.get_kinetic_energy() for atoms in frames]) / (1.5 * units.kB * (len(frames[0]) - 1))
        print(f"{len(frames)} frames {args.every:g} fs apart at {kinetic:.0f} K: {args.output / 'water_dynamics.traj'}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
