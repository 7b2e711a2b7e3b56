"""The exported suites: our own classes pass them, and broken ones are told what is wrong."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from helpers import METHANOL, WATER, crystal, mace, schnet

from stabie_ase.dynamics import (
    Langevin,
    NoseHooverChain,
    PotentialForces,
    StochasticCellRescaling,
    StochasticVelocityRescaling,
    VelocityVerlet,
    initial_state,
)
from stabie_ase.observables import Axis, BondLengths, DistanceDistribution, Observable, RadialDistribution
from stabie_ase.potentials.analytic import LennardJones, Morse
from stabie_ase.stability import (
    AngleDeviation,
    BondLengthDeviation,
    Contacts,
    EnergyRange,
    IntermolecularDistance,
    KineticTemperature,
    Verdict,
)
from stabie_ase.stability.criteria.base import OneFrame
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology
from stabie_ase.system.spec import parse
from stabie_ase.testing import check_criterion, check_integrator, check_observable, check_potential


def rattled(atoms, n=3, width=0.05):
    rng, frames = np.random.default_rng(1), []
    for _ in range(n):
        frames.append(atoms.copy())
        frames[-1].positions += rng.normal(scale=width, size=atoms.positions.shape)
    return frames


# -- potentials


@pytest.mark.parametrize("family", [schnet, mace])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_our_families(family, dtype, tmp_path):
    check_potential(family(dtype=dtype), [WATER, METHANOL, crystal(5)], folder=tmp_path)


def test_analytic_potentials(tmp_path):
    argon = rattled(bulk("Ar", "fcc", a=5.3, cubic=True).repeat(2), 2, 0.1)
    check_potential(LennardJones(0.0103, 3.4, 5.0), argon, folder=tmp_path)
    check_potential(Morse(depth=9.8, a=2.7, r0=1.1), rattled(molecule("N2")))


class Leaning(LennardJones):
    """Feels where it is."""

    def energies(self, batch, neighbors):
        return super().energies(batch, neighbors) + batch.sum_over_atoms(batch.positions[:, 0])


class Numbered(LennardJones):
    """Its first atom is worth more than the others."""

    def energies(self, batch, neighbors):
        first = (batch.index_in_system == 0) * batch.positions.norm(dim=1)
        near = neighbors.vectors(batch).norm(dim=1)
        weight = 1.0 / (1.0 + near)
        return super().energies(batch, neighbors) + batch.sum_over_atoms(
            torch.zeros_like(first).index_add(0, neighbors.pairs[0], weight * (near < self.cutoff)) * (batch.index_in_system == 0)
        )


class Crowd(LennardJones):
    """Systems of a batch feel each other."""

    def energies(self, batch, neighbors):
        return super().energies(batch, neighbors) + batch.n_systems


class Longsighted(LennardJones):
    """Counts all pairs it is given."""

    def energies(self, batch, neighbors):
        r = neighbors.vectors(batch).norm(dim=1)
        pair = torch.zeros(batch.n_atoms, dtype=r.dtype).index_add(0, neighbors.pairs[0], torch.exp(-r / 3.0))
        return batch.sum_over_atoms(pair)


class Detached(LennardJones):
    """Forces of half the energy only."""

    def energies(self, batch, neighbors):
        return super().energies(batch, neighbors) + super().energies(batch, neighbors).detach()


class Remembering(LennardJones):
    """Uses something that inputs have left behind."""

    def inputs(self, batch, neighbors):
        inputs = super().inputs(batch, neighbors)
        self.distances = inputs["distances"]
        return inputs

    def evaluate(self, inputs):
        return super().evaluate(inputs | {"distances": self.distances})


class Branching(LennardJones):
    """Leaves out pairs by a mask."""

    def evaluate(self, inputs):
        near = inputs["distances"] < self.cutoff
        return super().evaluate(inputs | {"distances": inputs["distances"][near], "pairs": inputs["pairs"][:, near]})


class Plainly(LennardJones):
    """Inputs with a number among them."""

    def inputs(self, batch, neighbors):
        return super().inputs(batch, neighbors) | {"n": batch.n_atoms}


class PerSystem(Morse):
    """Energies of whole systems."""

    evaluates_atoms = False

    def inputs(self, batch, neighbors):
        return super().inputs(batch, neighbors) | {"system": batch.system, "systems": batch.counts}

    def evaluate(self, inputs):
        atomic = super().evaluate(inputs)
        return atomic.new_zeros(len(inputs["systems"])).index_add(0, inputs["system"], atomic)


@pytest.mark.parametrize(
    "broken, words",
    [
        (Branching, "shapes in evaluate depend on values: indexing by a mask"),
        (Plainly, "inputs hold what is no tensor: n"),
        (Leaning, "energies change with a translation"),
        (Numbered, "energies change with the order of the atoms"),
        (Crowd, "depends on the others in its batch"),
        (Longsighted, "pairs beyond the cutoff contribute"),
        (Detached, "forces are not the negative gradient"),
    ],
)
def test_potentials_that_are_wrong(broken, words):
    frames = rattled(Atoms("Ar6", [[0, 0, 0], [3.8, 0, 0], [0, 3.8, 0], [0, 0, 3.8], [3.8, 3.8, 0], [6.5, 3.8, 3.0]]), 2, 0.2)
    with pytest.raises(AssertionError, match=words):
        check_potential(broken(0.0103, 3.4, 5.0), frames)


def test_energies_of_something_else_than_the_inputs():
    with pytest.raises(AssertionError, match="evaluate depends on more than its inputs"):
        check_potential(Remembering(0.0103, 3.4, 100.0), rattled(molecule("CH3CH2OH")))


def test_a_potential_that_evaluates_systems():
    check_potential(PerSystem(), rattled(molecule("N2")))
    assert not PerSystem().gives_atomic_energies


# -- observables


def test_our_observables():
    ethanol, argon = rattled(molecule("CH3CH2OH")), rattled(bulk("Ar", "fcc", a=5.3, cubic=True).repeat(2), 3, 0.2)
    check_observable(DistanceDistribution.from_reference(ethanol), ethanol)
    check_observable(BondLengths(Topology.from_frames(ethanol)), ethanol)
    check_observable(RadialDistribution((18, 18), 5.0), argon)


class Place(Observable):
    name, label, axis = "place", "x (Å)", Axis.of_names("", ["x"])

    def values(self, batch):
        return batch.sum_over_atoms(batch.positions[:, :1]) / batch.counts[:, None]


class Short(Observable):
    name, label, axis = "short", "", Axis.of_names("", ["a", "b"])

    def values(self, batch):
        return batch.counts[:, None].double()


class Relative(Observable):
    name, label, axis = "relative", "", Axis.of_names("", ["a"])

    def values(self, batch):
        r = batch.sum_over_atoms(batch.positions.square().sum(dim=1))[:, None]
        return r - r.mean()


@pytest.mark.parametrize(
    "broken, words", [(Place(), "moved and turned"), (Short(), r"shape \(3, 1\), expected \(3, 2\)"), (Relative(), "with the other frames")]
)
def test_observables_that_are_wrong(broken, words):
    with pytest.raises(AssertionError, match=words):
        check_observable(broken, rattled(molecule("CH3CH2OH"), 3, 0.2))


# -- criteria


def test_our_criteria():
    sound = rattled(molecule("CH3CH2OH"), 4, 0.02)
    torn, close = sound[0].copy(), sound[0].copy()
    torn.positions[3:] *= 1.6
    close.positions[8] = close.positions[3] + [0.4, 0.0, 0.0]
    potential = Morse(depth=0.1, a=1.0, r0=1.5)
    check_criterion(BondLengthDeviation.from_reference(sound, 0.25), sound, [torn], potential)
    check_criterion(Contacts.from_reference(sound, 0.25), sound, [close], potential)
    check_criterion(AngleDeviation.from_spec(*parse("angles:20"), Setting(sound, 300.0)), sound, [close], potential)
    waters = [molecule("H2O") + Atoms(molecule("H2O").symbols, molecule("H2O").positions + [d, 0, 0]) for d in (4.0, 4.1, 1.0)]
    apart = IntermolecularDistance(Topology.from_frames(waters[:2]).molecule, 1.5)
    check_criterion(apart, waters[:2], waters[2:], potential)
    check_criterion(KineticTemperature.for_atoms(9), sound, [], potential)
    check_criterion(EnergyRange.from_reference(sound, 300.0), sound, [], potential)


class Blind(OneFrame):
    name, unit = "blind", "Å"

    def judge(self, state):
        nothing = torch.zeros_like(state.potential_energy)
        return Verdict(nothing, nothing, state.step.new_zeros((state.n_systems, 0)))

    def describe(self):
        return "nothing"


class Ranked(Blind):
    def judge(self, state):
        order = torch.arange(state.n_systems).double() / 10
        return Verdict(order, order, state.step.new_zeros((state.n_systems, 0)))


@pytest.mark.parametrize(
    "broken, frames, words", [(Blind(), 1, r"broken frames are called stable: \[0\]"), (Ranked(), 0, "depends on the others")]
)
def test_criteria_that_are_wrong(broken, frames, words):
    sound = rattled(molecule("H2O"), 3, 0.02)
    with pytest.raises(AssertionError, match=words):
        check_criterion(broken, sound, sound[:frames], Morse(depth=0.1, a=1.0, r0=1.0))


# -- integrators


FS = units.fs
INTEGRATORS = {
    "verlet": VelocityVerlet(0.5 * FS),
    "langevin": Langevin(0.5 * FS, 0.01 / FS, fix_com=True),
    "nose-hoover": NoseHooverChain(0.5 * FS, 20 * FS),
    "rescaling": StochasticVelocityRescaling(0.5 * FS, 50 * FS),
    "pressure": StochasticCellRescaling(2.0 * FS, 0.01 / FS, relaxation_time=100 * FS),
}


@pytest.mark.parametrize("name", INTEGRATORS)
def test_our_integrators(name):
    frames = rattled(bulk("Ar", "fcc", a=5.3, cubic=True).repeat(2), 3, 0.05)
    integrator = INTEGRATORS[name]
    forces = PotentialForces.driving(LennardJones(0.0103, 3.4, 5.0), integrator)
    state = initial_state(AtomsBatch.from_atoms(frames), forces, 60.0, fix_com=integrator.fix_com)
    check_integrator(integrator, state, forces)


class Careless(VelocityVerlet):
    """Counts no steps."""

    def step(self, state, force_function):
        return super().step(state, force_function).replace(step=state.step)


def test_integrators_that_are_wrong():
    forces = PotentialForces(Morse(depth=9.8, a=2.7, r0=1.1))
    state = initial_state(AtomsBatch.from_atoms(rattled(molecule("N2"), 2)), forces, 300.0)
    with pytest.raises(AssertionError, match=r"\[0, 0\] steps are counted, expected 20"):
        check_integrator(Careless(0.5 * FS), state, forces)
