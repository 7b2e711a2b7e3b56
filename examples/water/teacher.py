"""Flexible SPC/Fw water as a potential: an analytic truth for a liquid of molecules, and what the other scripts here learn from.

    python examples/water/teacher.py                                    # 64 molecules on a lattice
    python examples/water/teacher.py frames.xyz --constants fu2023      # frames of a file, atoms in the order O, H, H

Prints energies of frames by term, how far they are from a converged Ewald sum, and, where OpenMM is installed (pip install
openmm), how far energies and forces are from those of OpenMM's own bonds, angles, Lennard-Jones and Ewald summation.
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec

import numpy as np
import torch
from ase import Atoms, units
from ase.io import read
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import NeighborList, neighbor_list

KCAL = units.kcal / units.mol

COULOMB = units.Hartree * units.Bohr
"""e²/(4π ε₀) in eV Å."""

CELL_PER_MOLECULE = 12.4429**3 / 64
"""Å³ of a molecule at 300 K and 0.993 g/cm³: 64 fill a cube of 12.4429 Å."""

SWITCHED = 1.0
"""Å before the cutoff over which Lennard-Jones is switched off."""


@dataclass(frozen=True)
class Constants:
    """Of three-site water with harmonic bonds ½ k (r - r₀)² and angle ½ k (θ - θ₀)², in the units in which they are published.

    Attributes
    ----------
    bond_stiffness, bond_length : float
        In kcal/mol/Å² and Å.
    angle_stiffness, angle : float
        In kcal/mol/rad² and degrees.
    charge : float
        Of a hydrogen, in e; an oxygen has minus twice this.
    sigma, epsilon : float
        Of Lennard-Jones between oxygens, in Å and kcal/mol.
    """

    bond_stiffness: float
    bond_length: float
    angle_stiffness: float
    angle: float
    charge: float
    sigma: float
    epsilon: float


SPCFW = Constants(1059.162, 1.012, 75.90, 113.24, 0.41, 3.165492, 0.1554253)
"""As published (Wu, Tepper & Voth, J. Chem. Phys. 124, 024503, 2006)."""

FU2023 = replace(SPCFW, bond_stiffness=2 * SPCFW.bond_stiffness, angle_stiffness=2 * SPCFW.angle_stiffness)
"""The water of Fu et al. (arXiv 2210.07237) and with it of StABIE's paper: twice the stiffness, as fits to its forces tell."""

CONSTANTS = {"spcfw": SPCFW, "fu2023": FU2023}


class Water(Potential):
    """Flexible three-site water, periodic in all directions; atoms come as O, H, H, molecule by molecule.

    U = Σ_OH ½ k_b (r - r₀)² + Σ_HOH ½ k_θ (θ - θ₀)² + Σ_OO S(r) 4ε[(σ/r)¹² - (σ/r)⁶] + Ewald sum of the charges, less the
    Coulomb energies q q'/r of the three pairs of each molecule. Lennard-Jones is multiplied by S = 1 - 10 x³ + 15 x⁴ - 6 x⁵, where
    x runs from 0 to 1 over the last Å before the cutoff, so that energy and force are continuous there; nothing stands for what
    lies beyond. The Ewald sum is that of a medium with an infinite dielectric constant around (tinfoil).

    Parameters
    ----------
    constants : Constants
        The published SPC/Fw if not given. They become parameters of the potential, in the same units.
    cutoff : float
        Of Lennard-Jones and of the Ewald sum's real-space part, in Å; may exceed half the cell.
    reach : float
        Of the Ewald sum: α is this over the cutoff and k go up to 2 α times this, so that what is left out in either space is
        smaller by exp(-reach²).
    dtype : torch.dtype
        Of the parameters.
    """

    family = "water"
    numbers = (1, 8)

    def __init__(
        self, constants: Constants = SPCFW, cutoff: float = 6.0, reach: float = 3.0, dtype: torch.dtype = torch.float64
    ):
        super().__init__()
        self.cutoff, self.splitting, self.k_max = float(cutoff), reach / cutoff, 2.0 * reach**2 / cutoff
        self.constants = nn.ParameterDict({n: torch.tensor(x, dtype=dtype) for n, x in asdict(constants).items()})

    def energies(self, batch: AtomsBatch, neighbors: NeighborList) -> Tensor:
        return torch.stack(list(self.terms(batch, neighbors).values())).sum(dim=0)

    def terms(self, batch: AtomsBatch, neighbors: NeighborList) -> dict[str, Tensor]:
        """Energies by term, float64, shape (n_systems,) each, in eV; ValueError for what is no periodic water."""
        check_water(batch)
        bonds = bond_vectors(batch)
        pairs, distances = near_pairs(batch, neighbors, self.cutoff)
        charges = self.constants["charge"] * torch.where(batch.numbers == 8, -2.0, 1.0).to(self.dtype)
        molecular = batch.system[::3]
        bond, angle = self._bonded(bonds)
        return {
            "bonds": sum_by(molecular, bond, batch.n_systems),
            "angles": sum_by(molecular, angle, batch.n_systems),
            "Lennard-Jones": self._lennard_jones(batch, pairs, distances),
            "Coulomb": ewald_energies(batch, pairs, distances, charges, self.splitting, self.k_max)
            - sum_by(molecular, self._within_molecules(bonds, charges), batch.n_systems),
        }

    def _bonded(self, bonds: Tensor) -> tuple[Tensor, Tensor]:
        """Bond and angle energies of each molecule, shape (n_molecules,), in eV."""
        c = self.constants
        bond = 0.5 * KCAL * c["bond_stiffness"] * (bonds.norm(dim=2) - c["bond_length"]).square().sum(dim=1)
        cross, dot = torch.linalg.cross(bonds[:, 0], bonds[:, 1]).norm(dim=1), (bonds[:, 0] * bonds[:, 1]).sum(dim=1)
        bend = torch.atan2(cross, dot) - torch.deg2rad(c["angle"])
        return bond, 0.5 * KCAL * c["angle_stiffness"] * bend.square()

    def _within_molecules(self, bonds: Tensor, charges: Tensor) -> Tensor:
        """Coulomb energy of the three pairs of each molecule, shape (n_molecules,), in eV."""
        distances = torch.cat([bonds, bonds[:, 1:] - bonds[:, :1]], dim=1).norm(dim=2)
        q = charges.view(-1, 3)
        return COULOMB * (q[:, [0, 0, 1]] * q[:, [1, 2, 2]] / distances).sum(dim=1)

    def _lennard_jones(self, batch: AtomsBatch, pairs: Tensor, distances: Tensor) -> Tensor:
        oxygen = batch.numbers == 8
        chosen = (oxygen.index_select(0, pairs[0]) & oxygen.index_select(0, pairs[1])).nonzero()[:, 0]
        r = distances.index_select(0, chosen)
        x = ((r - self.cutoff) / SWITCHED + 1.0).clamp(min=0.0)
        switch = 1.0 - x * x * x * (10.0 - 15.0 * x + 6.0 * x * x)
        square = (self.constants["sigma"] / r).square()
        sixth = square * square * square
        energies = 4.0 * KCAL * self.constants["epsilon"] * (sixth * sixth - sixth) * switch
        return sum_by(batch.system[pairs[0].index_select(0, chosen)], energies, batch.n_systems)


def check_water(batch: AtomsBatch) -> None:
    """Raise ValueError unless all systems are periodic and their atoms come as O, H, H."""
    if batch.n_atoms % 3 or not torch.equal(batch.numbers.view(-1, 3), batch.numbers.new_tensor([8, 1, 1]).expand(batch.n_atoms // 3, 3)):
        raise ValueError("water needs its atoms in the order O, H, H, molecule by molecule; bring them to it, or leave out other molecules")
    if not bool(batch.pbc.all()):
        raise ValueError(f"water needs pbc in all three directions, got {batch.pbc.tolist()}: the Ewald sum has no isolated systems")


def bond_vectors(batch: AtomsBatch) -> Tensor:
    """Vectors from each oxygen to its two hydrogens by the nearest image, shape (n_molecules, 2, 3), in Å."""
    exact = batch.exact
    molecules, cells = exact.positions.view(-1, 3, 3), exact.lattice
    vectors = molecules[:, 1:] - molecules[:, :1]
    fractions = vectors.detach() @ torch.linalg.inv_ex(cells.detach()).inverse[batch.system[::3]]
    return (vectors - fractions.round() @ cells[batch.system[::3]]).to(batch.dtype)


def near_pairs(batch: AtomsBatch, neighbors: NeighborList, cutoff: float) -> tuple[Tensor, Tensor]:
    """Each pair within the cutoff once, shape (2, n_pairs), and its distance in Å, shape (n_pairs,)."""
    half = neighbors.half
    with torch.no_grad():
        near = (half.vectors(batch).square().sum(dim=1) < cutoff**2).nonzero()[:, 0]
    half = half.select(near)
    return half.pairs, half.vectors(batch).norm(dim=1)


def sum_by(system: Tensor, values: Tensor, n_systems: int) -> Tensor:
    """Sums over what belongs to one system, float64, shape (n_systems,)."""
    return values.new_zeros(n_systems, dtype=torch.float64).index_add(0, system, values.double())


def ewald_energies(batch: AtomsBatch, pairs: Tensor, distances: Tensor, charges: Tensor, splitting: float, k_max: float) -> Tensor:
    """Coulomb energies of periodic systems of charges (Ewald, Ann. Phys. 369, 253, 1921), float64, shape (n_systems,), in eV.

    E = Σ_pairs q_i q_j erfc(α r)/r + (2π/V) Σ_{k≠0} exp(-k²/4α²)/k² |Σ_a q_a exp(i k·r_a)|² - (α/√π) Σ_a q_a², times e²/(4π ε₀).

    Parameters
    ----------
    batch : AtomsBatch
        Periodic in all directions; charges of each system sum to zero.
    pairs : Tensor of int64, shape (2, n_pairs)
        Each pair of atoms and images within the cutoff once.
    distances : Tensor, shape (n_pairs,)
        In Å.
    charges : Tensor, shape (n_atoms,)
        In e.
    splitting : float
        α in 1/Å: the larger it is, the shorter the range in real and the longer that in reciprocal space.
    k_max : float
        In 1/Å; all k up to it are there, and others as integer triples in a box.

    Returns
    -------
    Tensor
    """
    i, j = pairs
    real = charges.index_select(0, i) * charges.index_select(0, j) * torch.erfc(splitting * distances) / distances
    own = splitting / math.sqrt(math.pi) * batch.sum_over_atoms(charges.double().square())
    reciprocal = _reciprocal(batch, charges, splitting, k_max)
    return COULOMB * (sum_by(batch.system.index_select(0, i), real, batch.n_systems) + reciprocal - own)


def _reciprocal(batch: AtomsBatch, charges: Tensor, splitting: float, k_max: float) -> Tensor:
    """(2π/V) Σ_k exp(-k²/4α²)/k² |S(k)|² over integer triples h with k = 2π h · cell⁻ᵀ, half of them: S(-k) is S(k)'s conjugate."""
    cells = batch.exact.lattice
    inverse = torch.linalg.inv_ex(cells).inverse
    a, b, c = (torch.arange(-n, n + 1, device=batch.device) for n in _highest(cells, k_max))
    a = a[a >= 0]
    factors = structure_factors(batch, inverse, charges, (a, b, c)).flatten(1)
    power = factors.real.square() + factors.imag.square()
    triples = torch.cartesian_prod(a, b, c).to(cells.dtype)
    k2 = (2.0 * math.pi * triples @ inverse.mT).square().sum(dim=2)
    zero = (triples == 0).all(dim=1)
    counted = torch.where(zero, 0.0, torch.where(triples[:, 0] > 0, 2.0, 1.0))
    weights = counted * torch.exp(-k2 / (4.0 * splitting**2)) / (k2 + zero.to(k2))
    volumes = torch.linalg.det(cells).abs()
    return (2.0 * math.pi / volumes * (weights * power).sum(dim=1)).double()


def _highest(cells: Tensor, k_max: float) -> list[int]:
    """The largest integer along each lattice vector of any |k| up to k_max: h_d = k · a_d / 2π."""
    longest = cells.detach().norm(dim=2).amax(dim=0).nan_to_num(nan=0.0, posinf=0.0)
    return torch.ceil(k_max * longest / (2.0 * math.pi)).long().clamp(max=100).tolist()


def structure_factors(batch: AtomsBatch, inverse: Tensor, charges: Tensor, integers: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Σ_a q_a exp(i k·r_a) for a box of integer triples, complex, shape (n_systems, n_1, n_2, n_3).

    A wave is the product of one along each lattice vector, so that few exponentials and one matrix product for each system do.

    Parameters
    ----------
    batch : AtomsBatch
    inverse : Tensor, shape (n_systems, 3, 3)
        Of the cells, in 1/Å.
    charges : Tensor, shape (n_atoms,)
        In e.
    integers : tuple of three Tensors of int64, shapes (n_1,), (n_2,), (n_3,)
        Along each lattice vector.

    Returns
    -------
    Tensor
    """
    fractions = torch.einsum("nx,nxd->nd", batch.exact.positions, inverse[batch.system])
    fractions = (fractions - fractions.detach().floor()).to(charges.dtype)
    # Systems may differ in size: what is not there has no charge.
    places = batch.system, batch.index_in_system
    room = (batch.n_systems, max(batch.sizes))
    charges = charges.new_zeros(room).index_put(places, charges)
    fractions = fractions.new_zeros((*room, 3)).index_put(places, fractions)
    first, second, third = (torch.exp(2j * math.pi * fractions[..., d, None] * h) for d, h in enumerate(integers))
    plane = (charges[..., None] * first)[..., :, None] * second[..., None, :]
    return (plane.flatten(2).mT @ third).unflatten(1, plane.shape[2:])


def lattice(n_molecules: int, seed: int = 0) -> Atoms:
    """Molecules in their own geometry, turned at random, on sites of a simple cubic lattice at the density of the liquid."""
    half = math.radians(0.5 * SPCFW.angle)
    molecule = SPCFW.bond_length * np.array([[0, 0, 0], [math.sin(half), math.cos(half), 0], [-math.sin(half), math.cos(half), 0]])
    edge, n = (n_molecules * CELL_PER_MOLECULE) ** (1 / 3), math.ceil(n_molecules ** (1 / 3) - 1e-9)
    sites = (np.indices((n, n, n)).reshape(3, -1).T + 0.5) / n
    chosen = np.random.default_rng(seed).permutation(len(sites))[:n_molecules]
    positions = [edge * site + turn.apply(molecule) for site, turn in zip(sites[chosen], Rotation.random(n_molecules, seed))]
    return Atoms("OHH" * n_molecules, np.concatenate(positions), cell=[edge] * 3, pbc=True)


def openmm_labels(frames: list[Atoms], constants: Constants = SPCFW, cutoff: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
    """Energies in eV, shape (n_frames,), and forces in eV/Å, (n_frames, n_atoms, 3), by OpenMM in double precision."""
    import openmm
    from openmm import unit

    nm, kJ, kcal = 0.1, units.kJ / units.mol, 4.184
    system, atoms, c = openmm.System(), frames[0], constants
    bonds, angles, nonbonded = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.NonbondedForce()
    for mass, number in zip(atoms.get_masses(), atoms.numbers):
        system.addParticle(mass)
        nonbonded.addParticle(*((-2 * c.charge, c.sigma * nm, c.epsilon * kcal) if number == 8 else (c.charge, 0.1, 0.0)))
    for o in range(0, len(atoms), 3):
        for h in (o + 1, o + 2):
            bonds.addBond(o, h, c.bond_length * nm, c.bond_stiffness * kcal / nm**2)
        angles.addAngle(o + 1, o, o + 2, math.radians(c.angle), c.angle_stiffness * kcal)
        for i, j in ((o, o + 1), (o, o + 2), (o + 1, o + 2)):
            nonbonded.addException(i, j, 0.0, 0.1, 0.0)
    bonds.setUsesPeriodicBoundaryConditions(True)
    angles.setUsesPeriodicBoundaryConditions(True)
    nonbonded.setExceptionsUsePeriodicBoundaryConditions(True)
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.Ewald)
    nonbonded.setEwaldErrorTolerance(1e-6)
    nonbonded.setCutoffDistance(cutoff * nm)
    nonbonded.setUseSwitchingFunction(True)
    nonbonded.setSwitchingDistance((cutoff - SWITCHED) * nm)
    nonbonded.setUseDispersionCorrection(False)
    for force in (bonds, angles, nonbonded):
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    energies, forces = [], []
    for frame in frames:
        cell, turn = frame.cell.standard_form()
        context.setPeriodicBoxVectors(*(cell.array * nm))
        context.setPositions(frame.positions @ turn.T * nm)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) * kJ)
        forces.append(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer) @ turn * kJ * nm)
    return np.array(energies), np.array(forces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", nargs="?", help="file of frames, all of one system (default: a lattice of 64 molecules)")
    parser.add_argument("--constants", choices=CONSTANTS, default="spcfw", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first frame only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    frames = read(args.frames, ":1" if args.quick else ":10") if args.frames else [lattice(64)]
    batch, constants = AtomsBatch.from_atoms(frames), CONSTANTS[args.constants]
    water, converged = Water(constants), Water(constants, reach=5.5)
    with torch.no_grad():
        for name, energies in water.terms(batch, neighbor_list(batch, water.cutoff)).items():
            print(f"{name:14s} {float(energies.mean()):10.4f} eV")
    found, exact = (p.compute(batch, neighbor_list(batch, p.cutoff)) for p in (water, converged))
    against = {"a converged Ewald sum": (exact.energies, exact.forces)}
    if find_spec("openmm") is None:
        print("openmm is not installed: no comparison")
    else:
        energies, forces = openmm_labels(frames, constants, water.cutoff)
        against["OpenMM"] = torch.as_tensor(energies), torch.as_tensor(forces).view(-1, 3)
    for name, (energies, forces) in against.items():
        worst, rms = float((found.energies - energies).abs().max()), float((found.forces - forces).square().mean().sqrt())
        share = rms / float(forces.square().mean().sqrt())
        print(f"from {name}: energies {1000 * worst:.4f} meV at most, forces {1000 * rms:.4f} meV/Å rms ({share:.1e} of their rms)")


if __name__ == "__main__":
    main()
