"""Labels that do not fit a model: units, signs, molecules and levels of theory are named before anything is run."""

from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import tiny
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from stabie_ase.runs.checks import InconsistentLabels, check_inputs, check_labels, check_same_system

FACTORS = {
    "kcal/mol": units.mol / units.kcal,
    "kJ/mol": units.mol / units.kJ,
    "Hartree": 1.0 / units.Hartree,
    "Ry": 2.0 / units.Hartree,
    "meV": 1000.0,
}


def labelled(energy=1.0, forces=1.0, noise=0.1, seed=0):
    """Frames with the truth's labels times factors, with an error of the forces of some of their size."""
    reference, rng = tiny.reference(), np.random.default_rng(seed)
    rms = np.sqrt(np.mean(np.square(reference.forces)))
    errors = noise * rms * rng.normal(size=np.shape(reference.forces))
    spread = noise * reference.energies.std() * rng.normal(size=len(reference))
    return replace(
        reference, energies=energy * (reference.energies + spread), forces=[forces * f for f in reference.forces + errors]
    )


def check(reference):
    check_labels(tiny.truth(), reference, "good.pt", "the reference")


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6, 2.0])
def test_a_poor_model_is_no_other_unit(noise):
    check(labelled(noise=noise))


@pytest.mark.parametrize("noise", [0.01, 0.4])
@pytest.mark.parametrize("per", ["Å", "Bohr"])
@pytest.mark.parametrize("unit", FACTORS)
def test_units_of_forces(unit, per, noise):
    factor = FACTORS[unit] * (units.Bohr if per == "Bohr" else 1.0)
    with pytest.raises(InconsistentLabels, match=rf"forces of the reference .* good.pt .*in {unit}/{per}, expected eV/Å; convert"):
        check(labelled(forces=factor, noise=noise))


@pytest.mark.parametrize("noise", [0.01, 0.4])
@pytest.mark.parametrize("unit", FACTORS)
def test_units_of_energies(unit, noise):
    with pytest.raises(InconsistentLabels, match=f"energies of the reference .* in {unit}, expected eV; convert"):
        check(labelled(energy=FACTORS[unit], noise=noise))


def test_units_of_a_model():
    with pytest.raises(InconsistentLabels, match="the model looks to be trained in kcal/mol/Å, not eV/Å"):
        check(labelled(forces=1.0 / FACTORS["kcal/mol"]))


@pytest.mark.parametrize(
    "factor, words", [(-1.0, "gradients"), (-FACTORS["kcal/mol"], "in kcal/mol/Å, expected eV/Å and .* gradients")]
)
def test_gradients_instead_of_forces(factor, words):
    with pytest.raises(InconsistentLabels, match=words):
        check(labelled(forces=factor))


def test_what_is_only_likely_is_a_warning(caplog):
    """Forces of something else; energies of something else; total energies of something else."""
    reference = labelled()
    shuffled = replace(reference, forces=[-0.3 * f[::-1] for f in reference.forces])
    check(shuffled)
    assert "predicts the forces of the reference with an error of" in caplog.text and "another molecule" in caplog.text
    caplog.clear()
    check(replace(reference, energies=np.random.default_rng(1).permutation(reference.energies)))
    assert "the energies of the reference are" in caplog.text and "level of theory" in caplog.text
    caplog.clear()
    check(replace(reference, energies=reference.energies - 1000.0))
    assert "eV an atom from those that good.pt predicts" in caplog.text
    caplog.clear()
    check(reference)
    assert not caplog.text


def test_predictions_that_are_not_finite_are_said(caplog):
    class Broken(type(tiny.truth())):
        def atomic_energies(self, batch, neighbors):
            return super().atomic_energies(batch, neighbors) * np.nan

    check_labels(Broken(3.0, 1.8, 1.5), labelled(), "broken.pt", "the reference")
    assert "not finite" in caplog.text


def test_one_frame_and_forces_of_zero_are_no_error(caplog):
    reference = labelled()
    check(reference.subset([3]))
    assert not caplog.text
    check(replace(reference, forces=[0.0 * f for f in reference.forces]))
    assert "root mean squares" in caplog.text


def test_frames_of_another_system():
    water, other = Atoms("OH2", np.eye(3)), Atoms("C4", tiny.TETRAHEDRON)
    with pytest.raises(InconsistentLabels, match="--valid holds H2O, but the reference holds C4: frames of another system"):
        check_same_system([water], [other], "--valid", "the reference")
    check_same_system([water, other], [other], "--valid", "the reference")
    ice = Atoms("OH2", np.eye(3), cell=[3.0] * 3, pbc=True)
    check_same_system([ice * (2, 2, 1)], [ice], "--valid", "the reference")


def test_validation_frames_are_named():
    """Those are at fault, not the reference; and the reference is looked at first."""
    good, bad = labelled(), labelled(forces=FACTORS["kcal/mol"])
    with pytest.raises(InconsistentLabels, match="forces of --valid"):
        check_inputs(tiny.truth(), "good.pt", good, bad)
    with pytest.raises(InconsistentLabels, match="forces of the reference"):
        check_inputs(tiny.truth(), "good.pt", bad, bad)


# -- the commands

DATA = files("stabie_ase") / "data"


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_commands_refuse_other_units_in_one_line(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    frames = read(DATA / "aspirin_xtb_test.xyz", ":12")
    for atoms in frames:
        energy, forces = (atoms.calc.results[name] * FACTORS["kcal/mol"] for name in ("energy", "forces"))
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    write("kcal.xyz", frames)
    result = tiny.run(command, DATA / "aspirin_schnet.pt", "--ref", "kcal.xyz", "--output", "out")
    assert result.exit_code == 1 and result.output.splitlines()[-1].startswith("Error: the forces of the reference are 2")
    assert "kcal/mol/Å" in result.output and [path.name for path in tmp_path.iterdir()] == ["kcal.xyz"]


def test_a_model_to_compare_is_named(tmp_path):
    """A SchNet with large random weights knows nothing of these forces."""
    import torch

    from stabie_ase.potentials.checkpoint import save_potential
    from stabie_ase.potentials.schnet import build
    from stabie_ase.structures.reference import read_reference

    torch.manual_seed(0)
    other = build(read_reference(DATA / "aspirin_xtb_test.xyz"))
    other.network.lin2.weight.data *= 1000.0
    save_potential(other, tmp_path / "other.pt")
    models = (DATA / "aspirin_schnet.pt", "--compare", tmp_path / "other.pt")
    result = tiny.run("evaluate", *models, "--ref", f"{DATA / 'aspirin_xtb_test.xyz'}@:12", "--time", "0.005", "--replicas", "2")
    assert result.exit_code == 0, result.output
    assert "other.pt predicts the forces of the reference with an error" in result.output
    assert "aspirin_schnet.pt predicts" not in result.output
