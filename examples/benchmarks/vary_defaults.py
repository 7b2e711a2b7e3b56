#!/usr/bin/env python
"""What other values of an option would do: the same fine-tuning again with one option changed at a time.

    python examples/benchmarks/vary_defaults.py aspirin.pt --ref train.xyz --vary near_factor=2,8 --vary window_fs=125,500
    python examples/benchmarks/vary_defaults.py --quick

All runs have one seed and make as many updates, whatever time that takes, so that a busy machine changes nothing. Then as many
fresh replicas run for as long, which neither chance nor a clock ends early. Given are failures per replica-ps by any criterion with
95 % intervals, and what was paid: replica-ps of dynamics in the loop, errors on held-out frames, the error of h(r).
"""

import argparse
import json
import tempfile
from pathlib import Path

import stabie_ase

DATA = Path(stabie_ase.__file__).parent / "data"
DEFAULTS = {"near_factor": "2,8", "escape_factor": "4,16", "window_fs": "125,500"}
QUICK = {"replicas": 4, "window_fs": 25.0, "qm_steps": 1, "natural_iterations": 1}
HEAD = ("changed", "failures per replica-ps", "dynamics", "updates", "force MAE", "energy MAE", "observable error")
ROW = "{:22s} {:26s} {:>9s} {:>7s} {:>9s} {:>10s}  {}"


def value(text):
    """A number where it is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def variants(texts):
    """The defaults, then each value of each option."""
    yield "", {}
    for text in texts:
        name, _, values = text.partition("=")
        for one in values.split(","):
            yield f"{name}={one}", {name: value(one)}


def errors(models):
    """The first observable's error at the start and at the end."""
    name = next(key for key in models["start"] if key.endswith("_error"))
    return " -> ".join(f"{models[which][name]:.4f}" for which in ("start", "stabie"))


def run(args, name, changes):
    """One run, begun or read from its directory."""
    output, windows = args.output / (name or "defaults"), []
    check = {"replicas": args.check_replicas, "time_ps": args.check_time, "rounds": 1, "max_time_min": 1e6}
    options = {"seed": args.seed, "max_updates": args.updates, "max_time_min": 1e6, "check": check, **args.fixed, **changes}
    if (output / "result.json").exists():
        return json.loads((output / "result.json").read_text()), json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    result = stabie_ase.finetune(args.model, args.ref, output=output, on_window=windows.append, **options)
    return result.details, windows[-1]


def growth(models, key):
    start, end = (models[which].get(key) for which in ("start", "stabie"))
    return f"{100 * (end / start - 1):+.1f} %" if start and end else "-"


def tell(name, details, last, which):
    summary = details["models"][which]
    low, high = summary["hazard_per_ps_interval"]
    paid = ("", "") if which == "start" else (f"{last['md_replica_ps']:.0f} ps", str(last.get("updates", 0)))
    models = details["models"]
    grown = ("", "") if which == "start" else (growth(models, "held_out_force_mae_eV_per_A"), growth(models, "held_out_energy_mae_eV"))
    found = "" if which == "start" else errors(models)
    print(ROW.format(name, f"{summary['hazard_per_ps']:.3g} [{low:.2g}, {high:.2g}]", *paid, *grown, found), flush=True)


def main():
    """A table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(DATA / "aspirin_schnet.pt"))
    parser.add_argument("--ref", default=str(DATA / "aspirin_xtb_train.xyz"))
    parser.add_argument("--vary", action="append", metavar="OPTION=A,B", help=f"default: {DEFAULTS}")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--check-replicas", type=int, default=96)
    parser.add_argument("--check-time", type=float, default=2.0, metavar="PS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where runs are kept, so that a table that was interrupted is gone on with")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    args.fixed, texts = {}, args.vary or [f"{name}={values}" for name, values in DEFAULTS.items()]
    if args.quick:
        args.fixed, args.updates, args.check_replicas, args.check_time, texts = QUICK, 1, 2, 0.02, ["near_factor=2"]
    with tempfile.TemporaryDirectory() as temporary:
        args.output = args.output or Path(temporary)
        print(ROW.format(*HEAD))
        for name, changes in variants(texts):
            details, last = run(args, name, changes)
            if not name:
                tell("start", details, last, "start")
            tell(name or "defaults", details, last, "stabie")


if __name__ == "__main__":
    main()
