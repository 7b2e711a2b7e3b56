"""`stabie-ase view`: the unstable frames of a run in ASE's viewer."""

from __future__ import annotations

import click

from stabie_ase.cli.main import main


@main.command()
@click.argument("run")
def view(run):
    """Open RUN's unstable frames with `ase gui`."""
    from stabie_ase.runs.report.view import view as start

    start(run).wait()
