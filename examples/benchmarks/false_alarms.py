#!/usr/bin/env python
"""What criteria say of dynamics that cannot be wrong: those of the method that labelled the reference.

    python examples/data/make_molecules_xtb.py --output molecules
    python examples/benchmarks/false_alarms.py glycine=molecules/glycine_train.xyz,molecules/glycine_dynamics.xyz ...
    python examples/benchmarks/false_alarms.py --quick

For each molecule the criteria are made from the few frames of the first file, with the tolerances of training and of the final
comparison, and applied to all of the second, frames of one trajectory in the order of time with their energies. Given are the
largest severity, beyond 1 an alarm, and the part of the frames beyond 1. The distances of each kind, `distribution`, are averaged
over windows first.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read

import stabie_ase
from stabie_ase.runs.evaluation import StabilityTest
from stabie_ase.stability import TRAINING, VERDICT, EnergyRange, criteria_from, default_criteria
from stabie_ase.stability.criteria.distribution import DistanceShift
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import read_reference
from stabie_ase.structures.setting import Setting

DATA = Path(stabie_ase.__file__).parent / "data"
WINDOW_FS = 1000 * StabilityTest.slice_ps


def judged(criterion, state, own):
    """Severities of all frames; an energy range is that of the reference's own energies, which here are the model's."""
    if isinstance(criterion, EnergyRange):
        criterion = replace(criterion, centre=own.mean(), lowest=own.min(), highest=own.max())
    return criterion.judge(state).severity


def tell(what, severity):
    print(f"  {what:34s} largest {float(severity.max()):.2f}, {float((severity > 1).double().mean()):.3%} beyond 1")


def examine(name, few, dynamics, temperature, every_fs):
    """Criteria from the frames of one file, applied to those of another."""
    reference, frames = read_reference(few), read(dynamics, ":")
    temperature = temperature or reference.temperature_K
    if temperature is None:
        raise ValueError("the frames tell no temperature: give --temperature")
    batch, setting = AtomsBatch.from_atoms(frames), Setting(reference.frames, temperature, reference.temperature_K)
    energies = torch.tensor([atoms.get_potential_energy() for atoms in frames], dtype=torch.float64)
    state = SimpleNamespace(batch=batch, n_systems=len(frames), step=torch.zeros(len(frames), dtype=torch.int64),
                            potential_energy=energies)  # fmt: skip
    print(f"{name}: {len(reference.frames)} frames against {len(frames)} of dynamics, {temperature:g} K")
    for when, spec in (("training", default_criteria(setting, TRAINING)), ("comparison", default_criteria(setting, VERDICT))):
        for criterion in criteria_from(spec, setting):
            if criterion.name != "temperature":  # frames without momenta
                tell(f"{criterion.name}, {when}", judged(criterion, state, reference.energies))
    distribution = DistanceShift.from_reference(reference.frames, setting.topology)
    length = min(round(WINDOW_FS / every_fs), len(frames))
    windows = distribution.cumulative(batch)[: len(frames) // length * length].unflatten(0, (-1, length)).mean(dim=1)
    tell(f"distribution, {len(windows)} windows of {length}", distribution.severity(windows)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("molecules", nargs="*", metavar="NAME=FEW,DYNAMICS", help="files that ASE reads")
    parser.add_argument("--temperature", type=float, help="K (default: that of the reference)")
    parser.add_argument("--every", type=float, default=5.0, help="fs between frames (default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help="the packaged frames, which are no trajectory")
    args = parser.parse_args()
    if args.quick:
        args.molecules = [f"aspirin={DATA / 'aspirin_xtb_train.xyz'},{DATA / 'aspirin_xtb_test.xyz'}"]
    if not args.molecules:
        parser.error("give NAME=FEW,DYNAMICS, or --quick")
    for given in args.molecules:
        name, _, files = given.partition("=")
        few, _, dynamics = files.partition(",")
        if not dynamics:
            parser.error(f"{given!r}: expected NAME=FEW,DYNAMICS, two files")
        try:
            examine(name, few, dynamics, args.temperature, args.every)
        except (OSError, ValueError, PropertyNotImplementedError) as error:
            parser.error(f"{given}: {error}")


if __name__ == "__main__":
    main()
