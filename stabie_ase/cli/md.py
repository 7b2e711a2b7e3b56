"""`stabie-ase md`: the batched engine as a tool of its own."""

from __future__ import annotations

import logging
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import click

from stabie_ase.cli.config_file import META
from stabie_ase.cli.log import keep_log, tell
from stabie_ase.cli.main import check_device, main, model_options, told_how_to_go_on
from stabie_ase.cli.options import Sectioned, build, changed, flag, options_from
from stabie_ase.cli.progress import Progress, Rate
from stabie_ase.runs.options import MDConfig
from stabie_ase.system.options import BadOption, from_dict, with_temperature

logger = logging.getLogger(__name__)

SECTIONS = {
    "Files": ("start", "output", "resume", "config", "one_file"),
    "Model": ("device", "dtype", "head", "compilation", "trust_checkpoint"),
    "Dynamics": (),
}

SAFE_TIMESTEP_FS = 1.0
"""For hydrogen; the fastest vibration of an atom slows down with the root of its mass."""


@main.command(cls=Sectioned, sections=SECTIONS)
@click.argument("model", required=False)
@click.option("--start", metavar="FILE", help="Frames to start from, in any format ASE knows; FILE@0:100, FILE.db@QUERY or a pattern")
@click.option("--output", metavar="RUN", help="Directory to write to [default: MODEL's name with -md]")
@click.option("--resume", metavar="RUN", help="Go on to the end, or to a later one given with --time")
@click.option("--one-file", is_flag=True, help="All frames in frames.traj instead of one file a replica")
@model_options
@options_from(MDConfig)
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
    else:
        if not model or not start:
            raise click.UsageError("give MODEL and --start FILE, or --resume RUN", context)
        output = output or f"{Path(model).parent / Path(model).stem}-md"
        _begin(context, output, inputs | {"model": model, "start": start}, build(MDConfig, given))


def _begin(context, output, inputs, config: MDConfig) -> None:
    from stabie_ase.dynamics.compilation import compile_where_wanted
    from stabie_ase.runs.md import MDDirectory, Production
    from stabie_ase.structures.reference import absolute, digest

    check_device(inputs["device"])
    MDDirectory.check_free(output)
    setup = _set_up(inputs, config)
    production = Production(*setup)
    _, potential, frames, _ = setup
    say = None if context.obj["quiet"] else tell
    _tell_momenta(production, config.temperature_K, say)
    inputs["compilation"] = compile_where_wanted(
        inputs["compilation"], potential, frames, config.replicas, steps=production.n_steps, say=say
    )
    files = ("model", "start")
    directory = MDDirectory.create(
        output,
        {
            "config": asdict(production.config),
            "inputs": inputs | {name: absolute(inputs[name]) for name in files},
            "digests": {name: digest(inputs[name]) for name in files},
        },
    )
    _run(context, directory, production, inputs)


def _go_on(context, path, typed, given) -> None:
    from stabie_ase.dynamics.compilation import compile_where_wanted
    from stabie_ase.runs.directory import UnusableRun, in_words
    from stabie_ase.runs.md import MDDirectory, Production
    from stabie_ase.structures.reference import digest, files_of

    directory, saved = MDDirectory.open(path)
    try:
        # The directory may be someone else's: trust is given anew each time.
        trust = {"trust_checkpoint": typed.pop("trust_checkpoint", False)}
        config, inputs = from_dict(MDConfig, saved["config"]), {"compilation": "off"} | saved["inputs"] | trust
        files = {inputs[name]: (name, saved["digests"][name]) for name in ("model", "start")}
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableRun(f"{directory.config_path} is damaged ({in_words(error)})") from error
    other = [flag(name) for name, value in typed.items() if inputs[name] != value]
    _refuse(other + [name for name in changed(config, given) if name != "--time"])
    if given["time_ps"]:
        if config.end_temperature_K is not None:
            raise click.UsageError("the ramp of a run cannot be made longer: --time does not go with --end-temperature", context)
        config = replace(config, time_ps=given["time_ps"])
    for file, (name, before) in files.items():
        if not all(path.is_file() for path in files_of(file)) or digest(file) != before:
            raise UnusableRun(f"the {name} file of {path} is gone or has changed: {file}")
    check_device(inputs["device"])
    setup = _set_up(inputs, config)
    production = Production(*setup)
    _, potential, frames, _ = setup
    compile_where_wanted(inputs["compilation"], potential, frames, config.replicas)
    _run(context, directory, production, inputs)


def _refuse(flags: list[str]) -> None:
    if flags:
        raise click.ClickException(f"--resume goes on with what the run was begun with; leave out {', '.join(flags)}")


def _set_up(inputs, config: MDConfig):
    """Everything that can be wrong before anything is written."""
    from stabie_ase.potentials.checkpoint import load_potential
    from stabie_ase.stability import criteria_from
    from stabie_ase.structures.reference import common_temperature, read_frames
    from stabie_ase.structures.setting import Setting

    frames = read_frames(inputs["start"])
    found = common_temperature(frames)
    if config.ensemble == "nve" and not config.new_momenta:
        found = found or _kinetic_temperature(frames)
    config = with_temperature(config, found, "the file of starting frames")
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
    # Frames that tell no temperature may be relaxed ones.
    criteria = criteria_from(config.criterion or "", Setting(frames, config.temperature_K, common_temperature(frames) or 0.0))
    return config, potential, frames, [criterion.for_model(potential) for criterion in criteria]


def _kinetic_temperature(frames) -> float | None:
    """Mean over the frames that have momenta, in K."""
    from ase.constraints import FixCom

    from stabie_ase.dynamics.state import has_momenta

    moving = [atoms.copy() for atoms in frames if has_momenta(atoms)]
    for atoms in moving:  # drift is no heat
        atoms.set_constraint(atoms.constraints or FixCom())
        atoms.set_momenta(atoms.get_momenta())
    found = [atoms.get_temperature() if atoms.get_number_of_degrees_of_freedom() else 0.0 for atoms in moving]
    return max(1e-3, sum(found) / len(found)) if found else None


def _tell_momenta(production, asked_K: float | None, say) -> None:
    """What became of the momenta in the file, if there are any."""
    config, n_kept = production.config, sum(production.from_file)
    if not n_kept:
        return
    text = f"Momenta: {n_kept} of {config.replicas} replicas start with those in the file"
    if n_kept < config.replicas:
        text += f", the others (a frame used again, or without momenta) with new ones at {config.temperature_K:g} K"
    if say:
        say(text)
    if config.ensemble == "nve" and asked_K is not None:
        logger.warning("--temperature %g is not used for the momenta in the file; --new-momenta draws new ones at it", asked_K)


def _run(context, directory, production, inputs) -> None:
    config, quiet = production.config, context.obj["quiet"]
    resume_command = directory.resume_command + (" --trust-checkpoint" if inputs["trust_checkpoint"] else "")
    directory.claim()
    keep_log(directory)
    directory.arrange(config.replicas, inputs["one_file"])
    production.take_up(directory)
    if not quiet:
        bath = "" if config.ensemble == "nve" else f", {config.temperature_K:g} K"
        tell(f"{config.replicas} replicas, {config.ensemble}{bath}, to {config.time_ps:g} ps")
        if production.criteria:
            tell(f"Unstable: {'; '.join(criterion.describe() for criterion in production.criteria)}")
        tell(f"Directory: {directory.path}\nctrl-C is safe; to go on: {resume_command}")
    rate = Rate()
    with Progress(production.n_steps, "md", quiet, production.done) as progress:

        def on_sample(steps, state, stopped):
            fraction = f"stopped {100 * float(stopped.double().mean()):.0f} %, "
            progress.show(steps, fraction + rate.update(int(state.step.sum())))

        with told_how_to_go_on(lambda: f"go on with: {resume_command}"):
            production.run(on_sample)
        progress.done = progress.total  # all may have been stopped long before
    _tell_end(production)


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
