"""`stabie-ase evaluate`: stability, observable and errors of one or several models."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from stabie_ase.cli.main import check_device, check_new_file, common_options, main
from stabie_ase.cli.options import build, options_from, reference_option
from stabie_ase.cli.progress import Progress, Rate
from stabie_ase.config import BadOption, EvaluationConfig, with_temperature
from stabie_ase.system.files import replaced


@main.command(short_help="Measure stability and errors of models.")
@click.argument("model")
@reference_option("Frames to start from and to compare with")
@click.option("--compare", multiple=True, metavar="OTHER", help="Another model, from the same starts and seeds; may be repeated")
@click.option("--output", metavar="JSON", help="Write the figures there")
@options_from(EvaluationConfig)
@common_options
@click.pass_context
def evaluate(
    context, model, reference, compare, output, device, dtype, energy_key, forces_key, head, compilation, trust_checkpoint, **given
):
    """Time to first failure, h(r) error and energy/force errors of MODEL."""
    config, quiet = build(EvaluationConfig, given), context.obj["quiet"]
    if output:
        check_new_file(output)

    from stabie_ase.dynamics.compilation import compile_where_wanted
    from stabie_ase.observables import default_observable, observables_from
    from stabie_ase.potentials.checkpoint import load_potential
    from stabie_ase.runs.checks import check_labels
    from stabie_ase.runs.evaluation import StabilityTest, Yardstick, failures_p_value, summarize
    from stabie_ase.runs.report.table import format_table
    from stabie_ase.structures.reference import read_reference
    from stabie_ase.structures.setting import Setting
    from stabie_ase.training.labels import LabelledFrames, qm_errors

    check_device(device)
    frames = read_reference(reference, energy_key, forces_key)
    config = with_temperature(config, frames.temperature_K, "the reference")
    potentials = {name: load_potential(name, device, dtype, trust_checkpoint, head) for name in (model, *compare)}
    frames = frames.isolated(max(potential.cutoff for potential in potentials.values()))
    setting = Setting(frames.frames, config.temperature_K, frames.temperature_K)
    observables = observables_from(config.observable or default_observable(setting), setting)
    yardstick = Yardstick.from_reference(config.criterion, setting, observables)
    test = StabilityTest(
        temperature_K=config.temperature_K,
        replicas=config.replicas,
        time_ps=config.time_ps,
        timestep_fs=config.timestep_fs,
        friction_per_fs=config.friction_per_fs,
        check_every_fs=config.check_every_fs,
        seed=config.seed,
    )
    for name, potential in potentials.items():
        try:
            potential.check_numbers(z for atoms in frames.frames for z in set(atoms.numbers))
        except ValueError as error:
            raise BadOption(f"{name}: {error}") from error
        check_labels(potential, frames, Path(name).name, "the reference")
    if not quiet:
        click.echo(f"Reference: {frames.source}")
        click.echo(f"{test.replicas} replicas of {test.time_ps:g} ps at {test.temperature_K:g} K; unstable is any of")
        click.echo("\n".join(f"  - {line}" for line in yardstick.describe()))
    results = {}
    for name, potential in potentials.items():
        compile_where_wanted(
            compilation, potential, frames.frames, test.replicas, steps=test.n_steps, say=None if quiet else click.echo
        )
        results[name], seconds_per_ps = _tested(name, potential, frames, yardstick, test, quiet)
    summaries = {}
    for name, potential in potentials.items():
        errors = qm_errors(potential, LabelledFrames.from_reference(frames, potential.device))
        summaries[name] = summarize(results[name], yardstick, None, errors, None if name == model else results[model])
    for name in compare:
        summaries[name]["p_value"] = failures_p_value(results[model], results[name])
    click.echo(format_table(summaries, test.time_ps))
    for name in compare:
        click.echo(f"{name} fails less often than {model}: p = {summaries[name]['p_value']:.2g}")
    if not quiet:
        click.echo(_time_to_tell(model, results[model].statistics, seconds_per_ps))
    if output:
        with replaced(output) as temporary:
            temporary.write_text(json.dumps(summaries, indent=1) + "\n")


def _tested(name, potential, frames, yardstick, test, quiet):
    """What became of a model's replicas, under a bar of its own, and the seconds that a stable replica-ps took."""
    from stabie_ase.runs.evaluation import run_stability_test

    rate, began = Rate(), time.monotonic()
    with Progress(test.n_steps, Path(name).name, quiet) as progress:

        def on_look(steps, state, failures):
            progress.show(steps, f"unstable {100 * failures.share:.0f} %, {rate.update(steps * test.replicas)}")

        result = run_stability_test(potential, frames.frames, yardstick, test, on_look)
        progress.done = progress.total  # all may have failed long before
    return result, (time.monotonic() - began) / max(result.statistics.stable_replica_ps, 1e-9)


def _time_to_tell(model, statistics, seconds_per_ps) -> str:
    """How long a comparison has to be to mean something; of a model that did not fail, for one failure in the time it was seen."""
    from stabie_ase.stability.sequential import replica_ps_to_tell

    needed = replica_ps_to_tell(statistics.hazard_per_ps or 1.0 / statistics.stable_replica_ps)
    return (
        f"To tell a model four times as stable as {model} from it takes about {needed:.2g} replica-ps of each, "
        f"{2 * needed * seconds_per_ps / 60:.2g} min here"
    )
