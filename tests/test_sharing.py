"""One potential in several hands: threads, copies, pickles and blocks within blocks."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import tiny
import torch
from helpers import ENERGIES, METHANOL, WATER, crystal, predict, schnet
from torch import nn

from stabie_ase import StABIECalculator
from stabie_ase.dynamics import PotentialForces, VelocityVerlet, graphs, initial_state, simulate
from stabie_ase.potentials.analytic import Harmonic
from stabie_ase.potentials.checkpoint import load_potential, save_potential
from stabie_ase.potentials.mace import MACEPotential
from stabie_ase.potentials.module import ModulePotential
from stabie_ase.potentials.turns import alone, together
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

# e3nn scripts its modules when they are built.
pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")


class Forgetful(nn.Module):
    """Keeps its input in itself while it works, as modules may that expect one caller."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z, pos, batch):
        self.input = pos
        time.sleep(1e-4)
        return (self.scale * self.input.square().sum())[None]


def mace():
    torch.manual_seed(0)
    return MACEPotential.build(ENERGIES, 3.0, hidden_irreps="4x0e + 4x1o", radial_mlp=(8,), cutoff=3.0, dtype=torch.float64)


def forgetful():
    return ModulePotential(Forgetful(), 3.0)


each_family = pytest.mark.parametrize("family", [schnet, mace, forgetful])


@pytest.fixture
def often():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(function, arguments):
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))


@each_family
@pytest.mark.parametrize("share", ["potential", "network"])
def test_calculators_in_threads_give_what_each_gives_alone(family, share, often):
    """Molecules of the same size, in which mistaken inputs would go unnoticed, and of another."""
    potential = family()
    network = potential.module if family is forgetful else potential.network
    molecules = [METHANOL, METHANOL[[1, 0, 2, 3, 4, 5]], METHANOL[[2, 1, 0, 3, 4, 5]], WATER]

    def energies(atoms, repeats=80):
        found = []
        for _ in range(repeats):
            atoms = atoms.copy()  # other arrays for every call
            atoms.calc = StABIECalculator(potential if share == "potential" else network, cutoff=3.0)
            found.append((atoms.get_potential_energy(), *atoms.get_forces()[0]))
        return np.array(found)

    alone = [energies(atoms, 1) for atoms in molecules]
    for found, expected in zip(in_threads(energies, molecules), alone):
        assert np.allclose(found, expected, rtol=1e-12, atol=1e-11)


def test_files_are_opened_in_threads_while_others_compute(tmp_path, often):
    """MACE is built by setting torch's default precision and by tracing, which changes every module's call meanwhile."""
    files, written = [tmp_path / name for name in ("single.model", "double.model", "schnet.pt")], sys.stdout
    double = mace()
    potentials = [copy.deepcopy(double).float(), double, schnet()]
    for potential, file in zip(potentials, files):
        save_potential(potential, file)
    expected = [predict(potential, METHANOL).forces for potential in potentials]
    unfinished = files[:2]

    def opened(file):
        potential = load_potential(file)
        found = predict(potential, METHANOL).forces
        if file in unfinished:
            unfinished.remove(file)
        while unfinished:
            assert torch.equal(predict(potential, METHANOL).forces, found)
        return found

    for found, wanted in zip(in_threads(opened, files), expected):
        assert torch.equal(found, wanted)
    assert torch.get_default_dtype() == torch.float32 and sys.stdout is written


OPENING = """
import copy, pickle, sys, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from stabie_ase.potentials.checkpoint import load_potential

sys.setswitchinterval(1e-6)
pickles, start = [Path(f"{name}.pickle").read_bytes() for name in ("single", "double")], Barrier(4)

def work(k):
    start.wait()
    for _ in range(2):
        potential = pickle.loads(pickles[k % 2]) if k < 2 else load_potential(("single.model", "double.model")[k % 2])
        potential = pickle.loads(pickle.dumps(copy.deepcopy(potential)))
    return str(potential.dtype)

with ThreadPoolExecutor(4) as pool:
    print(*pool.map(work, range(4)), torch.get_default_dtype())
"""


def test_threads_open_and_copy_maces_at_the_same_time(tmp_path):
    """Also as the first thing in a process: torch traces the networks, which changes every module's call, when e3nn opens them."""
    for name, potential in (("single", mace().float()), ("double", mace())):
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(potential))
        save_potential(potential, tmp_path / f"{name}.model")
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run([sys.executable, "-c", OPENING], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == 2 * ["torch.float32", "torch.float64"] + ["torch.float32"], done.stderr[-3000:]


def test_a_pickled_mace_is_the_same_and_one_object_in_what_holds_it():
    potential = mace().requires_grad_(False)
    twin, also = pickle.loads(pickle.dumps([potential, potential]))
    assert twin is also and not any(p.requires_grad for p in twin.parameters())
    assert torch.equal(predict(twin, METHANOL).forces, predict(potential, METHANOL).forces)
    copied = copy.deepcopy([potential, potential.network])
    assert copied[0].network is copied[1] and copied[1] is not potential.network


def test_one_is_alone_with_nobody_and_many_are_together():
    lone, inside, most = [], [], []

    def work(k):
        for turn in range(100):
            group, make = (lone, alone) if turn % 4 == k else (inside, together)
            with make():
                group.append(k)
                time.sleep(1e-4)
                assert lone == [k] * (group is lone) and (group is inside or not inside)
                most.append(len(inside))
                group.remove(k)

    in_threads(work, range(4))
    assert max(most) > 1


def test_turns_within_turns():
    """A potential may call others, or open them when it is first called; two that do so at once wait for nobody."""
    meet, inside, most = Barrier(2, timeout=10.0), [], []

    def work(_):
        with together(), together():
            meet.wait()
            with alone():
                inside.append(1)
                with alone(), together():
                    most.append(len(inside))
                inside.pop()

    in_threads(work, range(2))
    assert most == [1, 1]


@each_family
def test_a_call_that_comes_between_changes_nothing(family):
    """The worst moments: another thread's call right after this one has written something into the potential."""
    potential, interruptions = family(), []

    class Interrupted(type(potential)):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if interruptions:
                interruptions.pop()()

    expected = [predict(potential, atoms) for atoms in (METHANOL, WATER)]
    potential.__class__ = Interrupted
    for atoms, wanted in zip((METHANOL, WATER), expected):
        for other in (METHANOL[::-1], WATER[[1, 0, 2]]):
            interruptions[:] = 2 * [lambda other=other: predict(potential, other)]
            found = predict(potential, atoms)
            assert torch.allclose(found.energies, wanted.energies, rtol=1e-13)
            assert torch.allclose(found.forces, wanted.forces, atol=1e-11)


@each_family
def test_dynamics_in_threads_are_what_each_is_alone(family, often):
    potential = family()
    learning = [p.requires_grad for p in potential.parameters()]

    def end(atoms):
        state = initial_state(AtomsBatch.from_atoms(atoms), PotentialForces(potential), 300.0)
        for _ in range(5):
            state = simulate(state, VelocityVerlet(0.05), PotentialForces(potential), 2)
        return state.batch.positions

    starts = [METHANOL, WATER, METHANOL[::-1]]
    for found, expected in zip(in_threads(end, starts), [end(atoms) for atoms in starts]):
        assert torch.allclose(found, expected, rtol=0.0, atol=1e-10)
    assert [p.requires_grad for p in potential.parameters()] == learning


def test_parameters_stay_frozen_until_the_last_block_is_left():
    potential, other = Harmonic(), Harmonic()
    first, second = potential.frozen(), potential.frozen()
    first.__enter__(), second.__enter__()
    potential.k.requires_grad_(True)  # by somebody in between
    with potential.frozen(), other.frozen():
        assert not potential.k.requires_grad
    first.__exit__(None, None, None)
    assert not potential.k.requires_grad and other.k.requires_grad
    second.__exit__(None, None, None)
    assert potential.k.requires_grad


def test_compiled_code_is_called_by_one_thread_at_a_time(monkeypatch, often):
    """Torch's compiler works on the whole process: other calls fail meanwhile."""
    busy = []

    def compiled(function, dynamic):
        def call(*inputs):
            assert not busy
            busy.append(1)
            time.sleep(1e-4)
            busy.clear()
            return function(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    potential = schnet().requires_grad_(False)
    potential.compile_network()
    expected = predict(schnet(), METHANOL).forces
    for found in in_threads(lambda _: [predict(potential, METHANOL).forces for _ in range(20)], range(4)):
        assert all(torch.equal(x, expected) for x in found)


def test_recorded_blocks_are_for_one_thread():
    """Their memory would be written to by two."""
    graphs._graphed.cache_clear()
    potential, integrator = schnet(), VelocityVerlet(0.05)

    class OnGpu:
        device, is_compiled, bears_fixed_lists = torch.device("cuda"), True, True
        cutoff, compute, dtype = potential.cutoff, potential.compute, potential.dtype

    on_gpu = PotentialForces(OnGpu())
    here = graphs.blocks(on_gpu, integrator, 10)
    assert graphs.blocks(on_gpu, integrator, 10) is here
    assert in_threads(lambda _: graphs.blocks(on_gpu, integrator, 10), [0])[0] is not here


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])


@COPIES
@pytest.mark.parametrize("family", [schnet, mace])
def test_a_copy_is_plain_and_knows_only_its_own_parameters(family, copied, monkeypatch):
    potential = family()
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *inputs: function(*inputs))
    potential.compile_network()
    expected = predict(potential, [crystal(), WATER])
    with potential.frozen():
        compiled = predict(potential, [crystal(), WATER])
        twin = copied(potential)
    assert potential.is_compiled and not twin.is_compiled
    for found in (compiled, predict(twin, [crystal(), WATER])):
        assert torch.allclose(found.forces, expected.forces, atol=1e-11)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    twin.compile_network()
    with twin.frozen():
        changed = predict(twin, [crystal(), WATER])
    assert not torch.allclose(changed.forces, expected.forces, atol=1e-4)
    assert torch.equal(predict(potential, [crystal(), WATER]).forces, expected.forces)
    with twin.frozen():
        pass
    assert all(p.requires_grad for p in potential.parameters())


@COPIES
@pytest.mark.parametrize("family", [schnet, mace])
def test_a_calculator_of_a_compiled_potential_is_copied(family, copied, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *inputs: function(*inputs))
    potential = family().requires_grad_(False)
    potential.compile_network()
    atoms = crystal()
    atoms.calc = StABIECalculator(potential)
    stress = atoms.get_stress()
    twin = copied(atoms)
    assert twin.calc.results["energy"] == atoms.get_potential_energy()
    for x in (atoms, twin):
        x.rattle(0.05, seed=2)
    assert np.allclose(twin.get_forces(), atoms.get_forces(), atol=1e-11)
    assert np.allclose(twin.get_stress(), atoms.get_stress(), atol=1e-11) and not np.allclose(twin.get_stress(), stress)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_torch_has_compiled_is_left_behind():
    torch._dynamo.reset()
    potential = schnet().requires_grad_(False)
    potential.compile_network()
    batch = AtomsBatch.from_atoms([METHANOL, WATER])
    neighbors = neighbor_list(batch, potential.cutoff)
    expected = potential.compute(batch, neighbors)
    twin = pickle.loads(pickle.dumps(potential))
    assert torch.allclose(twin.compute(batch, neighbors).forces, expected.forces, atol=1e-10)
