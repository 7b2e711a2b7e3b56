"""`stabie-ase evaluate`: stability, observable and errors of one or several models."""

from __future__ import annotations

import click

from stabie_ase.cli.main import OF_THE_INPUTS, check_device, common_options, main
from stabie_ase.cli.options import options_from, reference_option
from stabie_ase.cli.progress import Terminal
from stabie_ase.runs.options import EvaluationOptions
from stabie_ase.system.files import check_new_file
from stabie_ase.system.options import from_dict


@main.command(short_help="Measure stability and errors of models.")
@click.argument("model")
@reference_option("Frames to start from and to compare with")
@click.option("--compare", multiple=True, metavar="OTHER", help="Another model, from the same starts and seeds; may be repeated")
@click.option("--output", metavar="JSON", help="Write the figures there")
@options_from(EvaluationOptions)
@common_options
@click.pass_context
def evaluate(context, model, reference, compare, output, **given):
    """Time to first failure, h(r) error and energy/force errors of MODEL."""
    options = {name: value for name, value in given.items() if value is not None}
    config = from_dict(EvaluationOptions, {name: value for name, value in options.items() if name not in OF_THE_INPUTS})  # before torch
    if output:
        check_new_file(output)

    import stabie_ase
    from stabie_ase.runs.report.table import format_table

    check_device(options.get("device", "cpu"))
    with Terminal(context.obj["quiet"]) as terminal:
        summaries = stabie_ase.evaluate(model, reference, compare=compare, output=output or None, monitor=terminal, **options)
    click.echo(format_table(summaries, config.time_ps))
    for name in compare:
        click.echo(f"Does {name} fail less often than {model}? One-sided test: p = {summaries[name]['p_value']:.2g}")
