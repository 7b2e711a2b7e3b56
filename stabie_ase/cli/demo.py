"""`stabie-ase demo`: the whole of it on packaged data, in minutes."""

from __future__ import annotations

import click

from stabie_ase.cli.finetune import run_to_end
from stabie_ase.cli.main import main, packaged


@main.command()
@click.option("--output", default="stabie-demo", show_default=True, metavar="RUN")
@click.option("--max-time", "max_time_min", type=click.FloatRange(min=0), default=5.0, show_default=True, metavar="MIN")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.pass_context
def demo(context, output, **options):
    """Fine-tune the packaged SchNet, trained on 45 frames of aspirin, and compare before and after."""
    from stabie_ase.training.config import FinetuneConfig
    from stabie_ase.training.run import Inputs, prepare

    inputs = Inputs(packaged("aspirin_schnet.pt"), packaged("aspirin_xtb_train.xyz"))
    quiet = context.obj["quiet"]
    finetuning = prepare(output, inputs, FinetuneConfig(**options), None if quiet else click.echo)
    run_to_end(finetuning, quiet)
