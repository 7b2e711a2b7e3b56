"""`stabie-ase evaluate`: stability, observable and errors of one or several models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from stabie_ase.cli.main import check_device, common_options, main
from stabie_ase.cli.progress import Progress, Rate


@main.command()
@click.argument("model")
@click.option("--ref", "reference", required=True, metavar="FILE", help="Frames to start from and to compare with.")
@click.option("--compare", multiple=True, metavar="OTHER", help="Another model, from the same starts and seeds.")
@click.option("--time", "time_ps", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True, metavar="PS")
@click.option("--replicas", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True, max=1e5), metavar="K", help="[default: the reference's]")
@click.option("--timestep", type=click.FloatRange(min=0, min_open=True, max=20), default=0.5, show_default=True, metavar="FS")
@click.option("--criterion", default="bonds:0.5", show_default=True, help="KIND:TOLERANCE (Å)")
@click.option("--observable", default="hr", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--output", metavar="JSON", help="Write the figures there.")
@common_options
@click.pass_context
def evaluate(context, model, reference, compare, output, **options):
    """Time to first failure, h(r) error and energy/force errors of MODEL."""
    from stabie_ase.evaluation import StabilityTest
    from stabie_ase.evaluation import evaluate as run
    from stabie_ase.observables import OBSERVABLES
    from stabie_ase.potentials.checkpoint import load_potential
    from stabie_ase.reference import read_reference
    from stabie_ase.report.table import format_table
    from stabie_ase.stability import criterion_from
    from stabie_ase.training.config import BadOption

    quiet = context.obj["quiet"]
    check_device(options["device"])
    if options["observable"] not in OBSERVABLES:
        raise BadOption(f"unknown observable {options['observable']!r}; known: {', '.join(OBSERVABLES)}")
    if output:
        _check_writable(Path(output))
    frames = read_reference(reference, options["energy_key"], options["forces_key"])
    temperature = options["temperature"] or frames.temperature_K
    if temperature is None:
        raise BadOption("the reference tells no temperature (info key temperature_K); give --temperature in K")
    criterion = criterion_from(options["criterion"], frames.frames)
    observable = OBSERVABLES[options["observable"]].from_reference(frames.frames)
    test = StabilityTest(
        temperature, options["replicas"], options["time_ps"], options["timestep"], seed=options["seed"]
    )
    potentials = {
        name: load_potential(name, options["device"], options["dtype"], options["trust_checkpoint"], options["head"])
        for name in (model, *compare)
    }
    for potential in potentials.values():
        potential.check_numbers(z for atoms in frames.frames for z in set(atoms.numbers))
    if not quiet:
        click.echo(f"Reference: {frames.source}")
        click.echo(f"{test.replicas} replicas of {test.time_ps:g} ps at {temperature:g} K; unstable: {criterion.describe()}")
    results = {}
    for name, potential in potentials.items():
        total, rate = test.steps(1000.0 * test.time_ps), Rate()
        with Progress(total, Path(name).name, quiet=quiet) as progress:

            def on_block(steps, state, failures):
                progress.show(steps, f"unstable {100 * failures.share:.0f} %, {rate.update(steps * test.replicas)}")

            results[name], _ = run(potential, frames, criterion, observable, test, on_block)
    click.echo(format_table(results))
    if output:
        temporary = Path(output).with_name(f".{Path(output).name}.tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(temporary, output)


def _check_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise click.ClickException(f"cannot write {path}: its folder is missing or not writable")
