"""`stabie-ase finetune`: StABIE training of an existing checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from stabie_ase.cli.config_file import META
from stabie_ase.cli.log import tell
from stabie_ase.cli.main import OF_THE_INPUTS, check_device, common_options, main
from stabie_ase.cli.options import Sectioned, changed, options_from, reference_option
from stabie_ase.cli.progress import Terminal
from stabie_ase.system.options import from_dict
from stabie_ase.training.options import FinetuneOptions

SECTIONS = {
    "Files": ("reference", "validation", "output", "resume", "config", "energy_key", "forces_key"),
    "What to match and how long": (
        "recipe", "observable", "estimator", "update", "observable_weight", "max_time_min", "max_cycles", "max_updates", "seed",
    ),
    "Model": ("device", "dtype", "head", "compilation", "trust_checkpoint"),
    "Dynamics": (
        "temperature_K", "timestep_fs", "thermostat", "friction_per_fs", "relaxation_time_fs", "replicas", "window_fs", "sample_every_fs",
        "check_every_fs", "criterion",
    ),
    "Final comparison": ("check_criterion", "check_replicas", "check_time_ps", "check_rounds", "check_max_time_min"),
    "Phases and learning": (),
}  # fmt: skip


def _from_a_file(context, parameter, value):
    """Several state points do not fit behind a flag."""
    if isinstance(value, str):
        raise click.UsageError("--conditions is a list of state points, each with options of its own: give it in a --config FILE", context)
    return value


@main.command(cls=Sectioned, sections=SECTIONS)
@click.argument("model", required=False)
@reference_option("Reference frames with energies and forces", required=False)
@click.option("--valid", "validation", metavar="FILE", help="Unseen frames to judge accuracy by")
@click.option("--output", metavar="RUN", help="Run directory [default: MODEL's name with -stabie]")
@click.option("--resume", metavar="RUN", help="Go on with an interrupted run")
@click.option("--conditions", type=click.UNPROCESSED, callback=_from_a_file, hidden=True)
@common_options
@options_from(FinetuneOptions)
@click.pass_context
def finetune(context, model, reference, validation, output, resume, **given):
    """Make MODEL stable without new quantum calculations.

    Give MODEL and --ref FILE to begin a run, or --resume RUN to go on with one.
    """
    inputs = {name: given.pop(name) for name in OF_THE_INPUTS}
    typed = {name for name in inputs if context.get_parameter_source(name).name == "COMMANDLINE"}
    given = {name: value for name, value in given.items() if value is not None}
    if resume:
        files = {"MODEL": model, "--ref": reference, "--output": output, "--config": context.meta.get(META), "--valid": validation}
        _go_on(context, resume, [name for name, value in files.items() if value], {name: inputs[name] for name in typed}, given)
        return
    if not model or not reference:
        raise click.UsageError("give MODEL and --ref FILE, or --resume RUN", context)
    begin(context, model, reference, output or f"{Path(model).parent / Path(model).stem}-stabie", validation, **inputs, **given)


def begin(context, model, reference, output, validation=None, **options) -> None:
    """Begin a run, take it to its end and tell what came of it."""
    from_dict(FinetuneOptions, {name: value for name, value in options.items() if name not in OF_THE_INPUTS})  # a typo needs no torch

    import stabie_ase

    check_device(options.get("device", "cpu"))
    with Terminal(context.obj["quiet"]) as terminal:
        _tell(stabie_ase.finetune(model, reference, validation=validation, output=output, monitor=terminal, **options))


def _go_on(context, path, files, inputs, given) -> None:
    import stabie_ase
    from stabie_ase.runs.finetune import Finetuning
    from stabie_ase.runs.live import result_of

    trust = inputs.get("trust_checkpoint", False)
    directory, saved, config, _ = Finetuning.opened(path)
    different = files + changed(saved, inputs) + changed(config, given)
    if different:
        raise click.UsageError(
            f"--resume goes on with the options the run began with; leave out {', '.join(different)}, or begin a new run", context
        )
    if directory.complete:
        tell(f"{path} is finished; its model is {result_of(directory, saved).model_path}")
        return
    check_device(saved.device)
    with Terminal(context.obj["quiet"]) as terminal:
        _tell(stabie_ase.resume(path, monitor=terminal, trust_checkpoint=trust))


def _tell(result) -> None:
    """The table, the verdict, and where everything is."""
    from stabie_ase.runs.finetune_directory import RunDirectory
    from stabie_ase.runs.report.causes import broken_in, broken_in_words
    from stabie_ase.runs.report.table import format_table

    details = result.details
    tell(format_table(result.models, details["test"]["time_ps"]))
    tell("reference: {reference}\nheld-out: {held_out}".format(**details["frames"]))
    tell(result.message)
    tell(f"Model: {result.model_path}")
    tell(f"Report: {result.report_path}")
    unstable = RunDirectory(result.path).unstable_path
    if unstable.exists():
        tell(f"What broke in training: {broken_in_words(broken_in(unstable))}")
        tell(f"Unstable frames: stabie-ase view {result.path}")
