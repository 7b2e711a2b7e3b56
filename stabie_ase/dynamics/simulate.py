"""The simulation loop: advance replicas, look at them every few steps, record frames."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stabie_ase.dynamics.forces import PotentialForces
from stabie_ase.dynamics.graphs import blocks
from stabie_ase.dynamics.integrators import Integrator
from stabie_ase.dynamics.state import MDState
from stabie_ase.potentials.base import Potential
from stabie_ase.stability import Criterion, Failures, look
from stabie_ase.structures.batch import AtomsBatch


@dataclass(frozen=True)
class Trajectory:
    """Frames of a batch at equal intervals.

    Attributes
    ----------
    batch : AtomsBatch
        What does not change; its positions are those at the start.
    positions : Tensor, shape (n_frames, n_atoms, 3)
        In Å.
    cells : Tensor, shape (n_frames, n_systems, 3, 3)
        In Å.
    potential_energy : Tensor of float64, shape (n_frames, n_systems)
        In eV, by the potential that drove the dynamics.
    steps : Tensor of int64, shape (n_frames,)
        Since the start.
    valid : Tensor of bool, shape (n_frames, n_systems)
        False once a replica has been stopped.
    severity : Tensor of float64, shape (n_frames, n_systems)
        Of the criterion by which a replica was worst; 1 is where it becomes unstable.
    momenta : Tensor or None, shape (n_frames, n_atoms, 3)
        In amu Å / ASE time, if asked for.
    """

    batch: AtomsBatch
    positions: Tensor
    cells: Tensor
    potential_energy: Tensor
    steps: Tensor
    valid: Tensor
    severity: Tensor
    momenta: Tensor | None = None

    def keep(self, chosen: Tensor) -> Trajectory:
        """The same with only the chosen ones of its valid frames, shape (n_frames, n_systems)."""
        return replace(self, valid=self.valid & chosen)

    def frames(self) -> tuple[AtomsBatch, Tensor, Tensor]:
        """All valid frames as one batch, each with the cell it had, and the frame and the replica it came from, shapes (n_samples,)."""
        frame, replica = self.valid.nonzero(as_tuple=True)
        picked = self.batch.select(replica)
        atoms = self.batch.atom_index(replica) + torch.repeat_interleave(frame * self.batch.n_atoms, picked.counts)
        positions = self.positions.reshape(-1, 3).index_select(0, atoms.to(self.positions.device))
        return picked.replace(positions=positions, cells=self.cells[frame, replica]), frame, replica


def simulate(
    state: MDState,
    integrator: Integrator,
    potential: Potential,
    n_steps: int,
    criteria: Sequence[Criterion] = (),
    check_every: int = 10,
    sample_every: int | None = None,
    stop_unstable: bool = True,
    escape: float = math.inf,
    record_momenta: bool = False,
    on_block: Callable[[int, MDState, Failures], None] | None = None,
) -> tuple[MDState, Trajectory | None, Failures]:
    """Run a batch of replicas and note the first failure of each.

    Parameters
    ----------
    state : MDState
    integrator : Integrator
    potential : Potential
        Left as it was found; it takes no parameter gradients here.
    n_steps : int
    criteria : sequence of Criterion
        Looked at every `check_every` steps, and of every frame that is kept. A number that is not finite is always a failure.
    check_every, sample_every : int
        In steps; without `sample_every` no frame is kept. Frames are those after `sample_every`, 2 `sample_every`, ...
    stop_unstable : bool
        Stop a replica at its first failure, so that it costs nothing more, or let it run on while it is finite.
    escape : float
        Severity beyond which a replica is stopped in any case: fragments far apart have nothing more to tell.
    record_momenta : bool
        Keep momenta with the frames.
    on_block : callable, optional
        Called as `on_block(steps_done, state, failures)` after every look, with the replicas that run on.

    Returns
    -------
    state : MDState
        The last frame of every replica: for a stopped one, the frame at which it failed.
    trajectory : Trajectory or None
    failures : Failures
    """
    integrator.check(state)
    block = check_every if sample_every is None else math.gcd(check_every, sample_every)
    failures = Failures.none(state.batch)
    recorder = _Recorder(state, n_steps, sample_every, record_momenta) if sample_every else None
    active = torch.arange(state.n_systems, device=state.batch.device)
    running = state
    advance = blocks(potential, integrator, PotentialForces(potential, stress=integrator.needs_stress), block)
    with potential.frozen():
        done = 0
        while done < n_steps and len(active):
            n = min(block - done % block, n_steps - done)
            running = advance(running, n)
            done += n
            sampling, looking = recorder and done % sample_every == 0, done % check_every == 0 or done == n_steps
            if not sampling and not looking:
                continue
            looked = look(running, criteria)
            if sampling:
                recorder.record(running, active, looked.severity)
            if not looking:
                continue
            failures = failures.examine(running, active, criteria, looked, done)
            stopped = ~running.alive | (looked.severity > escape)
            if stop_unstable:
                stopped = stopped | failures.failed[active]
            if stopped.any():
                state = state.put(active, running)
                active, running = active[~stopped], running.select((~stopped).nonzero()[:, 0])
            if on_block:
                on_block(done, running, failures)
    return state.put(active, running), recorder.trajectory() if recorder else None, failures


IN_MEMORY = 2**30
"""Bytes of recorded positions up to which they are kept in memory; what is larger goes through a temporary file."""


def _buffer(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros in the dtype and on the device of `like`; on a CPU, large ones are mapped to a file that goes with them."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size <= IN_MEMORY:
        return like.new_zeros(shape)
    with tempfile.TemporaryFile(prefix="stabie-frames-") as file:
        return torch.from_numpy(np.memmap(file, dtype=like.numpy().dtype, mode="w+", shape=shape))


class _Recorder:
    """Buffers for every frame to come, filled in place."""

    def __init__(self, state: MDState, n_steps: int, sample_every: int, momenta: bool):
        n, batch = n_steps // sample_every, state.batch
        self.batch, self.n_recorded = batch, 0
        self.positions = _buffer((n, batch.n_atoms, 3), batch.positions)
        self.momenta = _buffer((n, batch.n_atoms, 3), state.momenta) if momenta else None
        self.cells = batch.cells.new_zeros((n, batch.n_systems, 3, 3))
        self.energies = state.potential_energy.new_zeros((n, batch.n_systems))
        self.severity = torch.zeros_like(self.energies)
        self.steps = sample_every * torch.arange(1, n + 1, device=batch.device)
        self.valid = torch.zeros((n, batch.n_systems), dtype=torch.bool, device=batch.device)

    def record(self, running: MDState, active: Tensor, severity: Tensor) -> None:
        k, atoms = self.n_recorded, self.batch.atom_index(active)
        self.positions[k, atoms] = running.batch.positions
        if self.momenta is not None:
            self.momenta[k, atoms] = running.momenta
        self.cells[k, active] = running.batch.cells
        self.severity[k, active] = severity
        self.energies[k, active] = running.potential_energy
        self.valid[k, active] = running.alive
        self.n_recorded += 1

    def trajectory(self) -> Trajectory:
        return Trajectory(
            self.batch, self.positions, self.cells, self.energies, self.steps, self.valid, self.severity, self.momenta
        )
