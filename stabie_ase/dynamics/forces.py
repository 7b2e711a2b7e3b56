"""A potential as a force function: neighbour lists that are kept, and no more systems at once than memory holds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from stabie_ase.dynamics.integrators import Integrator
from stabie_ase.potentials.base import Potential, Prediction
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import VerletList
from stabie_ase.system.memory import free_bytes, out_of_memory, taken_bytes

logger = logging.getLogger(__name__)

MAX_UNMEASURED_ATOMS = 500
"""Atoms in a batch that is computed at once without a question."""

MAX_MEMORY_FRACTION = 0.7
"""Of the free memory that a call may take; what is kept between two calls needs the rest."""

_known: WeakKeyDictionary[Potential, dict[tuple, float]] = WeakKeyDictionary()
"""Atoms at once, as measured before, by device, precision and whether there is a stress."""


class PotentialForces:
    """A potential as a force function, with Verlet lists of its own.

    Systems are computed in one call while they fit in memory. A batch of more than a few hundred atoms is held against
    the memory there is before the first call: what calls of one system, two, four, ... take is measured, and doubled while
    it is sure to fit. Should memory run out all the same, half as many are computed at once from there on.

    Parameters
    ----------
    potential : Potential
    skin : float
        Of the neighbour list, in Å.
    stress : bool
        Also the stress, which a barostat needs.
    """

    def __init__(self, potential: Potential, skin: float = 1.0, stress: bool = False):
        self.potential, self.skin, self.stress = potential, skin, stress
        self.neighbors = self._new_list()
        self._parts: dict[tuple[int, int], VerletList] = {}
        self._limits = _known.setdefault(potential, {})
        self._kind = (potential.device, potential.dtype, stress)

    @classmethod
    def driving(cls, potential: Potential, integrator: Integrator) -> PotentialForces:
        """What an integrator needs: the stress too if it changes cells."""
        return cls(potential, stress=integrator.needs_stress)

    def _new_list(self) -> VerletList:
        return VerletList(self.potential.cutoff, self.skin)

    def __call__(self, batch: AtomsBatch) -> Prediction:
        """Energies, forces and, if asked for, stress.

        Parameters
        ----------
        batch : AtomsBatch
            Worked through in parts where it does not fit into memory at once.

        Returns
        -------
        Prediction

        Raises
        ------
        MemoryError
            A single system does not fit.
        """
        while True:
            at_once = self.at_once(batch)
            try:
                return self._in_parts(batch, at_once) if batch.n_atoms > at_once else self._compute(batch, self.neighbors)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if batch.n_systems == 1 or at_once <= max(batch.sizes):
                    raise MemoryError(f"{max(batch.sizes)} atoms do not fit in the memory of {batch.device}") from error
            # Outside of the handler: the error holds on to what was being computed.
            self._set(0.5 * min(at_once, batch.n_atoms))
            logger.warning("out of memory; from here on at most %d atoms at once", self.at_once(batch))

    def at_once(self, batch: AtomsBatch) -> float:
        """The most atoms of such a batch in one call, infinite if all fit; measured on the first question."""
        if self._kind not in self._limits:
            if batch.n_atoms <= MAX_UNMEASURED_ATOMS or batch.n_systems == 1:
                return math.inf
            self._set(atoms_that_fit(lambda part: self._compute(part, self._new_list()), batch))
        return self._limits[self._kind]

    def _set(self, atoms: float) -> None:
        self._parts.clear()
        self._limits[self._kind] = atoms

    def _in_parts(self, batch: AtomsBatch, at_once: float) -> Prediction:
        """As many systems at a time as have room, the last ones fewer, each part with a list of its own."""
        n = max(1, int(at_once // max(batch.sizes)))
        parts = []
        for first in range(0, batch.n_systems, n):
            systems = torch.arange(first, min(first + n, batch.n_systems))
            neighbors = self._parts.setdefault((first, n), self._new_list())
            parts.append(self._compute(batch.select(systems), neighbors))
        energies, forces, stress = zip(*parts)
        return Prediction(torch.cat(energies), torch.cat(forces), torch.cat(stress) if self.stress else None)

    def _compute(self, batch: AtomsBatch, neighbors: VerletList) -> Prediction:
        energies, forces, stress = self.potential.compute(batch, neighbors(batch), stress=self.stress)
        return Prediction(energies, forces.to(batch.dtype), stress.to(batch.dtype) if self.stress else None)


def atoms_that_fit(function: Callable[[AtomsBatch], object], batch: AtomsBatch) -> float:
    """Number of atoms whose call is sure to fit in memory, infinite if the whole batch is.

    Measured on the first system, the first two, four, ...; a call of twice as many takes twice as much.
    """
    n = 1
    while n < batch.n_systems:
        part = batch.select(torch.arange(n))
        try:
            taken = taken_bytes(lambda: function(part), batch.device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return 0.5 * part.n_atoms
        free = free_bytes(batch.device)
        if taken is not None and free is not None and 2.0 * taken > MAX_MEMORY_FRACTION * free:
            return part.n_atoms
        n *= 2
    return math.inf
