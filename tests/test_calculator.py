"""The ASE calculator: in ASE's dynamics, optimisers, phonons and cell relaxation, and against wrong input."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import (
    CalculationFailed,
    CalculatorSetupError,
    InputError,
    PropertyNotImplementedError,
)
from ase.calculators.lj import LennardJones as ASELennardJones
from ase.filters import FrechetCellFilter
from ase.md.nptberendsen import NPTBerendsen
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.phonons import Phonons
from ase.vibrations import Vibrations
from helpers import ENERGIES, METHANOL, WATER, crystal, schnet
from torch import nn

from stabie_ase import StABIECalculator
from stabie_ase.potentials.analytic import LennardJones, Morse
from stabie_ase.potentials.checkpoint import save_potential
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.structures.batch import AtomsBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning"),
    pytest.mark.filterwarnings("ignore:Use thermalize_momenta:DeprecationWarning"),
]


def argon(**options):
    return StABIECalculator(LennardJones(0.0104, 3.4, cutoff=7.0), **options)


# --- what it returns --------------------------------------------------------------------------------------------------


def test_checkpoint_potential_and_module_are_the_same_calculator(tmp_path):
    potential = schnet()
    save_potential(potential, tmp_path / "model.pt")
    found = []
    for model in (str(tmp_path / "model.pt"), tmp_path / "model.pt", potential):
        atoms = METHANOL.copy()
        atoms.calc = StABIECalculator(model)
        found.append((atoms.get_potential_energy(), atoms.get_forces()))
    for energy, forces in found[1:]:
        assert energy == found[0][0] and np.array_equal(forces, found[0][1])


@pytest.mark.parametrize("dtype", ["float32", torch.float64])
def test_results_are_numbers_and_arrays_in_double_precision(dtype):
    atoms = crystal()
    atoms.calc = StABIECalculator(schnet(), dtype=dtype)
    assert type(atoms.get_potential_energy()) is float
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    for array, shape in (
        (atoms.get_forces(), (5, 3)),
        (atoms.get_stress(), (6,)),
        (atoms.get_potential_energies(), (5,)),
    ):
        assert array.dtype == np.float64 and array.shape == shape
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy(), rel=1e-12)


def test_stress_is_in_voigt_order():
    atoms = bulk("Ar", "fcc", 5.1, cubic=True)
    atoms.rattle(0.2, seed=1)
    atoms.set_cell(atoms.cell @ np.array([[1, 0.02, 0.05], [0, 1.01, 0.03], [0, 0, 0.98]]), scale_atoms=True)
    atoms.calc = argon()
    stress = atoms.get_stress()
    atoms.calc = ASELennardJones(epsilon=0.0104, sigma=3.4, rc=7.0)
    assert len(set(np.abs(stress).round(6))) == 6
    assert np.allclose(stress, atoms.get_stress(), atol=1e-13)


def test_atoms_are_made_tensors_once_a_call(monkeypatch):
    atoms, made, from_atoms = crystal(), [], AtomsBatch.from_atoms.__func__
    atoms.calc = StABIECalculator(schnet())
    monkeypatch.setattr(AtomsBatch, "from_atoms", classmethod(lambda *given, **more: made.append(1) or from_atoms(*given, **more)))
    for n_calls in (1, 2):
        atoms.rattle(0.01, seed=n_calls)
        atoms.get_stress()
        assert len(made) == n_calls


def test_stress_is_computed_only_once_it_was_asked_for():
    atoms = crystal()
    atoms.calc = StABIECalculator(schnet())
    atoms.get_forces()
    assert "stress" not in atoms.calc.results
    atoms.get_stress()
    atoms.rattle(0.01)
    atoms.get_forces()
    assert "stress" in atoms.calc.results


def test_calculator_follows_changes_of_elements_cell_and_periodicity():
    calculator = StABIECalculator(schnet())
    for atoms in (METHANOL, crystal(), WATER, Atoms("HOH", positions=WATER.positions), crystal(3)):
        changed = atoms.copy()
        assert calculator.get_potential_energy(changed) == StABIECalculator(schnet()).get_potential_energy(changed)
        changed.pbc = not atoms.pbc.any()
        changed.cell = [6, 7, 8]
        assert calculator.get_potential_energy(changed) == StABIECalculator(schnet()).get_potential_energy(changed)


def test_elements_that_changed_in_a_failed_call_are_not_forgotten():
    calculator = StABIECalculator(schnet())
    calculator.get_potential_energy(WATER)
    other = Atoms("CO2", positions=WATER.positions)
    other.positions[0] = np.nan
    with pytest.raises(InputError):
        calculator.get_potential_energy(other)
    other.positions = WATER.positions
    assert calculator.get_potential_energy(other) == StABIECalculator(schnet()).get_potential_energy(other)


# --- in ASE's tools ---------------------------------------------------------------------------------------------------


def test_molecular_dynamics_conserves_energy_and_keeps_its_list():
    atoms = bulk("Ar", "fcc", 5.25, cubic=True) * (2, 2, 2)
    # shifted to zero at the cutoff, the force still jumps there: a long cutoff keeps that small
    atoms.calc = StABIECalculator(LennardJones(0.0104, 3.4, cutoff=8.5), skin=1.0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=60, rng=np.random.default_rng(0))
    start = atoms.get_total_energy()
    VelocityVerlet(atoms, 4 * units.fs).run(60)
    kinetic = atoms.get_kinetic_energy()
    assert abs(atoms.get_total_energy() - start) < 0.005 * kinetic
    assert atoms.calc._neighbors.n_builds < 6


def test_same_trajectory_as_ase_s_own_potential():
    paths = []
    for calculator in (argon(skin=0.3), ASELennardJones(epsilon=0.0104, sigma=3.4, rc=7.0)):
        atoms = bulk("Ar", "fcc", 5.2, cubic=True)
        atoms.calc = calculator
        MaxwellBoltzmannDistribution(atoms, temperature_K=150, rng=np.random.default_rng(1))
        VelocityVerlet(atoms, 5 * units.fs).run(40)
        paths.append(atoms.positions)
    assert np.allclose(*paths, atol=1e-9)


def test_relaxation_finds_the_minimum_of_a_dimer():
    atoms = Atoms("Ar2", positions=[[0, 0, 0], [0, 0.3, 4.4]])
    atoms.calc = argon()
    BFGS(atoms, logfile=None).run(fmax=1e-5)
    assert atoms.get_distance(0, 1) == pytest.approx(2 ** (1 / 6) * 3.4, abs=1e-3)


def test_vibration_of_a_morse_dimer(tmp_path):
    depth, a = 4.5, 1.9
    atoms = Atoms("OH", positions=[[0, 0, 0], [0, 0, 0.97]])
    atoms.calc = StABIECalculator(Morse(depth, a, 0.97))
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"), delta=0.002)
    vibrations.run()
    reduced = 1 / (1 / atoms.get_masses()).sum()
    expected = units._hbar * units.m * np.sqrt(2 * depth * a**2 / reduced * units._e / units._amu) / units._e
    # central differences: relative error of the force constant about 7/6 a² delta² = 2e-5
    assert vibrations.get_energies()[-1].real == pytest.approx(expected, rel=1e-4)


def test_phonons_of_argon(tmp_path):
    atoms = bulk("Ar", "fcc", 5.23)
    phonons = Phonons(atoms, argon(), supercell=(3, 3, 3), delta=0.02, name=str(tmp_path / "phonon"))
    phonons.run()
    phonons.read(acoustic=True)
    gamma, edge = phonons.band_structure([[0, 0, 0], [0.5, 0.5, 0]], verbose=False)
    assert np.abs(gamma).max() < 1e-4
    assert 5e-3 < edge.max() < 1.2e-2  # argon's phonons end at 8 meV


def test_cell_relaxation_agrees_with_ase_s_own_potential():
    sizes = []
    for calculator in (argon(), ASELennardJones(epsilon=0.0104, sigma=3.4, rc=7.0)):
        atoms = bulk("Ar", "fcc", 5.4, cubic=True)
        atoms.set_cell(atoms.cell @ np.diag([1.02, 1.0, 0.99]), scale_atoms=True)
        atoms.calc = calculator
        BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3, steps=60)
        sizes.append(atoms.cell.lengths())
    assert np.allclose(*sizes, atol=1e-6)


def test_slab_relaxes_in_its_plane_as_with_ase_s_own_potential():
    sizes = []
    for calculator in (argon(), ASELennardJones(epsilon=0.0104, sigma=3.4, rc=7.0)):
        atoms = bulk("Ar", "fcc", 5.4, cubic=True)
        atoms.center(vacuum=5.0, axis=2)
        atoms.pbc = (True, True, False)
        atoms.calc = calculator
        BFGS(FrechetCellFilter(atoms, mask=[1, 1, 0, 0, 0, 1]), logfile=None).run(fmax=1e-3, steps=60)
        sizes.append(atoms.cell.lengths())
    assert np.allclose(*sizes, atol=1e-6) and sizes[0][0] < 5.3


def test_constant_pressure_dynamics_runs():
    atoms = bulk("Ar", "fcc", 5.3, cubic=True)
    atoms.calc = argon()
    MaxwellBoltzmannDistribution(atoms, temperature_K=40, rng=np.random.default_rng(2))
    volume = atoms.get_volume()
    NPTBerendsen(
        atoms, 5 * units.fs, temperature_K=40, pressure_au=1000 * units.bar, taut=200 * units.fs, taup=500 * units.fs,
        compressibility_au=1e-4 / units.bar,
    ).run(20)  # fmt: skip
    assert 0.9 * volume < atoms.get_volume() < volume


def test_mace_in_dynamics():
    pytest.importorskip("mace")
    from stabie_ase.potentials.mace import MACEPotential

    torch.manual_seed(0)
    potential = MACEPotential.build(ENERGIES, 6.0, 1.0, 0.0, "4x0e + 4x1o", radial_mlp=[8], dtype=torch.float64)
    atoms = METHANOL.copy()
    atoms.calc = StABIECalculator(potential)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    start = atoms.get_total_energy()
    VelocityVerlet(atoms, 0.5 * units.fs).run(20)
    assert abs(atoms.get_total_energy() - start) < 1e-3


@pytest.mark.parametrize("model", ["file", "potential", "network", "made inside"])
def test_in_inference_mode_and_out_of_it_again(model, tmp_path):
    save_potential(schnet(), tmp_path / "model.pt")
    models = {"file": tmp_path / "model.pt", "potential": schnet(), "network": schnet().network}
    atoms, expected = crystal(), crystal()
    expected.calc = StABIECalculator(schnet() if model != "network" else SchNetPotential(schnet().network))
    with torch.inference_mode():
        atoms.calc = StABIECalculator(models.get(model) or schnet())
    for inside in (True, False, True, False):
        for x in (atoms, expected):
            x.rattle(0.02, seed=1)
        with torch.inference_mode(inside):
            for name in ("energies", "forces", "stress"):
                found = atoms.calc.get_property(name, atoms)
                assert np.allclose(found, expected.calc.get_property(name, expected), rtol=1e-12, atol=1e-11), name


# --- a model belongs to its owner -------------------------------------------------------------------------------------


def test_shared_model_is_left_as_it_was():
    potential = schnet()
    names = {n for n, p in potential.named_parameters() if p.requires_grad}
    atoms = crystal()
    atoms.calc = StABIECalculator(potential)
    atoms.get_stress()
    assert atoms.calc.potential is potential
    other = StABIECalculator(potential, dtype="float32")
    other.get_potential_energy(atoms)
    assert other.potential is not potential and potential.dtype == torch.float64
    assert {n for n, p in potential.named_parameters() if p.requires_grad} == names
    assert all(p.grad is None for p in potential.parameters())


def test_calculator_sees_the_training_of_its_model():
    potential = schnet()
    calculator = StABIECalculator(potential)
    before = calculator.get_potential_energy(WATER)
    with torch.no_grad():
        potential.network.lin2.bias.add_(1.0)
    calculator.reset()
    assert calculator.get_potential_energy(WATER) == pytest.approx(before + 3.0)


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_unknown_element_is_named():
    with pytest.raises(CalculatorSetupError, match="does not know N; it was made for H, C, O"):
        StABIECalculator(schnet()).get_potential_energy(Atoms("N2", positions=[[0, 0, 0], [0, 0, 1.1]]))


def test_no_atoms():
    with pytest.raises(CalculatorSetupError, match="no atoms"):
        argon().get_potential_energy(Atoms())


def test_positions_that_are_not_finite():
    atoms = Atoms("Ar2", positions=[[0, 0, 0], [0, np.inf, 4]])
    with pytest.raises(InputError, match="positions that are not finite"):
        argon().get_potential_energy(atoms)


def test_atoms_on_top_of_each_other_are_a_failed_calculation():
    with pytest.raises(CalculationFailed, match="not finite .*energy.*on top of each other"):
        argon().get_potential_energy(Atoms("Ar2", positions=np.zeros((2, 3))))


@pytest.mark.parametrize("atoms", [WATER, Atoms("H", cell=[3, 3, 0], pbc=(1, 1, 0)), Atoms("H", cell=[3, 3, np.inf], pbc=(1, 1, 0))])
def test_stress_of_what_is_not_periodic_or_has_no_volume(atoms):
    with pytest.raises(PropertyNotImplementedError, match="at least one direction, and a cell of three .*; got pbc=.* and the cell"):
        StABIECalculator(schnet()).get_property("stress", atoms.copy())


def test_stress_that_was_asked_for_is_left_out_where_there_is_none():
    calculator = StABIECalculator(schnet())
    calculator.get_property("stress", crystal())
    assert np.isfinite(calculator.get_property("energy", WATER.copy())) and "stress" not in calculator.results


def test_periodic_direction_without_a_vector():
    atoms = Atoms("Ar", cell=[5, 5, 0], pbc=True)
    with pytest.raises(CalculatorSetupError, match="lattice vector"):
        argon().get_potential_energy(atoms)


@pytest.mark.parametrize("nothing", [np.inf, np.nan])
@pytest.mark.parametrize("pbc", [(0, 0, 0), (1, 0, 0), (1, 0, 1)])
def test_cell_that_is_not_finite_where_nothing_is_periodic(pbc, nothing):
    atoms = METHANOL.copy() if not any(pbc) else crystal()
    atoms.pbc = pbc
    odd = atoms.copy()
    atoms.cell[~atoms.pbc] = 0.0
    odd.cell[~atoms.pbc] = nothing
    for x in (atoms, odd):
        x.calc = StABIECalculator(schnet())
    for name in ("energy", "energies", "forces"):
        assert np.array_equal(odd.calc.get_property(name, odd), atoms.calc.get_property(name, atoms)), name


@pytest.mark.parametrize("nothing", [np.inf, np.nan])
def test_cell_that_is_not_finite_where_it_is_periodic(nothing):
    atoms = crystal()
    atoms.pbc, atoms.cell[1, 1] = (0, 1, 0), nothing
    atoms.calc = StABIECalculator(schnet())
    with pytest.raises(CalculatorSetupError, match=f"pbc=.*and the cell .*{nothing}.* every periodic direction needs a finite lattice"):
        atoms.get_potential_energy()


class Total(nn.Module):
    def forward(self, z, pos, batch):
        return pos.square().sum()[None]


def test_bare_module_gives_neither_energies_nor_periodic_systems():
    calculator = StABIECalculator(Total(), cutoff=3.0)
    assert "energies" not in calculator.implemented_properties
    assert "energies" in StABIECalculator.implemented_properties
    assert np.allclose(calculator.get_forces(WATER), -2 * WATER.positions)
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_property("energies", WATER)
    with pytest.raises(CalculatorSetupError, match="knows no cell"):
        calculator.get_potential_energy(crystal())


def test_bare_module_needs_a_cutoff():
    with pytest.raises(ValueError, match="give its cutoff"):
        StABIECalculator(Total())


def test_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match="devcie"):
        StABIECalculator(schnet(), devcie="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calculator_on_a_device():
    atoms, there = crystal(), crystal()
    atoms.calc, there.calc = StABIECalculator(schnet()), StABIECalculator(schnet(), device="cuda")
    assert np.allclose(atoms.get_forces(), there.get_forces(), atol=1e-10)
    assert np.allclose(atoms.get_stress(), there.get_stress(), atol=1e-11)
