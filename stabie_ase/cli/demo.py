"""`stabie-ase demo`: the whole of it on packaged data, in minutes."""

from __future__ import annotations

import click

from stabie_ase.cli.finetune import begin
from stabie_ase.cli.main import main, packaged


@main.command(short_help="Fine-tune a packaged SchNet and compare.")
@click.option("--output", default="stabie-demo", show_default=True, metavar="RUN", help="Run directory")
@click.option("--max-time", "max_time_min", type=float, default=7.0, show_default=True, metavar="MIN", help="Wall time of the loop")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of everything random")
@click.pass_context
def demo(context, output, **given):
    """Fine-tune the packaged SchNet, trained on 40 frames of aspirin, and compare before and after."""
    begin(context, packaged("aspirin_schnet.pt"), packaged("aspirin_xtb_train.xyz"), output, check_time_ps=1.0, **given)
