"""Systems and models shared by several test files."""

import numpy as np
import torch
from ase import Atoms
from ase.geometry import complete_cell

from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

WATER = Atoms("OH2", positions=[[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.02, -0.78, -0.45]])
METHANOL = Atoms(
    "COH4",
    positions=[
        [-0.05, 0.66, 0.0], [-0.05, -0.76, 0.02], [-1.09, 0.97, 0.0],
        [0.44, 1.07, 0.89], [0.44, 1.07, -0.89], [0.87, -1.05, 0.03],
    ],
)  # fmt: skip
ENERGIES = {1: -13.61234, 6: -1029.12345, 8: -2041.56789}
"""Reference energies of the elements in these systems, eV; none is a float32."""


def crystal(n_atoms: int = 5, seed: int = 1) -> Atoms:
    """A few H, C and O atoms in a triclinic cell smaller than the models' cutoff, none closer than 0.9 Å."""
    rng = np.random.default_rng(seed)
    cell = np.array([[3.4, 0.0, 0.0], [0.7, 3.6, 0.0], [-0.5, 0.4, 3.9]])
    scaled = [rng.random(3)]
    while len(scaled) < n_atoms:
        new = rng.random(3)
        images = np.array(np.meshgrid(*[[-1, 0, 1]] * 3)).reshape(3, -1).T
        vectors = (np.array(scaled)[:, None] - new + images) @ cell
        if np.linalg.norm(vectors, axis=-1).min() > 0.9:
            scaled.append(new)
    return Atoms(("OHCHO" * n_atoms)[: 2 * n_atoms : 2][:n_atoms], cell=cell, scaled_positions=scaled, pbc=True)


def schnet(dtype: torch.dtype = torch.float64, cutoff: float = 4.0, seed: int = 0) -> SchNetPotential:
    """A small SchNet with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        potential = SchNetPotential.build(ENERGIES, 16, 16, 2, 10, cutoff)
    return potential.to(dtype=dtype)


def predict(potential, atoms, stress: bool = False):
    """Prediction for one Atoms or several, with a list of exactly the potential's cutoff."""
    batch = AtomsBatch.from_atoms(atoms)
    return potential.compute(batch, neighbor_list(batch, potential.cutoff), stress=stress)


def brute_force_pairs(positions, cell, pbc, cutoff) -> set[tuple[int, ...]]:
    """All (i, j, S) with |r_j - r_i + S · cell| < cutoff, by trying every image that could matter."""
    cell = complete_cell(cell)
    inverse = np.linalg.inv(cell)
    spread = np.ptp(positions @ inverse, axis=0)
    reach = np.where(pbc, np.ceil(cutoff * np.linalg.norm(inverse, axis=0) + spread), 0).astype(int)
    images = np.array(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij")).reshape(3, -1).T
    found = set()
    for i, j in np.ndindex(len(positions), len(positions)):
        distances = np.linalg.norm(positions[j] - positions[i] + images @ cell, axis=1)
        found |= {(i, j, *image) for image in images[distances < cutoff].tolist() if i != j or any(image)}
    return found
