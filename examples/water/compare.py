r"""Hold water models against each other: how often they fail, and what their water is like before they do.

    python examples/water/make_water.py --output F
    python examples/data/make_schnet.py --ref F/water_train.xyz --interactions 3 --channels 64 --cutoff 4 --batch-size 2 --patience 8 \
--offset-weight 0.01 --max-time 28 --output F/start.pt
    stabie-ase finetune F/start.pt --ref F/water_train.xyz --valid F/water_valid.xyz --timestep 1 --replicas 16 --compile on \
--max-time 60 --output F/run
    stabie-ase finetune F/start.pt --ref F/water_train.xyz --valid F/water_valid.xyz --timestep 1 --update labels-only --qm-steps 1000 \
--learning-rate 6e-4 --max-updates 6 --output F/control
    python examples/water/compare.py start=F/start.pt control=F/control/model.pt end=F/run/model.pt --ref F/water_test.xyz --dynamics \
F/water_dynamics.traj --time 2 --fit 0.2 0.5 --replicas 32 --seed 2 --compile on

A model of fewer frames (F/water_train.xyz@::5 in all of these, --time 5 --replicas 16 in the last) fails sooner, by its radial
distribution functions too. Train it to the end: one that was stopped after 7 minutes became about as stable by labels alone.
README's models of 10 frames are of @::10: --max-time 18 in the first, 50 in the second or 40 with --estimator global, 24 in the third.

All three know the same labels: with new ones steps on energies and forces alone make a model more stable as well.
`finetune` writes the start back where it sees no gain; weights of the last state are in state.pt of the run.

Fresh replicas of each model start from the same frames with the same momenta. They go on until their radial distribution functions,
over a window of 1 ps, are off by the published tolerance (Fu et al., arXiv 2210.07237); whatever other criterion finds fault with a
frame before that is what "any criterion" counts. A velocity rescaling of 1 ps hardly disturbs diffusion. Radial distribution
functions and the diffusion coefficient of oxygen, from displacements between --fit, are those of the frames before any failure: a
window that failed, unless another criterion has told when, is left out whole. "floor" is the error that a perfect model would show;
"farther by" compares with the first model, replica by replica.
Errors in the table are standard errors over replicas, intervals hold 95 %.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from ase import units
from ase.io import read, write
from make_water import labelled
from scipy.stats import chi2
from teacher import Water as TeacherWater
from teacher import lattice

from stabie_ase import (
    PotentialForces,
    Setting,
    Target,
    criteria_from,
    load_potential,
    observables_from,
    read_curve,
    read_reference,
    watched,
)
from stabie_ase.dynamics import StochasticVelocityRescaling, integrator_for
from stabie_ase.dynamics.compilation import compile_where_wanted
from stabie_ase.dynamics.starts import start
from stabie_ase.observables.averages import SlicedMeans
from stabie_ase.observables.diffusion import SelfDiffusion
from stabie_ase.observables.series import TimeSeries
from stabie_ase.potentials.checkpoint import save_potential
from stabie_ase.potentials.energies import potential_energies
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.runs.replicas import criteria_of_frames
from stabie_ase.stability.frames import first_failure
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import reference_energies, spread
from stabie_ase.system.allocator import keep_freed_memory
from stabie_ase.training.labels import LabelledFrames, qm_errors

PAIRS = "rdf:O-O,rdf:H-O,rdf:H-H"
LOOK_FS, CHECK_FS, WINDOW_FS = 10.0, 5.0, 1000.0


class Water(NamedTuple):
    """What replicas of one model have been through."""

    images: list
    """Of each replica before any failure."""
    by_rdf: tuple
    by_any: tuple
    """Failures and replica-ps."""


def run(potential, args, setting, rdf, others) -> Water:
    """Replicas until they fail by `rdf`, with what `others` say of their frames."""
    if args.pressure is None:
        integrator = StochasticVelocityRescaling(args.timestep * units.fs, 1000 * units.fs)
    else:
        integrator = integrator_for("npt", args.timestep, 0.005)
    every, n_steps = round(LOOK_FS / args.timestep), round(1000 * args.time / args.timestep)
    compile_where_wanted(args.compile, potential, setting.frames, args.replicas, steps=n_steps, say=print)
    state = start(potential, setting.frames, args.replicas, args.temperature, integrator, args.seed, args.pressure or 0.0)
    _, trajectory, failures = watched(
        state, integrator, PotentialForces.driving(potential, integrator), n_steps, [rdf], check_every=round(CHECK_FS / args.timestep),
        sample_every=every, record_momenta=True,
    )  # fmt: skip
    lived = torch.where(failures.failed, failures.step, n_steps).double().cpu() * args.timestep / 1000
    images, times, failed = [], [], 0
    for replica, frames in enumerate(trajectory.to_atoms(args.timestep)):
        found = first_failure(frames, others, args.temperature) if frames else None
        n_unsound = round(WINDOW_FS / LOOK_FS) if failures.failed[replica] else 0
        images.append(frames[: max(len(frames) - n_unsound, 0)] if found is None else frames[: found.frame])
        times.append(float(lived[replica]) if found is None else min(float(lived[replica]), (found.frame + 1) * LOOK_FS / 1000))
        failed += found is not None or bool(failures.failed[replica])
    return Water(images, (int(failures.failed.sum()), float(lived.sum())), (failed, sum(times)))


def hazard(failures, ps):
    """Failures per replica-ps and the exact interval of a Poisson number."""
    low, high = (chi2.ppf(p, 2 * n) / 2 / ps if n else 0.0 for p, n in ((0.025, failures), (0.975, failures + 1)))
    return failures / ps, [float(low), float(high)]


def by_replica(target, water):
    """Means of an observable over the frames of each replica."""
    n, means = len(water.images), SlicedMeans.none(len(water.images), 1, target.observable.width)
    for k, images in enumerate(water.images):
        if images:
            values = target.observable.sample(AtomsBatch.from_atoms(images))
            slices = torch.zeros(len(values), dtype=torch.int64)
            means += SlicedMeans.collect(values, slices + k, slices, n, 1)
    return means


def farther(target, means, first):
    """By how much than the first model, and its standard error: a replica of both, which began alike, is left out at a time."""

    def change(kept):
        return target.distance(means.keep(kept))[0] - target.distance(first.keep(kept))[0]

    n, everyone = len(means.counts), torch.ones_like(means.counts, dtype=torch.bool)
    left_out = torch.tensor([change(everyone.index_fill(0, torch.tensor([k]), False)) for k in range(n)])
    return change(everyone), float(((n - 1) * left_out.var(correction=0)).sqrt())


def diffusion(replicas, args):
    """D of oxygen in 10⁻⁹ m²/s and its standard error; not a number where none lived long enough."""
    long_enough = [TimeSeries.from_atoms(images) for images in replicas if len(images) * LOOK_FS > 1000 * args.fit[1]]
    if not long_enough:
        return float("nan"), float("nan")
    found = SelfDiffusion(8, t_max=args.fit[1], fit_from=args.fit[0])(long_enough)
    return float(found.value), float("nan") if found.error is None else float(found.error)


def by_teacher(replicas, reference):
    """Energy of every tenth frame by what made the labels, less the labels' mean, in eV, and its standard error over replicas.

    No training and no criterion knows it: a molecule that opens where nobody looks costs 1 eV or more.
    """
    teacher = TeacherWater()
    with torch.no_grad():
        means = [potential_energies(teacher, AtomsBatch.from_atoms(images[::10]), 8).mean() for images in replicas if images]
    if len(means) < 2:
        return float("nan"), float("nan")
    above = torch.stack(means) - float(reference.energies.mean())
    return float(above.mean()), float(above.std()) / len(means) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL")
    parser.add_argument("--ref", help="frames with energies and forces, of which none was trained on")
    parser.add_argument("--experiment", metavar="FILE", help="a curve of g_OO, its column OO (Soper's)")
    parser.add_argument("--dynamics", help="dense frames of the reference, for its diffusion coefficient")
    parser.add_argument("--replicas", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--time", type=float, default=5.0, help="ps of each (default: %(default)s)")
    parser.add_argument("--timestep", type=float, default=1.0, help="in fs (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=300.0, help="in K (default: %(default)s)")
    parser.add_argument("--pressure", type=float, help="in GPa; the volume is constant if not given")
    parser.add_argument("--fit", type=float, nargs=2, default=(0.3, 1.0), help="ps between which displacements count (default: 0.3 1.0)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--compile", default="off", choices=["off", "on", "auto"], help="networks for dynamics (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="json file of all figures")
    parser.add_argument("--quick", action="store_true", help="a moment, on frames and a model of its own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if args.quick:
        args.models, args.ref = trial()
        args.replicas, args.time, args.fit = 2, 0.1, (0.02, 0.05)
    reference = read_reference(args.ref)
    setting = Setting(reference.frames, args.temperature, args.temperature, args.timestep, CHECK_FS)
    (rdf,) = criteria_from(f"rdf:3.0,window_fs={WINDOW_FS:g}", setting)
    others = criteria_of_frames(None, setting, by_reference=True)
    observables = observables_from(PAIRS, setting)
    targets = {o.name: Target.from_frames(o, reference.frames) for o in observables}
    if args.experiment:
        targets["experiment's g_OO"] = Target.from_curve(observables[0], read_curve(args.experiment, "OO"))
    dense = read(args.dynamics, ":") if args.dynamics else []
    found: dict = {"floor": {name: (target.floor, None) for name, target in targets.items()}}
    if dense:
        of_reference = SelfDiffusion(8, t_max=args.fit[1], fit_from=args.fit[0])([TimeSeries.from_atoms(dense)])
        found["floor"]["D"] = (float(of_reference.value), float("nan") if of_reference.error is None else float(of_reference.error))
    held_out = LabelledFrames.from_reference(reference.subset(spread(len(reference), 100)), args.device)
    tell("reference", found["floor"])
    first = None
    for called, path in (model.split("=", 1) for model in args.models):
        potential = load_potential(path, args.device)
        water = run(potential, args, setting, rdf, others)
        row = {"rdf": hazard(*water.by_rdf), "any": hazard(*water.by_any), "ps": (water.by_rdf[1], water.by_any[1])}
        means = {name: by_replica(target, water) for name, target in targets.items()}
        row |= {name: target.distance(means[name]) for name, target in targets.items()}
        row["U by the teacher (eV)"] = by_teacher(water.images, reference)
        row |= {"D": diffusion(water.images, args), "force MAE (meV/Å)": (1000 * qm_errors(potential, held_out).force_mae_eV_per_A, None)}
        if first is None:
            first = means
        elif all(int((x.counts > 0).sum()) > 1 for x in (*means.values(), *first.values())):  # one may be left out
            row |= {f"{name} farther by": farther(target, means[name], first[name]) for name, target in targets.items()}
        found[called] = row
        tell(called, row)
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")


def trial():
    """A model of no use, twice, and ten lattices of 8 molecules, shaken and labelled."""
    images = [lattice(8, seed) for seed in range(10)]
    for seed, atoms in enumerate(images):
        atoms.rattle(0.05, seed=seed)
    write("water_trial.xyz", labelled(AtomsBatch.from_atoms(images), TeacherWater(), 300.0, "a trial"))
    torch.manual_seed(0)
    save_potential(SchNetPotential.build(reference_energies(read_reference("water_trial.xyz")), 8, 8), "water_trial.pt")
    return ["trial=water_trial.pt", "again=water_trial.pt"], "water_trial.xyz"


def tell(name, row) -> None:
    """One line; what no frame tells is left out."""
    parts = []
    for key, (value, error) in row.items():
        if value is None:
            continue
        beside = "" if error is None else f" [{error[0]:.2g}, {error[1]:.2g}]" if isinstance(error, list) else f" ± {error:.2g}"
        parts.append(f"{key} {value:.3g}{beside}" if key != "ps" else f"over {value:.3g} and {error:.3g} replica-ps")
    print(f"{name}: {'; '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
