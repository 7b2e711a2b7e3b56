"""`stabie-ase pretrain`: energies and forces from random weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from stabie_ase.cli.main import check_device, main
from stabie_ase.cli.options import build, options_from
from stabie_ase.cli.progress import Progress
from stabie_ase.training.config import PretrainConfig


@main.command()
@click.option("--model", "family", type=click.Choice(["schnet", "mace"]), required=True, help="Family of the model.")
@click.option("--ref", "reference", required=True, metavar="FILE", help="Frames with energies and forces.")
@click.option("-o", "--output", required=True, metavar="MODEL", help="Checkpoint to write.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--energy-key", help="Name of the energies in the reference.")
@click.option("--forces-key", help="Name of the forces in the reference.")
@options_from(PretrainConfig)
@click.pass_context
def pretrain(context, family, reference, output, device, dtype, energy_key, forces_key, **given):
    """Train a new model on energies and forces.

    The same command goes on where an interrupted one stopped.
    """
    import torch

    from stabie_ase.potentials.checkpoint import save_potential, write_atomically
    from stabie_ase.reference import read_reference
    from stabie_ase.training.pretrain import BUILDERS, Pretraining
    from stabie_ase.training.pretrain import pretrain as run

    config, quiet = build(PretrainConfig, given), context.obj["quiet"]
    check_device(device)
    output, state_path = Path(output), Path(output + ".pretrain")
    _check_output(output)
    frames = read_reference(reference, energy_key, forces_key, min_frames=10)
    torch.manual_seed(config.seed)
    potential = BUILDERS[family](frames).to(device=device, dtype=getattr(torch, dtype))
    training = Pretraining(potential, frames, config)
    fixed = asdict(config) | {"family": family, "reference": frames.source, "dtype": dtype}
    fixed = {name: value for name, value in fixed.items() if name not in ("epochs", "max_time_min")}
    if state_path.exists():
        saved = torch.load(state_path, weights_only=True)
        if saved["options"] != fixed:
            raise click.ClickException(f"{state_path} is of a run with other options; remove it to begin anew")
        training.restore(saved["training"])
    elif output.exists():
        raise click.ClickException(f"{output} exists; remove it or choose another --output")
    if not quiet:
        click.echo(f"Reference: {frames.source}")
        click.echo(f"Training {family} on {len(training.train)} frames, validating on {len(training.validation)}")

    with Progress(60 * config.max_time_min, "pretrain", quiet=quiet) as progress:

        def on_epoch(record):
            write_atomically({"options": fixed, "training": training.state()}, state_path)
            used = max(training.seconds, 60 * config.max_time_min * training.epoch / config.epochs)
            progress.show(used, f"epoch {record['epoch']}, force MAE {1000 * record['force_mae_eV_per_A']:.1f} meV/Å")

        run(training, on_epoch)
    save_potential(potential, output)
    state_path.unlink(missing_ok=True)
    click.echo(
        f"Wrote {output}: best of {training.epoch} epochs at {training.best_epoch}, validation force RMSE "
        f"{1000 * training.best_error:.1f} meV/Å, {training.seconds:.0f} s"
    )


def _check_output(output: Path) -> None:
    if not output.parent.is_dir():
        raise click.ClickException(f"{output.parent} is no directory; make it or choose another --output")
