"""`stabie-ase finetune`: StABIE training of an existing checkpoint."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import click

from stabie_ase.cli.config_file import META
from stabie_ase.cli.log import keep_log, tell
from stabie_ase.cli.main import check_device, common_options, explain, main, told_how_to_go_on
from stabie_ase.cli.options import Sectioned, build, changed, options_from, reference_option
from stabie_ase.cli.progress import Progress, Rate
from stabie_ase.training.options import FinetuneConfig

SECTIONS = {
    "Files": ("reference", "validation", "output", "resume", "config", "energy_key", "forces_key"),
    "What to match and how long": ("observable", "update", "observable_weight", "max_time_min", "max_cycles", "max_updates", "seed"),
    "Model": ("device", "dtype", "head", "compilation", "trust_checkpoint"),
    "Dynamics": (
        "temperature_K", "timestep_fs", "thermostat", "friction_per_fs", "relaxation_time_fs", "replicas", "window_fs", "sample_every_fs",
        "check_every_fs", "criterion",
    ),
    "Final comparison": ("check_criterion", "check_replicas", "check_time_ps", "check_rounds", "check_max_time_min"),
    "Phases and learning": (),
}  # fmt: skip


@main.command(cls=Sectioned, sections=SECTIONS)
@click.argument("model", required=False)
@reference_option("Reference frames with energies and forces", required=False)
@click.option("--valid", "validation", metavar="FILE", help="Unseen frames to judge accuracy by")
@click.option("--output", metavar="RUN", help="Run directory [default: MODEL's name with -stabie]")
@click.option("--resume", metavar="RUN", help="Go on with an interrupted run")
@common_options
@options_from(FinetuneConfig)
@click.pass_context
def finetune(context, model, reference, validation, output, resume, **given):
    """Make MODEL stable without new quantum calculations.

    Give MODEL and --ref FILE to begin a run, or --resume RUN to go on with one.
    """
    names = {"device", "dtype", "energy_key", "forces_key", "head", "compilation", "trust_checkpoint"}
    inputs = {name: given.pop(name) for name in names} | {"validation": validation}
    if resume:
        typed = {name for name in inputs if context.get_parameter_source(name).name == "COMMANDLINE"}
        files = {"MODEL": model, "--ref": reference, "--output": output, "--config": context.meta.get(META), "--valid": validation}
        _go_on(context, resume, files, {name: inputs[name] for name in typed if name != "validation"}, given)
    else:
        _begin(context, model, reference, output, inputs, given)


def _begin(context, model, reference, output, inputs, given) -> None:
    if not model or not reference:
        raise click.UsageError("give MODEL and --ref FILE, or --resume RUN", context)
    config = build(FinetuneConfig, given)

    from stabie_ase.runs.finetune import Inputs, prepare

    check_device(inputs["device"])
    output = output or f"{Path(model).parent / Path(model).stem}-stabie"
    finetuning = prepare(output, Inputs(model, reference, **inputs), config, _say(context.obj["quiet"]))
    run_to_end(finetuning, context.obj["quiet"])


def _go_on(context, path, files, inputs, given) -> None:
    from stabie_ase.runs.finetune import model_path, open_run
    from stabie_ase.runs.finetune import resume as take_up

    directory, saved_inputs, config, _ = open_run(path)
    different = [name for name, value in files.items() if value] + changed(saved_inputs, inputs) + changed(config, given)
    if different:
        raise click.UsageError(
            f"--resume goes on with the options the run began with; leave out {', '.join(different)}, or begin a new run", context
        )
    if directory.complete:
        _report(directory)
        tell(f"{path} is finished; its model is {model_path(directory, saved_inputs)}")
        return
    if saved_inputs.trust_checkpoint and not inputs.get("trust_checkpoint"):
        raise click.UsageError(f"{path} was begun with --trust-checkpoint; give it again if you still trust the model", context)
    check_device(saved_inputs.device)
    run_to_end(take_up(path, _say(context.obj["quiet"])), context.obj["quiet"])


def _say(quiet: bool):
    return None if quiet else tell


def run_to_end(finetuning, quiet: bool) -> None:
    """Run with progress, print the table, write the report."""
    from stabie_ase.runs.report.causes import broken_in_words
    from stabie_ase.runs.report.table import format_table
    from stabie_ase.runs.report.view import read_frames
    from stabie_ase.stability.causes import broken

    directory = finetuning.directory
    keep_log(directory)
    resume_command = directory.resume_command + (" --trust-checkpoint" if finetuning.inputs.trust_checkpoint else "")
    if not quiet:
        tell(f"Run directory: {directory.path}\nctrl-C is safe; to go on: {resume_command}")
        loop, check = finetuning.config.max_time_min, finetuning.check_seconds / 60.0
        tell(f"Time: up to {loop:.3g} min for the loop, then up to about {check:.3g} min for the comparison")
    with told_how_to_go_on(lambda: f"go on with: {resume_command}"):
        _loop(finetuning, quiet)
        result = _comparison(finetuning, quiet)
    tell(format_table(result["models"], result["test"]["time_ps"]))
    tell("reference: {reference}\nheld-out: {held_out}".format(**result["frames"]))
    tell(result["message"])
    tell(f"Model: {finetuning.model_path}")
    tell(f"Report: {_report(directory)}")
    if directory.unstable_path.exists():
        tell(f"What broke in training: {broken_in_words(broken(read_frames(directory.unstable_path)))}")
        tell(f"Unstable frames: stabie-ase view {directory.path}")


def _loop(finetuning, quiet: bool) -> None:
    training, config = finetuning.training, finetuning.config
    rate, log, live = Rate(), logging.getLogger("stabie_ase"), training.progress
    with Progress(60.0 * config.max_time_min, "stabie", quiet, _used(training)) as progress:

        def on_look(steps, state, failures):
            fraction = failures.fraction
            if live.phase == "simulation":  # those that failed in earlier windows are not in this one
                fraction = training.unstable_fraction + int(failures.failed.sum()) / training.n_replicas
            speed = rate.update(training.md_steps + steps * len(failures.step))
            progress.show(_used(training), f"cycle {live.cycle + 1} {live.phase}, unstable {100 * fraction:.0f} %, {speed}")

        def on_qm_step(k):
            what = f"cycle {live.cycle + 1}, update {live.updates + 1}"
            progress.show(_used(training), f"{what}, energies and forces {k} of {config.labels.qm_steps}")

        training.on_look(on_look)
        training.work.on_label_step = on_qm_step
        finetuning.train(lambda record: log.info("%s", _window_line(record)))
        progress.done = progress.total


def _window_line(record: dict) -> str:
    skip = ("phase", "cycle", "window")
    values = (f"{name} {value:.4g}" for name, value in record.items() if name not in skip and isinstance(value, (int, float)))
    return f"cycle {record['cycle'] + 1} {record['phase']} {record['window']}: {', '.join(values)}"


def _comparison(finetuning, quiet: bool) -> dict:
    """The final comparison with its own progress."""
    from stabie_ase.runs.finetune import LONGEST_CHECK

    config, time_ps, log = finetuning.config, finetuning.check_ps, logging.getLogger("stabie_ase")
    if config.check.time_ps is None and time_ps < LONGEST_CHECK:
        log.info("replicas of the comparison run %.2g ps, so that a round fits its time; see --check-max-time", time_ps)
    began, n_steps = time.monotonic(), config.dynamics.steps(1000.0 * time_ps)
    with Progress(finetuning.check_seconds, "comparison", quiet) as progress:

        def on_check(model, k, steps, state, failures):
            which = f"{model}, heat" if k >= config.check.rounds else f"{model}, round {k + 1}"
            unstable = f"{100 * steps / n_steps:.0f} % of the time, unstable {100 * failures.fraction:.0f} %"
            progress.show(time.monotonic() - began, f"{which}, {unstable}")

        result = finetuning.finish(on_check)
        progress.done = progress.total
    return result


def _report(directory) -> Path:
    """Write the report, unless an earlier call has."""
    from stabie_ase.runs.report.html import write_report

    try:
        return directory.report_path if directory.report_path.exists() else write_report(directory.path)
    except OSError as error:
        raise click.ClickException(
            f"the run is finished, but its report cannot be written to {directory.path}: {explain(error)}; "
            f"once it can: {directory.resume_command}"
        ) from error


def _used(training) -> float:
    """Seconds of the budget used, or their equal in cycles or updates where those run out first."""
    config, live = training.config, training.progress
    budget = 60.0 * config.max_time_min
    fractions = [training.seconds / budget] if budget else [1.0]
    if config.max_cycles:
        fractions.append(live.cycle / config.max_cycles)
    if config.max_updates:
        fractions.append(live.updates / config.max_updates)
    return max(fractions) * budget
