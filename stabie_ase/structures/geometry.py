"""Vectors between atoms of many systems alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from ase.geometry import minkowski_reduce
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch

VECTORS_AT_ONCE = 2**17
"""Vectors that are worked out before the next: pairs grow with the square of the atoms."""


def pair_vectors(batch: AtomsBatch, pairs: Tensor) -> Tensor:
    """Vectors from the first atom to the second of some pairs in every system, by the nearest image.

    Parameters
    ----------
    batch : AtomsBatch
        Systems of one size.
    pairs : Tensor of int64, shape (2, n_pairs)
        Atoms numbered within their system.

    Returns
    -------
    Tensor of float64, shape (n_systems, n_pairs, 3), in Å
    """
    positions = batch.positions.double().view(batch.n_systems, -1, 3)
    pairs = pairs.to(batch.device)
    vectors = positions[:, pairs[1]] - positions[:, pairs[0]]
    return nearest_images(vectors, batch) if bool(batch.pbc.any()) else vectors


def nearest_images(vectors: Tensor, batch: AtomsBatch) -> Tensor:
    """The shortest of all images of some vectors of each system, whatever the shape of its cell.

    Fractions of the cell are rounded, which is right for vectors shorter than half the distance of any two opposite faces: no
    fraction of such a vector reaches one half. Of others the neighbouring images are tried, in a Minkowski-reduced lattice
    (Nguyen & Stehlé, ACM Trans. Algorithms 5, 46, 2009), that of one of the cells, for cells of one batch differ by little.

    Parameters
    ----------
    vectors : Tensor, shape (n_systems, n, 3)
    batch : AtomsBatch
        The cells, whose directions that are not periodic play no part.

    Returns
    -------
    Tensor of float64, shape (n_systems, n, 3)
    """
    # A direction that is not periodic may have no lattice vector; any one that is independent does.
    cells = torch.where(batch.pbc[:, :, None], batch.cells.double(), _complement(batch))
    fractions = torch.linalg.solve_ex(cells.mT, vectors.double().mT).result.mT  # of no volume, no error but no meaning
    images = torch.where(batch.pbc[:, None, :], fractions.round(), 0.0)
    nearest = vectors - images @ cells
    heights = torch.where(batch.pbc, 1.0 / torch.linalg.inv_ex(cells).inverse.norm(dim=1), math.inf)
    far = nearest.norm(dim=2) > 0.5 * heights.amin(dim=1)[:, None]
    return _nearest_of_neighbors(nearest, far, cells, batch.pbc) if bool(far.any()) else nearest


def _nearest_of_neighbors(vectors: Tensor, far: Tensor, cells: Tensor, pbc: Tensor) -> Tensor:
    """The same vectors, those that are `far` in place of a longer one of their 26 neighbouring images."""
    system = far.nonzero()[:, 0]
    first = int(system[0])
    alike = pbc[system].eq(pbc[first]).all()  # else no combination of lattice vectors is one of all lattices
    reduction = minkowski_reduce(cells[first].cpu().numpy(), pbc[first].cpu().numpy())[1] if bool(alike) else torch.eye(3)
    cell = (torch.as_tensor(reduction).to(cells) @ cells)[system]
    here, periodic = vectors[far], pbc[system].to(cells.dtype)
    fractions = torch.linalg.solve_ex(cell.mT, here[:, :, None]).result[:, :, 0]
    start = here - torch.einsum("nk,nkx->nx", fractions.round() * periodic, cell)
    best = start
    for steps in itertools.product((-1.0, 0.0, 1.0), repeat=3):
        other = start + torch.einsum("nk,nkx->nx", periodic * periodic.new_tensor(steps), cell)
        best = torch.where((other.norm(dim=1) < best.norm(dim=1))[:, None], other, best)
    found = vectors.clone()
    found[far] = best
    return found


def _complement(batch: AtomsBatch) -> Tensor:
    """Unit vectors at right angles to all periodic directions, one for each that is not, shape (n_systems, 3, 3)."""
    known = batch.pbc[:, :, None] & torch.isfinite(batch.cells).all(dim=(1, 2), keepdim=True)  # one that exploded would be an error
    periodic = torch.where(known, batch.cells.double(), 0.0)
    periodic = periodic / periodic.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1.0)  # whose square may be too large for a number
    # Of the eigenvectors of AᵀA those with the smallest eigenvalues span what is left.
    _, vectors = torch.linalg.eigh(periodic.mT @ periodic)
    order = (~batch.pbc).long().cumsum(dim=1) - 1
    return vectors.mT.gather(1, order.clamp(min=0)[:, :, None].expand(-1, -1, 3))


def pair_distances(batch: AtomsBatch, pairs: Tensor) -> Tensor:
    """Distances of the pairs in every system, float64, shape (n_systems, n_pairs), in Å; see `pair_vectors`."""
    return pair_vectors(batch, pairs).norm(dim=2)


def first_atoms(unit: Tensor) -> Tensor:
    """The first atom of each molecule, int64, shape (n,), of the molecule of each atom, numbered from 0, shape (n_atoms,)."""
    atoms = torch.arange(len(unit), device=unit.device)
    return atoms.new_full((int(unit.max()) + 1,), len(unit)).scatter_reduce(0, unit, atoms, "amin")


def molecule_vectors(batch: AtomsBatch, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors from the first atom of each molecule to its atoms, and to its centre of mass.

    A molecule may lie across the faces of its cell: its atoms are taken where they are nearest to its first one, which is right for
    molecules that reach less than half the width of the cell from there. For longer distances see `pair_vectors`.

    Parameters
    ----------
    batch : AtomsBatch
        Systems of one size.
    unit : Tensor of int64, shape (n_atoms_of_a_system,)
        The molecule of each atom, numbered from 0.

    Returns
    -------
    vectors : Tensor of float64, shape (n_systems, n_atoms_of_a_system, 3), in Å
    centres : Tensor of float64, shape (n_systems, n_molecules, 3), in Å
    """
    vectors = pair_vectors(batch, torch.stack([first_atoms(unit)[unit], torch.arange(len(unit), device=unit.device)]))
    masses, n = batch.masses.double().view(batch.n_systems, -1, 1), int(unit.max()) + 1
    sums = (x.new_zeros((batch.n_systems, n, x.shape[2])).index_add(1, unit, x) for x in (masses * vectors, masses))
    return vectors, torch.div(*sums)


def bond_angles(batch: AtomsBatch, chains: Tensor) -> Tensor:
    """Angles at the second of three atoms in every system, some systems at a time; bonds by the nearest image, see `pair_vectors`.

    Parameters
    ----------
    batch : AtomsBatch
        Systems of one size.
    chains : Tensor of int64, shape (3, n_angles)
        Atoms numbered within their system.

    Returns
    -------
    Tensor of float64, shape (n_systems, n_angles), in degrees
    """
    ends, centres = torch.cat([chains[0], chains[2]]), chains[1].repeat(2)
    bonds = torch.stack([centres, ends])
    return torch.cat([angle_between(*pair_vectors(part, bonds).chunk(2, dim=1)) for part in in_parts(batch, bonds.shape[1])])


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Angle of two vectors in degrees, shape (...), of vectors of shape (..., 3); as exact at 0° and 180° as elsewhere."""
    return torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(dim=-1)) * (180.0 / math.pi)


def in_parts(batch: AtomsBatch, n_pairs: int, at_once: int = VECTORS_AT_ONCE) -> Iterator[AtomsBatch]:
    """Some systems at a time, so many that their pairs are no more than `at_once`."""
    n = max(1, at_once // max(1, n_pairs))
    if batch.n_systems <= n:
        yield batch
        return
    for part in torch.arange(batch.n_systems, device=batch.device).split(n):
        yield batch.select(part)
