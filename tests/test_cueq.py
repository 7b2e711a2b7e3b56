"""cuequivariance for MACE: the same forces by other code, and a network that does not know of it."""

from importlib.util import find_spec

import pytest
import tiny
import torch
from ase import units
from ase.io import write
from helpers import ENERGIES, METHANOL, WATER, schnet

from stabie_ase.dynamics import Langevin, PotentialForces, initial_state, simulate
from stabie_ase.dynamics.compilation import NotCompiled, compile_where_wanted, make_ready
from stabie_ase.potentials.checkpoint import load_potential, save_potential
from stabie_ase.potentials.evaluators import Plain
from stabie_ase.potentials.mace import MACEPotential
from stabie_ase.potentials.mace import kernels as cueq
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

FRAMES = [METHANOL, WATER, METHANOL]
installed = pytest.mark.skipif(find_spec("cuequivariance_torch") is None, reason="needs cuequivariance-torch")


def mace(correlation=2, dtype=torch.float64):
    torch.manual_seed(0)
    settings = {"hidden_irreps": "4x0e + 4x1o", "radial_mlp": (8,), "correlation": correlation}
    return MACEPotential.build(ENERGIES, 3.0, dtype=dtype, **settings)


def computed(potential, images=FRAMES):
    batch = AtomsBatch.from_atoms(images)
    with potential.frozen():
        return potential.compute(batch, neighbor_list(batch, potential.cutoff))


def agree(a, b):
    assert torch.allclose(a.energies, b.energies, rtol=0.0, atol=1e-9)
    assert torch.allclose(a.forces, b.forces, rtol=0.0, atol=1e-11)


@installed
@pytest.mark.parametrize("reduced", [True, False], ids=["reduced", "full"])
@pytest.mark.parametrize("correlation", [2, 3])
def test_same_forces_with_the_same_parameters(monkeypatch, reduced, correlation):
    from mace.modules import wrapper_ops

    with monkeypatch.context() as elsewhere:  # a model made without cuequivariance has another basis of couplings
        if not reduced:
            elsewhere.setattr(wrapper_ops, "CUET_AVAILABLE", False)
        potential = mace(correlation)
    plain = computed(potential), computed(potential, [WATER])
    potential.use_kernels()
    assert potential.evaluator.config["use_reduced_cg"] is reduced or correlation == 2
    agree(computed(potential), plain[0])
    agree(computed(potential, [WATER]), plain[1])
    with torch.no_grad():
        for p in potential.parameters():
            p.mul_(1.1)
    followed = computed(potential)
    potential.evaluator = Plain()
    agree(followed, computed(potential))
    assert float((followed.forces - plain[0].forces).abs().max()) > 1e-3


@installed
def test_dynamics_run_on_them_and_training_does_not(monkeypatch):
    potential = mace()
    potential.use_kernels()
    calls = []
    evaluate = cueq.Kernels.__call__
    monkeypatch.setattr(cueq.Kernels, "__call__", lambda self, *given: calls.append(1) or evaluate(self, *given))
    batch = AtomsBatch.from_atoms(FRAMES)
    potential(batch, neighbor_list(batch, potential.cutoff)).sum().backward()
    assert not calls and all(p.grad is not None for p in potential.parameters() if p.requires_grad)
    state = initial_state(batch, PotentialForces(potential), 300.0)
    before = len(calls)
    simulate(state, Langevin(0.5 * units.fs, 0.01 / units.fs), PotentialForces(potential), 10)
    assert len(calls) == before + 10


@installed
def test_stress_is_the_same():
    potential, crystal = mace(), WATER.copy()
    crystal.set_cell([5.0, 5.5, 6.0])
    crystal.pbc = True
    batch = AtomsBatch.from_atoms([crystal, crystal])

    def stress():
        with potential.frozen():
            return potential.compute(batch, neighbor_list(batch, potential.cutoff), stress=True).stress

    expected = stress()
    potential.use_kernels()
    assert torch.allclose(stress(), expected, rtol=0.0, atol=1e-12) and float(expected.abs().max()) > 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("cuequivariance_ops_torch") is None, reason="needs its kernels and CUDA")
def test_kernels_on_a_gpu():
    potential = mace(dtype=torch.float32).to("cuda")
    batch = AtomsBatch.from_atoms(FRAMES, "cuda")
    neighbors = neighbor_list(batch, potential.cutoff)
    with potential.frozen():
        expected = potential.compute(batch, neighbors)
    potential.use_kernels()
    with potential.frozen():
        found = potential.compute(batch, neighbors)
    assert torch.allclose(found.forces, expected.forces, rtol=0.0, atol=1e-4)


@installed
def test_what_is_saved_does_not_know_of_them(tmp_path):
    potential = mace()
    save_potential(potential, tmp_path / "plain.model")
    potential.use_kernels()
    save_potential(potential, tmp_path / "after.model")
    plain, after = (torch.load(tmp_path / f"{name}.model", weights_only=False) for name in ("plain", "after"))
    assert plain.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(x, after.state_dict()[name]) for name, x in plain.state_dict().items())
    agree(computed(load_potential(tmp_path / "after.model")), computed(potential))


@installed
def test_other_forces_are_not_taken(monkeypatch):
    evaluate = cueq.Kernels.__call__
    monkeypatch.setattr(cueq.Kernels, "__call__", lambda self, *given: 1.01 * evaluate(self, *given))
    potential = mace()
    with pytest.raises(NotCompiled, match="has no kernels for this MACE, or gives other forces"):
        make_ready(potential, FRAMES, 3, kernels=True)
    assert not potential.is_compiled


@installed
def test_in_a_run_that_is_taken_up_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_potential(mace(), "mace.model")
    write("start.xyz", METHANOL)
    given = ("--start", "start.xyz", "--replicas", 2, "--temperature", 300, "--output", "run", "--compile", "kernels")
    assert tiny.run("md", "mace.model", *given, "--time", 0.005).exit_code == 0
    used = []
    monkeypatch.setattr(MACEPotential, "use_kernels", lambda self: used.append(self))
    assert tiny.run("md", "--resume", "run", "--time", 0.01).exit_code == 0
    assert len(used) == 1


def test_where_they_are_not_installed(monkeypatch):
    monkeypatch.setattr(cueq, "PACKAGES", {"cpu": ("no_such_package",)})
    with pytest.raises(NotCompiled, match="^cuequivariance is not installed: pip install 'stabie_ase"):
        compile_where_wanted("kernels", mace(), FRAMES, 3)


def test_a_family_without():
    with pytest.raises(NotCompiled, match="^there are no kernels for the schnet potential$"):
        compile_where_wanted("kernels", schnet(), FRAMES, 3)


def test_where_they_do_not_load(monkeypatch, tmp_path):
    """Kernels of another version of CUDA: cuequivariance would go on without them, and MACE fail with it."""
    (tmp_path / "broken_kernels.py").write_text('raise ImportError("libnvrtc.so: cannot open shared object file")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cueq, "PACKAGES", {"cpu": ("broken_kernels",)})
    with pytest.raises(NotCompiled, match="^broken_kernels is installed but does not load \\(libnvrtc.so: cannot open"):
        compile_where_wanted("kernels", mace(), FRAMES, 3)
