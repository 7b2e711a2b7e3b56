"""Systems and models shared by several test files."""

from types import SimpleNamespace

import numpy as np
import torch
from ase import Atoms
from ase.geometry import complete_cell

from stabie_ase.boltzmann import Estimator, Samples, StatePoint
from stabie_ase.observables import Axis, Observable, Target
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.topology import Groups

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


def mace(dtype: torch.dtype = torch.float64, seed: int = 0):
    """A small MACE with random weights; its package is imported now."""
    from stabie_ase.potentials.mace import MACEPotential

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MACEPotential.build(ENERGIES, 3.0, hidden_irreps="4x0e + 4x1o", radial_mlp=(8,), dtype=dtype)


class Vector(Observable):
    """A vector of so many components that nobody works out: samples have it already."""

    def __init__(self, d, name="vector", weights=None):
        self.name, self.label, self.weights = name, "", weights
        self.axis = Axis.of_names("", [""] * d)

    @property
    def measure(self):
        return super().measure if self.weights is None else self.weights.double()


def samples_of(values, replica=None, frames=None, energies=None, severity=None):
    """Samples of one-atom frames, or of these, with the values of vectors by name; replicas are numbered if not given."""
    values = values if isinstance(values, dict) else {"vector": values}
    n = len(next(iter(values.values())))
    frames = frames or AtomsBatch.from_atoms(Atoms("H")).repeat(n)
    index = torch.arange(n)
    zeros = torch.zeros(n, dtype=torch.float64)
    return Samples(
        frames, Groups.systems(frames), values, zeros if energies is None else energies,
        zeros if severity is None else severity, torch.zeros_like(index), index if replica is None else replica,
    )  # fmt: skip


def estimate(values, reference, weights, temperature_K, energy_change=None, fold=None):
    """The estimator on plain vectors: mean, loss, weights and effective number, with the halves of a fold for cross-fitting."""
    replica = None if fold is None else (~fold).long()
    target = Target(Vector(values.shape[1], weights=weights), reference.double())
    found = Estimator(StatePoint(temperature_K), cross_fit=fold is not None)(samples_of(values, replica), [target], energy_change)
    return SimpleNamespace(
        mean=found.means["vector"], loss=torch.tensor(found.loss).double(), sample_weights=found.weights,
        effective_samples=found.effective_samples,
    )  # fmt: skip
