"""Whether compiled networks pay on this machine, found out in a child process, and the same made ready before dynamics begin.

Where a network is compiled for a GPU, `simulate` also records blocks of steps as CUDA graphs (see `graphs`).
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from ase import Atoms, units
from ase.io import read, write
from torch import Tensor

from stabie_ase.dynamics.forces import PotentialForces
from stabie_ase.dynamics.graphs import WARMUP_BLOCKS, blocks, timed
from stabie_ase.dynamics.integrators import Langevin
from stabie_ase.dynamics.state import initial_state
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import load_potential, save_potential
from stabie_ase.potentials.evaluators import MAX_ROUNDING_FRACTION, Plain
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

logger = logging.getLogger(__name__)

MAX_TRIAL_SECONDS = 900.0
"""Seconds after which a trial is given up."""

FIRST_CALL_SYSTEMS = 8
"""Systems in the first call, at which the code is made; it serves any other number of them."""

BLOCK_STEPS = 2
"""Steps between two looks at the clock."""

MIN_SPEEDUP = 1.1
"""Factor on the rate below which the plain network is kept: its path is the better trodden."""


class NotCompiled(ValueError):
    """The network could not be compiled here; the message says why in one line."""


@dataclass(frozen=True)
class Trial:
    """What steps of dynamics take on this machine.

    Attributes
    ----------
    plain, compiled : float
        Seconds a step of all replicas.
    ready : float
        Seconds until the first compiled call returned.
    """

    plain: float
    compiled: float
    ready: float

    def pays(self, seconds: float) -> bool:
        """Whether compiled steps save more than their making costs, out of so many seconds of plain ones."""
        return self.plain > MIN_SPEEDUP * self.compiled and seconds * (1.0 - self.compiled / self.plain) > self.ready


def make_ready(potential: Potential, frames: Sequence[Atoms], replicas: int, kernels: bool = False) -> None:
    """Compile a potential's network for dynamics, and make the first call.

    Done before anything else is measured or timed, and always on the same input, so that the code does not depend on
    where a run is taken up.

    Parameters
    ----------
    potential : Potential
        Compiled in place.
    frames : sequence of Atoms
        The first call is on the first of them.
    replicas : int
        Systems of a batch in the dynamics.
    kernels : bool
        Take the kernels of the potential's family instead of a compiler's.

    Raises
    ------
    NotCompiled
    """
    try:
        potential.use_kernels() if kernels else potential.compile_network()
        batch = _batch(potential, frames, min(replicas, FIRST_CALL_SYSTEMS))
        with potential.frozen():
            potential.compute(batch, neighbor_list(batch, potential.cutoff))
    except (NotImplementedError, ImportError) as error:
        raise NotCompiled(str(error)) from error
    except Exception as error:  # there are many ways for a compiler to fail
        potential.evaluator = Plain()
        raise NotCompiled(f"the {potential.family} network cannot be compiled here: {_first_line(error)}") from error


def decide(
    choice: str,
    potential: Potential,
    frames: Sequence[Atoms],
    replicas: int,
    seconds: float = math.inf,
    steps: float = math.inf,
    say: Callable[[str], None] | None = None,
) -> str:
    """What to do: as chosen, or for "auto" what a trial on this machine says about that much dynamics.

    Parameters
    ----------
    choice : {"off", "on", "kernels", "auto"}
    potential : Potential
    frames : sequence of Atoms
        As for `make_ready`.
    replicas : int
        Systems of a batch in the dynamics.
    seconds : float
        For which dynamics will go on at most.
    steps : float
        Time steps that there will be at most.
    say : callable, optional
        Told in words what was found.

    Returns
    -------
    {"off", "on", "kernels"}
    """
    if choice != "auto":
        return choice
    say = say or logger.info
    say("Compilation: measuring whether it pays here, which takes a minute or two")
    try:
        trial = probe(potential, frames, replicas)
    except NotCompiled as error:
        say(f"Compilation: off; {error}")
        return "off"
    pays = trial.pays(min(seconds, steps * trial.plain))
    found = "on" if pays else "off"
    say(
        f"Compilation: {found}; {1000 * trial.compiled:.3g} ms a step instead of {1000 * trial.plain:.3g}, "
        f"ready after {trial.ready:.0f} s"
    )
    return found


def compile_where_wanted(choice: str, potential: Potential, frames: Sequence[Atoms], replicas: int, **how_long) -> str:
    """`decide`, and do it.

    Parameters
    ----------
    choice : {"off", "on", "kernels", "auto"}
    potential : Potential
        Compiled in place.
    frames : sequence of Atoms
        As for `make_ready`.
    replicas : int
        Systems of a batch in the dynamics.
    **how_long
        `seconds` or `steps`, and `say`, of `decide`.

    Returns
    -------
    {"off", "on", "kernels"}
        What was done.

    Raises
    ------
    NotCompiled
    """
    wanted = decide(choice, potential, frames, replicas, **how_long)
    if wanted != "off":
        make_ready(potential, frames, replicas, kernels=wanted == "kernels")
    return wanted


def probe(potential: Potential, frames: Sequence[Atoms], replicas: int) -> Trial:
    """`try_out` in a process of its own, which a compiler may take down with it.

    Parameters
    ----------
    potential : Potential
        Copied to the other process, and left as it is.
    frames : sequence of Atoms
        As for `make_ready`.
    replicas : int
        Systems of a batch in the dynamics.

    Returns
    -------
    Trial

    Raises
    ------
    NotCompiled
        It failed, came to other forces, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="stabie-compile-") as folder:
        try:
            save_potential(potential, Path(folder, "model"))
            write(Path(folder, "frames.traj"), [_bare(atoms) for atoms in frames[:replicas]])
            settings = {
                "device": str(potential.device),
                "dtype": str(potential.dtype).removeprefix("torch."),
                "head": potential.head,
                "replicas": replicas,
                "threads": torch.get_num_threads(),
            }
            command = [sys.executable, "-m", "stabie_ase.dynamics.compilation", folder, json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_TRIAL_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise NotCompiled(f"its trial took more than {MAX_TRIAL_SECONDS:.0f} s") from error
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise NotCompiled(lines[-1] if lines else f"its trial ended with {done.returncode}")
    return Trial(**json.loads(lines[-1]))


def try_out(potential: Potential, frames: Sequence[Atoms], replicas: int) -> Trial:
    """Time steps of dynamics before and after compilation, in this process.

    Parameters
    ----------
    potential : Potential
        Is compiled afterwards.
    frames : sequence of Atoms
        As for `make_ready`.
    replicas : int
        Systems of the batch that is timed.

    Returns
    -------
    Trial

    Raises
    ------
    NotCompiled
    """
    batch = _batch(potential, frames, replicas)
    plain, expected = _timed(potential, batch)
    began = time.perf_counter()
    make_ready(potential, frames, replicas)
    ready = time.perf_counter() - began
    compiled, found = _timed(potential, batch)
    scale, deviation = float(expected.abs().max()), float((found - expected).abs().max())
    if not deviation <= MAX_ROUNDING_FRACTION * scale:
        raise NotCompiled(f"compiled, the {potential.family} network gives other forces, by up to {deviation:.2g} eV/Å")
    return Trial(plain, compiled, ready)


def _batch(potential: Potential, frames: Sequence[Atoms], n: int) -> AtomsBatch:
    return AtomsBatch.from_atoms([frames[k % len(frames)] for k in range(n)], potential.device)


def _timed(potential: Potential, batch: AtomsBatch, seconds: float = 1.0) -> tuple[float, Tensor]:
    """Seconds a step in the fastest of the blocks that fit into so many seconds, at least three, and forces to compare.

    The forces are those of the first block that a graph would be replayed for; before it, nothing is measured.
    """
    integrator, forces = Langevin(0.5 * units.fs, 0.01 / units.fs), PotentialForces(potential)
    with potential.frozen():
        state = initial_state(batch, forces, 300.0)
        take = blocks(forces, integrator, BLOCK_STEPS)
        for _ in range(WARMUP_BLOCKS):
            state, _ = timed(take, state, BLOCK_STEPS)
        state, first = timed(take, state, BLOCK_STEPS)
        compared, times = state.forces, [first]
        while len(times) < 3 or sum(times) < seconds:
            state, taken = timed(take, state, BLOCK_STEPS)
            times.append(taken)
    return min(times) / BLOCK_STEPS, compared


def _bare(atoms: Atoms) -> Atoms:
    return Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _child(folder: str, settings: str) -> None:
    given = json.loads(settings)
    torch.set_num_threads(given["threads"])
    try:
        potential = load_potential(Path(folder, "model"), given["device"], given["dtype"], head=given["head"])
        print(json.dumps(asdict(try_out(potential, read(Path(folder, "frames.traj"), index=":"), given["replicas"]))))
    except ValueError as error:
        print(" ".join(str(error).split()))
        sys.exit(1)


if __name__ == "__main__":
    _child(*sys.argv[1:])
