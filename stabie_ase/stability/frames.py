"""Criteria held against frames that are there already, instead of replicas that run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.observables.series import momenta_of
from stabie_ase.stability.criteria.base import Criterion
from stabie_ase.stability.watch import NOT_FINITE, look, with_memory
from stabie_ase.structures.batch import AtomsBatch

FRAMES_AT_ONCE = 256
"""That criteria look at together, if one frame is enough to them."""


class FirstFailure(NamedTuple):
    """Where a replica's frames stop being stable, and why."""

    frame: int
    criterion: str


def first_failure(images: Sequence[Atoms], criteria: Sequence[Criterion], temperature_K: float = 300.0) -> FirstFailure | None:
    """The first frame of one replica that a criterion calls unstable.

    Parameters
    ----------
    images : sequence of Atoms
        Of one system, finite, in the order of time. Without momenta they are at rest.
    criteria : sequence of Criterion
        Of which none asks for energies or forces: these are taken for zero.
    temperature_K : float
        Of the heat bath.

    Returns
    -------
    FirstFailure or None
        None if all frames are stable.
    """
    memory: dict[str, Tensor] = {}
    one_by_one = any(criterion.memory(AtomsBatch.from_atoms(images[0])) for criterion in criteria)
    at_once = 1 if one_by_one else FRAMES_AT_ONCE
    for first in range(0, len(images), at_once):
        state = with_memory(_at(images[first : first + at_once], temperature_K).remember(**memory), criteria)
        looked = look(state, criteria)
        if bool(looked.unstable.any()):
            k = int(looked.unstable.int().argmax())
            return FirstFailure(first + k, [NOT_FINITE, *(c.name for c in criteria)][int(looked.worst[k])])
        memory = {name: x for verdict in looked.verdicts for name, x in verdict.memory.items()}
    return None


def _at(images: Sequence[Atoms], temperature_K: float) -> MDState:
    """Frames as the states of so many replicas."""
    batch, momenta = AtomsBatch.from_atoms(images), momenta_of(images)
    zero = batch.positions.new_zeros(batch.n_systems)
    count, rest = torch.zeros(batch.n_systems, dtype=torch.int64), torch.zeros_like(batch.positions)
    return MDState(
        batch=batch,
        momenta=rest if momenta is None else momenta.reshape(-1, 3),
        forces=rest,
        mobile=torch.ones(batch.n_atoms, dtype=torch.bool),
        potential_energy=zero,
        temperature=zero + temperature_K,
        pressure=zero,
        key=count,
        step=count,
        alive=count == 0,
    )
