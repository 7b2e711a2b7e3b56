#!/usr/bin/env python
"""How stable a model gets by each recipe, against what it has cost: force calls and minutes of the loop.

    python examples/benchmarks/recipes.py aspirin.pt --ref train.xyz --max-time 30 --every 5 --output curves
    python examples/benchmarks/recipes.py aspirin.pt --ref train.xyz --output curves --option replicas=32
    python examples/benchmarks/recipes.py --quick

Each recipe is run by `stabie_ase.finetune` with the options that are given here, in OUTPUT/NAME. Every so many updates the model
as it is at that moment is held against all criteria in fresh replicas, the same ones for all: a point in OUTPUT/NAME.jsonl, with
failures per replica-ps, their 95 % interval, the force error on held-out frames, force calls (steps of a replica, and frames that
updates have evaluated) and minutes, in which the measuring is not counted. OUTPUT/curves.json and OUTPUT/curves.png have all points.
What is there already is kept, and a run that was interrupted is gone on with.
"""

import argparse
import json
import tempfile
from functools import cached_property
from pathlib import Path

import torch

import stabie_ase
from stabie_ase.dynamics.compilation import compile_where_wanted
from stabie_ase.potentials.checkpoint import load_potential
from stabie_ase.runs.evaluation import StabilityTest, Yardstick, run_stability_test
from stabie_ase.structures.reference import read_reference
from stabie_ase.structures.setting import Setting
from stabie_ase.system.options import with_temperature
from stabie_ase.training.recipes import RECIPES

DATA = Path(stabie_ase.__file__).parent / "data"
QUICK = {"replicas": 4, "window_fs": 25.0, "sample_every_fs": 5.0, "qm_steps": 1, "natural_iterations": 1, "max_updates": 1,
         "criterion": "bonds:0.1"}  # fmt: skip
NO_CHECK = {"replicas": 2, "time_ps": 0.02, "rounds": 1}
"""Of the comparison that ends a run: the points tell more."""

HEAD = ("recipe", "updates", "force calls", "minutes", "failures per replica-ps", "force MAE (meV/Å)")
ROW = "{:14s} {:>7s} {:>12s} {:>8s}  {:26s} {:>s}"


def value(text):
    """A number where it is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class Measure:
    """Measures a model from equal fresh starts.

    Parameters
    ----------
    args : Namespace
    """

    def __init__(self, args):
        reference = read_reference(args.ref)
        self.potential = load_potential(args.model, args.device)
        self.weights = {name: x.clone() for name, x in self.potential.state_dict().items()}
        self.frames = reference.isolated(self.potential.cutoff).frames
        self.test = with_temperature(
            StabilityTest(args.temperature, args.check_replicas, args.check_time, seed=args.seed + 1), reference.temperature_K, args.ref
        )
        self.yardstick = Yardstick.from_reference(None, Setting(self.frames, self.test.temperature_K, reference.temperature_K), [])
        compile_where_wanted(args.compile, self.potential, self.frames, self.test.replicas, steps=self.test.n_steps, say=print)

    @cached_property
    def start(self):
        """Of the starting model, which all curves have in common."""
        return self(self.weights)

    def __call__(self, weights):
        """Failures per replica-ps and their interval."""
        self.potential.load_state_dict(weights)
        statistics = run_stability_test(self.potential, self.frames, self.yardstick, self.test).statistics
        return {"hazard_per_ps": statistics.hazard_per_ps, "hazard_per_ps_interval": list(statistics.hazard_interval())}


class Curve:
    """The points of one recipe, each told and kept as soon as it is known.

    Parameters
    ----------
    name : str
    args : Namespace
    measure : Measure
    """

    def __init__(self, name, args, measure):
        self.name, self.run, self.every, self.measure = name, args.output / name, args.every, measure
        self.last, self.file = None, args.output / f"{name}.jsonl"
        self.points = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        for point in self.points:
            tell(point)

    def add(self, record, found):
        """One more point: what a window has told, and what was measured."""
        figures = {key: record.get(key) for key in ("updates", "force_calls", "seconds", "force_mae_eV_per_A")}
        self.points.append({"recipe": self.name, **figures, **found})
        with self.file.open("a") as file:
            file.write(json.dumps(self.points[-1]) + "\n")
        tell(self.points[-1])

    def look(self, record, every=None):
        """Told of each window: a point where enough updates have been made since the last."""
        self.last = record if "updates" in record else self.last
        if self.last and self.last["updates"] >= self.points[-1]["updates"] + (every or self.every):
            state = torch.load(self.run / "state.pt", weights_only=True, map_location="cpu")["state"]
            self.add(self.last, self.measure(state["weights"]))


def trace(name, args, measure):
    """The curve of one recipe, from wherever it stands."""
    curve = Curve(name, args, measure)
    if not curve.points:
        curve.add({"updates": 0, "force_calls": 0, "seconds": 0.0}, measure.start)
    if (curve.run / "result.json").exists():
        return curve.points
    if curve.run.exists():
        stabie_ase.resume(curve.run, on_window=curve.look)
    else:
        own = {"seed": args.seed, "max_time_min": args.max_time, "temperature_K": args.temperature, "check": NO_CHECK, "recipe": name,
               "device": args.device, "compilation": args.compile}  # fmt: skip
        options = {**own, **args.options}
        stabie_ase.finetune(args.model, args.ref, output=curve.run, on_window=curve.look, **options)
    curve.look({}, every=1)  # where the run has ended
    return curve.points


def tell(point):
    low, high = point["hazard_per_ps_interval"]
    mae = point["force_mae_eV_per_A"]
    print(ROW.format(
        point["recipe"], str(point["updates"]), f"{point['force_calls']:.3g}", f"{point['seconds'] / 60:.1f}",
        f"{point['hazard_per_ps']:.3g} [{low:.2g}, {high:.2g}]", "" if mae is None else f"{1000 * mae:.0f}",
    ), flush=True)  # fmt: skip


def draw(curves, path):
    """Hazard against both costs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, (key, scale, label) in zip(panels, (("force_calls", 1, "force calls"), ("seconds", 60, "minutes of the loop"))):
        for name, points in curves.items():
            hazards = [point["hazard_per_ps"] for point in points]
            bars = [[abs(point["hazard_per_ps_interval"][k] - h) for point, h in zip(points, hazards)] for k in (0, 1)]
            axes.errorbar([point[key] / scale for point in points], hazards, bars, marker="o", capsize=2, label=name)
        axes.set(xlabel=label, ylim=(0, None))
    panels[0].set_ylabel("failures per replica-ps")
    panels[0].legend()
    figure.savefig(path, dpi=150)


def main():
    """A table, row by row, and the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DATA / "aspirin_schnet.pt"))
    parser.add_argument("--ref", default=str(DATA / "aspirin_xtb_train.xyz"))
    parser.add_argument("--recipes", default="natural,paper", help=f"of {', '.join(RECIPES)} (default: %(default)s)")
    parser.add_argument("--max-time", type=float, default=15.0, metavar="MIN", help="of each recipe's loop (default: %(default)g)")
    parser.add_argument("--every", type=int, default=5, metavar="N", help="updates between two points (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of finetune, for all recipes")
    parser.add_argument("--temperature", type=float, metavar="K", help="(default: what the frames say)")
    parser.add_argument("--check-replicas", type=int, default=96, help="of each point (default: %(default)s)")
    parser.add_argument("--check-time", type=float, default=2.0, metavar="PS", help="of each of them (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: %(default)s)")
    parser.add_argument("--compile", default="off", choices=["off", "on", "auto"], help="networks for dynamics (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where runs and points are kept")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    args.options = {name: value(text) for name, _, text in (option.partition("=") for option in args.option)}
    if args.quick:
        args.options, args.every, args.check_replicas, args.check_time = QUICK, 1, 2, 0.02
    with tempfile.TemporaryDirectory() as temporary:
        args.output = args.output or Path(temporary)
        try:
            compare(args)
        except (OSError, ValueError) as error:
            parser.error(str(error))


def compare(args):
    measure = Measure(args)
    args.output.mkdir(parents=True, exist_ok=True)
    print(ROW.format(*HEAD))
    curves = {name: trace(name, args, measure) for name in args.recipes.split(",")}
    (args.output / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
    draw(curves, args.output / "curves.png")


if __name__ == "__main__":
    main()
