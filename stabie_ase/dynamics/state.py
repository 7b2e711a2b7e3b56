"""The state of a batch of replicas in molecular dynamics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from ase import Atoms, units
from ase.constraints import FixAtoms, FixCom
from torch import Tensor

from stabie_ase.dynamics.random import MOMENTA, normals, replica_keys
from stabie_ase.potentials.base import Prediction
from stabie_ase.structures.batch import AtomsBatch, changed, per_atom, per_system, rows_of

ForceFunction = Callable[[AtomsBatch], Prediction]
"""Batch to potential energies, forces and, for a barostat, stress; all detached."""

@dataclass(frozen=True)
class MDState:
    """Everything a step depends on; a step returns a new one.

    Attributes
    ----------
    batch : AtomsBatch
        Positions in Å, unwrapped.
    momenta, forces : Tensor, shape (n_atoms, 3)
        In amu Å / ASE time and eV/Å.
    mobile : Tensor of bool, shape (n_atoms,)
        False for an atom that is held where it is: it has no momentum and feels no force.
    potential_energy : Tensor of float64, shape (n_systems,)
        In eV.
    temperature : Tensor, shape (n_systems,)
        Of the heat bath, in K.
    pressure : Tensor, shape (n_systems,)
        Of the surroundings, in eV/Å³; only a barostat looks at it.
    key, step : Tensor of int64, shape (n_systems,)
        Each replica's random stream and the steps it has taken since the stream began.
    alive : Tensor of bool, shape (n_systems,)
        False for a replica that met a number that is not finite: it stays at its last finite frame.
    stress : Tensor or None, shape (n_systems, 3, 3)
        In eV/Å³, where the force function gives it.
    extra : mapping of str to Tensor, shape (n_systems, ...)
        What an integrator or a criterion remembers of each replica, under the owner's name.
    """

    batch: AtomsBatch
    momenta: Tensor = per_atom()
    forces: Tensor = per_atom()
    mobile: Tensor = per_atom()
    potential_energy: Tensor = per_system()
    temperature: Tensor = per_system()
    pressure: Tensor = per_system()
    key: Tensor = per_system()
    step: Tensor = per_system()
    alive: Tensor = per_system()
    stress: Tensor | None = per_system(None)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def n_systems(self) -> int:
        """Number of replicas."""
        return self.batch.n_systems

    def replace(self, **changes) -> MDState:
        """Copy with some fields changed."""
        return changed(self, changes)

    def move(self, **changes) -> MDState:
        """Copy with new positions and other fields changed."""
        return self.replace(batch=self.batch.replace(positions=changes.pop("positions")), **changes)

    def remember(self, **extra: Tensor) -> MDState:
        """Copy in which some of `extra` is new."""
        return self.replace(extra={**self.extra, **extra})

    def select(self, systems: Tensor | Sequence[int]) -> MDState:
        """Pick replicas by index, shape (n,)."""
        systems = torch.as_tensor(systems, dtype=torch.int64, device=self.batch.device)
        index = {"atom": self.batch.atom_index(systems), "system": systems}
        return self._with(self.batch.select(systems), {n: x[index[_rows(n)]] for n, x in self._own().items()})

    def put(self, systems: Tensor | Sequence[int], other: MDState) -> MDState:
        """Copy in which the replicas `systems`, shape (n,), are those of `other`, in order; they must have the same atoms."""
        systems = torch.as_tensor(systems, dtype=torch.int64, device=self.batch.device)
        index, new = {"atom": self.batch.atom_index(systems), "system": systems}, other.tensors()
        return self._of({n: x.index_copy(0, index[_rows(n)], new[n]) for n, x in self.tensors().items()})

    def where(self, chosen: Tensor, other: MDState) -> MDState:
        """The chosen replicas, shape (n_systems,), from this state, all others from `other`, without a branch."""
        flags, old = {"atom": chosen[self.batch.system], "system": chosen}, other.tensors()

        def pick(name, x):
            if x is old[name]:
                return x
            return torch.where(flags[_rows(name)].view(-1, *[1] * (x.dim() - 1)), x, old[name])

        return self._of({name: pick(name, x) for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All that changes during a run, by name, for a restart file (`restore` is the way back)."""
        return self._own() | {"positions": self.batch.positions, "cells": self.batch.cells}

    def restore(self, tensors: Mapping[str, Tensor]) -> MDState:
        """Copy with everything `tensors` returned put back."""
        return self._of({name: x.to(self.batch.device) for name, x in tensors.items()})

    def _of(self, tensors: dict[str, Tensor]) -> MDState:
        batch = self.batch.replace(positions=tensors.pop("positions"), cells=tensors.pop("cells"))
        return self._with(batch, tensors)

    def _own(self) -> dict[str, Tensor]:
        """All but the batch, what is remembered under `EXTRA` and its name."""
        values = {name: getattr(self, name) for name in rows_of(MDState)} | {EXTRA + name: x for name, x in self.extra.items()}
        return {name: x for name, x in values.items() if x is not None}

    @staticmethod
    def _with(batch: AtomsBatch, own: Mapping[str, Tensor]) -> MDState:
        """The state that `_own` was taken from, and a batch."""
        extra = {name[len(EXTRA) :]: x for name, x in own.items() if name.startswith(EXTRA)}
        return MDState(batch, **{name: x for name, x in own.items() if not name.startswith(EXTRA)}, extra=extra)


EXTRA = "extra:"
"""In front of the names of what is remembered, among the tensors of a state."""


def _rows(name: str) -> str:
    """Whether a tensor of a state has a row for each "atom" or for each "system"."""
    return rows_of(MDState).get(name) or rows_of(AtomsBatch).get(name, "system")


def initial_state(
    batch: AtomsBatch,
    force_function: ForceFunction,
    temperature_K: float | Sequence[float] | Tensor,
    seed: int = 0,
    keys: Tensor | None = None,
    fix_com: bool = True,
    pressure_GPa: float | Sequence[float] | Tensor = 0.0,
    mobile: Tensor | None = None,
) -> MDState:
    """Start replicas from positions, with momenta from the Maxwell-Boltzmann distribution.

    Parameters
    ----------
    batch : AtomsBatch
    force_function : ForceFunction
    temperature_K : float or sequence of floats
        One for all replicas or one each.
    seed : int
        Seed of the replicas' random streams.
    keys : Tensor of int64, shape (n_systems,), optional
        The streams themselves, instead of `seed`.
    fix_com : bool
        Take out each replica's centre-of-mass momentum, which leaves 3N - 3 degrees of freedom; not where an atom is held.
    pressure_GPa : float or sequence of floats
        For a barostat, one for all replicas or one each.
    mobile : Tensor of bool, shape (n_atoms,), optional
        Atoms that may move (see `mobile_atoms`); all by default.

    Returns
    -------
    MDState

    Raises
    ------
    ValueError
        A system is periodic along a vector that is not finite.
    """

    def one_each(values):
        return torch.as_tensor(values, dtype=batch.dtype, device=batch.device).expand(batch.n_systems).clone()

    temperature = one_each(temperature_K)
    if mobile is None:
        mobile = torch.ones(batch.n_atoms, dtype=torch.bool, device=batch.device)
    keys = replica_keys(seed, batch.n_systems, device=batch.device) if keys is None else keys
    step = torch.zeros_like(keys)
    batch.check_cells()
    energy, forces, stress = force_function(batch)
    alive = torch.isfinite(energy) & batch.all_atoms(torch.isfinite(batch.positions) & torch.isfinite(forces))
    # A step must not bring bad positions to a potential.
    forces = torch.where((alive[batch.system] & mobile)[:, None], forces, 0.0)
    return MDState(
        batch=batch,
        momenta=maxwell_boltzmann(batch, temperature, keys, step, fix_com, mobile),
        forces=forces,
        potential_energy=energy,
        stress=stress,
        temperature=temperature,
        pressure=one_each(pressure_GPa) * units.GPa,
        mobile=mobile,
        key=keys,
        step=step,
        alive=alive,
    )


def maxwell_boltzmann(
    batch: AtomsBatch, temperature: Tensor, keys: Tensor, step: Tensor, fix_com: bool, mobile: Tensor
) -> Tensor:
    """Momenta with variance m k_B T, shape (n_atoms, 3), from the replicas' streams; none for atoms that are held."""
    sigma = torch.sqrt(mobile * batch.masses * units.kB * temperature[batch.system])
    momenta = sigma[:, None] * normals(batch, keys, step, MOMENTA)
    return remove_com_momentum(batch, momenta, mobile) if fix_com else momenta


def remove_com_momentum(batch: AtomsBatch, momenta: Tensor, mobile: Tensor) -> Tensor:
    """Momenta without the centre-of-mass motion of each system in which no atom is held, shape (n_atoms, 3)."""
    velocity = batch.sum_over_atoms(momenta) / batch.sum_over_atoms(batch.masses)[:, None]
    velocity = velocity * batch.all_atoms(mobile)[:, None]
    return momenta - batch.masses[:, None] * velocity[batch.system]


def has_momenta(atoms: Atoms) -> bool:
    """Whether ASE atoms bring momenta of their own; all zero, as some formats write for want of any, are none; ValueError if not finite."""
    momenta = atoms.get_momenta()
    if not np.isfinite(momenta).all():
        raise ValueError("momenta of the starting frames are not finite; remove them or draw new ones")
    return bool(momenta.any())


def take_momenta(state: MDState, images: Sequence[Atoms], taken: Sequence[bool], fix_com: bool) -> MDState:
    """Copy in which some replicas have the momenta of their ASE atoms instead of those drawn.

    Parameters
    ----------
    state : MDState
    images : sequence of Atoms
        One a replica. Atoms that are held get no momentum.
    taken : sequence of bool
        Which replicas have the momenta of their atoms, one a replica.
    fix_com : bool
        Take out the centre-of-mass momentum, except where an atom is held.

    Returns
    -------
    MDState
    """
    batch = state.batch
    momenta = torch.as_tensor(np.concatenate([atoms.get_momenta() for atoms in images])).to(state.momenta) * state.mobile[:, None]
    if fix_com:
        momenta = remove_com_momentum(batch, momenta, state.mobile)
    chosen = torch.as_tensor(taken, device=batch.device)[batch.system]
    return state.replace(momenta=torch.where(chosen[:, None], momenta, state.momenta))


def mobile_atoms(images: Sequence[Atoms]) -> Tensor:
    """Which atoms the constraints of ASE atoms leave free.

    `FixAtoms` is honoured, `FixCom` is left to the ensemble, whose `fix_com` tells.

    Parameters
    ----------
    images : sequence of Atoms
        One a replica.

    Returns
    -------
    Tensor of bool, shape (n_atoms,)
        Of all images in a row.

    Raises
    ------
    ValueError
        Any other constraint, by name.
    """
    free = []
    for atoms in images:
        free.append(np.ones(len(atoms), dtype=bool))
        for constraint in atoms.constraints:
            if isinstance(constraint, FixAtoms):
                free[-1][constraint.index] = False
            elif not isinstance(constraint, FixCom):
                raise ValueError(
                    f"the constraint {type(constraint).__name__} is not supported, only FixAtoms and FixCom are: "
                    "remove it with atoms.set_constraint() if the dynamics may go without it"
                )
    return torch.as_tensor(np.concatenate(free))


def degrees_of_freedom(state: MDState, fix_com: bool) -> Tensor:
    """Momenta that are free in each replica, shape (n_systems,): 3 per mobile atom, less 3 if its centre of mass rests.

    A replica with atoms that are held does not conserve its momentum, so that nothing is taken off there.
    """
    batch = state.batch
    mobile = batch.sum_over_atoms(state.mobile.to(state.momenta.dtype))
    return 3.0 * (mobile - (mobile == batch.counts).to(mobile.dtype)) if fix_com else 3.0 * mobile


def kinetic_energy(state: MDState) -> Tensor:
    """Kinetic energies, shape (n_systems,), in eV."""
    batch = state.batch
    return batch.sum_over_atoms(0.5 * state.momenta.square().sum(dim=1) / batch.masses)
