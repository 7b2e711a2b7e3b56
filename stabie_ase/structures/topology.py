"""The bonds of a system, from frames of it, its molecules, and groups of atoms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii
from matscipy.neighbours import neighbour_list
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, shortest_path
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch, rows_of
from stabie_ase.structures.geometry import in_parts, pair_distances

BOND_FACTOR = 1.25
"""Two atoms are bonded when their mean distance is below this factor times the sum of their covalent radii."""

MAX_BOND_EXCESS = 1.0
"""Å beyond the longest bond at which a bond of other frames is taken for another order of the atoms."""

MIN_BONDED_FRACTION = 0.1
"""Fraction of the frames in which two atoms are within a bond's length that makes a bond which other frames must keep."""


ION_FORMERS = torch.tensor([3, 11, 19, 20, 37, 38, 55, 56, 87, 88])
"""Alkali and alkaline-earth metals, without Be and Mg: neighbours of their ions come and go, within ps in water (Helm and Merbach,
Chem. Rev. 105, 1923, 2005), and are no bonds in what is periodic."""


@dataclass(frozen=True)
class Topology:
    """Bonds of a system and distances of pairs of its atoms in the frames it was taken from.

    Attributes
    ----------
    numbers : Tensor of int64, shape (n_atoms,)
    pairs : Tensor of int64, shape (2, n_pairs)
        i < j: of an isolated molecule all pairs, of a periodic system those that are near enough for a bond in some frames.
    mean, shortest : Tensor of float64, shape (n_pairs,)
        Distances by the nearest image over the frames, in Å.
    bonded : Tensor of bool, shape (n_pairs,)
    """

    numbers: Tensor
    pairs: Tensor
    mean: Tensor
    shortest: Tensor
    bonded: Tensor

    @classmethod
    def from_frames(cls, frames: Sequence[Atoms], ionic: bool = False) -> Topology:
        """Bonds from the distances averaged over all frames.

        In a single hot frame a bond can be stretched beyond any sensible threshold. What surrounds the ion of an alkali or an
        alkaline-earth metal is bonded to it in a system that is not periodic alone, and where it stays.

        Parameters
        ----------
        frames : sequence of Atoms
            Of one system.
        ionic : bool
            Count neighbours of ions as bonds in what is periodic too, as in a crystal.

        Returns
        -------
        Topology

        Raises
        ------
        ValueError
            Several compositions, or frames whose bonds are not those of the others.
        """
        batch = AtomsBatch.from_atoms(frames)
        if not batch.same_composition:
            raise ValueError("bonds need reference frames of one molecule with its atoms in one order")
        numbers = batch.numbers[: batch.n_atoms // batch.n_systems]
        pairs = _near_pairs(frames) if batch.pbc.any() else torch.triu_indices(len(numbers), len(numbers), offset=1)
        return cls._of_pairs(batch, numbers, pairs, ionic)

    @classmethod
    def of_atoms(cls, frames: Sequence[Atoms], atoms: Sequence[int]) -> Topology:
        """The bonds of some atoms, by index, among themselves; others have none. See `from_frames`."""
        index = torch.tensor(atoms)
        own = cls.from_frames([frame[index.numpy()] for frame in frames])
        return replace(own, numbers=torch.as_tensor(frames[0].numbers, dtype=torch.int64), pairs=index[own.pairs])

    @classmethod
    def _of_pairs(cls, batch: AtomsBatch, numbers: Tensor, pairs: Tensor, ionic: bool = False) -> Topology:
        """What frames show of some pairs; ValueError where a bond does not last that is not to an ion."""
        to_ion = torch.isin(numbers, ION_FORMERS)[pairs].any(dim=0)
        reach = BOND_FACTOR * covalent_sums(numbers, pairs)
        total, near = torch.zeros_like(reach), torch.zeros_like(reach)
        shortest, longest = torch.full_like(reach, torch.inf), torch.zeros_like(reach)
        for distances in _distances(batch, pairs):
            total += distances.sum(dim=0)
            near += (distances < reach).sum(dim=0)
            shortest = torch.minimum(shortest, distances.amin(dim=0))
            longest = torch.maximum(longest, distances.amax(dim=0))
        torn = (near > MIN_BONDED_FRACTION * batch.n_systems) & (longest > reach + MAX_BOND_EXCESS)
        broken = torn & ~to_ion
        if broken.any():
            _refuse(batch, pairs[:, broken], reach[broken])
        mean = total / batch.n_systems
        loose = torn | to_ion if batch.pbc.any() and not ionic else torn
        return cls(numbers, pairs, mean, shortest, (mean < reach) & ~loose)

    def within_molecules(self, frames: Sequence[Atoms]) -> Topology:
        """The same bonds among all pairs of atoms that have a molecule in common, from the same frames."""
        pairs = torch.cat([atoms[torch.triu_indices(len(atoms), len(atoms), offset=1)] for atoms in self.members], dim=1)
        return self._of_pairs(AtomsBatch.from_atoms(frames), self.numbers, pairs)

    @property
    def bonds(self) -> Tensor:
        """The pairs that are bonded, shape (2, n_bonds)."""
        return self.pairs[:, self.bonded]

    @cached_property
    def _graph(self) -> coo_array:
        n, bonds = len(self.numbers), self.bonds.numpy()
        return coo_array((np.ones(bonds.shape[1]), (bonds[0], bonds[1])), shape=(n, n)).tocsr()

    @cached_property
    def separation(self) -> Tensor:
        """Bonds on the shortest path between the two atoms of each pair, shape (n_pairs,), infinite between molecules."""
        i, j = self.pairs.numpy()
        molecule, members = self.molecule.numpy(), [atoms.numpy() for atoms in self.members]
        row = np.empty_like(molecule)
        paths = []
        for atoms in members:
            row[atoms] = np.arange(len(atoms))
            paths.append(shortest_path(self._graph[atoms][:, atoms], directed=False, unweighted=True).ravel())
        size = np.array([len(atoms) for atoms in members], dtype=np.int64)
        first = np.cumsum(size**2) - size**2
        found = np.full(len(i), np.inf)
        near = molecule[i] == molecule[j]
        of, i, j = molecule[i][near], i[near], j[near]
        found[near] = np.concatenate(paths)[first[of] + row[i] * size[of] + row[j]]
        return torch.as_tensor(found)

    @cached_property
    def molecule(self) -> Tensor:
        """The molecule that each atom belongs to, shape (n_atoms,), numbered from 0 in the order of their first atoms.

        Molecules are what bonds hold together: the connected components of the graph of bonds.
        """
        _, labels = connected_components(self._graph, directed=False)
        _, first, label = np.unique(labels, return_index=True, return_inverse=True)
        return torch.as_tensor(np.argsort(np.argsort(first))[label], dtype=torch.int64)

    @cached_property
    def members(self) -> list[Tensor]:
        """The atoms of each molecule, in increasing order."""
        return list(torch.argsort(self.molecule, stable=True).split(torch.bincount(self.molecule).tolist()))

    @cached_property
    def place(self) -> Tensor:
        """The kind of place of each atom in its molecule, shape (n_atoms,): molecules of equal elements in equal order share theirs."""
        place, places = torch.empty_like(self.molecule), {}
        for atoms in self.members:
            elements = tuple(self.numbers[atoms].tolist())
            place[atoms] = torch.tensor([places.setdefault((elements, n), len(places)) for n in range(len(atoms))])
        return place


def _near_pairs(frames: Sequence[Atoms]) -> Tensor:
    """Pairs i < j that are within a bond's length in some frame, by whichever image, shape (2, n_pairs)."""
    radii = covalent_radii * BOND_FACTOR
    found = set()
    for atoms in frames:
        i, j, d = neighbour_list("ijd", atoms, 2.0 * float(radii[atoms.numbers].max()))
        near = (i < j) & (d < radii[atoms.numbers[i]] + radii[atoms.numbers[j]])
        found.update(zip(i[near].tolist(), j[near].tolist()))
    return torch.as_tensor(sorted(found), dtype=torch.int64).reshape(-1, 2).T.contiguous()


def covalent_sums(numbers: Tensor, pairs: Tensor) -> Tensor:
    """Sums of the covalent radii of pairs (Cordero et al., Dalton Trans., 2832, 2008), float64, shape (n_pairs,), in Å."""
    return torch.as_tensor(covalent_radii)[numbers.cpu()][pairs.cpu()].sum(dim=0)


def _distances(batch: AtomsBatch, pairs: Tensor) -> Iterator[Tensor]:
    """Distances of the pairs in some frames at a time, shape (n_frames, n_pairs)."""
    for part in in_parts(batch, pairs.shape[1]):
        yield pair_distances(part, pairs)


@dataclass(frozen=True)
class Groups:
    """What one sample is: a whole system, a molecule, a neighbourhood. Groups may overlap.

    Attributes
    ----------
    atoms : Tensor of int64, shape (n_members,)
        Atoms of a batch, group by group.
    group : Tensor of int64, shape (n_members,)
        The group that each of them is a member of, sorted.
    system : Tensor of int64, shape (n_groups,)
        The system that each group is part of.
    """

    atoms: Tensor
    group: Tensor
    system: Tensor

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.system)

    @classmethod
    def systems(cls, batch: AtomsBatch) -> Groups:
        """Each system is one group."""
        return cls(torch.arange(batch.n_atoms, device=batch.device), batch.system, torch.arange(batch.n_systems, device=batch.device))

    @classmethod
    def of_each(cls, atoms: Tensor, batch: AtomsBatch) -> Groups:
        """Some atoms of every system, by index, shape (n,), as one group of each; systems are of one size."""
        starts = torch.cumsum(batch.counts, 0) - batch.counts
        system = torch.arange(batch.n_systems, device=batch.device)
        return cls((atoms.to(batch.device) + starts[:, None]).flatten(), system.repeat_interleave(len(atoms)), system)

    @classmethod
    def molecules(cls, batch: AtomsBatch, topology: Topology) -> Groups:
        """The molecules of systems that all have this topology; those of the first system come first."""
        molecule = topology.molecule.to(batch.device)
        n = int(molecule.max()) + 1
        order = torch.argsort(molecule, stable=True)
        offset = torch.arange(batch.n_systems, device=batch.device)[:, None]
        atoms, group = order + len(molecule) * offset, molecule[order] + n * offset
        return cls(atoms.flatten(), group.flatten(), torch.arange(batch.n_systems, device=batch.device).repeat_interleave(n))

    def select(self, chosen: Tensor) -> Groups:
        """Some of the groups by index, shape (n,), in increasing order, of the same batch."""
        new_group = chosen.new_full((self.n_groups,), -1).index_copy(0, chosen, torch.arange(len(chosen), device=chosen.device))
        members = new_group[self.group] >= 0
        return Groups(self.atoms[members], new_group[self.group[members]], self.system[chosen])

    def of_systems(self, systems: Tensor, batch: AtomsBatch) -> Groups:
        """Those of some systems of their batch, shape (n,), in increasing order, for the batch of these systems alone."""
        atoms = batch.atom_index(systems)
        new_atom = atoms.new_full((batch.n_atoms,), -1).index_copy(0, atoms, torch.arange(len(atoms), device=atoms.device))
        new_system = systems.new_full((batch.n_systems,), -1).index_copy(0, systems, torch.arange(len(systems), device=systems.device))
        kept = new_system[self.system] >= 0
        new_group = torch.cumsum(kept, 0) - 1
        members = kept[self.group]
        return Groups(new_atom[self.atoms[members]], new_group[self.group[members]], new_system[self.system[kept]])

    def batch(self, batch: AtomsBatch) -> AtomsBatch:
        """Each group as a system of its own, in the cell that it was in, shape (n_groups,) systems."""
        rows = {"atom": self.atoms, "system": self.system}
        fields = {name: getattr(batch, name)[rows[per]] for name, per in rows_of(AtomsBatch).items()}
        return AtomsBatch(**fields, system=self.group, n_systems=self.n_groups)

    def apart(self, batch: AtomsBatch) -> tuple[AtomsBatch, Groups]:
        """For every group a copy of the system that it is part of, and the groups as atoms of these n_groups systems."""
        copies = batch.select(self.system)
        starts = torch.cumsum(copies.counts, 0) - copies.counts
        atoms = starts[self.group] + batch.index_in_system[self.atoms]
        return copies, Groups(atoms, self.group, torch.arange(self.n_groups, device=batch.device))

    def spread(self, weights: Tensor, batch: AtomsBatch) -> Tensor:
        """Weights of atoms from weights of groups, W_a = Σ_{j∋a} w_j, shape (n_atoms,)."""
        return weights.new_zeros(batch.n_atoms).index_add(0, self.atoms, weights[self.group])


def _refuse(batch: AtomsBatch, pairs: Tensor, reach: Tensor) -> None:
    """Name a frame that stands apart by the bonds that are not there."""
    distances = torch.cat(list(_distances(batch, pairs)))
    lost = distances > reach + MAX_BOND_EXCESS
    often = (distances <= reach).sum(dim=0)
    frame = int((lost * often).sum(dim=1).argmax())  # one that lacks what most have, not one that lacks what few have
    k = int(torch.where(lost[frame], distances[frame] - reach, -torch.inf).argmax())
    i, j = pairs[:, k].tolist()
    raise ValueError(
        f"frame {frame}: atoms {i} and {j} are {float(distances[frame, k]):.2f} Å apart, but bonded in "
        f"{int(often[k])} of {batch.n_systems} frames; are its atoms in another order? Bring the "
        "frames to one order of the atoms, or leave out those in which a bond is broken; for what reacts name criteria and "
        "observables that need no bonds: --criterion energy,temperature --observable rdf:A-B"
    )
