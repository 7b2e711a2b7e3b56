"""Compiled networks: the same numbers, the same parameters, and the plain network wherever compilation does not serve."""

import os
import shutil
import sys

import pytest
import tiny
import torch
from ase import units
from helpers import ENERGIES, METHANOL, WATER, schnet
from torch import nn

from stabie_ase.dynamics import Langevin, PotentialForces, compilation, initial_state, simulate
from stabie_ase.dynamics.compilation import NotCompiled, Trial, decide, make_ready, probe
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import load_potential
from stabie_ase.potentials.evaluators import Plain
from stabie_ase.runs.finetune import Finetuning, Inputs
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.training.labels import LabelledFrames, QMLoss

compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
FRAMES = [METHANOL, WATER, METHANOL, METHANOL]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What torch has compiled for one potential is not to be mistaken for the code of another."""
    torch._dynamo.reset()


def computed(potential, atoms):
    batch = AtomsBatch.from_atoms(atoms)
    with potential.frozen():
        return potential.compute(batch, neighbor_list(batch, potential.cutoff))


def agree(a, b):
    assert torch.allclose(a.energies, b.energies, rtol=0.0, atol=1e-9)
    assert torch.allclose(a.forces, b.forces, rtol=0.0, atol=1e-10)


def families():
    from stabie_ase.potentials.mace import MACEPotential

    yield schnet
    yield lambda: MACEPotential.build(ENERGIES, 3.0, hidden_irreps="4x0e + 4x1o", radial_mlp=(8,), dtype=torch.float64)


@compiler
@pytest.mark.parametrize("family", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["schnet", "mace"])
def test_same_forces_with_the_same_parameters(family):
    potential = list(families())[family]()
    plain = [computed(potential, images) for images in (FRAMES, FRAMES[:3])]
    make_ready(potential, FRAMES, len(FRAMES))
    assert potential.is_compiled
    for images, expected in zip((FRAMES, FRAMES[:3]), plain):  # one code for batches of any size
        found = computed(potential, images)
        agree(found, expected)
    with torch.no_grad():
        for p in potential.parameters():
            p.mul_(1.1)
    followed = computed(potential, FRAMES)
    potential.evaluator = Plain()
    expected = computed(potential, FRAMES)
    agree(followed, expected)
    assert float((expected.energies - plain[0].energies).abs().max()) > 1e-4


class Counted:
    """A compiled network that counts its calls."""

    def __init__(self, potential):
        self.network, self.calls = potential.compilable(), 0

    def __call__(self, inputs):
        self.calls += 1
        return self.network(inputs)


@pytest.fixture
def counted(monkeypatch):
    """A SchNet `compiled` by something that only counts."""
    potential = schnet()
    counter = Counted(potential)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: counter)
    potential.compile_network()
    return potential, counter


def test_only_forces_of_frozen_batches_are_compiled(counted):
    potential, counter = counted
    computed(potential, FRAMES)
    assert counter.calls == 1
    batch = AtomsBatch.from_atoms(FRAMES)
    neighbors = neighbor_list(batch, potential.cutoff)
    potential.compute(batch, neighbors)  # parameters ask for gradients
    potential(batch, neighbors).sum().backward()
    labelled = LabelledFrames(batch, torch.zeros(len(FRAMES)).double(), torch.zeros_like(batch.positions))
    QMLoss()(potential, labelled).backward()
    with torch.no_grad():
        potential.energies(batch, neighbors)
    far = METHANOL.copy()
    far.positions *= 100.0
    computed(potential, [far, far])  # no pair
    computed(potential, [far, WATER[:2]])  # a single pair
    assert counter.calls == 1
    computed(potential, METHANOL)  # whose inputs are of the same kind
    assert counter.calls == 2


class PerSystem(Potential):
    """Energies of systems, of inputs that tell how many there are; it keeps count of them."""

    family, cutoff, evaluates_atoms = "per system", 3.0, False

    def __init__(self):
        super().__init__()
        self.k, self.plain = nn.Parameter(torch.ones((), dtype=torch.float64)), []

    def inputs(self, batch, neighbors):
        sizes = batch.counts
        return {"vectors": neighbors.vectors(batch), "system": batch.system[neighbors.pairs[0]], "sizes": sizes}

    def evaluate(self, inputs):
        self.plain.append(len(inputs["sizes"]))
        return self._sum(inputs)

    def compilable(self):
        return self._sum

    def _sum(self, inputs):
        zeros = inputs["vectors"].new_zeros(len(inputs["sizes"]))
        return self.k * zeros.index_add(0, inputs["system"], inputs["vectors"].square().sum(dim=1))


@pytest.mark.parametrize("first, other", [(FRAMES, WATER), (WATER, FRAMES)], ids=["several", "one"])
def test_code_for_several_systems_is_not_used_for_one_nor_the_other_way_round(monkeypatch, first, other):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    potential = PerSystem()
    potential.compile_network()
    computed(potential, first), computed(potential, other), computed(potential, first)
    assert potential.plain == [1 if other is WATER else len(other)]


def test_dynamics_run_on_the_compiled_network(counted):
    potential, counter = counted
    state = initial_state(AtomsBatch.from_atoms(FRAMES), PotentialForces(potential), 300.0)
    before = counter.calls
    simulate(state, Langevin(0.5 * units.fs, 0.01 / units.fs), PotentialForces(potential), 10)
    assert counter.calls == before + 10


def test_a_choice_that_needs_no_trial(monkeypatch):
    monkeypatch.setattr(compilation, "probe", None)
    assert decide("on", schnet(), FRAMES, 4) == "on" and decide("off", schnet(), FRAMES, 4) == "off"


def test_it_has_to_pay():
    assert Trial(plain=1.0, compiled=0.5, ready=60.0).pays(seconds=121.0)
    assert not Trial(plain=1.0, compiled=0.5, ready=60.0).pays(seconds=119.0)
    assert not Trial(plain=1.0, compiled=0.95, ready=0.0).pays(seconds=1e9)


@pytest.mark.parametrize("steps, wanted", [(1e6, "on"), (100, "off")])
def test_auto_follows_the_trial(monkeypatch, steps, wanted):
    monkeypatch.setattr(compilation, "probe", lambda *_: Trial(plain=0.02, compiled=0.01, ready=30.0))
    said = []
    assert decide("auto", schnet(), FRAMES, 4, steps=steps, say=said.append) == wanted
    assert f"Compilation: {wanted}; 10 ms a step instead of 20, ready after 30 s" in said


@compiler
def test_a_trial_in_a_process_of_its_own():
    trial = probe(load_potential(tiny.model_path()), tiny.frames(4), 4)
    assert 0 < trial.compiled < 10 and 0 < trial.plain < 10 and trial.ready > 0


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    potential, said = load_potential(tiny.model_path()), []
    assert decide("auto", potential, tiny.frames(4), 4, say=said.append) == "off"
    assert len(said) == 2 and "Compilation: off; the schnet network cannot be compiled here" in said[1]


def test_a_compiler_that_takes_its_process_down(monkeypatch, tmp_path):
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nkill -ABRT $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with pytest.raises(NotCompiled, match="its trial ended with -6"):
        probe(load_potential(tiny.model_path()), tiny.frames(4), 4)


def test_other_forces_are_not_taken(monkeypatch):
    potential = schnet()

    def broken(function, dynamic):
        return lambda inputs: 1.01 * function(inputs)

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(NotCompiled, match="gives other forces"):
        compilation.try_out(potential, FRAMES, 4)


class OwnGraph(Potential):
    """Overrides the energies."""

    family, cutoff = "own graph", 3.0

    def energies(self, batch, neighbors):
        return batch.sum_over_atoms(batch.positions.square().sum(dim=1))


def test_a_family_that_has_nothing_to_compile():
    with pytest.raises(NotCompiled, match="^the own graph potential cannot be compiled$"):
        make_ready(OwnGraph(), FRAMES, 4)


def test_what_cannot_be_compiled_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: _fails)
    run = tmp_path / "run"
    result = tiny.run("finetune", tiny.model_path(), "--ref", tiny.reference_path(), "--output", run, "--compile", "on")
    assert result.exit_code == 1 and "Error: the schnet network cannot be compiled here: ValueError: no" in result.stderr
    result = tiny.run("md", tiny.model_path(), "--start", tiny.reference_path(), "--output", run, "--compile", "on")
    assert result.exit_code == 1 and "Error: the schnet network cannot be compiled here: ValueError: no" in result.stderr
    assert not run.exists()


def _fails(*inputs):
    raise ValueError("no")


@compiler
def test_resumed_in_the_same_bits(monkeypatch, tmp_path):
    inputs = Inputs(str(tiny.model_path()), str(tiny.reference_path()), compilation="on")
    config = tiny.config(max_cycles=1)
    whole = Finetuning.begin(tmp_path / "whole", inputs, config)
    whole.train()
    assert whole.training.potential.is_compiled
    parts = Finetuning.begin(tmp_path / "parts", inputs, config)
    while not parts.training.finished:
        record, unstable = parts.training.step()
        parts.directory.append(record, unstable)
        parts.directory.save(parts.training.state())
        parts = Finetuning.resume(tmp_path / "parts")
        assert parts.inputs.compilation == "on" and parts.training.potential.is_compiled
    a, b = whole.training._weights(), parts.training._weights()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_a_trial_said_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("stabie_ase.dynamics.compilation.decide", lambda *_, **__: "off")
    inputs = Inputs(str(tiny.model_path()), str(tiny.reference_path()), compilation="auto")
    assert Finetuning.begin(tmp_path / "run", inputs, tiny.config()).inputs.compilation == "off"
    monkeypatch.undo()
    assert Finetuning.resume(tmp_path / "run").inputs.compilation == "off"
