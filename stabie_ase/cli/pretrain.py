"""`stabie-ase pretrain`: energies and forces from random weights."""

from __future__ import annotations

import click

from stabie_ase.cli.main import check_device, main
from stabie_ase.cli.options import build, options_from, reference_option
from stabie_ase.cli.progress import Terminal
from stabie_ase.potentials.family import names
from stabie_ase.system.files import check_new_file
from stabie_ase.training.pretrain_options import PretrainOptions


@main.command()
@click.option("--model", "family", type=click.Choice(names()), required=True, help="Family of the model")
@reference_option("Frames with energies and forces")
@click.option("-o", "--output", required=True, metavar="MODEL", help="Checkpoint to write")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True, help="Precision")
@click.option("--energy-key", metavar="NAME", help="Energies in the reference [default: found by itself]")
@click.option("--forces-key", metavar="NAME", help="Forces in the reference [default: found by itself]")
@options_from(PretrainOptions)
@click.pass_context
def pretrain(context, family, reference, output, device, dtype, energy_key, forces_key, **given):
    """Train a new model on energies and forces.

    The same command goes on where an interrupted one stopped, from MODEL.pretrain.
    """
    check_new_file(output)

    from stabie_ase.potentials.family import families
    from stabie_ase.runs.pretrain import PretrainInputs, PretrainRun

    config = build(PretrainOptions, given, families()[family].pretraining)
    check_device(device)
    inputs = PretrainInputs(family, reference, energy_key, forces_key, device, dtype)
    with Terminal(context.obj["quiet"]) as terminal:
        run = PretrainRun.begin_or_resume(output, inputs, config, terminal)
        run.run(terminal)
    training = run.training
    click.echo(
        f"Wrote {output}: best of {training.epoch} epochs at {training.best_epoch}, validation force RMSE "
        f"{1000 * training.best_error:.1f} meV/Å, {training.seconds:.0f} s"
    )
