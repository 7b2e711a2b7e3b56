#!/usr/bin/env python
"""Make the packaged aspirin reference set: GFN2-xTB molecular dynamics at 500 K.

    python examples/data/make_aspirin_xtb.py                            # the real thing, about ten minutes
    python examples/data/make_aspirin_xtb.py --quick --output /tmp/try  # a trial run, seconds

Independent replicas start from one relaxed geometry with their own velocities
and Langevin noise. After equilibration, frames are kept at a fixed spacing,
rounded to the six decimals that the file will hold, and only then labelled:
energies and forces belong to the positions in the file, digit for digit.
"""

import os
from pathlib import Path

# A molecule this small runs fastest on one thread, and sums in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.velocitydistribution import thermalize_momenta
from ase.neighborlist import natural_cutoffs, neighbor_list
from ase.optimize import BFGS
from tblite.ase import TBLite
from tqdm import tqdm

METHOD = "GFN2-xTB"
TEMPERATURE_K = 500.0
TIMESTEP = 0.5 * units.fs
RELAXATION_TIME = 100 * units.fs  # the inverse of Langevin's friction
MAX_BOND_STRETCH = 0.5  # Å, beyond the relaxed bond length
DATA = Path(__file__).resolve().parents[2] / "stabie_ase" / "data"

# C9H8O4: ring, acid and acetyl carbons; acid =O and -OH, ester -O- and =O; ring,
# acid and methyl hydrogens. Built from textbook bond lengths and angles; the
# lowest of sixteen conformers after relaxation with GFN2-xTB.
GEOMETRY = """
C -0.044 -0.868 -0.302
C -0.877  0.257 -0.319
C -2.252  0.105 -0.428
C -2.804 -1.159 -0.519
C -1.990 -2.280 -0.484
C -0.621 -2.134 -0.374
C  1.431 -0.723 -0.251
C  0.465  1.868  0.760
C  1.078  3.211  0.508
O  2.052  0.232 -0.649
O  2.035 -1.800  0.262
O -0.371  1.538 -0.252
O  0.652  1.172  1.719
H -2.872  0.988 -0.439
H -3.874 -1.268 -0.609
H -2.423 -3.266 -0.543
H  0.024 -2.998 -0.354
H  2.993 -1.655  0.294
H  1.406  3.652  1.444
H  1.943  3.051 -0.136
H  0.377  3.859 -0.008
"""


def calculator():
    return TBLite(method=METHOD, verbosity=0)


def relaxed_aspirin():
    rows = [line.split() for line in GEOMETRY.split("\n") if line]
    atoms = Atoms([row[0] for row in rows], [[float(x) for x in row[1:]] for row in rows])
    atoms.calc = calculator()
    if not BFGS(atoms, logfile=None).run(fmax=0.005, steps=200):
        raise click.ClickException("the starting geometry did not relax in 200 steps")
    return atoms


def bonds(atoms):
    """Indices (2, n_bonds) of the atoms that are bonded, each pair once."""
    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.2))
    return np.array([i[i < j], j[i < j]])


def bond_lengths(atoms, pairs):
    return np.linalg.norm(atoms.positions[pairs[0]] - atoms.positions[pairs[1]], axis=1)


def labelled(atoms, **info):
    """A centred copy of `atoms`, rounded as it will be written, with its energy and forces."""
    frame = Atoms(atoms.numbers, np.round(atoms.positions - atoms.get_center_of_mass(), 6))
    # A fresh calculator: no label depends on the wavefunction of the step before.
    frame.calc = calculator()
    energy, forces = frame.get_potential_energy(), frame.get_forces()
    frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
    frame.info.update(temperature_K=TEMPERATURE_K, method=METHOD, **info)
    return frame


def sample(start, n_frames, equilibration, spacing, rng, progress, replica):
    """Run one replica; return its labelled frames and the kinetic temperatures (K) at those frames."""
    atoms = start.copy()
    atoms.calc = calculator()
    thermalize_momenta(atoms, TEMPERATURE_K, rng=rng)
    # All 3N degrees of freedom are thermal: nothing fixes the centre of mass.
    dynamics = LangevinBAOAB(
        atoms, TIMESTEP, temperature_K=TEMPERATURE_K, T_tau=RELAXATION_TIME, rng=rng
    )
    pairs, frames, temperatures = bonds(start), [], []
    relaxed_lengths = bond_lengths(start, pairs)

    def advance(steps):
        dynamics.run(steps)
        progress.update(steps)

    advance(equilibration)
    for _ in range(n_frames):
        advance(spacing)
        stretch = np.abs(bond_lengths(atoms, pairs) - relaxed_lengths).max()
        if stretch > MAX_BOND_STRETCH:
            raise click.ClickException(
                f"replica {replica}: a bond is {stretch:.2f} Å from its relaxed length; "
                "the molecule has reacted, choose another --seed"
            )
        time_fs = dynamics.get_time() / units.fs
        frames.append(labelled(atoms, replica=replica, time_fs=round(time_fs, 3)))
        temperatures.append(2 * atoms.get_kinetic_energy() / (3 * len(atoms) * units.kB))
    return frames, temperatures


def summary(frames, temperatures):
    energies = np.array([f.get_potential_energy() for f in frames])
    forces = np.array([f.get_forces() for f in frames])
    error = np.std(temperatures) / np.sqrt(len(temperatures))
    return (
        f"{len(frames)} frames: energy {energies.mean():.4f} ± {energies.std():.4f} eV, "
        f"rms force {np.sqrt((forces**2).mean()):.3f} eV/Å, "
        f"kinetic temperature {np.mean(temperatures):.0f} ± {error:.0f} K"
    )


@click.command(help=__doc__.split("\n")[0])
@click.option("--frames", "n_frames", default=300, show_default=True, type=click.IntRange(6),
              help="Frames in all; one in six is for training.")
@click.option("--output", default=DATA, show_default="stabie_ase/data", type=click.Path(path_type=Path),
              help="Folder for aspirin_xtb_train.xyz and aspirin_xtb_test.xyz.")
@click.option("--seed", default=2026, show_default=True, help="Of velocities, noise and the shuffle.")
@click.option("--quick", is_flag=True, help="A trial: 12 frames, hardly equilibrated. Needs --output.")
def main(n_frames, output, seed, quick):
    n_replicas, equilibration, spacing = 4, 4000, 100  # 2 ps, then a frame every 50 fs
    if quick:
        n_frames, n_replicas, equilibration, spacing = 12, 2, 100, 20
        if output == DATA:
            raise click.UsageError("--quick makes no reference data: name a scratch folder with --output")

    start = relaxed_aspirin()
    shares = [len(part) for part in np.array_split(np.arange(n_frames), n_replicas)]
    frames, temperatures = [], []
    with tqdm(total=n_replicas * equilibration + n_frames * spacing, unit="step") as progress:
        for replica, share in enumerate(shares):
            rng = np.random.default_rng([seed, replica])
            new = sample(start, share, equilibration, spacing, rng, progress, replica)
            frames += new[0]
            temperatures += new[1]

    order = np.random.default_rng([seed, n_replicas]).permutation(n_frames)
    shuffled = [frames[i] for i in order]
    n_train = n_frames // 6
    output.mkdir(parents=True, exist_ok=True)
    write(output / "aspirin_xtb_train.xyz", shuffled[:n_train])
    write(output / "aspirin_xtb_test.xyz", shuffled[n_train:])
    click.echo(summary(frames, temperatures))
    click.echo(f"{n_train} training and {n_frames - n_train} test frames in {output}")


if __name__ == "__main__":
    main()
