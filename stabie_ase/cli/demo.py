"""`stabie-ase demo`: the whole of it on packaged data, in minutes."""

from __future__ import annotations

import click

from stabie_ase.cli.finetune import run_to_end
from stabie_ase.cli.main import main, packaged
from stabie_ase.cli.options import build
from stabie_ase.training.options import FinetuneConfig


@main.command(short_help="Fine-tune a packaged SchNet and compare.")
@click.option("--output", default="stabie-demo", show_default=True, metavar="RUN", help="Run directory")
@click.option("--max-time", "max_time_min", type=float, default=7.0, show_default=True, metavar="MIN", help="Wall time of the loop")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of everything random")
@click.pass_context
def demo(context, output, **given):
    """Fine-tune the packaged SchNet, trained on 40 frames of aspirin, and compare before and after."""
    config, quiet = build(FinetuneConfig, given, {"check_time_ps": 1.0}), context.obj["quiet"]

    from stabie_ase.runs.finetune import Inputs, prepare

    inputs = Inputs(packaged("aspirin_schnet.pt"), packaged("aspirin_xtb_train.xyz"))
    run_to_end(prepare(output, inputs, config, None if quiet else click.echo), quiet)
