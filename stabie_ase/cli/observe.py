"""`stabie-ase observe`: observables of trajectories."""

from __future__ import annotations

import click

from stabie_ase.cli.main import main
from stabie_ase.cli.options import build, options_from, reference_option
from stabie_ase.cli.progress import Terminal
from stabie_ase.runs.options import ObserveOptions


@main.command(short_help="Compute observables of trajectories.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@reference_option("Frames of the same system that observables and criteria are laid out for [default: those of FILE]", required=False)
@click.option("--no-criterion", is_flag=True, help="Let all frames count that are finite")
@click.option("--output", metavar="FILE", help="Write values and errors there, .json or .csv, or a figure, .png")
@options_from(ObserveOptions)
@click.pass_context
def observe(context, files, reference, no_criterion, output, **given):
    """Observables of the trajectories in FILE, with their errors.

    Each FILE is a replica, in any format ASE knows (FILE@0:100), or the directory of a run of stabie-ase md. Frames from a replica's
    first failure on do not count.
    """
    config = build(ObserveOptions, given)  # before torch
    if no_criterion and config.criterion:
        raise click.UsageError("--criterion and --no-criterion contradict each other: give one of them", context)

    import stabie_ase
    from stabie_ase.runs.report.observed import observed_table

    with Terminal(context.obj["quiet"]) as terminal:
        found = stabie_ase.observe(
            list(files),
            observables=config.observable,
            reference=reference,
            criteria=() if no_criterion else config.criterion,
            interval_fs=config.interval_fs,
            temperature_K=config.temperature_K,
            output=output,
            monitor=terminal,
        )
    click.echo(observed_table(found))
