"""Whoever looks at replicas while they run, and what a recorder keeps of them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from stabie_ase.dynamics.state import MDState
from stabie_ase.structures.batch import AtomsBatch


class Observer(Protocol):
    """Is shown the running replicas every `every` steps and at the end, and may stop some.

    Attributes
    ----------
    every : int
        Steps between two looks.
    """

    every: int

    def look(self, steps_done: int, running: MDState, active: Tensor) -> Tensor | None:
        """Record a frame if it is time for one; `active`, shape (n_running,), says of which replicas.

        Parameters
        ----------
        steps_done : int
            Since the start of the simulation.
        running : MDState
        active : Tensor of int64, shape (n_running,)
            Which replicas of the simulation these are.

        Returns
        -------
        Tensor of bool, shape (n_running,), or None
            Those to be stopped here.
        """
        ...


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
    momenta : Tensor or None, shape (n_frames, n_atoms, 3)
        In amu Å / ASE time, if asked for.
    columns : mapping of str to Tensor of float64, shape (n_frames, n_systems)
        What else was asked for.
    """

    batch: AtomsBatch
    positions: Tensor
    cells: Tensor
    potential_energy: Tensor
    steps: Tensor
    valid: Tensor
    momenta: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

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


    def to_atoms(self, timestep_fs: float) -> list[list[Atoms]]:
        """Each replica's valid frames, in the order of time.

        Parameters
        ----------
        timestep_fs : float
            Of the dynamics, in fs.

        Returns
        -------
        list of list of Atoms
            With energies, momenta if there are any, and in `info` their `replica` and `time_fs`.
        """
        frames, frame, replica = self.frames()
        found: list[list[Atoms]] = [[] for _ in range(self.batch.n_systems)]
        for k, atoms in enumerate(frames.to_atoms() if len(frame) else []):
            f, r = int(frame[k]), int(replica[k])
            if self.momenta is not None:
                atoms.set_momenta(self.momenta[f, self.batch.system == r].double().cpu().numpy())
            atoms.calc = SinglePointCalculator(atoms, energy=float(self.potential_energy[f, r]))
            atoms.info.update(replica=r, time_fs=float(self.steps[f]) * timestep_fs)
            found[r].append(atoms)
        return found


MAX_BYTES_IN_MEMORY = 2**30
"""Bytes of recorded positions up to which they are kept in memory; what is larger goes through a temporary file."""


class Recorder:
    """Keeps the frames after `every`, 2 `every`, ... steps.

    Parameters
    ----------
    state : MDState
        At the start.
    n_steps : int
        Of the simulation: all buffers are made at once.
    every : int
        In steps.
    momenta : bool
        Keep them too.
    columns : mapping of str to callable, optional
        `function(running, active)` gives a number for each running replica, shape (n_running,), to be kept with its frame.
    """

    def __init__(
        self,
        state: MDState,
        n_steps: int,
        every: int,
        momenta: bool = False,
        columns: Mapping[str, Callable[[MDState, Tensor], Tensor]] | None = None,
    ):
        self.every, self.functions = every, dict(columns or {})
        n, batch = n_steps // every, state.batch
        energies = state.potential_energy.new_zeros((n, batch.n_systems))
        self.trajectory = Trajectory(
            batch,
            _buffer((n, batch.n_atoms, 3), batch.positions),
            batch.cells.new_zeros((n, batch.n_systems, 3, 3)),
            energies,
            every * torch.arange(1, n + 1, device=batch.device),
            torch.zeros((n, batch.n_systems), dtype=torch.bool, device=batch.device),
            _buffer((n, batch.n_atoms, 3), state.momenta) if momenta else None,
            {name: torch.zeros_like(energies) for name in self.functions},
        )

    def look(self, steps_done: int, running: MDState, active: Tensor) -> None:
        """Record a frame if it is time for one."""
        k, off_beat = divmod(steps_done, self.every)
        if off_beat:
            return
        kept, frame = self.trajectory, k - 1
        atoms = kept.batch.atom_index(active)
        kept.positions[frame, atoms] = running.batch.positions
        if kept.momenta is not None:
            kept.momenta[frame, atoms] = running.momenta
        kept.cells[frame, active] = running.batch.cells
        kept.potential_energy[frame, active] = running.potential_energy
        kept.valid[frame, active] = running.alive
        for name, function in self.functions.items():
            kept.columns[name][frame, active] = function(running, active)


def _buffer(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros in the dtype and on the device of `like`; on a CPU, large ones are mapped to a file that goes with them."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size <= MAX_BYTES_IN_MEMORY:
        return like.new_zeros(shape)
    with tempfile.TemporaryFile(prefix="stabie-frames-") as file:
        return torch.from_numpy(np.memmap(file, dtype=like.numpy().dtype, mode="w+", shape=shape))


@dataclass
class Attached:
    """A function that is called as `function(steps_done, running)` every so many steps."""

    function: Callable[[int, MDState], None]
    every: int

    def look(self, steps_done: int, running: MDState, active: Tensor) -> None:
        """Call it; it stops nobody."""
        self.function(steps_done, running)
