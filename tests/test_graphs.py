"""Blocks of steps on memory of their own: the same paths as step by step, and nothing in them that a CUDA graph cannot hold.

Without a GPU a block is not recorded but run again; everything else is as it is there.
"""

import logging
import sys

import numpy as np
import pytest
import torch
from ase import Atoms, units
from helpers import METHANOL, WATER, crystal, mace, schnet
from torch._subclasses.fake_tensor import FakeTensorMode

from stabie_ase.dynamics import (
    Langevin,
    NoseHooverChain,
    PotentialForces,
    StochasticCellRescaling,
    StochasticVelocityRescaling,
    TemperatureRamp,
    VelocityVerlet,
    initial_state,
    simulate,
)
from stabie_ase.dynamics.graphs import WARMUP_BLOCKS, FixedForces, GraphedBlocks, blocks
from stabie_ase.dynamics.steps import advance
from stabie_ase.potentials.analytic import LennardJones
from stabie_ase.stability import watched
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

FS = units.fs
LANGEVIN = Langevin(0.5 * FS, 0.01 / FS)
INTEGRATORS = [
    VelocityVerlet(0.5 * FS),
    LANGEVIN,
    NoseHooverChain(0.5 * FS, 20 * FS),
    StochasticVelocityRescaling(0.5 * FS, 20 * FS),
    TemperatureRamp(LANGEVIN, 300.0, 600.0, 40),
]
each_case = pytest.mark.parametrize(
    "family, integrator",
    [*((schnet, integrator) for integrator in INTEGRATORS), (mace, LANGEVIN)],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)


def started(potential, images=(METHANOL, WATER, METHANOL), temperature_K=500.0):
    potential.requires_grad_(False)
    return initial_state(AtomsBatch.from_atoms(images), PotentialForces(potential), temperature_K)


def moving_crystals():
    """Two cells of water and hydrogen, so hot and sparse that a list does not last long."""
    rng = np.random.default_rng(4)
    images = [crystal(5), Atoms("OH2HH", rng.uniform(0, 6, (5, 3)), cell=[6.0, 6.5, 7.0], pbc=True)]
    return started(schnet(), images, temperature_K=20000.0)


class Recorded:
    """Stands in for a CUDA graph: counts what is recorded and replayed."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, function):
        self.recorded += 1
        return lambda: self._replay(function)

    def _replay(self, function):
        self.replayed += 1
        function()


def agree(a, b, tolerance=1e-9):
    for name, x in a.tensors().items():
        assert torch.allclose(x.double(), b.tensors()[name].double(), rtol=0.0, atol=tolerance), name


@each_case
def test_the_same_paths(family, integrator):
    potential = family()
    state, record = started(potential), Recorded()
    end = GraphedBlocks(potential, integrator, 10, record=record)(state, 47)
    assert (record.recorded, record.replayed) == (1, 4 - WARMUP_BLOCKS)
    agree(end, advance(state, integrator, PotentialForces(potential), 47))
    assert torch.equal(end.step, state.step + 47)


@each_case
def test_a_block_waits_for_nothing(family, integrator):
    """No number is brought from the device and no shape depends on one: fake tensors have none."""
    potential = family()
    taken = GraphedBlocks(potential, integrator, 3, record=Recorded())
    taken(started(potential), 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        taken._steps()


def test_a_list_that_does_not_last_is_renewed():
    """The list is as good as new in every step, and a graph serves longer than a list."""
    state, record = moving_crystals(), Recorded()
    potential = schnet().requires_grad_(False)
    taken, plain = GraphedBlocks(potential, LANGEVIN, 5, record=record), PotentialForces(potential)
    renewed = []
    renew = taken._renew_list
    taken._renew_list = lambda batch: (renewed.append(1), renew(batch))
    end = taken(state, 300)
    agree(end, advance(state, LANGEVIN, plain, 300), tolerance=1e-6)
    assert plain.neighbors.n_builds > 5 and len(renewed) > 5
    assert record.recorded < len(renewed) / 2, "recorded anew with every list"


def test_a_list_that_is_not_looked_at_gives_other_paths(monkeypatch):
    """The test above would see it."""
    monkeypatch.setattr(FixedForces, "held", lambda self: True)
    state, potential = moving_crystals(), schnet().requires_grad_(False)
    end = GraphedBlocks(potential, LANGEVIN, 5, record=Recorded())(state, 300)
    with pytest.raises(AssertionError):
        agree(end, advance(state, LANGEVIN, PotentialForces(potential), 300), tolerance=1e-6)


def test_atoms_that_no_list_can_follow():
    """One atom crosses the skin in a single step: such a block is taken step by step."""
    state = moving_crystals()
    potential = schnet().requires_grad_(False)
    state.momenta[0] = 40.0 * state.batch.masses[0]  # 4 Å a femtosecond
    taken = GraphedBlocks(potential, VelocityVerlet(0.5 * FS), 5, record=Recorded())
    agree(taken(state, 20), advance(state, VelocityVerlet(0.5 * FS), PotentialForces(potential), 20), tolerance=1e-6)


def test_other_replicas_are_recorded_anew_and_the_same_are_not():
    potential, record = schnet(), Recorded()
    state = started(potential)
    taken = GraphedBlocks(potential, LANGEVIN, 5, record=record)
    state = taken(state, 5 * (WARMUP_BLOCKS + 1))
    copied = state.select([0, 1, 2])  # the same atoms in other memory
    agree(taken(copied, 5), taken(state, 5), tolerance=0.0)
    assert record.recorded == 1
    fewer = taken(state.select([0, 2]), 5 * (WARMUP_BLOCKS + 1))
    assert record.recorded == 2
    agree(fewer, taken(state, 5 * (WARMUP_BLOCKS + 1)).select([0, 2]))


def test_a_replica_that_explodes_stops_and_harms_no_other():
    potential = schnet()
    state = started(potential)
    state.momenta[0] = torch.inf
    end = GraphedBlocks(potential, LANGEVIN, 5, record=Recorded())(state, 20)
    assert end.alive.tolist() == [False, True, True]
    alone = advance(state.select([1, 2]), LANGEVIN, PotentialForces(potential), 20)
    agree(end.select([1, 2]), alone)
    assert torch.isfinite(end.batch.positions).all()


def test_without_a_graph_it_goes_on(caplog):
    """Neither a device that cannot record nor one that has no memory for it stops the dynamics."""

    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might ...")

    potential = schnet()
    state = started(potential)
    with caplog.at_level(logging.WARNING):
        end = GraphedBlocks(potential, LANGEVIN, 5, record=fails)(state, 50)
    assert [r.getMessage() for r in caplog.records] == [
        "no CUDA graph could be made, going on without: operation not permitted when stream is capturing"
    ]
    agree(end, advance(state, LANGEVIN, PotentialForces(potential), 50))


def test_out_of_memory_falls_back(monkeypatch):
    potential = schnet()
    state, taken = started(potential), GraphedBlocks(potential, LANGEVIN, 5, record=Recorded())
    expected = advance(state, LANGEVIN, PotentialForces(potential), 20)

    def full(batch, neighbors):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(taken.fixed, "compute", full)
    agree(taken(state, 20), expected)


def test_what_does_not_fit_in_memory_goes_in_parts(monkeypatch):
    potential, record = schnet(), Recorded()
    state = started(potential)
    monkeypatch.setattr(PotentialForces, "at_once", lambda self, batch: 10.0)
    end = GraphedBlocks(potential, LANGEVIN, 5, record=record)(state, 20)
    assert record.recorded == 0
    agree(end, advance(state, LANGEVIN, PotentialForces(potential), 20))


class Elsewhere:
    """A potential as `blocks` would see it on a GPU."""

    device, dtype, cutoff = torch.device("cuda"), torch.float32, 4.0
    is_compiled = bears_fixed_lists = True

    def compute(self):
        raise NotImplementedError

    def __init__(self, **changes):
        self.__dict__.update(changes)


def test_where_there_are_graphs():
    barostat = StochasticCellRescaling(0.5 * FS, 0.01 / FS)
    assert isinstance(blocks(PotentialForces(Elsewhere()), LANGEVIN, 200), GraphedBlocks)
    assert blocks(PotentialForces(Elsewhere()), LANGEVIN, 200).size == 10 and blocks(PotentialForces(Elsewhere()), LANGEVIN, 4).size == 4
    same = PotentialForces(Elsewhere())
    assert blocks(same, LANGEVIN, 10) is blocks(same, Langevin(0.5 * FS, 0.01 / FS), 10)
    for potential, integrator in [
        (Elsewhere(is_compiled=False), LANGEVIN),
        (Elsewhere(bears_fixed_lists=False), LANGEVIN),
        (Elsewhere(device=torch.device("cpu")), LANGEVIN),
        (Elsewhere(), barostat),
    ]:
        assert not isinstance(blocks(PotentialForces(potential), integrator, 10), GraphedBlocks)
    assert not LennardJones().bears_fixed_lists


def test_simulations_in_a_row_share_a_graph(monkeypatch):
    record = Recorded()
    potential = schnet()
    state = started(potential)
    taken = GraphedBlocks(potential, LANGEVIN, 10, record=record)
    monkeypatch.setattr(sys.modules[simulate.__module__], "blocks", lambda *_: taken)
    expected = simulate(state, LANGEVIN, PotentialForces(potential), 60)
    end = state
    for _ in range(3):
        end, trajectory, failures = watched(end.select([0, 1, 2]), LANGEVIN, PotentialForces(potential), 20, sample_every=10)
        assert len(trajectory.steps) == 2 and not failures.failed.any()
    agree(end, expected, tolerance=0.0)
    assert record.recorded == 1


@pytest.mark.parametrize("family", [schnet, mace])
@pytest.mark.parametrize("images", [[METHANOL, WATER], [crystal(5), METHANOL]], ids=["molecules", "periodic"])
def test_padding_contributes_nothing(family, images):
    potential, batch = family(), AtomsBatch.from_atoms(images)
    neighbors = neighbor_list(batch, potential.cutoff + 1.0)
    padded = neighbors.padded(batch, neighbors.n_pairs // 2 + 13, 2.0 * potential.cutoff)
    assert padded.n_pairs == neighbors.n_pairs + 26 and padded.within(batch, 1.0) is padded
    expected, found = potential.compute(batch, neighbors), potential.compute(batch, padded)
    assert torch.allclose(found.energies, expected.energies, rtol=0.0, atol=1e-10)
    assert torch.allclose(found.forces, expected.forces, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("family", [schnet, mace])
def test_blocks_far_from_the_origin(family):
    """In single precision, where positions of 1e5 Å would be rounded by 0.01 Å: the same path as at the origin."""
    potential, images = family().float(), [METHANOL.copy(), WATER.copy()]
    ends = []
    for shift in (0.0, 1e5):
        for atoms in images:
            atoms.positions += shift
        end = GraphedBlocks(potential, VelocityVerlet(0.5 * FS), 5, record=Recorded())(started(potential, images), 20)
        ends.append(end.batch.positions - shift)
    assert torch.allclose(*ends, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_case
def test_recorded_on_a_gpu(family, integrator):
    potential = family().to("cuda").requires_grad_(False)
    batch = AtomsBatch.from_atoms([METHANOL, WATER, METHANOL], device="cuda")
    state = initial_state(batch, PotentialForces(potential), 500.0)
    end = GraphedBlocks(potential, integrator, 10)(state, 60)
    agree(end, advance(state, integrator, PotentialForces(potential), 60))
