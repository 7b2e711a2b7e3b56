"""Blocks of steps as CUDA graphs: a GPU is given hundreds of small kernels at once, and no longer waits for Python."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import lru_cache
from threading import get_ident

import torch
from torch import Tensor

from stabie_ase.dynamics.forces import PotentialForces
from stabie_ase.dynamics.integrators import Integrator
from stabie_ase.dynamics.state import ForceFunction, MDState
from stabie_ase.dynamics.steps import advance
from stabie_ase.potentials.base import Potential, Prediction
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import NeighborList, neighbor_list
from stabie_ase.system.memory import out_of_memory

logger = logging.getLogger(__name__)

MAX_GRAPH_STEPS = 10
"""In one graph: enough that launching it costs nothing, and few enough that it is soon recorded."""

WARMUP_BLOCKS = 2
"""Blocks of one kind that are run as usual before a graph is made: libraries have to set themselves up first."""

PAIR_ROOM_FACTOR = 1.2
"""Times the pairs of a list that the next lists find room in."""

Blocks = Callable[[MDState, int], MDState]
Record = Callable[[Callable[[], None]], Callable[[], None]]


def blocks(forces: ForceFunction, integrator: Integrator, n_steps: int) -> Blocks:
    """How to take blocks of up to `n_steps` steps: by graphs on a GPU where a potential's network is compiled, else one by one."""
    if isinstance(forces, PotentialForces) and _can_be_graphed(forces.potential, integrator):
        return _graphed(forces.potential, integrator, min(n_steps, MAX_GRAPH_STEPS), get_ident())
    return lambda state, n: advance(state, integrator, forces, n)


def _can_be_graphed(potential: Potential, integrator: Integrator) -> bool:
    on_gpu = potential.device.type == "cuda"
    return on_gpu and potential.is_compiled and potential.bears_fixed_lists and not integrator.needs_stress


def timed(take: Blocks, state: MDState, n_steps: int) -> tuple[MDState, float]:
    """The state `n_steps` later, and the seconds until the device had finished with it."""
    began = time.perf_counter()
    state = take(state, n_steps)
    if state.batch.device.type == "cuda":
        torch.cuda.synchronize(state.batch.device)
    return state, time.perf_counter() - began


@lru_cache(maxsize=1)
def _graphed(potential: Potential, integrator: Integrator, size: int, thread: int) -> GraphedBlocks:
    """The last one is kept: a long run comes as many short simulations. Its memory is for one thread."""
    return GraphedBlocks(potential, integrator, size)


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """What the function does on the device, recorded; it is not done now."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class GraphedBlocks:
    """Advances replicas a block of steps at a time, all of it recorded once and replayed on memory of its own.

    Recorded steps cannot look whether their neighbour list still holds. How far atoms have moved from where it was built is
    written down instead and looked at after the block; a block in which they have moved too far is taken again from
    its start with a new list, and if that does not last either, as usual.

    Parameters
    ----------
    potential : Potential
        That bears lists of fixed length.
    integrator : Integrator
        That needs no stress: cells do not change.
    size : int
        Steps in a block.
    skin : float
        Of the neighbour list, in Å.
    record : callable
        Makes something to replay of a function that works in place.
    """

    def __init__(self, potential: Potential, integrator: Integrator, size: int, skin: float = 1.0, record: Record = cuda_graph):
        self.integrator, self.size, self.record = integrator, size, record
        self.plain = PotentialForces(potential, skin)
        self.fixed = FixedForces(potential, skin)
        self.source: AtomsBatch | None = None

    def __call__(self, state: MDState, n_steps: int) -> MDState:
        """The state `n_steps` later, by as many whole blocks as there are, the rest step by step."""
        state = self.integrator.prepare(state.replace(stress=None))
        in_blocks = n_steps // self.size if self.plain.at_once(state.batch) >= state.batch.n_atoms else 0
        for _ in range(in_blocks):
            state = self._block(state)
        return advance(state, self.integrator, self.plain, n_steps - in_blocks * self.size)

    def _block(self, state: MDState) -> MDState:
        try:
            end = self._replayed(state)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.source = self.replay = end = None
        return advance(state, self.integrator, self.plain, self.size) if end is None else end

    def _replayed(self, state: MDState) -> MDState | None:
        """The state after a block, or None if even a new neighbour list did not last."""
        if not self._serves(state):
            self._take_over(state)
        self.source = state.batch  # so that the next comparison is of the same tensors
        end = self._attempt(state)
        if end is None:
            self._renew_list(state.batch)
            end = self._attempt(state)
        return end

    def _serves(self, state: MDState) -> bool:
        """Whether what does not change in a run is as it was recorded."""
        if self.source is None or (self.source.n_systems, self.source.n_atoms) != (state.n_systems, state.batch.n_atoms):
            return False
        if self.source.dtype != state.batch.dtype:
            return False
        names = ("numbers", "masses", "system", "pbc", "cells")
        return all(_equal(getattr(self.source, name), getattr(state.batch, name)) for name in names)

    def _take_over(self, state: MDState) -> None:
        """Give replicas of another kind memory of their own."""
        self.state = state.select(torch.arange(state.n_systems))
        batch = self.state.batch
        batch.counts, batch.index_in_system  # noqa: B018 - worked out now: they wait for the device
        self.memory = self.state.tensors()
        self.fixed.list = None
        self._renew_list(state.batch)

    def _renew_list(self, batch: AtomsBatch) -> None:
        if not self.fixed.renew(batch):
            self.replay, self.n_plain = self._steps, 0

    def _attempt(self, state: MDState) -> MDState | None:
        """The state after a block, or None if the neighbour list did not last."""
        if self.n_plain == WARMUP_BLOCKS:
            self._steps()  # what a potential keeps from its last call is of these tensors then, and need not be made
            self._record()
        for name, x in state.tensors().items():
            self.memory[name].copy_(x)
        self.fixed.furthest.zero_()
        self.n_plain += 1
        self.replay()  # type: ignore[misc]
        if not self.fixed.held():
            return None
        ends = {name: x.clone() for name, x in self.memory.items()}
        return state.restore(ends | {"cells": state.batch.cells})

    def _record(self) -> None:
        try:
            self.replay = self.record(self._steps)
        except RuntimeError as error:
            logger.warning("no CUDA graph could be made, going on without: %s", str(error).splitlines()[0])

    def _steps(self) -> None:
        """One block, in place."""
        end = advance(self.state, self.integrator, self.fixed, self.size)
        for name, x in end.tensors().items():
            self.memory[name].copy_(x)


class FixedForces:
    """A potential as a force function with a neighbour list of fixed length that is not checked, only followed.

    Parameters
    ----------
    potential : Potential
    skin : float
        How far beyond the cutoff the list reaches, in Å.

    Attributes
    ----------
    list : NeighborList or None
    furthest : Tensor, shape ()
        Largest square of a distance that an atom was from where it was when the list was built.
    """

    def __init__(self, potential: Potential, skin: float):
        self.compute, self.cutoff, self.skin = potential.compute, potential.cutoff, skin
        self.list: NeighborList | None = None

    def renew(self, batch: AtomsBatch) -> bool:
        """Another list, in the same memory if it finds room there; whether it did."""
        new = neighbor_list(batch, self.cutoff + self.skin)
        n_half, far = new.n_pairs // 2, 2.0 * self.cutoff
        fits = self.list is not None and n_half <= self.list.n_pairs // 2
        if fits:
            padded = new.padded(batch, self.list.n_pairs // 2, far)
            for old, x in ((self.list.pairs, padded.pairs), (self.list.known_offsets, padded.known_offsets)):
                old.copy_(x)
            self.positions.copy_(batch.positions)
        else:
            lasts = new.cutoff == float("inf")
            self.list = new.padded(batch, n_half if lasts else int(PAIR_ROOM_FACTOR * n_half) + 1, far)
            self.positions, self.furthest = batch.positions.clone(), batch.positions.new_zeros(())
        return fits

    def __call__(self, batch: AtomsBatch) -> Prediction:
        moved = (batch.positions - self.positions).square().sum(dim=1).nan_to_num(nan=0.0).max()
        self.furthest.copy_(torch.maximum(self.furthest, moved))
        energies, forces, _ = self.compute(batch, self.list)
        return Prediction(energies, forces.to(batch.dtype), None)

    def held(self) -> bool:
        """Whether no pair can have come within the cutoff that the list does not know of."""
        return self.list.cutoff == float("inf") or 2.0 * float(self.furthest) ** 0.5 <= self.skin


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)
