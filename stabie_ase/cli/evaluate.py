"""`stabie-ase evaluate`: stability, observable and errors of one or several models."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stabie_ase.cli.main import check_device, check_new_file, common_options, main
from stabie_ase.cli.options import build, options_from
from stabie_ase.cli.progress import Progress, Rate
from stabie_ase.config import BadOption, EvaluationConfig, with_temperature
from stabie_ase.files import replaced


@main.command(short_help="Measure stability and errors of models.")
@click.argument("model")
@click.option("--ref", "reference", required=True, metavar="FILE", help="Frames to start from and to compare with")
@click.option("--compare", multiple=True, metavar="OTHER", help="Another model, from the same starts and seeds; may be repeated")
@click.option("--output", metavar="JSON", help="Write the figures there")
@options_from(EvaluationConfig)
@common_options
@click.pass_context
def evaluate(
    context, model, reference, compare, output, device, dtype, energy_key, forces_key, head, compilation, trust_checkpoint, **given
):
    """Time to first failure, h(r) error and energy/force errors of MODEL."""
    config, quiet = build(EvaluationConfig, given), context.obj["quiet"]
    if output:
        check_new_file(output)

    from stabie_ase.dynamics.compilation import compile_where_wanted
    from stabie_ase.evaluation import StabilityTest
    from stabie_ase.evaluation import evaluate as run
    from stabie_ase.observables import OBSERVABLES
    from stabie_ase.potentials.checkpoint import load_potential
    from stabie_ase.reference import read_reference
    from stabie_ase.report.table import format_table
    from stabie_ase.stability import criterion_from

    check_device(device)
    if config.observable not in OBSERVABLES:
        raise BadOption(f"unknown observable {config.observable!r}; known: {', '.join(OBSERVABLES)}")
    frames = read_reference(reference, energy_key, forces_key)
    config = with_temperature(config, frames.temperature_K, "the reference")
    criterion = criterion_from(config.criterion, frames.frames)
    observable = OBSERVABLES[config.observable].from_reference(frames.frames)
    test = StabilityTest(
        temperature_K=config.temperature_K,
        replicas=config.replicas,
        time_ps=config.time_ps,
        timestep_fs=config.timestep_fs,
        friction_per_fs=config.friction_per_fs,
        check_every_fs=config.check_every_fs,
        seed=config.seed,
    )
    potentials = {name: load_potential(name, device, dtype, trust_checkpoint, head) for name in (model, *compare)}
    for name, potential in potentials.items():
        try:
            potential.check_numbers(z for atoms in frames.frames for z in set(atoms.numbers))
        except ValueError as error:
            raise BadOption(f"{name}: {error}") from error
    if not quiet:
        click.echo(f"Reference: {frames.source}")
        click.echo(f"{test.replicas} replicas of {test.time_ps:g} ps at {test.temperature_K:g} K; unstable: {criterion.describe()}")
    results, n_steps = {}, test.steps(1000.0 * test.time_ps)
    for name, potential in potentials.items():
        say = None if quiet else click.echo
        compile_where_wanted(compilation, potential, frames.frames, test.replicas, steps=n_steps, say=say)
        rate = Rate()
        with Progress(n_steps, Path(name).name, quiet) as progress:

            def on_block(steps, state, failures):
                progress.show(steps, f"unstable {100 * failures.share:.0f} %, {rate.update(steps * test.replicas)}")

            results[name], _ = run(potential, frames, criterion, observable, test, on_block)
            progress.done = progress.total  # all may have failed long before
    click.echo(format_table(results, test.time_ps))
    if output:
        with replaced(output) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
