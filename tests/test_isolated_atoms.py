"""Frames of isolated atoms among others: set aside, and the energies of the elements where a model is trained from nothing."""

import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from stabie_ase.potentials.checkpoint import load_potential
from stabie_ase.potentials.family import families, names
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.reference import UnusableReference, read_reference, reference_energies

CARBON = -3.25


def lone(symbol="C", energy=CARBON, forces=True, **settings):
    """A frame of one atom."""
    info = settings.pop("info", {})
    atoms = Atoms(symbol, info=info, **settings)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, **({"forces": np.zeros((1, 3))} if forces else {}))
    return atoms


def joined(path, *others, n=12):
    frames = tiny.frames(n)
    write(path, [others[0], *frames, *others[1:]] if others else frames)
    return path


@pytest.mark.parametrize(
    "atom",
    [
        lone(),
        lone(forces=False),
        lone(info={"config_type": "IsolatedAtom"}, cell=[6.0] * 3, pbc=True),
        lone(info={"config_type": "isolated_atom"}),
        lone(cell=[15.0] * 3, pbc=True),
        lone(cell=[6.0] * 3),
    ],
)
def test_isolated_atoms_are_set_aside_and_counted(tmp_path, atom):
    reference = read_reference(joined(tmp_path / "ref.traj", atom))
    assert len(reference) == 12 and {len(atoms) for atoms in reference.frames} == {4}
    assert "1 frames of isolated atoms (C) set aside" in reference.source
    assert reference.temperature_K == tiny.TEMPERATURE
    assert reference.atom_energies == {6: CARBON}
    assert reference.subset([1, 2]).atom_energies == {6: CARBON}


def test_a_crystal_of_one_atom_is_no_isolated_one(tmp_path):
    write(tmp_path / "bcc.traj", [lone("Fe", cell=2.4 * (1 - np.eye(3)), pbc=True) for _ in range(3)])
    reference = read_reference(tmp_path / "bcc.traj")
    assert len(reference) == 3 and not reference.atom_energies


def test_an_atom_without_an_energy_tells_none(tmp_path):
    bare = Atoms("O")
    reference = read_reference(joined(tmp_path / "ref.traj", bare, lone()))
    assert "2 frames of isolated atoms (O, C) set aside" in reference.source and reference.atom_energies == {6: CARBON}


def test_two_energies_of_one_atom_are_refused(tmp_path):
    read_reference(joined(tmp_path / "same.traj", lone(), lone()))
    with pytest.raises(UnusableReference, match="frame 13: an isolated C of -3 eV, another has -3.25 eV"):
        read_reference(joined(tmp_path / "two.traj", lone(), lone(energy=-3.0)))


def test_atoms_alone_are_not_enough(tmp_path):
    write(tmp_path / "atoms.traj", [lone(), lone("O")])
    with pytest.raises(UnusableReference, match="0 frames beside 2 of isolated atoms"):
        read_reference(tmp_path / "atoms.traj")


def test_energies_of_the_other_elements_are_fitted(tmp_path):
    """E = -10 n_C - 20 n_O, of which carbon is given, with one that the fit alone would not find."""
    frames = []
    for formula in ("CO", "CO2", "C2O"):
        atoms = Atoms(formula, 1.2 * np.arange(3 * len(Atoms(formula))).reshape(-1, 3))
        n_carbon = formula.count("C") + ("C2" in formula)
        energy = -10.0 * n_carbon - 20.0 * (len(atoms) - n_carbon)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
        frames.append(atoms)
    write(tmp_path / "ref.traj", [lone("C", -10.0), *frames, lone("H", -1.0)])
    assert reference_energies(read_reference(tmp_path / "ref.traj")) == pytest.approx({6: -10.0, 8: -20.0})


@pytest.mark.parametrize("family", names())
def test_models_begin_with_the_atoms_energies_and_the_mean_of_the_frames(tmp_path, family):
    """Untrained weights are off by some eV a frame; without the mean, frames of -18 eV would be off by 4 times 100 eV."""
    if family == "mace":
        pytest.importorskip("mace")
    torch.manual_seed(0)
    reference = read_reference(joined(tmp_path / "ref.traj", lone(energy=100.0)))
    potential = families()[family].build(reference)
    batch = AtomsBatch.from_atoms(reference.frames)
    energies = potential.compute(batch, neighbor_list(batch, potential.cutoff)).energies
    assert abs(float(energies.mean()) - reference.energies.mean()) < 40.0
    assert reference_energies(reference) == {6: 100.0}


def test_pretraining_from_a_joined_file(here):
    joined("joined.xyz", lone(), lone("O", -7.0))
    result = tiny.run("pretrain", "--model", "schnet", "--ref", "joined.xyz", "-o", "new.pt", "--epochs", "2", "--batch-size", "4")
    assert result.exit_code == 0, result.output
    assert "12 frames of C4" in result.output and "2 frames of isolated atoms (C, O) set aside" in result.output
    assert float(load_potential("new.pt").reference_energies[6]) == CARBON


def test_evaluation_of_a_joined_file(here):
    joined("joined.xyz", lone())
    result = tiny.run("evaluate", "model.pt", "--ref", "joined.xyz", "--time", "0.005", "--replicas", "2")
    assert result.exit_code == 0 and "1 frames of isolated atoms (C) set aside" in result.output, result.output
