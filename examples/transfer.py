#!/usr/bin/env python
"""What a model that was made stable at one temperature is like at others, and what became of its motion.

    python examples/transfer.py start.pt run/model.pt --ref train.xyz --temperatures 350 500 700
    python examples/transfer.py start.pt run/model.pt --ref train.xyz --dynamics reference.xyz    # frames in time, with momenta
    python examples/transfer.py --quick

At each temperature (Raja et al., arXiv 2402.13984, section 4.2): failures per replica-ps by any criterion, and the error of h(r) against
the reference reweighted to it, or as it is where too few frames would count. At the reference's own temperature: the velocity
autocorrelation before and after (A.14), of replicas of Langevin dynamics with a friction so small that it plays no part, with the
mean absolute difference of the two and, if there are dense frames of the reference, of each from theirs; and the largest time step at
which the models do not fail more often than at half a femtosecond (A.12).
"""

import argparse
import json
from pathlib import Path

import torch
from ase import units

import stabie_ase
from stabie_ase import Langevin, PotentialForces, Setting, criteria_from, load_potential, read_reference, watched
from stabie_ase.dynamics.starts import start
from stabie_ase.stability import VERDICT, default_criteria
from stabie_ase.system.allocator import keep_freed_memory

DATA = Path(stabie_ase.__file__).parent / "data"
TIMESTEP_FS, FRICTION_PER_FS, EVERY_FS = 0.5, 1e-4, 2.5


def stable(model, args, temperature, **options):
    """What `stabie-ase evaluate` finds out."""
    found = stabie_ase.evaluate(
        model, args.ref, temperature_K=temperature, replicas=args.replicas, time_ps=args.time, seed=args.seed, **options
    )
    return next(iter(found.values()))


def autocorrelation(model, args, temperature):
    """The VACF with its errors, of replicas up to their failure."""
    potential = load_potential(model)
    reference = read_reference(args.ref).isolated(potential.cutoff)
    criteria = criteria_from("", (setting := Setting(reference.frames, temperature)), default_criteria(setting, VERDICT))
    integrator = Langevin(TIMESTEP_FS * units.fs, FRICTION_PER_FS / units.fs)
    state = start(potential, reference.frames, args.replicas, temperature, integrator, args.seed)
    _, trajectory, _ = watched(
        state, integrator, PotentialForces(potential), round(1000 * args.time / TIMESTEP_FS),
        [criterion.for_model(potential) for criterion in criteria], sample_every=round(EVERY_FS / TIMESTEP_FS), record_momenta=True,
    )  # fmt: skip
    images = [frames for frames in trajectory.to_atoms(TIMESTEP_FS) if len(frames) * EVERY_FS > 1000 * args.t_max]
    return vacf(images, args) if images else None


def vacf(images, args):
    (found,) = stabie_ase.observe(images, observables=f"vacf,t_max={args.t_max:g}", criteria=[]).values()
    return found


def difference(a, b):
    """Mean absolute difference of two curves up to where the shorter ends, and the mean standard error of that."""
    n = min(len(a["value"]), len(b["value"]))
    far = torch.tensor(a["value"][:n]) - torch.tensor(b["value"][:n])
    errors = [torch.zeros(n) if curve["error"] is None else torch.tensor(curve["error"][:n]) for curve in (a, b)]
    return float(far.abs().mean()), float(torch.hypot(*errors).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="before and after")
    parser.add_argument("--ref", default=str(DATA / "aspirin_xtb_train.xyz"))
    parser.add_argument("--dynamics", help="frames of the reference at equal intervals, with momenta")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[350.0, 500.0, 700.0], metavar="K")
    parser.add_argument("--timesteps", type=float, nargs="+", default=[1.0, 1.5, 2.0], metavar="FS", help="to be tried")
    parser.add_argument("--replicas", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--time", type=float, default=2.0, metavar="PS", help="of each (default: %(default)g)")
    parser.add_argument("--t-max", type=float, default=0.1, metavar="PS", help="of the autocorrelation (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="json file of all figures")
    parser.add_argument("--quick", action="store_true", help="the packaged model beside itself, for a moment")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if args.quick:
        args.models = [str(DATA / "aspirin_schnet.pt")] * 2
        args.temperatures, args.timesteps, args.replicas, args.time, args.t_max = [500.0, 510.0], [1.0], 4, 0.03, 0.01
    if len(args.models) != 2:
        parser.error("two models are compared, one before and one after")
    own = read_reference(args.ref).temperature_K or args.temperatures[0]
    figures = {"temperatures": {}, "timesteps": {}, "vacf": {}}
    for temperature in args.temperatures:
        for name, model in zip(("before", "after"), args.models):
            found = stable(model, args, temperature)
            low, high = found["hazard_per_ps_interval"]
            hr = f"h(r) error {found['hr_error']:.3g} ± {found['hr_error_standard_error'] or float('nan'):.1g}"
            hazard = f"{found['hazard_per_ps']:.3g} [{low:.2g}, {high:.2g}] failures per replica-ps"
            print(f"{temperature:g} K, {name}: {hazard}, {hr} (floor {found['hr_error_floor']:.2g})", flush=True)
            figures["temperatures"].setdefault(f"{temperature:g}", {})[name] = found
    for name, model in zip(("before", "after"), args.models):
        found = stable(model, args, own, timestep_scan=",".join(map(str, args.timesteps)))
        print(f"{name}: largest stable time step {found['largest_stable_timestep_fs']} fs", flush=True)
        figures["timesteps"][name] = found["timestep_scan"]
    curves = {name: autocorrelation(model, args, own) for name, model in zip(("before", "after"), args.models)}
    if args.dynamics:
        curves["reference"] = vacf(args.dynamics, args)
    figures["vacf"] = curves
    for a, b in (("before", "after"), ("before", "reference"), ("after", "reference")):
        if curves.get(a) and curves.get(b):
            far, error = difference(curves[a], curves[b])
            print(f"VACF, {a} and {b}: {far:.3g} apart on the mean, standard error {error:.2g} at a time", flush=True)
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
