#!/usr/bin/env python
"""Make reference sets of five more small molecules: GFN2-xTB molecular dynamics.

    python examples/data/make_molecules_xtb.py --output sets                    # all five, ten minutes
    python examples/data/make_molecules_xtb.py --molecule glycine --dynamics 20 --output sets
    python examples/data/make_molecules_xtb.py --quick --output /tmp/try        # a trial run, seconds

Glycine (torsions, weak hydrogen bonds), butane (a chain), toluene (a ring and
its methyl), oxane (a ring that puckers) and salicylic acid (a strong hydrogen
bond); aspirin too, where it is named. Method, time step, friction and labels
are those of the packaged set, which `make_aspirin_xtb.py` makes. A molecule gets

NAME_train.xyz, NAME_test.xyz   frames of one trajectory, split at random;
NAME_dynamics.xyz               with --dynamics, a frame every 5 fs of another one. Its
                                molecule stays whole to the end, or the script stops:
                                whatever a stability criterion finds there is a false alarm.
"""

from pathlib import Path

import click
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import BFGS
from make_aspirin_xtb import (
    GEOMETRY,
    MAX_BOND_STRETCH,
    METHOD,
    RELAXATION_TIME,
    TEMPERATURE_K,
    TIMESTEP,
    bond_lengths,
    bonds,
    calculator,
    labelled,
    summary,
)
from tqdm import tqdm

DENSE = 10  # steps from frame to frame of the dense trajectory: 5 fs

# Textbook bond lengths and angles, relaxed with GFN2-xTB; aspirin as in its own script.
GEOMETRIES = {
    "aspirin": GEOMETRY,
    "glycine": """
N -1.654  1.101  0.000
C -0.209  1.058  0.000
C  0.372 -0.346  0.000
O -0.281 -1.355  0.000
O  1.709 -0.341  0.000
H  2.054 -1.249  0.000
H  0.169  1.583  0.882
H  0.169  1.583 -0.882
H -2.013  0.612 -0.814
H -2.013  0.612  0.814
""",
    "butane": """
C  0.697  1.813  0.000
C  0.706  0.290  0.000
C -0.706 -0.290  0.000
C -0.697 -1.813  0.000
H  1.712  2.203  0.000
H -1.712 -2.203  0.000
H  0.184  2.192  0.882
H  0.184  2.192 -0.882
H -0.184 -2.192  0.882
H -0.184 -2.192 -0.882
H  1.242 -0.070 -0.882
H  1.242 -0.070  0.882
H -1.242  0.070 -0.882
H -1.242  0.070  0.882
""",
    "toluene": """
C  0.000  0.940 -0.012
C  1.195  0.231 -0.005
C  1.196 -1.152  0.005
C  0.000 -1.848  0.009
C -1.196 -1.152  0.005
C -1.195  0.231 -0.005
H  2.132  0.770 -0.009
H  2.135 -1.688  0.009
H  0.000 -2.928  0.013
H -2.135 -1.688  0.009
H -2.132  0.770 -0.009
C  0.000  2.439  0.000
H  0.000  2.803  1.028
H -0.885  2.832 -0.496
H  0.885  2.832 -0.496
""",
    "oxane": """
O  1.366  0.000  0.222
C  0.721  1.167 -0.234
C -0.730  1.243  0.245
C -1.483  0.000 -0.225
C -0.730 -1.243  0.245
C  0.721 -1.167 -0.234
H  0.746  1.199 -1.336
H  1.308  2.001  0.156
H -0.740  1.285  1.336
H -1.195  2.150 -0.142
H -1.541  0.000 -1.317
H -2.501  0.000  0.168
H -0.740 -1.285  1.336
H -1.195 -2.150 -0.142
H  0.746 -1.199 -1.336
H  1.308 -2.001  0.156
""",
    "salicylic_acid": """
C  0.190 -0.236  0.022
C -0.623  0.912 -0.082
C -2.006  0.748 -0.202
C -2.564 -0.511 -0.217
C -1.762 -1.644 -0.114
C -0.399 -1.505  0.003
C  1.638 -0.080  0.150
O  2.215  0.996  0.175
O  2.321 -1.226  0.243
O -0.130  2.152 -0.070
H -2.615  1.634 -0.281
H -3.634 -0.618 -0.310
H -2.209 -2.626 -0.126
H  0.240 -2.371  0.083
H  3.268 -1.033  0.323
H  0.849  2.103  0.022
""",
}


def relaxed(name):
    rows = [line.split() for line in GEOMETRIES[name].split("\n") if line]
    atoms = Atoms([row[0] for row in rows], [[float(x) for x in row[1:]] for row in rows])
    atoms.calc = calculator()
    if not BFGS(atoms, logfile=None).run(fmax=0.005, steps=200):
        raise click.ClickException(f"the starting geometry of {name} did not relax in 200 steps")
    return atoms


def trajectory(name, start, temperature, equilibration, spacing, n_frames, rng):
    """Yield the molecule `n_frames` times, `spacing` steps apart, after `equilibration` steps."""
    atoms = start.copy()
    atoms.calc = calculator()
    thermalize_momenta(atoms, temperature, rng=rng)
    # All 3N degrees of freedom are thermal: nothing fixes the centre of mass.
    dynamics = LangevinBAOAB(atoms, TIMESTEP, temperature_K=temperature, T_tau=RELAXATION_TIME, rng=rng)
    pairs = bonds(start)
    relaxed_lengths = bond_lengths(start, pairs)
    dynamics.run(equilibration)
    for _ in tqdm(range(n_frames), desc=name, unit="frame"):
        dynamics.run(spacing)
        stretch = np.abs(bond_lengths(atoms, pairs) - relaxed_lengths).max()
        if stretch > MAX_BOND_STRETCH:
            raise click.ClickException(
                f"{name}: a bond is {stretch:.2f} Å from its relaxed length; the molecule has reacted, choose another --seed"
            )
        yield atoms, round(dynamics.get_time() / units.fs, 3)


def make_sets(name, start, output, temperature, equilibration, spacing, n_frames, n_train, seed):
    rng = np.random.default_rng(seed)
    frames, temperatures = [], []
    for atoms, time_fs in trajectory(name, start, temperature, equilibration, spacing, n_frames, rng):
        frames.append(labelled(atoms, time_fs=time_fs))
        frames[-1].info["temperature_K"] = temperature
        temperatures.append(2 * atoms.get_kinetic_energy() / (3 * len(atoms) * units.kB))
    shuffled = [frames[i] for i in rng.permutation(n_frames)]
    write(output / f"{name}_train.xyz", shuffled[:n_train])
    write(output / f"{name}_test.xyz", shuffled[n_train:])
    click.echo(f"{name}, {summary(frames, temperatures)}")


def make_dynamics(name, start, output, temperature, equilibration, n_frames, seed):
    """Written as it runs: what is there after an interruption can be used."""
    path = output / f"{name}_dynamics.xyz"
    path.unlink(missing_ok=True)
    rng = np.random.default_rng(seed)
    for atoms, time_fs in trajectory(name, start, temperature, equilibration, DENSE, n_frames, rng):
        frame = Atoms(atoms.numbers, atoms.positions)
        frame.calc = SinglePointCalculator(frame, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
        frame.info.update(temperature_K=temperature, method=METHOD, time_fs=time_fs)
        write(path, frame, append=True)
    click.echo(f"{name}, {n_frames} frames of dense dynamics")


@click.command(help=__doc__.split("\n")[0])
@click.option("--molecule", "names", multiple=True, type=click.Choice(list(GEOMETRIES)),
              help="Which, repeatable; all but aspirin where none is named.")
@click.option("--frames", "n_frames", default=250, show_default=True, type=click.IntRange(0),
              help="Of the training and test sets together; 0 makes no sets.")
@click.option("--train", "n_train", default=50, show_default=True, type=click.IntRange(1), help="Frames for training.")
@click.option("--spacing", default=50.0, show_default=True, type=click.FloatRange(0.5),
              help="From frame to frame, fs, in whole steps of 0.5.")
@click.option("--dynamics", "dynamics_ps", default=0.0, type=click.FloatRange(0),
              help="Length of a dense trajectory, ps; none by default.")
@click.option("--temperature", default=TEMPERATURE_K, show_default=True, type=click.FloatRange(1), help="K.")
@click.option("--output", default=".", show_default="this folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=2026, show_default=True, type=click.IntRange(0), help="Of velocities, noise and the split.")
@click.option("--quick", is_flag=True, help="A trial: glycine unless named, 6 frames, hardly equilibrated.")
def main(names, n_frames, n_train, spacing, dynamics_ps, temperature, output, seed, quick):
    equilibration = 2000  # 1 ps
    if quick:
        names, equilibration = names or ["glycine"], 20
        n_frames, n_train, spacing, dynamics_ps = 6, 2, 5.0, 0.02
    if n_frames and n_train >= n_frames:
        raise click.UsageError(f"--train {n_train} of --frames {n_frames} leaves no frame for the test set")
    if not n_frames and not dynamics_ps:
        raise click.UsageError("--frames 0 makes nothing: give the length of a trajectory with --dynamics")
    output.mkdir(parents=True, exist_ok=True)
    for name in names or [name for name in GEOMETRIES if name != "aspirin"]:
        start, number = relaxed(name), list(GEOMETRIES).index(name)
        if n_frames:
            steps = round(spacing * units.fs / TIMESTEP)
            make_sets(name, start, output, temperature, equilibration, steps, n_frames, n_train, [seed, number, 0])
        if dynamics_ps:
            dense = round(1000 * dynamics_ps * units.fs / TIMESTEP / DENSE)
            make_dynamics(name, start, output, temperature, equilibration, dense, [seed, number, 1])


if __name__ == "__main__":
    main()
