#!/usr/bin/env python
"""What fine-tuning gains, beside a control and by a judge that it did not train on: one row of a table.

    python examples/benchmarks/gains.py aspirin.pt --ref train.xyz --test test.xyz --output rows/aspirin -- --seed 1
    python examples/benchmarks/gains.py --table rows/*
    python examples/benchmarks/gains.py --rst --table rows/*
    python examples/benchmarks/gains.py --quick

A row takes three steps, each left out where its files are there already:

1. `stabie-ase finetune MODEL --ref TRAIN`, with the options behind `--`, into OUTPUT/stabie;
2. the control, OUTPUT/control: the same with `--update labels-only`, energies and forces alone, for as many updates. Its last
   weights count, in OUTPUT/control.pt, however accurate;
3. `independent_judge.py` on the start, the control and the result, from the frames of TEST: OUTPUT/judge.json.

The table gives hazards in failures per replica-ps with 95 % intervals: as finetune reports them, and as judged. `agree` is the
ratio that is reported over the ratio that is judged. Errors are mean absolute ones on the frames of TEST, from the start's, an
energy offset removed. h(r) errors are finetune's. Of replicas that outlived the judge's time the last ps is compared with TEST:
potential energy (eV from the mean of TEST; in brackets what TEST itself has), the closest unbonded pair (in sums of covalent radii)
and the error of h(r) (in brackets its floor).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import stabie_ase
from stabie_ase.potentials.checkpoint import load_potential, save_potential
from stabie_ase.structures.reference import read_reference
from stabie_ase.training.labels import LabelledFrames, qm_errors

DATA = Path(stabie_ase.__file__).parent / "data"
JUDGE = Path(__file__).with_name("independent_judge.py")
QUICK = "--max-time 0.5 --max-cycles 1 --replicas 4 --window 25 --qm-steps 1 --check-replicas 2 --check-time 0.02 --check-rounds 1"
LABELS_ONLY = {"--update": "labels-only", "--max-time": 60, "--check-replicas": 2, "--check-time": 0.02, "--check-rounds": 1}


def run(*command):
    """A Python command; what it says goes to the terminal."""
    print("$", *command, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True)


def finetune(args, output, replaced):
    """A run that is complete afterwards, begun or resumed; some options and their values are replaced."""
    if (output / "result.json").exists():
        return
    if output.exists():
        return run("-m", "stabie_ase", "finetune", "--resume", output)
    options = [x for k, x in enumerate(args.options) if not {x, args.options[k - 1] if k else None} & set(replaced)]
    options += [x for pair in replaced.items() for x in pair]
    if args.temperature is not None:
        options += ["--temperature", args.temperature]
    run("-m", "stabie_ase", "finetune", args.model, "--ref", args.ref, "--output", output, *options)


def last_state(run_directory):
    return torch.load(run_directory / "state.pt", weights_only=True)["state"]


def make_row(args):
    """All that is missing of a row."""
    stabie, control = args.output / "stabie", args.output / "control"
    checkpoint, judgement = args.output / f"control{args.model.suffix}", args.output / "judge.json"
    finetune(args, stabie, {})
    updates = max(1, last_state(stabie)["progress"]["updates"])
    finetune(args, control, LABELS_ONLY | {"--max-updates": updates})
    if not checkpoint.exists():
        potential = load_potential(args.model)
        potential.load_state_dict(last_state(control)["weights"])
        save_potential(potential, checkpoint)
    models = {"start": args.model, "control": checkpoint, "stabie": next(stabie.glob("model.*"))}
    if not judgement.exists():
        temperature = json.loads((stabie / "config.json").read_text())["config"]["dynamics"]["temperature_K"]
        run(JUDGE, *models.values(), "--ref", args.test, "--temperature", temperature, "--time", args.time,
            "--replicas", args.replicas, "--seed", args.judge_seed, "--output", judgement)  # fmt: skip
    labelled = LabelledFrames.from_reference(read_reference(str(args.test)))
    errors = {name: qm_errors(load_potential(path), labelled) for name, path in models.items()}
    row = {
        "updates": updates,
        "minutes": last_state(stabie)["progress"]["seconds"] / 60,
        "errors": {
            name: {"force_mae_eV_per_A": e.force_mae_eV_per_A, "energy_mae_eV": e.energy_mae_offset_removed_eV}
            for name, e in errors.items()
        },
    }
    (args.output / "row.json").write_text(json.dumps(row, indent=1) + "\n")


def ratio(before, after):
    """Of two hazards; infinite if the second never failed."""
    return before / after if after else float("inf")


def times(before, after):
    return f"{before / after:.1f} x" if after else "no failure"


def hazard(value, interval):
    return "{:.3g} [{:.2g}, {:.2g}]".format(value, *interval)


def read_row(output):
    """What finetune says, what the judge says of start, control and stabie, and all there is of either."""
    row, result, judgement = (json.loads((output / p).read_text()) for p in ("row.json", "stabie/result.json", "judge.json"))
    judged = dict(zip(("start", "control", "stabie"), judgement["models"].values()))
    return result["models"], judged, row, result, judgement


def change(row, name, key):
    return f"{row['errors'][name][key] / row['errors']['start'][key] - 1:+.1%}"


def tell_row(output):
    """The lines of one row."""
    reported, judged, row, result, judgement = read_row(output)
    told = ratio(reported["start"]["hazard_per_ps"], reported["stabie"]["hazard_per_ps"])
    seen = ratio(judged["start"]["hazard"], judged["stabie"]["hazard"])

    yield f"{output.name}: {row['updates']} updates in {row['minutes']:.0f} min" + ("" if result["gained"] else "; the start is kept")
    for what, models, value, interval in (
        ("reported", reported, "hazard_per_ps", "hazard_per_ps_interval"), ("judged", judged, "hazard", "hazard_95"),
    ):  # fmt: skip
        yield f"  {what:9s}" + "".join(f" {name} {hazard(m[value], m[interval])}" for name, m in models.items())
    better = ratio(judged["control"]["hazard"], judged["stabie"]["hazard"])
    yield f"  start/stabie reported {told:.3g}, judged {seen:.3g}, agree {told / seen:.2f}; control/stabie judged {better:.3g}"
    for name in ("control", "stabie"):
        force, energy = (change(row, name, key) for key in ("force_mae_eV_per_A", "energy_mae_eV"))
        yield f"  {name}: force MAE {force}, energy MAE {energy} on test frames"
    before, after = ("none" if m["hr_error"] is None else f"{m['hr_error']:.3g}" for m in reported.values())
    yield f"  hr_error {before} -> {after}, floor {reported['stabie']['hr_error_floor']:.3g}"
    yield from tell_survivors(judged["stabie"], judgement)


COLUMNS = ("row", "reported", "judged: start", "control", "stabie", "force MAE", "energy MAE", "h(r) error (floor)")


def tell_rst(outputs):
    """One table of all rows, as README shows it."""
    rows = []
    for output in outputs:
        reported, judged, row, result, _ = read_row(output)
        start, end = (reported[name]["hazard_per_ps"] for name in ("start", "stabie"))
        kept = "" if result["gained"] else ", start kept"
        before, after = (reported[name]["hr_error"] for name in ("start", "stabie"))
        rows.append((
            output.name.replace("_", " "), f"{start:.3g} -> {end:.3g} ({times(start, end)}){kept}",
            f"{judged['start']['hazard']:.3g}", f"{judged['control']['hazard']:.3g}",
            f"{judged['stabie']['hazard']:.3g} ({times(judged['start']['hazard'], judged['stabie']['hazard'])})",
            change(row, "stabie", "force_mae_eV_per_A"), change(row, "stabie", "energy_mae_eV"),
            f"{before:.3f} -> {after:.3f} ({reported['stabie']['hr_error_floor']:.3f})",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows)]
    line = "  ".join("=" * width for width in widths)
    for cells in (None, COLUMNS, None, *rows, None):
        yield line if cells is None else "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()


def tell_survivors(judged, judgement):
    if not judged["survivors"]:
        return
    own = judgement["reference"]
    yield (
        "  {survivors} outlived {time:g} ps: energy {mean_eV:.2f}, lowest {lowest_eV:.2f} [{own:.2f}], closest {closest:.2f} "
        "[{nearest:.2f}], h(r) error {h_error:.3g} [{floor:.3g}]"
    ).format(
        **judged, time=judgement["settings"]["time"], own=own["lowest_eV"], nearest=own["closest"], floor=own["h_error"]
    )


def parse():
    given = [*sys.argv[1:], "--"]
    own, options = given[: given.index("--")], given[given.index("--") + 1 : -1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="checkpoint to start from")
    parser.add_argument("--ref", type=Path, help="frames to train on")
    parser.add_argument("--test", type=Path, help="frames that no model has seen")
    parser.add_argument("--output", type=Path, help="folder of the row")
    parser.add_argument("--temperature", type=float, help="K (default: what the frames say)")
    parser.add_argument("--time", type=float, default=6.0, help="ps of each of the judge's replicas (default: %(default)g)")
    parser.add_argument("--replicas", type=int, default=20, help="of the judge, of each model (default: %(default)s)")
    parser.add_argument("--judge-seed", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--table", type=Path, nargs="+", metavar="ROW", help="print these rows and do nothing else")
    parser.add_argument("--rst", action="store_true", help="print rows as one reStructuredText table")
    parser.add_argument("--quick", action="store_true", help="the packaged model and hardly any dynamics")
    args = parser.parse_args(own)
    args.options = options
    if args.quick:
        args.model, args.ref, args.test = (DATA / n for n in ("aspirin_schnet.pt", "aspirin_xtb_train.xyz", "aspirin_xtb_test.xyz"))
        args.time, args.replicas, args.options = 0.01, 2, QUICK.split()
        args.output = args.output or Path(tempfile.mkdtemp())
    if not args.table and None in (args.model, args.ref, args.test, args.output):
        parser.error("give MODEL, --ref, --test and --output, or --table ROW")
    return args


def main():
    args = parse()
    try:
        if not args.table:
            for file in (args.ref, args.test):  # what cannot be read leaves no folder behind
                read_reference(str(file))
            args.output.mkdir(parents=True, exist_ok=True)
            make_row(args)
        rows = args.table or [args.output]
        for told in [tell_rst(rows)] if args.rst else map(tell_row, rows):
            print(*told, sep="\n")
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(error.returncode)
    except (OSError, ValueError) as error:
        sys.exit(f"gains.py: {error}")


if __name__ == "__main__":
    main()
