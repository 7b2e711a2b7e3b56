"""`stabie-ase md`: the batched engine as a tool of its own."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from stabie_ase.cli.config_file import META
from stabie_ase.cli.log import tell
from stabie_ase.cli.main import check_device, main, model_options
from stabie_ase.cli.options import Sectioned, build, changed, options_from
from stabie_ase.cli.progress import Terminal
from stabie_ase.runs.options import MDOptions

SECTIONS = {
    "Files": ("start", "output", "resume", "config", "one_file"),
    "Model": ("device", "dtype", "head", "compilation", "trust_checkpoint"),
    "Dynamics": (),
}


@main.command(cls=Sectioned, sections=SECTIONS)
@click.argument("model", required=False)
@click.option("--start", metavar="FILE", help="Frames to start from, in any format ASE knows; FILE@0:100, FILE.db@QUERY or a pattern")
@click.option("--output", metavar="RUN", help="Directory to write to [default: MODEL's name with -md]")
@click.option("--resume", metavar="RUN", help="Go on to the end, or to a later one given with --time")
@click.option("--one-file", is_flag=True, help="All frames in frames.traj instead of one file a replica")
@model_options
@options_from(MDOptions)
@click.pass_context
def md(context, model, start, output, resume, one_file, device, dtype, head, compilation, trust_checkpoint, **given):
    """Run replicas of molecular dynamics with MODEL.

    Give MODEL and --start FILE to begin a run, or --resume RUN to go on with one.
    """
    inputs = {
        "device": device,
        "dtype": dtype,
        "head": head,
        "compilation": compilation,
        "trust_checkpoint": trust_checkpoint,
        "one_file": one_file,
    }
    if resume:
        files = {"MODEL": model, "--start": start, "--output": output, "--one-file": one_file, "--config": context.meta.get(META)}
        _refuse([name for name, value in files.items() if value])
        typed = {name: value for name, value in inputs.items() if context.get_parameter_source(name).name == "COMMANDLINE"}
        _go_on(context, resume, typed, given)
        return
    if not model or not start:
        raise click.UsageError("give MODEL and --start FILE, or --resume RUN", context)
    config, output = build(MDOptions, given), output or f"{Path(model).parent / Path(model).stem}-md"

    from stabie_ase.runs.md import MDInputs, Production

    check_device(device)
    with Terminal(context.obj["quiet"]) as terminal:
        production = Production.begin(output, MDInputs(model, start, **inputs), config, terminal)
        production.run(terminal)
    _tell_end(production)


def _go_on(context, path, typed, given) -> None:
    from stabie_ase.runs.md import Production

    trust = typed.pop("trust_checkpoint", False)
    _, inputs, config, _ = Production.opened(path)
    _refuse(changed(inputs, typed) + [name for name in changed(config, given) if name != "--time"])
    later = {"time_ps": given["time_ps"]} if given["time_ps"] else {}
    if later and config.end_temperature_K is not None:
        raise click.UsageError("the ramp of a run cannot be made longer: --time does not go with --end-temperature", context)
    check_device(inputs.device)
    with Terminal(context.obj["quiet"]) as terminal:
        production = Production.resume(path, terminal, trust_checkpoint=trust, **later)
        production.run(terminal)
    _tell_end(production)


def _refuse(flags: list[str]) -> None:
    if flags:
        raise click.ClickException(f"--resume goes on with what the run was begun with; leave out {', '.join(flags)}")


def _tell_end(production) -> None:
    """How far replicas came, and what became of those that failed."""
    from ase.io import read

    from stabie_ase.runs.report.causes import failures_in_words

    config, directory = production.config, production.directory
    time_ps = production.done * config.timestep_fs / 1000.0
    n = int(production.stopped.sum())
    tell(f"{config.replicas} replicas at {time_ps:g} ps" + (f", {n} stopped before" if n else ""))
    if n or production.criteria:
        frames = read(directory.unstable.path, ":") if directory.unstable.length else []
        tell(failures_in_words(production.statistics, time_ps, frames))
    if n:
        tell(f"Unstable frames: stabie-ase view {shlex.quote(str(directory.path))}")
