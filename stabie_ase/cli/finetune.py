"""`stabie-ase finetune`: StABIE training of an existing checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from stabie_ase.cli.main import check_device, common_options, main
from stabie_ase.cli.options import build, changed, options_from
from stabie_ase.cli.progress import Progress, Rate
from stabie_ase.training.config import FinetuneConfig


@main.command()
@click.argument("model", required=False)
@click.option("--ref", "reference", metavar="FILE", help="Reference frames with energies and forces.")
@click.option("--valid", "validation", metavar="FILE", help="Unseen frames to judge accuracy by.")
@click.option("--output", metavar="RUN", help="Run directory [default: MODEL's name with -stabie]")
@click.option("--resume", metavar="RUN", help="Go on with an interrupted run.")
@click.option("--config", "config_file", metavar="FILE", help="Options as JSON; flags win.")
@common_options
@options_from(FinetuneConfig)
@click.pass_context
def finetune(context, model, reference, output, resume, config_file, **given):
    """Make MODEL stable without new quantum calculations."""
    from stabie_ase.training.run import Inputs, prepare
    from stabie_ase.training.run import resume as take_up

    quiet = context.obj["quiet"]
    inputs = {name: given.pop(name) for name in list(given) if name in Inputs.__dataclass_fields__}
    check_device(inputs["device"])

    def on_read(text):
        if not quiet:
            click.echo(f"Reference: {text}")

    if resume:
        finetuning = take_up(resume, on_read)
        _refuse_changes(context, finetuning, model, reference, output, config_file, inputs, given)
        if finetuning.complete:
            click.echo(f"{resume} is finished; its result is {finetuning.model_path}")
            return
    else:
        if not model or not reference:
            raise click.UsageError("give MODEL and --ref FILE, or --resume RUN")
        config = build(FinetuneConfig, given, config_file)
        output = output or str(Path(model).with_suffix("")) + "-stabie"
        finetuning = prepare(output, Inputs(model, reference, **inputs), config, on_read)
    run_to_end(finetuning, quiet)


def _refuse_changes(context, finetuning, model, reference, output, config_file, inputs, given) -> None:
    parameters = {name for name in inputs if context.get_parameter_source(name).name == "COMMANDLINE"}
    different = changed(finetuning.config, given)
    different += [f"--{name.replace('_', '-')}" for name in parameters if inputs[name] != getattr(finetuning.inputs, name)]
    different += [name for name, value in {"MODEL": model, "--ref": reference, "--output": output, "--config": config_file}.items() if value]
    if different:
        raise click.UsageError(
            f"--resume goes on with the options the run began with; leave out {', '.join(different)}, or begin a new run"
        )


def run_to_end(finetuning, quiet: bool) -> dict:
    """Run with progress, write the report, print the table."""
    from stabie_ase.report.html import write_report
    from stabie_ase.report.table import format_table

    directory, training, config = finetuning.directory, finetuning.training, finetuning.config
    if not quiet:
        click.echo(f"Run directory: {directory.path} (ctrl-C is safe: stabie-ase finetune --resume {directory.path})")
    rate = Rate()
    try:
        with Progress(_budget(config), "stabie", quiet=quiet) as progress:

            def on_block(steps, state, failures):
                live = training.progress
                done = live.md_steps + steps * config.replicas
                share = max(failures.share, float(training.failed.double().mean())) if live.phase == "simulation" else failures.share
                progress.show(
                    _used(training),
                    f"cycle {live.cycle} {live.phase} {live.window + 1}, unstable {100 * share:.0f} %, {rate.update(done)}",
                )

            training.on_block = on_block
            finetuning.run(on_check=_checker(quiet, config))
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; go on with: stabie-ase finetune --resume {directory.path}", err=True)
        raise click.exceptions.Exit(130) from None
    import json

    result = json.loads((directory.path / "result.json").read_text())
    report = write_report(directory.path)
    click.echo(format_table(result["models"]))
    click.echo(result["message"])
    click.echo(f"Model: {finetuning.model_path}\nReport: {report}")
    if directory.unstable_path.exists():
        click.echo(f"Unstable frames: stabie-ase view {directory.path}")
    return result


def _budget(config) -> float:
    return 60.0 * config.max_time_min


def _used(training) -> float:
    """Seconds of the budget used, or their equal in cycles or updates where those run out first."""
    config, live = training.config, training.progress
    shares = [live.seconds / (60.0 * config.max_time_min)] if config.max_time_min else [1.0]
    if config.max_cycles:
        shares.append(live.cycle / config.max_cycles)
    if config.max_updates:
        shares.append(live.updates / config.max_updates)
    return max(shares) * _budget(config)


def _checker(quiet: bool, config):
    """Progress of the final comparison, one line each half minute."""
    total = config.check_ps * 1000.0 / config.timestep_fs
    holder = {}

    def on_block(steps, state, failures):
        if "bar" not in holder or steps < holder["last"]:
            holder["bar"] = Progress(total, "comparison", quiet=quiet)
        holder["last"] = steps
        holder["bar"].show(steps, f"unstable {100 * failures.share:.0f} %")
        if steps >= total and holder["bar"].bar:
            holder["bar"].bar.close()

    return on_block
