"""`stabie-ase md`: the batched engine as a tool of its own."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, replace
from pathlib import Path

import click

from stabie_ase.cli.main import check_device, main, told_how_to_go_on
from stabie_ase.cli.options import Sectioned, build, changed, options_from
from stabie_ase.cli.progress import Progress, Rate
from stabie_ase.config import BadOption, MDConfig, from_dict, with_temperature

logger = logging.getLogger(__name__)

SECTIONS = {
    "Files": ("start", "output", "resume", "one_file"),
    "Model": ("device", "dtype", "head", "trust_checkpoint"),
    "Dynamics": (),
}

SAFE_TIMESTEP_FS = 1.0
"""For hydrogen; the fastest vibration of an atom slows down with the root of its mass."""


@main.command(cls=Sectioned, sections=SECTIONS)
@click.argument("model", required=False)
@click.option("--start", metavar="FILE", help="Frames to start from, in any format ASE knows")
@click.option("--output", metavar="RUN", help="Directory to write to [default: MODEL's name with -md]")
@click.option("--resume", metavar="RUN", help="Go on to the end, or to a later one given with --time")
@click.option("--one-file", is_flag=True, help="All frames in frames.traj instead of one file a replica")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Precision [default: the model's]")
@click.option("--head", metavar="NAME", help="Head of a multi-head model")
@click.option("--trust-checkpoint", is_flag=True, help="Run code that a pickled checkpoint carries")
@options_from(MDConfig)
@click.pass_context
def md(context, model, start, output, resume, one_file, device, dtype, head, trust_checkpoint, **given):
    """Run replicas of molecular dynamics with MODEL.

    Give MODEL and --start FILE to begin a run, or --resume RUN to go on with one.
    """
    from stabie_ase.directory import UnusableRun, in_words
    from stabie_ase.production import MDDirectory

    if resume:
        files = {"MODEL": model, "--start": start, "--output": output, "--one-file": one_file}
        _refuse([name for name, value in files.items() if value])
        directory, saved = MDDirectory.open(resume)
        try:
            config, inputs = from_dict(MDConfig, saved["config"]), dict(saved["inputs"])
            different = [name for name in changed(config, given) if name != "--time"]
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableRun(f"{directory.config_path} is damaged ({in_words(error)})") from error
        _refuse(different)
        config = replace(config, time_ps=given["time_ps"] or config.time_ps)
        if config.end_temperature_K is not None and given["time_ps"]:
            raise click.UsageError("the ramp of a run cannot be made longer: --time does not go with --end-temperature", context)
        for name, digest in saved["digests"].items():
            if not Path(inputs[name]).is_file() or _digest(inputs[name]) != digest:
                raise UnusableRun(f"the {name} file of {resume} is gone or has changed: {inputs[name]}")
        inputs["trust_checkpoint"] = trust_checkpoint or inputs["trust_checkpoint"]
        check_device(inputs["device"])
    else:
        if not model or not start:
            raise click.UsageError("give MODEL and --start FILE, or --resume RUN", context)
        config = build(MDConfig, given)
        check_device(device)
        output = output or f"{Path(model).parent / Path(model).stem}-md"
        MDDirectory.check_free(output)
        inputs = {
            "model": model, "start": start, "device": device, "dtype": dtype, "head": head,
            "trust_checkpoint": trust_checkpoint, "one_file": one_file,
        }  # fmt: skip
    frames, potential, config, criterion = _set_up(inputs, config)
    if not resume:
        description = {
            "config": asdict(config),
            "inputs": inputs | {name: str(Path(inputs[name]).absolute()) for name in ("model", "start")},
            "digests": {name: _digest(inputs[name]) for name in ("model", "start")},
        }
        directory = MDDirectory(output)
    _run(context.obj["quiet"], directory, None if resume else description, inputs, config, potential, frames, criterion)


def _refuse(flags: list[str]) -> None:
    if flags:
        raise click.ClickException(f"--resume goes on with what the run was begun with; leave out {', '.join(flags)}")


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _set_up(inputs, config: MDConfig):
    """Everything that can be wrong before anything is written."""
    from stabie_ase.potentials.checkpoint import load_potential
    from stabie_ase.reference import common_temperature, read_frames
    from stabie_ase.stability import criterion_from

    frames = read_frames(inputs["start"])
    config = with_temperature(config, common_temperature(frames), "the file of starting frames")
    if config.ensemble.startswith("npt") and not all(atoms.pbc.all() and atoms.cell.rank == 3 for atoms in frames):
        raise BadOption(f"{config.ensemble} needs frames with a cell that are periodic in all three directions; use nvt or nve")
    potential = load_potential(inputs["model"], inputs["device"], inputs["dtype"], inputs["trust_checkpoint"], inputs["head"])
    potential.check_numbers(z for atoms in frames for z in set(atoms.numbers))
    lightest = min(atoms.get_masses().min() for atoms in frames)
    safe = SAFE_TIMESTEP_FS * (lightest / 1.008) ** 0.5
    if config.timestep_fs > safe:
        logger.warning(
            "a time step of %g fs is long for atoms of %.3g amu; up to %.2g fs is usual", config.timestep_fs, lightest, safe
        )
    return frames, potential, config, criterion_from(config.criterion, frames) if config.criterion else None


def _run(quiet, directory, description, inputs, config, potential, frames, criterion) -> None:
    from stabie_ase.production import MDDirectory, Production

    production = Production(directory, config, potential, frames, criterion)
    if description:
        directory = production.directory = MDDirectory.create(directory.path, description)
    directory.claim()
    directory.arrange(config.replicas, inputs["one_file"])
    production.take_up(None if description else directory.load())
    if not quiet:
        click.echo(f"{config.replicas} replicas, {config.ensemble}, {config.temperature_K:g} K, to {config.time_ps:g} ps")
        click.echo(f"Directory: {directory.path}\nctrl-C is safe; to go on: {directory.resume_command}")
    rate = Rate()
    with Progress(production.n_steps, "md", quiet) as progress:

        def on_sample(steps, state, stopped):
            share = f"stopped {100 * float(stopped.double().mean()):.0f} %, "
            progress.show(steps, share + rate.update(int(state.step.sum())))

        with told_how_to_go_on(lambda: f"go on with: {directory.resume_command}"):
            production.run(on_sample)
    n = int(production.stopped.sum())
    click.echo(f"{config.replicas} replicas at {production.done * config.timestep_fs / 1000:g} ps" + (f", {n} stopped before" if n else ""))
