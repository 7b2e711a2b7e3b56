"""`stabie-ase evaluate`: stability, observable and errors of one or several models."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stabie_ase.cli.main import check_device, check_new_file, common_options, main
from stabie_ase.cli.options import build, options_from, reference_option
from stabie_ase.cli.progress import Progress, Rate
from stabie_ase.runs.options import EvaluationConfig
from stabie_ase.system.files import replaced


@main.command(short_help="Measure stability and errors of models.")
@click.argument("model")
@reference_option("Frames to start from and to compare with")
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

    from stabie_ase.runs.evaluate import Evaluation
    from stabie_ase.runs.report.table import format_table

    check_device(device)
    say = None if quiet else click.echo
    keys, about = {"energy_key": energy_key, "forces_key": forces_key}, {"device": device, "dtype": dtype, "head": head}
    models = {name: name for name in (model, *compare)}
    evaluation = Evaluation.set_up(models, reference, config, keys, about | {"trust": trust_checkpoint}, say=say)
    for name in models:
        evaluation.compile(name, compilation, say)
        _measure(evaluation, name, quiet)
    summaries = evaluation.summaries()
    click.echo(format_table(summaries, evaluation.test.time_ps))
    for name in compare:
        click.echo(f"{name} fails less often than {model}: p = {summaries[name]['p_value']:.2g}")
    if not quiet:
        click.echo(_time_to_tell(model, evaluation.results[model].statistics, evaluation.seconds_per_ps[model]))
    if output:
        with replaced(output) as temporary:
            temporary.write_text(json.dumps(summaries, indent=1) + "\n")


def _measure(evaluation, name: str, quiet: bool) -> None:
    """A model's replicas, under a bar of its own."""
    rate, test = Rate(), evaluation.test
    with Progress(test.n_steps, Path(name).name, quiet) as progress:

        def on_look(steps, state, failures):
            progress.show(steps, f"unstable {100 * failures.fraction:.0f} %, {rate.update(steps * test.replicas)}")

        evaluation.measure(name, on_look)
        progress.done = progress.total  # all may have failed long before


def _time_to_tell(model, statistics, seconds_per_ps) -> str:
    """How long a comparison has to be to mean something; of a model that did not fail, for one failure in the time it was seen."""
    from stabie_ase.stability.sequential import replica_ps_to_tell

    needed = replica_ps_to_tell(statistics.hazard_per_ps or 1.0 / statistics.stable_replica_ps)
    return (
        f"To tell a model four times as stable as {model} from it takes about {needed:.2g} replica-ps of each, "
        f"{2 * needed * seconds_per_ps / 60:.2g} min here"
    )
