#!/usr/bin/env python
"""Judge models by dynamics and criteria that owe nothing to this package's own.

    python examples/benchmarks/independent_judge.py before.pt after.pt --ref aspirin_test.xyz --time 10 --replicas 16
    python examples/benchmarks/independent_judge.py --quick

ASE's Langevin dynamics (friction 0.01/fs) run one replica at a time with `StABIECalculator`, from frames of the
reference and with Maxwell-Boltzmann momenta; replica k starts and is pushed alike for every model. Every 5 fs a
replica has failed that

- is not finite: a position or the energy, or the model could not be evaluated;
- bond: has two bonded atoms more than 0.5 Å off their mean distance in the reference;
- contact: has two unbonded atoms within 1.15 times the sum of their covalent radii. Pairs that come so close in the
  reference are left out;
- sunk: has a potential energy further than a margin below the lowest frame of the reference, after the model's mean
  offset over the reference. The margin is 3N/2 kT unless given: what N atoms hold on average above the bottom of
  a harmonic well, so that not even the bottom of the reference's own well lies that far below its lowest frame.

Of several at once the first counts. Bonded are atoms with a mean distance in the reference below 1.25 times the sum of
their covalent radii. The reference is molecules in open space, with energies.

Hazards are failures over the time lived, with exact Poisson intervals. Ratios are to the first model; their p is that
of the binomial test of one model's failures among those of both. h(r) is a histogram of all distances with bins of
0.05 Å and unit area; its error is the integral of |h - h of the reference|. The floor is that between random halves of
the reference. A perfect model in endless dynamics would come to half of it.
"""

import argparse
import json
import multiprocessing
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from ase import units
from ase.calculators.calculator import CalculatorError
from ase.data import covalent_radii
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from scipy.stats import binomtest, chi2

import stabie_ase
from stabie_ase.potentials.calculator import StABIECalculator

DATA = Path(stabie_ase.__file__).parent / "data"
LOOK_FS = 5  # from look to look
LOOKS_PER_PS = 1000 // LOOK_FS
BONDED = 1.25  # times the sum of covalent radii
MAX_STRETCH = 0.5  # Å
CONTACT = 1.15  # times the sum of covalent radii
BIN = 0.05  # Å
CAUSES = ("not finite", "bond", "contact", "sunk")


class Reference:
    """What is normal: bonds, distances and energies of the reference frames."""

    def __init__(self, frames, temperature, margin=None):
        self.frames, self.temperature = frames, temperature
        self.symbols = frames[0].get_chemical_symbols()
        n_atoms = len(self.symbols)
        self.pairs = np.triu_indices(n_atoms, 1)
        radii = covalent_radii[frames[0].numbers]
        self.touching = radii[self.pairs[0]] + radii[self.pairs[1]]
        lengths = np.stack([self.distances(frame.positions) for frame in frames])
        self.mean_lengths = lengths.mean(axis=0)
        self.bonded = self.mean_lengths < BONDED * self.touching
        self.watched = ~self.bonded & ((lengths / self.touching).min(axis=0) >= CONTACT)
        self.energies = np.array([frame.get_potential_energy() for frame in frames])
        self.margin = 1.5 * n_atoms * units.kB * temperature if margin is None else margin
        self.edges = np.arange(0.0, lengths.max() + 2.0, BIN)
        self.counts = np.stack([self.histogram(row) for row in lengths])
        self.closest = min(self.closeness(row) for row in lengths)

    def distances(self, positions):
        return np.linalg.norm(positions[self.pairs[0]] - positions[self.pairs[1]], axis=1)

    def closeness(self, lengths):
        """The smallest distance of unbonded atoms over the sum of their covalent radii."""
        return float(np.min(lengths[self.watched] / self.touching[self.watched], initial=np.inf))

    def histogram(self, lengths):
        """How many distances are in each bin; those beyond the last bin are in it."""
        return np.histogram(np.minimum(lengths, self.edges[-1]), self.edges)[0]

    def verdict(self, positions, energy):
        """None, or the cause of failure and its particulars; the energy in eV, without the model's offset."""
        if not (np.isfinite(positions).all() and np.isfinite(energy)):
            return "not finite", ""
        lengths = self.distances(positions)
        stretch = np.where(self.bonded, np.abs(lengths - self.mean_lengths), 0.0)
        if stretch.max() > MAX_STRETCH:
            return "bond", self.name_pair(stretch.argmax(), lengths)
        if self.closeness(lengths) < CONTACT:
            return "contact", self.name_pair(np.where(self.watched, lengths / self.touching, np.inf).argmin(), lengths)
        below = self.energies.min() - energy
        if below > self.margin:
            return "sunk", f"{below:.2f} eV below the lowest reference frame"
        return None

    def name_pair(self, k, lengths):
        i, j = self.pairs[0][k], self.pairs[1][k]
        return f"{self.symbols[i]}{i}-{self.symbols[j]}{j} at {lengths[k]:.3g} Å, mean {self.mean_lengths[k]:.3g} Å"

    def floor(self, rng, n_splits=20):
        """The error of h(r) between random halves of the frames, a mean over `n_splits`; nan of one frame."""
        half = len(self.frames) // 2
        if not half:
            return float("nan")
        orders = [rng.permutation(len(self.frames)) for _ in range(n_splits)]
        return float(np.mean([h_error(self.counts[o[:half]].sum(0), self.counts[o[half:]].sum(0)) for o in orders]))


def h_error(counts, others):
    """Integral of |h - h'|, from 0 where they agree to 2 where they do not overlap."""
    return float(np.abs(counts / counts.sum() - others / others.sum()).sum())


@lru_cache
def loaded(path, device, trust):
    """The potential in a file, once in each process."""
    torch.set_num_threads(1)
    return StABIECalculator(path, device=device, trust=trust).potential


def mean_offset(potential, reference):
    """The model's energy over the reference's, a mean over all frames, eV."""
    calculator = StABIECalculator(potential)
    return float(np.mean([calculator.get_potential_energy(frame) for frame in reference.frames] - reference.energies))


def run_replica(replica, path, offset, reference, args):
    """One replica until it fails or its time is up: a dict of what is told of it."""
    rng = np.random.default_rng([args.seed, replica])
    starts = np.random.default_rng(args.seed).permutation(len(reference.frames))
    atoms = reference.frames[starts[replica % len(starts)]].copy()
    atoms.calc = StABIECalculator(loaded(path, args.device, args.trust))
    thermalize_momenta(atoms, reference.temperature, rng=rng)
    dynamics = Langevin(atoms, args.timestep * units.fs, temperature_K=reference.temperature,
                        friction=0.01 / units.fs, fixcm=False, rng=rng)  # fmt: skip
    energies, lengths, failure = deque(maxlen=LOOKS_PER_PS), deque(maxlen=LOOKS_PER_PS), None
    steps = round(LOOK_FS / args.timestep)
    while failure is None and dynamics.nsteps < round(args.time * LOOKS_PER_PS) * steps:
        try:
            with np.errstate(all="ignore"):  # explosions are results here
                dynamics.run(steps)
                energies.append(atoms.get_potential_energy() - offset)
        except CalculatorError as error:
            failure = "not finite", str(error)
        else:
            failure = reference.verdict(atoms.positions, energies[-1])
            lengths.append(reference.distances(atoms.positions))
    cause, detail = failure or (None, "")
    # A replica whose forces fail at the start has lived no step; it counts as one.
    time_ps = max(dynamics.nsteps, 1) * args.timestep / 1000
    told = {"replica": replica, "cause": cause, "detail": detail, "time_ps": time_ps}
    if failure:
        return told
    counts = np.sum([reference.histogram(row) for row in lengths], axis=0)
    return {**told, "energies": list(energies), "counts": counts, "closest": min(map(reference.closeness, lengths))}


def run_model(name, path, offset, reference, args):
    """All replicas of a model, with a line of progress each."""
    run = partial(run_replica, path=path, offset=offset, reference=reference, args=args)
    with ExitStack() as stack:
        apply = map
        if args.jobs > 1:
            context = multiprocessing.get_context("spawn")
            apply = stack.enter_context(ProcessPoolExecutor(args.jobs, mp_context=context)).map
        replicas = []
        for told in apply(run, range(args.replicas)):
            end = f"{told['cause']}, {told['detail']}" if told["cause"] else "lives"
            print(f"{name}: replica {told['replica'] + 1} of {args.replicas}, {told['time_ps']:.3f} ps: {end}",
                  file=sys.stderr, flush=True)  # fmt: skip
            replicas.append(told)
    return replicas


def judged(replicas, reference):
    """What the replicas of a model come to."""
    failures = sum(r["cause"] is not None for r in replicas)
    exposure = sum(r["time_ps"] for r in replicas)
    lifetimes = [r["time_ps"] if r["cause"] else np.inf for r in replicas]
    survivors = [r for r in replicas if r["cause"] is None]
    result = {
        "failures": failures,
        "causes": {cause: sum(r["cause"] == cause for r in replicas) for cause in CAUSES},
        "replica_ps": exposure,
        "hazard": failures / exposure,
        "hazard_95": [chi2.ppf(0.025, 2 * failures) / 2 / exposure if failures else 0.0,
                      chi2.ppf(0.975, 2 * failures + 2) / 2 / exposure],
        "median_ps": float(np.median(lifetimes)),
        "survivors": len(survivors),
        "replicas": [{key: r[key] for key in ("replica", "cause", "detail", "time_ps")} for r in replicas],
    }  # fmt: skip
    if survivors:
        counts = np.sum([r["counts"] for r in survivors], axis=0)
        result |= spread(np.concatenate([r["energies"] for r in survivors]), reference)
        result |= {"closest": min(r["closest"] for r in survivors), "h_error": h_error(counts, reference.counts.sum(0))}
    return result


def spread(energies, reference):
    """Lowest, mean and highest energy, eV, from the reference's mean."""
    values = np.array([energies.min(), energies.mean(), energies.max()]) - reference.energies.mean()
    return dict(zip(("lowest_eV", "mean_eV", "highest_eV"), values.tolist()))


def compare(model, first):
    """Ratio of a model's hazard to the first one's with its exact 95 % interval and p value; None where neither failed."""
    failures = model["failures"] + first["failures"]
    if not failures:
        return None
    total = model["replica_ps"] + first["replica_ps"]
    test = binomtest(model["failures"], failures, model["replica_ps"] / total)
    interval = test.proportion_ci(0.95)

    def ratio(fraction):
        return fraction / (1 - fraction) * first["replica_ps"] / model["replica_ps"] if fraction < 1 else float("inf")

    return {"ratio": ratio(test.statistic), "ratio_95": [ratio(interval.low), ratio(interval.high)], "p": test.pvalue}


def print_tables(results, ratios, own, args):
    width = min(18, max(len("reference"), *map(len, results)))
    names = {name: f"{shortened(name, width):{width}s}" for name in results}
    print(f"{'':{width}s}  failed  not finite  bond  contact  sunk   hazard, 1/ps (95 %)        median, ps")
    for name, r in results.items():
        failed = f"{r['failures']}/{args.replicas}"
        causes = "{not finite:10d}  {bond:4d}  {contact:7d}  {sunk:4d}".format(**r["causes"])
        hazard = "{:.3g} ({:.3g} to {:.3g})".format(r["hazard"], *r["hazard_95"])
        median = f"{r['median_ps']:.3f}" if np.isfinite(r["median_ps"]) else f"> {args.time:g}"
        print(f"{names[name]}  {failed:>6s}  {causes}   {hazard:26s} {median}")
    print(f"\nThe last {min(args.time, 1.0):g} ps of what lived; energies in eV from the reference's mean")
    print(f"{'':{width}s}  replicas    lowest    mean  highest   closest unbonded   error of h(r)")
    row = "{:>8}  {lowest_eV:8.3f}  {mean_eV:6.3f}  {highest_eV:7.3f}   {closest:16.2f}   {h_error:13.4f}"
    print(f"{'reference':{width}s}  {row.format('', **own)} (floor)")
    for name, r in results.items():
        print(f"{names[name]}  {row.format(r['survivors'], **r) if r['survivors'] else '    none'}")
    if ratios:
        print(f"\nHazard over that of {names[next(iter(names))].rstrip()} (95 %), p of as much difference by chance")
    for name, r in ratios.items():
        told = "{:.3g} ({:.3g} to {:.3g}), p {:.2g}".format(r["ratio"], *r["ratio_95"], r["p"]) if r else "none failed"
        print(f"{names[name]}  {told}")


def shortened(name, width):
    """Without its middle, where it is too long."""
    return name if len(name) <= width else name[: width // 2 - 1] + "…" + name[-(width - width // 2) :]


def short_names(paths):
    """Of each path as many last parts as tell it from the others."""
    for n in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-n:]) for path in paths]
        if len(set(names)) == len(paths):
            return names
    raise ValueError("the same model is given twice")


def read_frames(path):
    """Frames that all are the same molecule in open space, with energies."""
    try:
        frames = read(path, ":")
    except OSError:
        raise
    except Exception as error:  # whatever a reader of the wrong kind runs into
        raise ValueError(f"ASE cannot read frames from this file ({type(error).__name__}: {error})") from error
    if not frames:
        raise ValueError("there are no frames in this file")
    if any(frame.numbers.tolist() != frames[0].numbers.tolist() for frame in frames):
        raise ValueError("frames are not all the same atoms in the same order")
    if len(frames[0]) < 2:
        raise ValueError("frames need two atoms or more")
    if any(frame.pbc.any() for frame in frames):
        raise ValueError("frames are periodic, expected molecules in open space")
    if any(frame.calc is None or "energy" not in frame.calc.results for frame in frames):
        raise ValueError("frames without energies")
    if not all(np.isfinite(frame.positions).all() and np.isfinite(frame.get_potential_energy()) for frame in frames):
        raise ValueError("frames with positions or energies that are not finite")
    return frames


def common_temperature(frames):
    temperatures = {frame.info.get("temperature_K") for frame in frames}
    if len(temperatures) > 1 or None in temperatures:
        raise ValueError("frames do not tell one temperature_K: give --temperature")
    return float(temperatures.pop())


def plain(value):
    """For JSON, which knows no infinity."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def number(kind, smallest):
    def parse(text):
        value = kind(text)
        if not smallest <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {smallest} or more")
        return value

    return parse


def timestep(text):
    value = float(text)
    if not 0 < value <= LOOK_FS or abs(LOOK_FS / value - round(LOOK_FS / value)) > 1e-9:
        raise argparse.ArgumentTypeError(f"{LOOK_FS} fs, from look to look, are no whole number of steps of {text} fs")
    return value


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="checkpoints")
    parser.add_argument("--ref", type=Path, help="reference frames with energies, best those that no model has learnt from")
    parser.add_argument("--time", type=number(float, 0.005), default=10.0, help="ps of each, to 5 fs (default: %(default)s)")
    parser.add_argument("--timestep", type=timestep, default=0.5, help="fs, a fraction of 5 (default: %(default)s)")
    parser.add_argument("--replicas", type=number(int, 1), default=16, help="of each model (default: %(default)s)")
    parser.add_argument("--temperature", type=number(float, 1), help="K (default: that of the reference)")
    parser.add_argument("--margin", type=number(float, 0), help="eV (default: 3N/2 kT)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of starts, momenta and noise (default: %(default)s)")
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="processes (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--trust", action="store_true", help="run the code that a pickled model carries")
    parser.add_argument("--output", type=Path, help="JSON file of all that is printed, and of every replica")
    parser.add_argument("--quick", action="store_true", help="the packaged model unless given, 2 replicas of 0.01 ps")
    args = parser.parse_args()
    if args.quick:
        args.replicas, args.time = 2, 0.01
        args.models, args.ref = args.models or [DATA / "aspirin_schnet.pt"], args.ref or DATA / "aspirin_xtb_test.xyz"
    if not args.models or args.ref is None:
        parser.error("give one MODEL or more, and reference frames with --ref")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no such folder")
    return parser, args


def main():
    parser, args = parse()
    concerned = args.ref
    try:
        frames = read_frames(args.ref)
        reference = Reference(frames, args.temperature or common_temperature(frames), args.margin)
        offsets = {}
        for name, path in zip(short_names(args.models), args.models):
            concerned = path
            offsets[name, path] = mean_offset(loaded(path, args.device, args.trust), reference)
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(f"{concerned}: {error}")
    beyond = sum(reference.verdict(frame.positions, energy) is not None for frame, energy in zip(frames, reference.energies))
    print(f"{len(frames)} reference frames, {beyond} of them failed by these criteria; {reference.temperature:g} K, "
          f"margin {reference.margin:.2f} eV", flush=True)  # fmt: skip
    results = {
        name: judged(run_model(name, path, offset, reference, args), reference) for (name, path), offset in offsets.items()
    }
    first, *others = results
    ratios = {name: compare(results[name], results[first]) for name in others}
    floor = reference.floor(np.random.default_rng(args.seed))
    own = spread(reference.energies, reference) | {"closest": reference.closest, "h_error": floor}
    print_tables(results, ratios, own, args)
    if args.output:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        settings |= {"models": [str(path) for path in args.models]}
        settings |= {"temperature": reference.temperature, "margin": reference.margin}
        document = {"settings": settings, "reference": own, "models": results, "ratios_to_first": ratios}
        args.output.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
