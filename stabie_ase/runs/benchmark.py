"""What a machine does with a model: replica-steps per second and memory against the number of replicas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ase import Atoms, units

from stabie_ase.dynamics import Langevin, PotentialForces
from stabie_ase.dynamics.graphs import WARMUP_BLOCKS, blocks, timed
from stabie_ase.dynamics.starts import start
from stabie_ase.potentials.base import Potential
from stabie_ase.system.memory import most_used_bytes, out_of_memory

ENOUGH_RATE_FRACTION = 0.9
"""Share of the best rate that is worth no more replicas."""

BLOCK_STEPS = 5
"""Steps between two looks at the clock."""


@dataclass(frozen=True)
class Measurement:
    """Langevin dynamics of so many replicas.

    Attributes
    ----------
    replicas : int
    rate : float
        Replica-steps per second.
    memory_MB : float or None
        Largest amount in use so far: of the device, or of the process on a CPU; None where the system does not tell.
    """

    replicas: int
    rate: float
    memory_MB: float | None


def measure(potential: Potential, frames: Sequence[Atoms], replicas: int, seconds: float, temperature_K: float) -> Measurement:
    """Run for so long after a few blocks that nobody measures."""
    integrator = Langevin(0.5 * units.fs, 0.01 / units.fs)
    state = start(potential, frames, replicas, temperature_K, integrator, seed=0)
    take = blocks(PotentialForces(potential), integrator, BLOCK_STEPS)
    with potential.frozen():
        for _ in range(WARMUP_BLOCKS + 1):
            state, _ = timed(take, state, BLOCK_STEPS)
        times = []
        while sum(times) < seconds:
            state, taken = timed(take, state, BLOCK_STEPS)
            times.append(taken)
    rate, memory = replicas * BLOCK_STEPS * len(times) / sum(times), most_used_bytes(potential.device)
    return Measurement(replicas, rate, None if memory is None else memory / 1e6)


def sweep(
    potential: Potential, frames: Sequence[Atoms], most: int, seconds: float, temperature_K: float
) -> Iterator[Measurement]:
    """1, 2, 4, ... replicas and at last `most`; ends early where twice as many bring no more or do not fit."""
    measured, replicas = [], 1
    while not measured or (measured[-1].replicas < most and not levelled(measured)):
        try:
            measured.append(measure(potential, frames, replicas, seconds, temperature_K))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or not measured:
                raise
            return
        yield measured[-1]
        replicas = min(2 * replicas, most)


def levelled(measurements: Sequence[Measurement]) -> bool:
    """Whether the last two, of four or more, bring no more than those before."""
    rates = [m.rate for m in measurements]
    return len(rates) > 3 and max(rates[-2:]) < 1.03 * max(rates[:-2])


def recommended(measurements: Sequence[Measurement]) -> Measurement:
    """The fewest replicas that come close to the best rate."""
    best = max(m.rate for m in measurements)
    return next(m for m in measurements if m.rate >= ENOUGH_RATE_FRACTION * best)


def advice(measurements: Sequence[Measurement], most: int) -> str:
    """How many replicas to run in words, and what ended a sweep up to `most` of them if rates had not levelled off."""
    last, best = measurements[-1].replicas, recommended(measurements).replicas
    if levelled(measurements):
        return f"Use --replicas {best}: more bring little here."
    little = f"Use --replicas {best}" + (f": {last} bring little more" if best < last else "")
    if last < most:
        return f"{little}; {min(2 * last, most)} do not fit in memory."
    return f"{little}. The limit, --replicas {most}, ended the table, not the machine: a higher one shows what more bring."
