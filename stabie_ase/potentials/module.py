"""Any torch module with torch-geometric's calling convention as a potential."""

from __future__ import annotations

from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import adopt
from stabie_ase.potentials.family import families
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import NeighborList

_turns: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
"""One thread at a time calls a module, whatever it may keep in itself meanwhile, and whoever else shares it."""


class ModulePotential(Potential):
    """A module called as `module(z, pos, batch)` that returns energies in eV, shape (n_systems,) or (n_systems, 1).

    The module finds its neighbours itself and knows nothing of cells, so only isolated systems are possible, without
    stress and without per-atom energies. In single precision it is given positions relative to the first atom of each
    system, because the distances between rounded positions are wrong far from the origin.

    Parameters
    ----------
    module : torch.nn.Module
    cutoff : float
        The module's range in Å.
    """

    family = "module"

    def __init__(self, module: nn.Module, cutoff: float):
        super().__init__()
        self.module = module
        self.cutoff = float(cutoff)

    def energies(self, batch: AtomsBatch, neighbors: NeighborList) -> Tensor:
        if neighbors.periodic:
            raise ValueError(
                "a bare module(z, pos, batch) knows no cell: give it isolated systems (pbc=False), "
                "or write a Potential that uses the neighbour list"
            )
        try:
            with _turns.setdefault(self.module, RLock()):
                energies = self.module(batch.numbers, _positions(batch), batch.system)
        except IndexError as error:
            elements = ", ".join(chemical_symbols[z] for z in batch.numbers.unique().tolist())
            raise ValueError(f"module(z, pos, batch) has no entry for one of the elements {elements}: {error}") from error
        if energies.shape not in ((batch.n_systems,), (batch.n_systems, 1)):
            raise ValueError(
                f"module(z, pos, batch) returned shape {tuple(energies.shape)} for {batch.n_systems} system(s); "
                "expected one energy per system, shape (n_systems,) or (n_systems, 1)"
            )
        return energies.reshape(batch.n_systems)


def _positions(batch: AtomsBatch) -> Tensor:
    exact = batch.exact
    if exact is batch:
        return batch.positions
    first = exact.positions.detach()[torch.cumsum(batch.counts, 0) - batch.counts]
    return (exact.positions - first[batch.system]).to(batch.dtype)


def as_potential(obj: Any, cutoff: float | None = None) -> Potential:
    """Make a potential of what the user has: a `Potential`, a module of a known family, or any module and a cutoff.

    The module is shared, not copied: training the potential trains it.

    Parameters
    ----------
    obj : Potential or torch.nn.Module
    cutoff : float, optional
        Needed for modules of no known family, in Å.

    Returns
    -------
    Potential
        The object itself, that of its family, or a `ModulePotential`.

    Raises
    ------
    TypeError
        Not a module.
    ValueError
        A module of no known family without a cutoff, or with parameters on several devices or in several precisions.
    """
    if isinstance(obj, Potential):
        return obj
    if not isinstance(obj, nn.Module):
        raise TypeError(f"expected a Potential or a torch module, got {type(obj).__name__}")
    _check_uniform(obj)
    known = adopt(obj)
    if known is not None:
        return known
    if cutoff is None:
        raise ValueError(
            f"{type(obj).__name__} is of no family known here ({', '.join(families())}); "
            "to use it as module(z, pos, batch) -> energies in eV, give its cutoff in Å"
        )
    return ModulePotential(obj, cutoff)


def _check_uniform(module: nn.Module) -> None:
    for what in ("device", "dtype"):
        found = sorted({str(getattr(p, what)) for p in module.parameters()})
        if len(found) > 1:
            raise ValueError(f"{type(module).__name__} has parameters of {what} {' and '.join(found)}: bring it to one by .to(...)")
