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


def blamed(frames: AtomsBatch, criteria: Sequence[Criterion], energies: Tensor, temperature_K: float) -> Tensor:
    """Which atoms the criterion blames by which a frame is worst.

    Parameters
    ----------
    frames : AtomsBatch
        Each by itself and at rest: criteria that remember, or look at momenta, blame nobody here.
    criteria : sequence of Criterion
    energies : Tensor of float64, shape (n_frames,)
        Potential energies in eV.
    temperature_K : float
        Of the heat bath.

    Returns
    -------
    Tensor of bool, shape (n_atoms,)
        All of a frame that is stable, or in which all are to blame.
    """
    alone, found = [c for c in criteria if not c.memory(frames)], torch.ones_like(frames.system, dtype=torch.bool)
    for part in frames.chunks(FRAMES_AT_ONCE):
        state = _state(frames.select(part), energies[part], temperature_K)
        looked = look(state, alone)
        for k, worst in zip(looked.unstable.nonzero()[:, 0].tolist(), looked.worst[looked.unstable].tolist()):
            atoms = looked.verdicts[worst].atoms[k]
            if bool((atoms >= 0).any()):
                own = frames.atom_index(part[[k]])
                found[own] = False
                found[own[atoms[atoms >= 0]]] = True
    return found


def _at(images: Sequence[Atoms], temperature_K: float) -> MDState:
    """Frames as the states of so many replicas, whose energies are taken for zero."""
    batch, momenta = AtomsBatch.from_atoms(images), momenta_of(images)
    return _state(batch, batch.positions.new_zeros(batch.n_systems), temperature_K, None if momenta is None else momenta.reshape(-1, 3))


def _state(batch: AtomsBatch, energies: Tensor, temperature_K: float, momenta: Tensor | None = None) -> MDState:
    zero, rest = torch.zeros_like(energies), torch.zeros_like(batch.positions)
    count = torch.zeros_like(energies, dtype=torch.int64)
    return MDState(
        batch=batch,
        momenta=rest if momenta is None else momenta,
        forces=rest,
        mobile=torch.ones_like(batch.system, dtype=torch.bool),
        potential_energy=energies,
        temperature=zero + temperature_K,
        pressure=zero,
        key=count,
        step=count,
        alive=count == 0,
    )
