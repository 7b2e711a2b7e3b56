"""Neighbour lists for batches: uncapped, image-aware, symmetric.

Every list is stored as one half, in which each pair occurs once, followed by the same pairs reversed. Models whose
edge features depend on the distance alone evaluate the half and use it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import alchemi, cell_list, kd_tree
from stabie_ase.system.memory import free_bytes

ALL_PAIRS_MAX_ATOMS = 64
"""Up to this size a molecule's list holds all its pairs and never goes out of date."""

MAX_PAIRS = 2**31 - 1
"""In the list of one system: backends count them by 32-bit integers."""

BYTES_PER_PAIR = 240.0
"""That a list and the distances in it take while they are made, as measured."""

CHECKED_PAIRS = 1e7
"""From so many on it is seen beforehand whether there is memory for them: a machine that has none left kills the process."""


@dataclass(frozen=True)
class NeighborList:
    """Pairs (i, j) of atoms with r_ij = r_j - r_i + shift · cell.

    Attributes
    ----------
    pairs : Tensor of int64, shape (2, n_pairs)
        Both directions of every pair: the second half of the columns is the first half reversed, with the negative
        shifts. No pair links two systems.
    shifts : Tensor of int64, shape (n_pairs, 3)
        Lattice images of atom j.
    cutoff : float
        Distance up to which the list was complete when built, in Å; infinite for all pairs.
    periodic : bool
        Whether any shift can differ from zero.
    known_offsets : Tensor or None, shape (n_pairs, 3)
        shift · cell in Å, worked out beforehand for the cells that the list is used with.
    fixed_length : bool
        Pairs beyond a model's cutoff have to stay and contribute nothing (see `padded`).
    """

    pairs: Tensor
    shifts: Tensor
    cutoff: float
    periodic: bool
    known_offsets: Tensor | None = None
    fixed_length: bool = False

    @property
    def n_pairs(self) -> int:
        """Pairs, both directions counted."""
        return self.pairs.shape[1]

    @property
    def half(self) -> NeighborList:
        """Each pair once."""
        n = self.n_pairs // 2
        offsets = None if self.known_offsets is None else self.known_offsets[:n]
        return replace(self, pairs=self.pairs[:, :n], shifts=self.shifts[:n], known_offsets=offsets)

    @property
    def full(self) -> NeighborList:
        """Both directions, from a list that is a half."""
        offsets = None if self.known_offsets is None else torch.cat([self.known_offsets, -self.known_offsets])
        pairs, shifts = torch.cat([self.pairs, self.pairs.flip(0)], dim=1), torch.cat([self.shifts, -self.shifts])
        return replace(self, pairs=pairs, shifts=shifts, known_offsets=offsets)

    def for_cells(self, batch: AtomsBatch) -> NeighborList:
        """The same list, of use with these cells only, for many calls."""
        return replace(self, known_offsets=self.offsets(batch))

    def offsets(self, batch: AtomsBatch) -> Tensor | None:
        """shift · cell of each pair, shape (n_pairs, 3), in Å; None where nothing is periodic."""
        if self.known_offsets is not None and (self.fixed_length or not batch.cells.requires_grad):
            return self.known_offsets.to(batch.dtype)
        if not self.periodic:
            return None
        cells = batch.lattice[batch.system[self.pairs[0]]]
        return torch.einsum("pk,pkx->px", self.shifts.to(cells.dtype), cells)

    def vectors(self, batch: AtomsBatch) -> Tensor:
        """r_j - r_i with the image shift, shape (n_pairs, 3), in Å; differentiable in positions and cells.

        Of a batch that was rounded, differences of what it was before: wherever atoms are, only distances are rounded.
        """
        i, j = self.pairs
        # Far faster than indexing, forwards and backwards.
        exact = batch.exact
        vectors = exact.positions.index_select(0, j) - exact.positions.index_select(0, i)
        offsets = self.offsets(exact)
        return (vectors if offsets is None else vectors + offsets).to(batch.dtype)

    def select(self, index: Tensor) -> NeighborList:
        """The pairs (columns) with these indices, shape (n,)."""
        offsets = None if self.known_offsets is None else self.known_offsets.index_select(0, index)
        pairs, shifts = self.pairs.index_select(1, index), self.shifts.index_select(0, index)
        return replace(self, pairs=pairs, shifts=shifts, known_offsets=offsets)

    def within(self, batch: AtomsBatch, cutoff: float) -> NeighborList:
        """Trim a full list to the pairs now closer than `cutoff` (Å), both directions kept together.

        A list of fixed length is returned as it is.
        """
        if self.fixed_length:
            return self
        half = self.half
        with torch.no_grad():
            near = half.vectors(batch).square().sum(dim=1) < cutoff**2
        return half.select(near.nonzero()[:, 0]).full

    def padded(self, batch: AtomsBatch, n_half: int, far: float) -> NeighborList:
        """A full list of `n_half` pairs in each half, for these cells: the same pairs, and others that are no neighbours.

        Those link the first atom with an image of it at a distance of `far`, in Å, so that they exert no force whatever
        a model makes of them.
        """
        half = self.half
        excess = n_half - half.n_pairs
        offsets = half.offsets(batch)
        if offsets is None:
            offsets = batch.positions.new_zeros((half.n_pairs, 3))
        return NeighborList(
            nn.functional.pad(half.pairs, (0, excess)),
            nn.functional.pad(half.shifts, (0, 0, 0, excess)),
            self.cutoff,
            periodic=True,
            known_offsets=torch.cat([offsets, offsets.new_tensor([far, 0.0, 0.0]).expand(excess, 3)]),
            fixed_length=True,
        ).full


def all_pairs(batch: AtomsBatch) -> NeighborList:
    """Every pair within each system, no images; never goes out of date."""
    halves = {n: torch.triu_indices(n, n, offset=1, device=batch.device) for n in set(batch.sizes)}
    starts = np.cumsum([0, *batch.sizes[:-1]]).tolist()
    pairs = torch.cat([halves[n] + start for n, start in zip(batch.sizes, starts)], dim=1)
    return NeighborList(pairs, pairs.new_zeros((pairs.shape[1], 3)), float("inf"), periodic=False).full


def _check_cells(cells: np.ndarray, pbc: np.ndarray, sizes: np.ndarray, cutoff: float, device: torch.device) -> None:
    """Refuse cells that span no volume, and a list of more pairs than can be counted or held in memory.

    Only a cutoff that nobody means leads there. A cell that is not finite is no error here: its list will be empty, as that of
    a replica that exploded should be.
    """
    lengths = np.linalg.norm(cells, axis=2)
    with np.errstate(invalid="ignore"):
        volumes = np.abs(np.linalg.det(cells))
        flat = volumes < 1e-10 * lengths.prod(axis=1)
    bad = (pbc & (lengths == 0)).any(axis=1) | (flat & (lengths > 0).all(axis=1))
    if bad.any():
        k = int(bad.argmax())
        raise ValueError(
            f"system {k} has pbc={pbc[k].tolist()} and the cell {cells[k].tolist()}: every periodic direction needs a "
            "lattice vector, and three vectors must span a volume"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        n_pairs = np.where(pbc.all(axis=1), 2.0 / 3.0 * np.pi * cutoff**3 * sizes**2 / volumes, 0.0)
    if (n_pairs > MAX_PAIRS).any():
        k = int((n_pairs > MAX_PAIRS).argmax())
        raise ValueError(
            f"a cutoff of {cutoff:g} Å means about {n_pairs[k]:.1g} pairs in system {k}, with {sizes[k]} atoms in "
            f"{volumes[k]:.4g} Å³; a neighbour list holds {MAX_PAIRS:.1g}. Is the cutoff in Å?"
        )
    needed, free = 2.0 * BYTES_PER_PAIR * n_pairs.sum(), free_bytes(device) if n_pairs.sum() > CHECKED_PAIRS else None
    if free is not None and needed > free:
        raise MemoryError(
            f"a cutoff of {cutoff:g} Å means about {2.0 * n_pairs.mean() / sizes.mean():.0f} neighbours of each of {sizes.sum()} atoms, "
            f"which take {needed / 1e9:.3g} GB; {free / 1e9:.3g} GB are free. Make it smaller"
        )


def neighbor_list(batch: AtomsBatch, cutoff: float) -> NeighborList:
    """Neighbour list of a batch: all pairs for small molecules, else by a k-d tree on a CPU.

    On other devices it is made there: by nvalchemi-toolkit-ops if that is installed, else by linked cells.

    Parameters
    ----------
    batch : AtomsBatch
    cutoff : float
        In Å; may be infinite where nothing is periodic.

    Returns
    -------
    NeighborList
        Complete at least up to `cutoff`; all pairs of small molecules are there whatever their distance.
    """
    pbc = batch.pbc.cpu().numpy()
    infinite = not np.isfinite(cutoff)
    if not pbc.any() and (infinite or max(batch.sizes) <= ALL_PAIRS_MAX_ATOMS):
        return all_pairs(batch)
    if infinite:
        raise ValueError("an infinite cutoff in a periodic system: give the potential a finite one")
    cells = batch.lattice.detach().cpu().double().numpy()
    _check_cells(cells, pbc, np.array(batch.sizes), cutoff, batch.device)
    return NeighborList(*_backend(batch.device)(batch, cutoff), float(cutoff), bool(pbc.any())).full


def _backend(device: torch.device) -> Callable[[AtomsBatch, float], tuple[Tensor, Tensor]]:
    if device.type == "cpu":
        return kd_tree.half_list
    return alchemi.half_list if alchemi.available() else cell_list.half_list


class VerletList:
    """A neighbour list that is kept while it is valid (Verlet, Phys. Rev. 159, 98, 1967).

    A list built at `cutoff + skin` holds every pair within `cutoff` until an atom has moved by `skin / 2` from where
    it was at the build. Where the cell has changed, from h₀ to h₀ F, atoms are followed relative to it: distances have
    shrunk by no more than the smallest singular value of F.

    Parameters
    ----------
    cutoff : float
        Distance within which pairs are wanted, in Å.
    skin : float
        How far beyond it the list reaches, in Å.
    """

    def __init__(self, cutoff: float, skin: float = 1.0):
        if not cutoff > 0 or skin < 0:
            raise ValueError(f"cutoff must be positive and skin not negative, got {cutoff} and {skin} Å")
        self.cutoff, self.skin = cutoff, skin
        self.n_builds = 0
        self._list: NeighborList | None = None
        self._built_for: AtomsBatch | None = None

    def __call__(self, batch: AtomsBatch) -> NeighborList:
        """The list for these positions, rebuilt only when it has to be."""
        if not self._valid(batch):
            cells = batch.cells.detach() if batch.cells.requires_grad else batch.cells
            self._built_for = batch.replace(positions=batch.positions.detach().clone(), cells=cells)
            self._list = neighbor_list(batch, self.cutoff + self.skin).for_cells(self._built_for)
            self.n_builds += 1
        assert self._list is not None
        return self._list if self._in_the_same_cells(batch) else replace(self._list, known_offsets=None)

    def _in_the_same_cells(self, batch: AtomsBatch) -> bool:
        old = self._built_for.cells
        return batch.cells is old or bool((batch.cells == old).all())

    def _valid(self, batch: AtomsBatch) -> bool:
        old = self._built_for
        if old is None or not _same_topology(old, batch):
            return False
        if self._list.cutoff == float("inf"):
            return True
        moved, shrunk = batch.positions.detach() - old.positions, 1.0
        if not self._in_the_same_cells(batch):
            deformation = torch.linalg.solve_ex(old.cells, batch.cells.detach()).result
            if not bool(torch.isfinite(deformation).all()):  # a cell of fewer than three vectors, or one that exploded
                return False
            moved = moved + torch.einsum("nx,nxy->ny", old.positions, (torch.eye(3).to(deformation) - deformation)[batch.system])
            shrunk = torch.linalg.svdvals(deformation).min()
        # An atom at nan has no neighbours before a new list and none after it: no reason to build one.
        furthest = moved.square().sum(dim=1).nan_to_num(nan=0.0).max().sqrt()
        return bool(shrunk * (self.cutoff + self.skin) - 2.0 * furthest >= self.cutoff)


def _same_topology(a: AtomsBatch, b: AtomsBatch) -> bool:
    """Same atoms in the same systems with the same periodicity (cheap when the tensors are shared)."""
    if a.n_systems != b.n_systems or a.n_atoms != b.n_atoms:
        return False
    return (a.system is b.system or torch.equal(a.system, b.system)) and (
        a.pbc is b.pbc or torch.equal(a.pbc, b.pbc)
    )
