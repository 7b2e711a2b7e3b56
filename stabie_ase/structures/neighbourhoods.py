"""Neighbourhoods as groups: each molecule of a system with those around it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ase.symbols import Symbols
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import first_atoms, in_parts, molecule_vectors, nearest_images
from stabie_ase.structures.topology import Groups, Topology


def units(topology: Topology) -> Tensor:
    """What neighbourhoods are made of, numbered for each atom, shape (n_atoms,): the molecules, or atoms where bonds hold all together."""
    molecule = topology.molecule
    return molecule if int(molecule.max()) > 0 else torch.arange(len(molecule))


def formulas(topology: Topology) -> list[str]:
    """Of each unit (see `units`), as H2O."""
    unit, numbers = units(topology).numpy(), topology.numbers.numpy()
    return [Symbols(numbers[unit == k]).get_chemical_formula() for k in range(unit.max() + 1)]


def nearest(batch: AtomsBatch, topology: Topology, k: int) -> Groups:
    """Each molecule with its k nearest ones, by the distance of centres of mass.

    A group for every molecule, the first of which is its own. Groups overlap. Distances are those of `centre_distances`.

    Parameters
    ----------
    batch : AtomsBatch
        Systems that all have this topology.
    topology : Topology
        Its molecules, or atoms where there are none (see `units`).
    k : int

    Returns
    -------
    Groups

    Raises
    ------
    ValueError
        No k, or so large a one that a group is the whole system.
    """
    n = int(units(topology).max()) + 1
    if not 1 <= k < n - 1:
        expected = f"expected 1 to {n - 2}" if n > 2 else "expected more molecules or atoms to choose from"
        raise ValueError(f"nearest:{k} of {n} molecules or atoms, {expected}; the estimator of whole systems is global")

    def chosen(distances: Tensor) -> Tensor:
        index = distances.topk(k + 1, dim=2, largest=False).indices
        return torch.zeros_like(distances, dtype=torch.bool).scatter(2, index, True)

    return _around(batch, units(topology), chosen)


def within(batch: AtomsBatch, topology: Topology, radius: float) -> Groups:
    """Each molecule with those whose centres of mass are nearer to its own than a radius.

    A group for every molecule. Groups overlap, and their sizes differ. Distances are those of `centre_distances`.

    Parameters
    ----------
    batch : AtomsBatch
        Systems that all have this topology.
    topology : Topology
        Its molecules, or atoms where there are none (see `units`).
    radius : float
        In Å.

    Returns
    -------
    Groups
    """
    return _around(batch, units(topology), lambda distances: distances < radius)


def _around(batch: AtomsBatch, unit: Tensor, choose: Callable[[Tensor], Tensor]) -> Groups:
    """A group around every unit: the units that are chosen by distances, shape (n_frames, n, n), as a bool of this shape."""
    unit = unit.to(batch.device)
    n, n_atoms, done, atoms, group = int(unit.max()) + 1, len(unit), 0, [unit[:0]], [unit[:0]]
    for part in in_parts(batch, n * n_atoms) if batch.n_systems else ():
        distances = centre_distances(part, unit)
        distances.diagonal(dim1=1, dim2=2).fill_(-1.0)  # its own comes first, also where others are at the same place
        frame, centre, atom = choose(distances)[:, :, unit].nonzero(as_tuple=True)
        atoms.append(atom + n_atoms * (frame + done))
        group.append(centre + n * (frame + done))
        done += part.n_systems
    return Groups(torch.cat(atoms), torch.cat(group), torch.arange(batch.n_systems, device=batch.device).repeat_interleave(n))


def centre_distances(batch: AtomsBatch, unit: Tensor) -> Tensor:
    """Distances between the centres of mass of molecules by the nearest image, float64, in Å.

    A molecule may lie across the faces of its cell, see `molecule_vectors`. For longer distances see `pair_vectors`.

    Parameters
    ----------
    batch : AtomsBatch
        Systems of one size.
    unit : Tensor of int64, shape (n_atoms_of_a_system,)
        The molecule of each atom, numbered from 0.

    Returns
    -------
    Tensor, shape (n_systems, n, n)
        Infinite where a position is not finite.
    """
    _, from_first = molecule_vectors(batch, unit)
    n, centres = from_first.shape[1], batch.positions.double().view(batch.n_systems, -1, 3)[:, first_atoms(unit)] + from_first
    vectors = (centres[:, None] - centres[:, :, None]).flatten(1, 2)
    vectors = nearest_images(vectors, batch) if bool(batch.pbc.any()) else vectors
    return vectors.norm(dim=2).nan_to_num(nan=torch.inf).view(batch.n_systems, n, n)
