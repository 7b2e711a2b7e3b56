"""Potentials: closed forms, the families' own code, finite differences, symmetries, and the base class's contract."""

import copy
import logging
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import CalculatorSetupError, PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.lj import LennardJones as ASELennardJones
from helpers import ENERGIES, METHANOL, WATER, crystal, predict, schnet
from scipy.spatial.transform import Rotation
from torch import nn
from torch_geometric.nn.models import SchNet

from stabie_ase.dynamics import PotentialForces, VelocityVerlet, initial_state, simulate
from stabie_ase.potentials.analytic import Harmonic, LennardJones, Morse
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.calculator import StABIECalculator
from stabie_ase.potentials.mace import MACEPotential
from stabie_ase.potentials.module import ModulePotential, as_potential
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import all_pairs, neighbor_list

# e3nn scripts its modules when they are built.
pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")

# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mace_modules():
    """The mace package, without its messages."""
    pytest.importorskip("mace")
    logging.disable(logging.WARNING)
    from mace import modules

    yield modules
    logging.disable(logging.NOTSET)


def build_mace(kind="ScaleShiftMACE", dtype=torch.float64, first="RealAgnosticResidualInteractionBlock", **changes):
    """A small MACE, its weights spread enough for forces of the order of 1 eV/Å."""
    from e3nn import o3
    from mace import modules

    settings = {
        "r_max": 4.0,
        "num_bessel": 5,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": modules.interaction_classes[first],
        "interaction_cls_first": modules.interaction_classes[first],
        "num_interactions": 2,
        "num_elements": 3,
        "hidden_irreps": o3.Irreps("4x0e + 4x1o"),
        "MLP_irreps": o3.Irreps("4x0e"),
        "atomic_energies": np.array([-13.6, -1029.0, -2041.5]),
        "avg_num_neighbors": 6.0,
        "atomic_numbers": [1, 6, 8],
        "correlation": 2,
        "gate": nn.functional.silu,
        "radial_MLP": [8, 8],
    }
    if kind == "ScaleShiftMACE":
        settings |= {"atomic_inter_scale": 5.0, "atomic_inter_shift": 0.1}
    settings |= changes
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            network = getattr(modules, kind)(**settings)
            with torch.no_grad():
                for p in network.parameters():
                    p.add_(0.3 * torch.randn_like(p))
    finally:
        torch.set_default_dtype(before)
    return network


@pytest.fixture(scope="module")
def mace(mace_modules):
    return MACEPotential(build_mace())


@pytest.fixture(params=["SchNet", "Lennard-Jones", "MACE"])
def potential(request):
    """One of each kind, in float64, with a cutoff beyond the crystal's half lattice."""
    if request.param == "MACE":
        return request.getfixturevalue("mace")
    return {"SchNet": schnet(), "Lennard-Jones": LennardJones(0.3, 1.1, cutoff=4.0)}[request.param]


class GivenEdges(nn.Module):
    """Hands torch-geometric's SchNet a list of edges."""

    def __init__(self, edges, shifts):
        super().__init__()
        self.edges, self.shifts = edges, shifts

    def forward(self, pos, batch):
        j, i = self.edges
        return self.edges, (pos[j] - pos[i] + self.shifts).norm(dim=1)


# --- closed forms and reference implementations -----------------------------------------------------------------------


def test_harmonic_energy_and_force():
    positions = np.array([[0.3, -0.2, 0.1], [1.0, 2.0, -1.0]])
    found = predict(Harmonic(k=2.5), Atoms("H2", positions=positions))
    assert float(found.energies) == pytest.approx(0.5 * 2.5 * (positions**2).sum())
    assert np.allclose(found.forces, -2.5 * positions)


@pytest.mark.parametrize("r", [0.8, 1.4, 3.0])
def test_morse_energy_and_force(r):
    depth, a, r0 = 4.0, 1.7, 1.2
    found = predict(Morse(depth, a, r0), Atoms("H2", positions=[[0, 0, 0], [0, 0, r]]))
    bond = np.exp(-a * (r - r0))
    assert float(found.energies) == pytest.approx(depth * ((1 - bond) ** 2 - 1))
    slope = 2 * depth * a * (1 - bond) * bond
    assert np.allclose(found.forces, [[0, 0, slope], [0, 0, -slope]])


@pytest.mark.parametrize("pbc", [False, (1, 0, 1), True])
def test_lennard_jones_is_that_of_ase(pbc):
    atoms = bulk("Ar", "fcc", 5.1, cubic=True)
    atoms.rattle(0.3, seed=1)
    atoms.pbc = pbc
    atoms.calc = ASELennardJones(epsilon=0.01, sigma=3.4, rc=7.0)
    found = predict(LennardJones(0.01, 3.4, cutoff=7.0), atoms, stress=np.any(pbc))
    assert float(found.energies) == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
    assert np.allclose(found.forces, atoms.get_forces(), atol=1e-12)
    if np.any(pbc):
        assert np.allclose(found.stress[0], atoms.get_stress(voigt=False), atol=1e-14)


@pytest.mark.parametrize("atoms", [METHANOL, crystal()])
@pytest.mark.parametrize("extras", [{}, {"mean": 0.3, "std": 2.0, "atomref": torch.linspace(-1, 1, 100)[:, None]}])
def test_schnet_is_that_of_torch_geometric(atoms, extras):
    torch.manual_seed(0)
    network = SchNet(hidden_channels=16, num_filters=12, num_interactions=2, num_gaussians=9, cutoff=4.0, **extras)
    network = network.double()
    batch = AtomsBatch.from_atoms(atoms)
    near = neighbor_list(batch, 4.0).within(batch, 4.0)
    positions = batch.positions.clone().requires_grad_()
    shifts = torch.einsum("pk,kx->px", near.shifts.double(), batch.cells[0])
    network.interaction_graph = GivenEdges(near.pairs.flip(0), shifts)
    expected = network(batch.numbers, positions, batch.system)[0, 0]
    forces = -torch.autograd.grad(expected, positions)[0]
    found = SchNetPotential(network).compute(batch, neighbor_list(batch, 6.0))
    # torch-geometric adds mean per atom too; the tolerance is round-off of a sum of a few terms of order 1
    assert float(found.energies) == pytest.approx(float(expected.detach()), abs=1e-11)
    assert torch.allclose(found.forces, forces, atol=1e-11)


def test_schnet_that_does_not_sum_atoms_is_refused():
    for options in ({"readout": "mean"}, {"dipole": True}):
        with pytest.raises(ValueError, match="readout='add'"):
            SchNetPotential(SchNet(hidden_channels=8, num_filters=8, num_interactions=1, **options))


# --- MACE against its own calculator ----------------------------------------------------------------------------------


def ase_mace(network, dtype, **options):
    from mace.calculators import MACECalculator

    # Its constructor freezes and may cast the model it is given.
    return MACECalculator(models=copy.deepcopy(network), default_dtype=str(dtype).removeprefix("torch."), **options)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_mace_is_that_of_its_own_calculator(mace_modules, dtype, rtol):
    network = build_mace(dtype=dtype, pair_repulsion=True, distance_transform="Agnesi")
    ours, theirs = StABIECalculator(network), ase_mace(network, dtype)
    for atoms in (METHANOL.copy(), crystal()):
        found, expected = ({}, {})
        for calculator, values in ((ours, found), (theirs, expected)):
            for name in ("energy", "energies", "forces", *(["stress"] if atoms.pbc.all() else [])):
                values[name] = calculator.get_property(name, atoms)
        # float32: the energies are of the order of 1e4 eV, with 1e-7 of relative round-off
        assert found["energy"] == pytest.approx(expected["energy"], rel=rtol / 10)
        assert np.allclose(found["energies"], expected["energies"], rtol=rtol / 10)
        assert np.abs(expected["forces"]).max() > 0.1
        for name in ("forces", "stress")[: len(expected) - 2]:
            assert np.allclose(found[name], expected[name], atol=rtol * np.abs(expected[name]).max())


def test_mace_gives_the_same_bits_from_its_first_call_on(mace_modules):
    """A resumed run calls a model for the first time where the uninterrupted one calls it again."""
    torch.manual_seed(0)
    potential = MACEPotential.build({1: -13.0, 6: -1030.0, 8: -2040.0}, avg_num_neighbors=5.0, dtype=torch.float32)
    molecules = [METHANOL.copy() for _ in range(6)]
    for k, atoms in enumerate(molecules):
        atoms.rattle(0.05, seed=k)
    first, second, third = (predict(potential, molecules) for _ in range(3))
    assert torch.equal(first.forces, third.forces) and torch.equal(second.forces, third.forces)
    assert torch.equal(first.energies, third.energies)


@pytest.fixture(scope="module")
def two_heads(mace_modules):
    return build_mace(
        num_interactions=1,
        heads=["dft", "cc"],
        atomic_energies=np.array([[-13.6, -1029.0, -2041.5], [-13.7, -1030.0, -2043.0]]),
        atomic_inter_scale=[5.0, 3.0],
        atomic_inter_shift=[0.1, 0.0],
    )


@pytest.mark.parametrize("head", ["dft", "cc"])
def test_mace_head_is_chosen_by_name(two_heads, head):
    ours, theirs = WATER.copy(), WATER.copy()
    ours.calc = StABIECalculator(two_heads, head=head)
    theirs.calc = ase_mace(two_heads, torch.float64, head=head)
    assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), rel=1e-12)


def test_mace_heads_are_listed_when_the_choice_is_wrong_or_missing(two_heads):
    potential = MACEPotential(two_heads)
    assert potential.head is None
    with pytest.raises(ValueError, match="choose one of dft, cc"):
        predict(potential, WATER)
    with pytest.raises(ValueError, match="no head 'mp2'; it has dft, cc"):
        potential.choose_head("mp2")
    potential.choose_head("cc")
    first = predict(potential, WATER).energies
    potential.choose_head("dft")
    assert predict(potential, WATER).energies != first


@pytest.mark.parametrize(
    "block, options",
    [
        ("RealAgnosticAttResidualInteractionBlock", {}),
        ("RealAgnosticResidualNonLinearInteractionBlock", {"apply_cutoff": True}),
    ],
)
def test_mace_blocks_without_a_mask_get_a_trimmed_list(mace_modules, block, options):
    potential = MACEPotential(build_mace(first=block, num_interactions=1, **options))
    batch = AtomsBatch.from_atoms(crystal())
    exact = potential.compute(batch, neighbor_list(batch, 4.0))
    longer = potential.compute(batch, neighbor_list(batch, 6.0))
    assert torch.allclose(longer.energies, exact.energies, rtol=1e-13, atol=0)
    assert torch.allclose(longer.forces, exact.forces, atol=1e-11)


def test_mace_builds_from_the_statistics_of_a_data_set(mace_modules):
    torch.manual_seed(0)
    potential = MACEPotential.build(ENERGIES, 6.0, 1.5, 0.2, "4x0e + 4x1o", radial_mlp=[8], dtype=torch.float64)
    assert potential.numbers == (1, 6, 8) and potential.dtype == torch.float64 and potential.cutoff == 5.0
    far = Atoms("OH", positions=[[0, 0, 0], [50, 0, 0]])
    alone = predict(potential, [Atoms("O"), Atoms("H")]).energies.sum()
    assert float(predict(potential, far).energies) == pytest.approx(float(alone))
    assert float(alone) == pytest.approx(ENERGIES[8] + ENERGIES[1], abs=20)
    assert torch.get_default_dtype() == torch.float32


# --- laws that hold for every potential -------------------------------------------------------------------------------


@pytest.mark.parametrize("atoms", [METHANOL, crystal()], ids=["molecule", "crystal"])
def test_forces_and_stress_are_derivatives_of_the_energy(potential, atoms):
    atoms = atoms.copy()
    atoms.calc = StABIECalculator(potential)
    # central differences: error eps² U''' / 6 ~ 1e-8 and round-off 1e-16 * 1e4 eV / eps ~ 1e-8
    size = np.abs(atoms.get_forces()).max()
    assert size > 1e-2
    numerical = calculate_numerical_forces(atoms, eps=1e-4, iatoms=[0, 1, 2])
    assert np.allclose(atoms.get_forces()[:3], numerical, atol=2e-6 * max(size, 1.0))
    if atoms.pbc.all():
        numerical = calculate_numerical_stress(atoms, eps=1e-5, voigt=True)
        assert np.allclose(atoms.get_stress(), numerical, atol=2e-6 * max(np.abs(numerical).max(), 1.0))


def test_batch_equals_each_system_alone(potential):
    systems = [crystal(4), WATER, Atoms("O"), crystal(5, seed=2), METHANOL]
    found = predict(potential, systems)
    alone = [predict(potential, atoms) for atoms in systems]
    assert torch.allclose(found.energies, torch.cat([p.energies for p in alone]), rtol=1e-13)
    assert torch.allclose(found.forces, torch.cat([p.forces for p in alone]), atol=1e-10)


def test_stress_in_a_batch_equals_that_alone(potential):
    systems = [crystal(4), crystal(5, seed=2)]
    found = predict(potential, systems, stress=True).stress
    assert found.shape == (2, 3, 3)
    assert torch.allclose(found, found.transpose(1, 2), atol=1e-12)
    for k, atoms in enumerate(systems):
        assert torch.allclose(found[k], predict(potential, atoms, stress=True).stress[0], atol=1e-11)


def test_atoms_may_be_wrapped_or_not(potential):
    atoms, unwrapped = crystal(), crystal()
    rng = np.random.default_rng(4)
    unwrapped.positions += rng.integers(-3, 4, (len(atoms), 3)) @ atoms.cell.array
    a, b = (predict(potential, x, stress=True) for x in (atoms, unwrapped))
    assert torch.allclose(a.energies, b.energies, rtol=1e-13)
    assert torch.allclose(a.forces, b.forces, atol=1e-10)
    assert torch.allclose(a.stress, b.stress, atol=1e-11)


@pytest.mark.parametrize("atoms", [METHANOL, crystal()], ids=["molecule", "crystal"])
def test_pairs_beyond_the_cutoff_change_nothing(potential, atoms):
    spread = atoms.copy()
    spread.positions *= 1.0 if atoms.pbc.any() else 2.5
    batch = AtomsBatch.from_atoms(spread)
    exact = neighbor_list(batch, potential.cutoff).within(batch, potential.cutoff)
    longer = neighbor_list(batch, potential.cutoff + 2.0)
    assert longer.n_pairs > exact.n_pairs
    a, b = potential.compute(batch, exact), potential.compute(batch, longer)
    assert torch.allclose(a.energies, b.energies, rtol=1e-14)
    assert torch.allclose(a.forces, b.forces, atol=1e-12)


def test_rotation_turns_the_forces_and_leaves_the_energy(potential):
    turn = Rotation.random(rng=np.random.default_rng(5)).as_matrix()
    atoms, turned = crystal(), crystal()
    turned.set_cell(atoms.cell @ turn.T)
    turned.positions = atoms.positions @ turn.T
    a, b = (predict(potential, x, stress=True) for x in (atoms, turned))
    assert torch.allclose(a.energies, b.energies, rtol=1e-13)
    assert np.allclose(a.forces.numpy() @ turn.T, b.forces, atol=1e-10)
    assert np.allclose(turn @ a.stress[0].numpy() @ turn.T, b.stress[0], atol=1e-11)


def test_order_of_atoms_does_not_matter(potential):
    order = np.random.default_rng(6).permutation(len(METHANOL))
    a, b = predict(potential, METHANOL), predict(potential, METHANOL[order])
    assert torch.allclose(a.energies, b.energies, rtol=1e-14)
    assert torch.allclose(a.forces[order.tolist()], b.forces, atol=1e-12)


def test_forces_sum_to_zero(potential):
    assert torch.allclose(predict(potential, crystal()).forces.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-11)


def test_atomic_energies_sum_to_the_energy(potential):
    batch = AtomsBatch.from_atoms([crystal(), METHANOL])
    neighbors = neighbor_list(batch, potential.cutoff)
    summed = batch.sum_over_atoms(potential.atomic_energies(batch, neighbors))
    assert torch.allclose(summed, potential(batch, neighbors), rtol=1e-14)


def test_atom_alone_feels_no_force(potential):
    found = predict(potential, [Atoms("H"), Atoms("O", cell=[20, 20, 20], pbc=True)])
    assert torch.equal(found.forces, torch.zeros(2, 3, dtype=torch.float64))


# --- autograd's border ------------------------------------------------------------------------------------------------


def test_compute_returns_nothing_attached_and_leaves_no_trace(potential):
    batch = AtomsBatch.from_atoms(crystal())
    with torch.no_grad():  # forces need a graph even here
        found = potential.compute(batch, neighbor_list(batch, potential.cutoff), stress=True)
    assert not any(t.requires_grad for t in found)
    assert not batch.positions.requires_grad and not batch.cells.requires_grad
    assert all(p.grad is None for p in potential.parameters())
    assert found.energies.dtype == torch.float64


@pytest.mark.parametrize("made_inside", [(), ("batch",), ("model",), ("model", "batch")], ids=str)
def test_forces_in_inference_mode_and_after_it(potential, made_inside):
    images = [crystal(4), crystal(5, seed=2)]
    expected = predict(potential, images, stress=True)

    def make(what):
        if what == "model":
            return copy.deepcopy(potential)
        batch = AtomsBatch.from_atoms(images)
        return batch, neighbor_list(batch, potential.cutoff).for_cells(batch)

    with torch.inference_mode():
        inside = {what: make(what) for what in made_inside}
    model, batch = (inside.get(what) or make(what) for what in ("model", "batch"))
    with torch.inference_mode():
        energies = model(*batch)
        found = model.compute(*batch, stress=True)
    for prediction in (found, model.compute(*batch, stress=True)):
        for x, y in zip(prediction, expected):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-11) and not x.is_inference()
    assert torch.allclose(energies, expected.energies, rtol=1e-13)
    assert all(p.requires_grad for p in model.parameters()) == all(p.requires_grad for p in potential.parameters())


def test_weights_that_modules_share_stay_shared_after_inference_mode():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2))
            self.second.weight = self.first.weight

        def forward(self, z, pos, batch):
            return self.second(self.first(pos.reshape(-1, 1))).square().sum()[None]

    with torch.inference_mode():
        module = Twice()
    predict(ModulePotential(module, 3.0), WATER)
    assert module.first.weight is module.second.weight and module.first.weight.requires_grad


class Layers(nn.Module):
    """A bare module of two layers and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))

    def forward(self, z, pos, batch):
        energies = (self.second(self.first(pos).tanh()) * self.scale).square().sum(dim=1)
        return energies.new_zeros(int(batch[-1]) + 1).index_add(0, batch, energies)


def scale_made_again(module):
    module.scale = torch.full((3,), 0.7, dtype=torch.float64)


def second_made_again(module):
    module.second = nn.Linear(3, 3, dtype=torch.float64)


@pytest.mark.parametrize("change", [scale_made_again, second_made_again])
@pytest.mark.parametrize("frozen", [False, True])
def test_forces_of_a_module_of_which_a_part_was_made_in_inference_mode(change, frozen):
    module, potential = Layers(), ModulePotential(Layers(), 3.0)
    predict(potential, WATER)  # when all was as usual
    potential.module = module
    with torch.inference_mode():
        change(module)
    batch = AtomsBatch.from_atoms([WATER, METHANOL])
    with potential.frozen() if frozen else nullcontext():
        found = potential.compute(batch, neighbor_list(batch, 3.0)).forces
    expected = ModulePotential(copy.deepcopy(module), 3.0).compute(batch, neighbor_list(batch, 3.0)).forces
    assert torch.equal(found, expected) and float(found.abs().max()) > 0
    assert all(p.requires_grad and not p.is_inference() for p in module.parameters())


def test_dynamics_in_inference_mode_are_the_same():
    potential, ends = schnet(), []
    for mode in (False, True, False):
        with torch.inference_mode(mode):
            state = initial_state(AtomsBatch.from_atoms([METHANOL, WATER]), PotentialForces(potential), 300.0)
            ends.append(simulate(state, VelocityVerlet(0.05), PotentialForces(potential), 5).batch.positions)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_energies_reach_the_parameters_only(potential):
    batch = AtomsBatch.from_atoms(crystal())
    energies = potential(batch, neighbor_list(batch, potential.cutoff))
    gradients = torch.autograd.grad(energies.sum(), list(potential.parameters()), allow_unused=True)
    assert sum(g is not None and bool(g.abs().max() > 0) for g in gradients) > 0.7 * len(gradients)
    assert not batch.positions.requires_grad, "the caller's positions were changed"


def test_force_loss_has_the_right_parameter_gradient(potential):
    """d/dθ Σ F² by double backward against finite differences along one direction in parameter space."""
    potential = copy.deepcopy(potential)
    batch = AtomsBatch.from_atoms(METHANOL)
    neighbors = neighbor_list(batch, potential.cutoff)
    parameters = [p for p in potential.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss(create_graph=False):
        return potential.compute(batch, neighbors, create_graph=create_graph).forces.square().sum()

    gradients = torch.autograd.grad(loss(create_graph=True), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction) if g is not None)
    sides, eps = [], 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p.add_(sign * eps * d)
        sides.append(float(loss()))
    assert slope == pytest.approx((sides[0] - sides[1]) / (2 * eps), rel=1e-4)


def test_frozen_parameters_ask_for_gradients_again(potential):
    names = {n for n, p in potential.named_parameters() if p.requires_grad}
    batch = AtomsBatch.from_atoms(WATER)
    neighbors = neighbor_list(batch, potential.cutoff)
    free = potential.compute(batch, neighbors)
    with pytest.raises(KeyError), potential.frozen():
        assert not any(p.requires_grad for p in potential.parameters())
        assert torch.allclose(potential.compute(batch, neighbors).forces, free.forces, atol=1e-12)
        raise KeyError
    assert {n for n, p in potential.named_parameters() if p.requires_grad} == names


class Detached(Potential):
    """A potential with a mistake in it."""

    cutoff, family = 3.0, "mistaken"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def atomic_energies(self, batch, neighbors):
        return self.scale * batch.positions.detach().square().sum(dim=1)


def test_energy_without_a_path_to_the_positions_is_an_error():
    with pytest.raises(RuntimeError, match="mistaken .* not a differentiable function of the positions"):
        predict(Detached(), WATER)
    with pytest.raises(RuntimeError, match="not a differentiable"), torch.no_grad():
        predict(Detached().requires_grad_(False), WATER)


def test_potential_without_atomic_energies_says_so():
    with pytest.raises(PropertyNotImplementedError, match="gives no per-atom energies"):
        Potential().atomic_energies(AtomsBatch.from_atoms(WATER), None)
    assert not Potential().gives_atomic_energies and Harmonic().gives_atomic_energies


@pytest.mark.parametrize("vacuum", [6.0, 30.0])
@pytest.mark.parametrize("pbc", [(1, 1, 0), (0, 1, 1), (0, 1, 0)], ids=str)
def test_stress_of_slabs_and_wires_is_the_derivative_over_the_given_volume(potential, pbc, vacuum):
    """However the cell is chosen where nothing is periodic: skew, or far larger than what is in it."""
    atoms = crystal()
    atoms.pbc = pbc
    atoms.cell[~atoms.pbc] *= vacuum / 4.0
    atoms.calc = StABIECalculator(potential)
    stress = atoms.get_stress()
    numerical = calculate_numerical_stress(atoms, eps=1e-5)
    assert np.abs(stress).max() > 1e-4 and np.allclose(stress, numerical, atol=2e-6 * max(np.abs(numerical).max(), 1.0))
    in_a_batch = predict(potential, [crystal(4), atoms], stress=True).stress[1]
    assert np.allclose(in_a_batch, atoms.get_stress(voigt=False), atol=1e-11)


def test_a_cell_that_exploded_has_no_energy_and_no_stress_and_harms_no_other(potential):
    batch = AtomsBatch.from_atoms([crystal(4), crystal(4)])
    cells = batch.cells.clone()
    cells[1, 0] = torch.inf
    exploded = batch.replace(cells=cells)
    a, b = (potential.compute(x, neighbor_list(x, potential.cutoff), stress=True) for x in (batch, exploded))
    assert b.energies[1].isnan() and b.stress[1].isnan().any()
    assert torch.allclose(a.energies[0], b.energies[0], rtol=1e-13) and torch.allclose(a.stress[0], b.stress[0], atol=1e-11)


def test_stress_needs_a_periodic_direction_and_a_volume(potential):
    flat, open_ended, box = crystal(), crystal(), crystal()
    flat.pbc, flat.cell[2] = (1, 1, 0), 0.0
    open_ended.pbc, open_ended.cell[2, 2] = (1, 1, 0), np.inf
    box.pbc = False
    for atoms in (WATER, flat, open_ended, box, [crystal(), flat]):
        with pytest.raises(PropertyNotImplementedError, match="periodic in at least one direction, and a cell of three vectors"):
            predict(potential, atoms, stress=True)


# --- precision, device, elements --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [lambda p: p.to(dtype=torch.float32), lambda p: p.float()])
def test_casts_do_not_round_reference_energies(cast):
    potential = cast(schnet())
    assert potential.dtype == torch.float32
    assert float(potential.reference_energies[8]) == ENERGIES[8]
    double = predict(schnet(), METHANOL)
    single = predict(potential, METHANOL)
    assert single.energies.dtype == torch.float64 and single.forces.dtype == torch.float32
    # rounding the reference energies to float32 would cost about 1e-4 eV an atom
    assert float(single.energies) == pytest.approx(float(double.energies), abs=1e-5)


def scattered(images, distance=1e5):
    """Each system as a whole somewhere else; in cells, each atom in another image."""
    rng, moved = np.random.default_rng(7), []
    for atoms in images:
        atoms = atoms.copy()
        atoms.positions += distance * rng.uniform(-1, 1, 3)
        if atoms.pbc.any():
            images_away = np.rint(distance / 4.0 * rng.uniform(-1, 1, (len(atoms), 3))) * atoms.pbc
            atoms.positions += images_away @ atoms.cell.array
        moved.append(atoms)
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pbc", [False, (1, 1, 0), True], ids=["molecules", "slabs", "crystals"])
def test_where_atoms_are_changes_nothing(potential, pbc, dtype):
    """Only the distances are rounded to the precision of the model; positions of 1e5 Å would be, by 0.01 Å."""
    potential = copy.deepcopy(potential).to(dtype=dtype)
    images = [crystal(4), crystal(5, seed=2)] if np.any(pbc) else [METHANOL, WATER]
    for atoms in images:
        atoms.pbc = pbc
    stress = bool(np.all(pbc))
    here, there = (predict(potential, x, stress=stress) for x in (images, scattered(images)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-8  # positions themselves are known to 1e-11 Å
    scale = float(here.forces.abs().max())
    assert torch.allclose(there.energies, here.energies, rtol=0, atol=tolerance * scale)
    assert torch.allclose(there.forces, here.forces, rtol=0, atol=tolerance * scale)
    if stress:
        assert torch.allclose(there.stress, here.stress, rtol=0, atol=tolerance * float(here.stress.abs().max()))
    batches = [AtomsBatch.from_atoms(x) for x in (images, scattered(images))]
    a, b = (potential(batch, neighbor_list(batch, potential.cutoff + 1.0)) for batch in batches)
    assert torch.allclose(a, b, rtol=0, atol=tolerance * scale)


def test_where_a_molecule_is_changes_nothing_for_a_bare_module():
    module = PairNetwork()
    potential = ModulePotential(module, 9.0)
    here, there = (predict(potential, x) for x in ([METHANOL, WATER], scattered([METHANOL, WATER])))
    assert float(here.forces.abs().max()) > 0.1
    assert torch.allclose(there.forces, here.forces, rtol=0, atol=1e-5)
    assert torch.allclose(there.energies, here.energies, rtol=1e-6)


def test_per_atom_energies_and_relaxed_cells_far_away():
    """The calculator's own paths: a list that is kept, in cells that change, and energies of single atoms."""
    (there,), here = scattered([crystal()]), crystal()
    here.calc, there.calc = StABIECalculator(schnet(torch.float32)), StABIECalculator(schnet(torch.float32))
    for _ in range(2):
        assert np.allclose(there.get_potential_energies(), here.get_potential_energies(), rtol=0, atol=1e-5)
        assert np.allclose(there.get_stress(), here.get_stress(), rtol=0, atol=1e-5 * np.abs(here.get_stress()).max())
        for atoms in (here, there):
            atoms.set_cell(1.001 * atoms.cell, scale_atoms=True)


def test_unknown_elements_are_named(potential):
    if potential.numbers is None:
        pytest.skip("knows all elements")
    with pytest.raises(ValueError, match="does not know N, Ar; it was made for H, C, O"):
        potential.check_numbers([1, 7, 18])


@pytest.mark.parametrize("numbers, named", [([0, 1], r"X \(Z = 0\)"), ([1, 119], r"an element \(Z = 119\)"), ([-1], r"\(Z = -1\)")])
def test_what_is_no_element_is_refused(potential, numbers, named):
    for model in (potential, ModulePotential(PairSum(), 3.0)):
        with pytest.raises(ValueError, match=f"does not know .*{named}; it was made for"):
            model.check_numbers(numbers)


@pytest.mark.parametrize("symbol", ["Fm", "Og", "X"])
def test_elements_without_a_row_are_named_wherever_they_come(symbol):
    """By a SchNet that carries no list of elements, in a bare call, in the engine and in the calculator."""
    potential = SchNetPotential(schnet().network)
    atoms = Atoms(["H", symbol], positions=[[0, 0, 0], [0, 0, 1]])
    batch = AtomsBatch.from_atoms([WATER, atoms])
    neighbors = neighbor_list(batch, 4.0)
    for call in (potential, potential.compute, lambda batch, _: PotentialForces(potential)(batch)):
        with pytest.raises(ValueError, match=f"does not know {symbol}"):
            call(batch, neighbors)
    with pytest.raises(CalculatorSetupError, match=f"does not know {symbol}"):
        StABIECalculator(potential).get_potential_energy(atoms)


def test_schnet_cannot_be_built_for_elements_without_a_row():
    with pytest.raises(ValueError, match="does not know Fm; it was made for elements up to Es"):
        SchNetPotential.build({1: -13.6, 100: 0.0}, 8, 8, 1, 5)


def test_bare_module_without_a_row_for_an_element():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 1).double()

        def forward(self, z, pos, batch):
            return (self.table(z)[:, 0] * pos.sum(dim=1)).sum()[None]

    predict(ModulePotential(Table(), 3.0), WATER)
    with pytest.raises(ValueError, match="no entry for one of the elements H, S: index out of range"):
        predict(ModulePotential(Table(), 3.0), Atoms("SH2", positions=WATER.positions))


def test_potential_without_heads_says_so():
    with pytest.raises(ValueError, match="no head 'a'; it has a single output"):
        Harmonic().choose_head("a")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_device_agrees_with_the_cpu(potential, dtype, atol):
    expected = predict(potential, [crystal(), crystal(4)], stress=True)
    there = copy.deepcopy(potential).to(device="cuda", dtype=dtype)
    batch = AtomsBatch.from_atoms([crystal(), crystal(4)], device="cuda")
    found = there.compute(batch, neighbor_list(batch, there.cutoff), stress=True)
    size = float(expected.forces.abs().max())
    assert torch.allclose(found.forces.cpu().double(), expected.forces, atol=atol * size)
    assert torch.allclose(found.stress.cpu().double(), expected.stress, atol=atol * size)


# --- bare modules -----------------------------------------------------------------------------------------------------


class PairSum(nn.Module):
    """A module with torch-geometric's convention: Σ_pairs exp(-r) within each system."""

    def __init__(self, keepdim=False):
        super().__init__()
        self.keepdim = keepdim

    def forward(self, z, pos, batch):
        i, j = torch.triu_indices(len(z), len(z), offset=1)
        i, j = i[batch[i] == batch[j]], j[batch[i] == batch[j]]
        terms = torch.exp(-(pos[i] - pos[j]).norm(dim=1)) * z[i] * z[j]
        energies = pos.new_zeros(int(batch[-1]) + 1).index_add(0, batch[i], terms)
        return energies[:, None] if self.keepdim else energies


class PairNetwork(PairSum):
    """The same with weights in single precision."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z, pos, batch):
        assert pos.dtype == torch.float32
        return self.scale * super().forward(z, pos, batch)


@pytest.mark.parametrize("keepdim", [False, True])
def test_bare_module_becomes_a_potential(keepdim):
    potential = as_potential(PairSum(keepdim), cutoff=9.0)
    assert isinstance(potential, ModulePotential) and potential.cutoff == 9.0
    found = predict(potential, [WATER, METHANOL])
    r = WATER.get_all_distances()
    expected = 8 * np.exp(-r[0, 1]) + 8 * np.exp(-r[0, 2]) + np.exp(-r[1, 2])
    assert float(found.energies[0]) == pytest.approx(expected)
    assert found.energies.shape == (2,)
    atoms = WATER.copy()
    atoms.calc = StABIECalculator(PairSum(keepdim), cutoff=9.0)
    assert np.allclose(found.forces[:3], calculate_numerical_forces(atoms, eps=1e-5), atol=1e-8)


def test_bare_module_knows_no_cell():
    with pytest.raises(ValueError, match="knows no cell"):
        predict(ModulePotential(PairSum(), 3.0), crystal())


def test_bare_module_must_return_one_energy_a_system():
    class PerAtom(nn.Module):
        def forward(self, z, pos, batch):
            return pos.sum(dim=1)

    with pytest.raises(ValueError, match=r"returned shape \(3,\) for 1 system"):
        predict(ModulePotential(PerAtom(), 3.0), WATER)


def test_as_potential_finds_the_family(mace):
    potential = schnet()
    assert as_potential(potential) is potential
    assert as_potential(potential.network).network is potential.network
    assert isinstance(as_potential(mace.network), MACEPotential)


def test_batch_and_model_on_two_devices():
    batch = AtomsBatch.from_atoms(WATER)
    neighbors = neighbor_list(batch, 4.0)
    with pytest.raises(ValueError, match="the batch is on meta, the model on cpu"):
        schnet().compute(batch.to(device="meta"), neighbors)


@pytest.mark.parametrize("change, found", [({"dtype": torch.float32}, "float32 and torch.float64"), ({"device": "meta"}, "cpu and meta")])
def test_parameters_of_two_kinds(change, found):
    network = schnet().network
    network.lin2.to(**change)
    with pytest.raises(ValueError, match=f"SchNet has parameters of {next(iter(change))} .*{found}: bring it to one"):
        as_potential(network)


def test_as_potential_says_what_is_missing():
    with pytest.raises(ValueError, match="PairSum is of no family known here .*schnet.* give its cutoff"):
        as_potential(PairSum())
    with pytest.raises(TypeError, match="expected a Potential or a torch module, got str"):
        as_potential("model.pt")


def test_mace_that_needs_a_charge_is_refused(mace_modules):
    specs = {"total_charge": {"type": "continuous", "in_dim": 1, "emb_dim": 4, "per": "graph"}}
    network = build_mace(num_interactions=1, embedding_specs=specs)
    with pytest.raises(ValueError, match="total charge or spin"):
        as_potential(network)


def test_adopted_mace_with_fixed_zeros_can_be_copied(mace_modules):
    from e3nn import o3

    network = build_mace(max_ell=1, hidden_irreps=o3.Irreps("4x0e+4x0o+4x1o"))
    assert any(type(p).__name__ == "EmptyParam" for p in network.parameters())
    potential = MACEPotential(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = copy.deepcopy(potential)
    assert torch.equal(predict(twin, WATER).energies, predict(potential, WATER).energies)


def test_all_pairs_and_a_search_give_the_same_prediction(potential):
    batch = AtomsBatch.from_atoms(METHANOL)
    a = potential.compute(batch, all_pairs(batch))
    b = potential.compute(batch, neighbor_list(batch, potential.cutoff).within(batch, potential.cutoff))
    assert torch.allclose(a.forces, b.forces, atol=1e-12)
