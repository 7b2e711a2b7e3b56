"""`stabie-ase pretrain`: energies and forces from random weights."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from stabie_ase.cli.main import check_device, check_new_file, main, told_how_to_go_on
from stabie_ase.cli.options import build, options_from, reference_option
from stabie_ase.cli.progress import Progress
from stabie_ase.potentials.family import families, names
from stabie_ase.training.options import PretrainConfig

SAVE_EVERY = 5.0
"""Seconds between two saved states: what ctrl-C or a crash may cost, and an epoch can be shorter than a disk's sync."""


@main.command()
@click.option("--model", "family", type=click.Choice(names()), required=True, help="Family of the model")
@reference_option("Frames with energies and forces")
@click.option("-o", "--output", required=True, metavar="MODEL", help="Checkpoint to write")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True, help="Precision")
@click.option("--energy-key", metavar="NAME", help="Energies in the reference [default: found by itself]")
@click.option("--forces-key", metavar="NAME", help="Forces in the reference [default: found by itself]")
@options_from(PretrainConfig)
@click.pass_context
def pretrain(context, family, reference, output, device, dtype, energy_key, forces_key, **given):
    """Train a new model on energies and forces.

    The same command goes on where an interrupted one stopped, from MODEL.pretrain.
    """
    check_new_file(output)

    import torch
    from ase.data import chemical_symbols

    from stabie_ase.potentials.checkpoint import save_potential
    from stabie_ase.structures.reference import read_reference
    from stabie_ase.system.files import write_atomically
    from stabie_ase.training.pretrain import Pretraining

    made = families()[family]
    if made.build is None:
        raise click.BadParameter(f"{family} models cannot be trained from nothing; give a checkpoint to finetune", param_hint="--model")
    config, quiet = build(PretrainConfig, given, made.pretraining), context.obj["quiet"]
    check_device(device)
    frames = read_reference(reference, energy_key, forces_key, min_frames=10)
    torch.manual_seed(config.seed)
    potential = made.build(frames).to(device=device, dtype=getattr(torch, dtype))
    training = Pretraining(potential, frames, config)
    options = _options(config, family, dtype, reference, energy_key, forces_key)
    state_path = Path(output + ".pretrain")
    resumed = _restore(training, state_path, options)
    if not quiet:
        click.echo(f"Reference: {frames.source}")
        if frames.atom_energies:
            of = ", ".join(chemical_symbols[z] for z in sorted(frames.atom_energies))
            click.echo(f"Reference energies of {of} are those of the isolated atoms")
        click.echo(f"Training {family} on {len(training.train)} frames, validating on {len(training.validation)}")
        if resumed:
            click.echo(f"Going on after epoch {training.epoch}")

    def kept():
        return f"the same command goes on from {state_path}" if state_path.exists() else "nothing was saved yet"

    def used():
        return max(training.seconds, 60.0 * config.max_time_min * training.epoch / config.epochs)

    saved = time.monotonic()
    with Progress(60.0 * config.max_time_min, "pretrain", quiet, used()) as progress, told_how_to_go_on(kept):
        while not training.finished:
            record = training.run_epoch()
            progress.show(used(), f"epoch {record['epoch']}, force MAE {1000 * record['force_mae_eV_per_A']:.1f} meV/Å")
            if time.monotonic() - saved > SAVE_EVERY:
                write_atomically({"options": options, "training": training.state()}, state_path)
                saved = time.monotonic()
    training.take_best()
    save_potential(potential, output)
    state_path.unlink(missing_ok=True)
    click.echo(
        f"Wrote {output}: best of {training.epoch} epochs at {training.best_epoch}, validation force RMSE "
        f"{1000 * training.best_error:.1f} meV/Å, {training.seconds:.0f} s"
    )


def _options(config: PretrainConfig, family: str, dtype: str, reference: str | list[str], energy_key, forces_key) -> dict:
    """What must be the same for a state to be gone on with; the budget may be raised."""
    from stabie_ase.structures.reference import digest

    options = {name: value for name, value in asdict(config).items() if name not in ("epochs", "max_time_min")}
    return options | {"family": family, "dtype": dtype, "reference": digest(reference), "energy_key": energy_key, "forces_key": forces_key}


def _restore(training, path: Path, options: dict) -> bool:
    """Go on from a saved state if there is one."""
    import torch

    if not path.exists():
        return False
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        different = sorted(name for name in options if saved["options"].get(name) != options[name])
        if not different:
            training.restore(saved["training"])
    except Exception as error:  # a damaged file ends in whatever the bytes lead to
        raise click.ClickException(f"{path} is damaged ({type(error).__name__}); remove it to begin anew") from error
    if different:
        raise click.ClickException(f"{path} is of a run with another {', '.join(different)}; remove it to begin anew")
    return True
