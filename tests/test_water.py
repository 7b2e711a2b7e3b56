"""The water of examples/water: its terms by closed forms, its Ewald sum by constants of crystals, all of it by OpenMM; and its files."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.io import read
from helpers import predict
from scipy.spatial.transform import Rotation

from stabie_ase.dynamics import PotentialForces, VelocityVerlet, initial_state, kinetic_energy, simulate
from stabie_ase.potentials.calculator import StABIECalculator
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

sys.path.append(str(Path(__file__).parents[1] / "examples" / "water"))
import make_water
import teacher
from teacher import FU2023, SPCFW, Water

KE = 14.399645
"""e²/(4π ε₀) in eV Å, from CODATA."""


def liquid(n=8, seed=0, skew=0.0):
    """Molecules off their lattice and out of shape, if wished in a triclinic cell."""
    atoms = teacher.lattice(n, seed)
    atoms.rattle(0.08, seed=seed)
    edge = atoms.cell[0, 0]
    atoms.set_cell(atoms.cell.array + edge * skew * np.array([[0, 0, 0], [0.3, 0, 0], [-0.2, 0.25, 0]]))
    return atoms


def terms(water, atoms):
    batch = AtomsBatch.from_atoms(atoms)
    with torch.no_grad():
        return water.terms(batch, neighbor_list(batch, water.cutoff))


def two_molecules(distance, edge=40.0):
    """Whose oxygens are that far apart."""
    pair = teacher.lattice(1)
    other = pair.copy()
    other.translate([distance, 0.0, 0.0])
    pair += other
    pair.set_cell([edge] * 3)
    return pair


# --- terms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constants", [SPCFW, FU2023])
@pytest.mark.parametrize("wrapped", [False, True])
def test_bonds_and_angle_of_one_molecule(constants, wrapped):
    """Published constants in kcal/mol, the molecule turned, and cut by the faces of its cell or not."""
    lengths, angle = (1.07, 0.95), math.radians(105.0)
    molecule = np.array([[0, 0, 0], [lengths[0], 0, 0], [lengths[1] * math.cos(angle), lengths[1] * math.sin(angle), 0]])
    atoms = Atoms("OHH", Rotation.random(1, 3).apply(molecule) + 0.05, cell=[30.0] * 3, pbc=True)
    if wrapped:
        atoms.wrap()
    found = terms(Water(constants), atoms)
    bonds = 0.5 * constants.bond_stiffness * sum((r - 1.012) ** 2 for r in lengths)
    bend = 0.5 * constants.angle_stiffness * (angle - math.radians(113.24)) ** 2
    assert float(found["bonds"]) == pytest.approx(bonds * 0.0433641, rel=1e-5)
    assert float(found["angles"]) == pytest.approx(bend * 0.0433641, rel=1e-5)
    assert float(found["Lennard-Jones"]) == 0.0


def test_the_two_sets_of_constants_differ_by_the_stiffness_alone():
    assert SPCFW.bond_stiffness == 1059.162 and SPCFW.angle_stiffness == 75.90
    assert replace(FU2023, bond_stiffness=1059.162, angle_stiffness=75.90) == SPCFW
    assert (FU2023.bond_stiffness, FU2023.angle_stiffness) == (2118.324, 151.80)


def test_a_molecule_is_a_dipole_among_its_images():
    """No charge acts within the molecule; images in tinfoil give -2π μ²/(3 V), the next order falls with the fifth power of the edge."""
    mu = 2 * 0.41 * 1.012 * math.cos(math.radians(113.24 / 2))
    for edge, tolerance in ((20.0, 3e-2), (40.0, 8e-3)):
        atoms = teacher.lattice(1)
        atoms.set_cell([edge] * 3)
        found = float(terms(Water(cutoff=8.0, reach=5.5), atoms)["Coulomb"])
        assert found == pytest.approx(-2 * math.pi * KE * mu**2 / (3 * edge**3), rel=tolerance)


@pytest.mark.parametrize("r", [2.8, 3.553, 4.9])
def test_lennard_jones_of_two_oxygens(r):
    expected = 4 * 0.1554253 * 0.0433641 * ((3.165492 / r) ** 12 - (3.165492 / r) ** 6)
    assert float(terms(Water(), two_molecules(r))["Lennard-Jones"]) == pytest.approx(expected, rel=1e-5)


def test_lennard_jones_ends_smoothly():
    """Energy and slope have no jump where it is switched off over the last Å."""
    r = np.linspace(4.7, 6.3, 33)
    energies = np.array([float(terms(Water(), two_molecules(x))["Lennard-Jones"]) for x in r])
    assert energies[r >= 6.0] == pytest.approx(0.0) and (energies[r < 5.9] < 0).all()
    step = 1e-3
    for edge in (5.0, 6.0):
        e = [float(terms(Water(), two_molecules(edge + k * step))["Lennard-Jones"]) for k in (-2, -1, 0, 1, 2)]
        left, right = (3 * e[2] - 4 * e[1] + e[0]) / (2 * step), (4 * e[3] - 3 * e[2] - e[4]) / (2 * step)
        assert left == pytest.approx(right, abs=1e-5)


# --- the Ewald sum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splitting", [0.4, 0.7])
@pytest.mark.parametrize("crystal, charges, distance, madelung", [
    ("rocksalt", (1, -1), 0.5, 1.747564594633), ("cesiumchloride", (1, -1), 0.75**0.5, 1.762674773071),
    ("zincblende", (2, -2), 0.1875**0.5, 1.638055053389), ("fluorite", (2, -1, -1), 0.1875**0.5, 5.038784879),
])  # fmt: skip
def test_madelung_constants(crystal, charges, distance, madelung, splitting):
    """Of crystals in cells of one formula, most of them not orthorhombic (Borwein et al., Lattice Sums Then and Now, 2013)."""
    a = 5.64
    atoms = bulk({"fluorite": "CaFF"}.get(crystal, "NaCl"), crystal, a=a)
    batch = AtomsBatch.from_atoms([atoms, atoms])
    near = neighbor_list(batch, 16.0).half
    q = torch.tensor(charges, dtype=torch.float64).repeat(2)
    found = teacher.ewald_energies(batch, near.pairs, near.vectors(batch).norm(dim=1), q, splitting, 6.5)
    expected = -madelung * KE / (a * distance) * (4 if crystal == "zincblende" else 1)
    assert found.tolist() == pytest.approx([expected] * 2, rel=1e-7)


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_coulomb_energies_do_not_depend_on_how_they_are_split(skew):
    atoms = liquid(skew=skew)
    found = [float(terms(Water(cutoff=cutoff, reach=5.5), atoms)["Coulomb"]) for cutoff in (5.0, 7.0, 9.0)]
    assert np.ptp(found) < 1e-6
    assert float(terms(Water(), atoms)["Coulomb"]) == pytest.approx(found[0], abs=8 * 1e-4)


# --- forces, stress and the contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_forces_and_stress_are_derivatives_of_the_energy(skew):
    """The cell is smaller than twice the cutoff: pairs see several images, also of their own molecule."""
    atoms = liquid(4, skew=skew)
    atoms.calc = StABIECalculator(Water(reach=5.0))
    assert np.allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-4), atol=1e-5)
    assert np.allclose(atoms.get_stress(voigt=False), calculate_numerical_stress(atoms, eps=1e-5, voigt=False), atol=1e-6)


def test_symmetries():
    atoms = liquid(skew=1.0)
    expected = predict(Water(reach=5.5), atoms)
    assert expected.forces.sum(dim=0).abs().max() < 1e-6
    moved = atoms.copy()
    moved.translate([0.7, -5.1, 33.0])
    moved.wrap()
    turn = Rotation.random(1, 5)[0]
    turned = atoms.copy()
    turned.set_cell(turn.apply(atoms.cell.array))
    turned.positions = turn.apply(atoms.positions)
    double = atoms.repeat((2, 1, 1))
    for other, energy, forces in (
        (moved, expected.energies, expected.forces),
        (turned, expected.energies, torch.as_tensor(turn.apply(expected.forces))),
        (double, 2 * expected.energies, expected.forces.repeat(2, 1)),
    ):
        found = predict(Water(reach=5.5), other)
        assert torch.allclose(found.energies, energy, atol=1e-6) and torch.allclose(found.forces, forces, atol=1e-6)


def test_systems_of_several_sizes_and_cells_share_a_batch():
    images = [liquid(8), liquid(3, 1, skew=0.5), liquid(11, 2)]
    together = predict(Water(reach=5.5), images)
    alone = [predict(Water(reach=5.5), atoms) for atoms in images]
    assert torch.allclose(together.energies, torch.cat([x.energies for x in alone]), atol=1e-7)
    assert torch.allclose(together.forces, torch.cat([x.forces for x in alone]), atol=1e-7)


def test_single_precision_far_from_the_origin():
    atoms = liquid(27)
    expected = predict(Water(), atoms, stress=True)
    atoms.translate([1000.0, -2000.0, 500.0])
    found = predict(Water(dtype=torch.float32), atoms, stress=True)
    assert found.forces.dtype == torch.float32
    assert float((found.energies - expected.energies).abs()) < 27 * 1e-5
    assert (found.forces - expected.forces).abs().max() < 1e-4 and (found.stress - expected.stress).abs().max() < 1e-5


def test_energy_is_conserved():
    """Over 40 fs to a part in 1000 of the kinetic energy, and by the square of the time step."""
    spreads = []
    for dt in (0.4, 0.2):
        forces, energies = PotentialForces(Water()), []
        state = initial_state(AtomsBatch.from_atoms(teacher.lattice(8)), forces, 300.0, seed=1)
        for _ in range(10):
            state = simulate(state, VelocityVerlet(dt * units.fs), forces, round(4 / dt))
            energies.append(float(state.potential_energy + kinetic_energy(state)))
        spreads.append(np.std(energies) / float(kinetic_energy(state)))
    assert spreads[1] < 1e-3 and 2.5 < spreads[0] / spreads[1] < 6.0


def test_constants_are_parameters():
    """∂U/∂ε of what is linear in ε is the energy over ε."""
    water, batch = Water(), AtomsBatch.from_atoms(liquid())
    neighbors = neighbor_list(batch, water.cutoff)
    water(batch, neighbors).sum().backward()
    expected = float(terms(water, liquid())["Lennard-Jones"]) / SPCFW.epsilon
    assert float(water.constants["epsilon"].grad) == pytest.approx(expected)
    assert all(torch.isfinite(p.grad) for p in water.parameters())


@pytest.mark.parametrize("change, words", [
    (lambda atoms: atoms[[1, 0, 2, *range(3, len(atoms))]], "O, H, H"),
    (lambda atoms: atoms[:-1], "O, H, H"),
    (lambda atoms: atoms.set_pbc([True, True, False]), "pbc"),
])  # fmt: skip
def test_what_is_no_periodic_water_is_refused(change, words):
    atoms = liquid()
    with pytest.raises(ValueError, match=words):
        predict(Water(), change(atoms) or atoms)


@pytest.mark.parametrize("constants", [SPCFW, FU2023])
def test_openmm_agrees(constants):
    pytest.importorskip("openmm")
    images = [liquid(64, seed) for seed in range(2)]
    images[1].wrap()
    found = predict(Water(constants, reach=5.0), images)
    energies, forces = teacher.openmm_labels(images, constants)
    assert found.energies.numpy() == pytest.approx(energies, abs=64 * 1e-6)
    assert found.forces.numpy().reshape(forces.shape) == pytest.approx(forces, abs=1e-4)


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pressure", [None, 0.1])
def test_files_hold_what_they_say(pressure, tmp_path, monkeypatch):
    options = "--waters 3 --replicas 4 --equilibration 0.03 --spacing 0.005 --train 4 --valid 4 --test 8 --dynamics 0.02 --every 1"
    given = [*options.split(), "--constants", "fu2023", "--temperature", "310", *(["--pressure", str(pressure)] if pressure else [])]
    monkeypatch.setattr(sys, "argv", ["make_water.py", *given, "--output", str(tmp_path)])
    make_water.main()
    sets = {name: read(tmp_path / f"water_{name}.xyz", ":") for name in ("train", "valid", "test")}
    assert {name: len(images) for name, images in sets.items()} == {"train": 4, "valid": 4, "test": 8}
    replicas = [{atoms.info["replica"] for atoms in images} for images in sets.values()]
    assert replicas == [{0}, {1}, {2, 3}]
    water, images = Water(FU2023), sum(sets.values(), [])
    assert {atoms.info["temperature_K"] for atoms in images} == {310.0}
    assert len({round(atoms.get_volume(), 6) for atoms in images}) == (1 if pressure is None else 16)
    moving = read(tmp_path / "water_dynamics.traj", ":")
    for atoms in (*images, *moving):
        found = predict(water, atoms)
        assert float(found.energies) == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
        assert found.forces.numpy() == pytest.approx(atoms.get_forces(), abs=1e-4)
    times = np.array([atoms.info["time_fs"] for atoms in moving])
    assert times == pytest.approx(np.arange(1, 21))
    for before, after in zip(moving, moving[1:]):  # momenta move atoms
        moved = 0.5 * units.fs * (before.get_velocities() + after.get_velocities())
        assert after.positions - before.positions == pytest.approx(moved, abs=0.1 * np.abs(moved).max())
