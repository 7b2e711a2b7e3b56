"""`stabie-ase bench`: how many replicas to run here."""

from __future__ import annotations

import click

from stabie_ase.cli.main import check_device, main, model_options
from stabie_ase.cli.options import reference_option


@main.command(short_help="Measure how fast dynamics run here.")
@click.argument("model")
@reference_option("Frames to start from, in any format ASE knows")
@click.option("--replicas", default=1024, show_default=True, type=click.IntRange(1), help="Most replicas to try")
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(0.01), help="Time for each number of replicas")
@click.option("--temperature", default=300.0, show_default=True, type=click.FloatRange(1e-3), help="In K")
@model_options
def bench(model, reference, replicas, seconds, temperature, device, dtype, head, compilation, trust_checkpoint):
    """Replica-steps per second of MODEL against the number of replicas, and the number to use."""
    import torch

    from stabie_ase.dynamics.compilation import compile_where_wanted
    from stabie_ase.potentials.checkpoint import load_potential
    from stabie_ase.runs.benchmark import advice, sweep
    from stabie_ase.structures.reference import read_frames

    check_device(device)
    frames = read_frames(reference)
    potential = load_potential(model, device, dtype, trust_checkpoint, head)
    potential.check_numbers(z for atoms in frames for z in set(atoms.numbers))
    compile_where_wanted(compilation, potential, frames, replicas, say=click.echo)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    click.echo(f"{model}: {potential.family}, {potential.dtype}, {where}; {frames[0].get_chemical_formula()}")
    click.echo(f"{'replicas':>8}  {'replica-steps/s':>15}  {'ms a step':>9}  {'memory (MB)':>11}")
    measured = []
    for m in sweep(potential, frames, replicas, seconds, temperature):
        memory = "-" if m.memory_MB is None else f"{m.memory_MB:.0f}"
        click.echo(f"{m.replicas:>8}  {m.rate:>15.0f}  {1000 * m.replicas / m.rate:>9.1f}  {memory:>11}")
        measured.append(m)
    click.echo(advice(measured, replicas))
