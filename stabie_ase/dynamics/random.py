"""Random numbers as a pure function of a replica's key and its step.

A replica's stream is Philox4x32-10 (Salmon, Moraes, Dror & Shaw, SC'11) keyed by the replica and counted by step and
atom. So the noise of a replica does not depend on the batch it runs in, rewinding a replica replays its noise, and an
exact restart needs no generator state beyond two integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch

_MASK = 0xFFFFFFFF

MOMENTA, NOISE, RESETS, CELL, LEARNERS = 1, 2, 3, 4, 5
"""Purposes, kept apart by the counter: initial momenta, thermostat noise, draws made once a replica and phase, barostat noise, who
takes part in learning."""


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32 with ten rounds.

    Parameters
    ----------
    counter : Tensor of int64, shape (4, ...)
    key : Tensor of int64, shape (2, ...)
        32-bit words held in int64.

    Returns
    -------
    Tensor of int64, shape (4, ...)
        32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products wrap around in int64, which leaves both 32-bit halves right. What stands above the lower 32 bits of
        # the other words does no harm: only c0 and c2 are multiplied.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return torch.stack([c0, c1 & _MASK, c2, c3 & _MASK])


def _words(key: Tensor, purpose: int, step: Tensor, index: Tensor) -> Tensor:
    """Four words, shape (4, ..., n), for keys and indices of shape (n,) and steps of shape (..., n)."""
    index = index.expand_as(step)
    counter = torch.stack([index, torch.full_like(index, purpose), step & _MASK, (step >> 32) & _MASK])
    return philox(counter, torch.stack([key & _MASK, (key >> 32) & _MASK]))


def replica_keys(seed: int, n: int, first: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """Independent stream keys of replicas `first` to `first + n - 1`, int64, shape (n,)."""
    index = torch.arange(first, first + n, device=device)
    words = _words(torch.full_like(index, seed), 0, torch.zeros_like(index), index)
    return words[0] | ((words[1] >> 1) << 32)


def uniforms(keys: Tensor, step: Tensor, purpose: int) -> Tensor:
    """One number in (0, 1) a replica, float64, shape (n_systems,)."""
    return (_words(keys, purpose, step, torch.zeros_like(keys))[0].double() + 0.5) / 2.0**32


def normals(batch: AtomsBatch, keys: Tensor, step: Tensor, purpose: int) -> Tensor:
    """Standard normal numbers for every atom by Box and Muller, in the dtype of the positions.

    Parameters
    ----------
    batch : AtomsBatch
    keys : Tensor of int64, shape (n_systems,)
        Stream of each replica.
    step : Tensor of int64, shape (..., n_systems)
        Its counter: one, or several at once.
    purpose : int
        Separates draws made at the same step.

    Returns
    -------
    Tensor, shape (..., n_atoms, 3)
    """
    return _box_muller(_words(keys[batch.system], purpose, step[..., batch.system], batch.index_in_system)).to(batch.dtype)


def system_normals(keys: Tensor, step: Tensor, purpose: int) -> Tensor:
    """Nine standard normal numbers a replica, float64, shape (n_systems, 3, 3)."""
    index = torch.arange(3, device=keys.device).repeat(len(keys))
    words = _words(keys.repeat_interleave(3), purpose, step.repeat_interleave(3), index)
    return _box_muller(words).view(-1, 3, 3)


def _box_muller(words: Tensor) -> Tensor:
    """Three normal numbers, shape (..., 3), from four words each, shape (4, ...)."""
    u = (words.double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(u[:2]))
    angle = (2.0 * math.pi) * u[2:]
    x, z = radius * torch.cos(angle)
    return torch.stack([x, radius[0] * torch.sin(angle[0]), z], dim=-1)


def normals_ahead(
    batch: AtomsBatch, keys: Tensor, step: Tensor, purpose: int, n_steps: int, at_once: int = 2**16
) -> Iterator[Tensor]:
    """`normals` at this step and the following ones in turn, drawn for up to `at_once` atoms and steps together.

    Ten rounds of integer operations cost much the same for one step of a few molecules as for many steps.
    """
    size = max(1, at_once // batch.n_atoms)
    for ahead in torch.arange(n_steps, device=step.device).split(size):
        yield from normals(batch, keys, step + ahead[:, None], purpose)
