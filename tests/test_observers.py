"""Observers of a simulation, force functions that are no potential, and criteria that remember."""

import numpy as np
import pytest
import torch
from ase import Atoms, units

from stabie_ase.dynamics import Attached, Langevin, PotentialForces, Recorder, VelocityVerlet, initial_state, simulate
from stabie_ase.potentials.analytic import Harmonic, Morse
from stabie_ase.potentials.base import Prediction
from stabie_ase.stability import BondLengthDeviation, Verdict, Watch, watched, with_memory
from stabie_ase.stability.criteria.base import OneFrame
from stabie_ase.structures.batch import AtomsBatch

T = 300.0
KT = units.kB * T


def wells(n_replicas, n_atoms=8):
    """Atoms that feel nothing but a well each."""
    return AtomsBatch.from_atoms([Atoms(f"Ar{n_atoms}", np.zeros((n_atoms, 3)))] * n_replicas)


class Bias:
    """A potential's forces and those of a spring of every atom to its origin."""

    def __init__(self, potential, k):
        self.forces, self.k = PotentialForces(potential), k

    def __call__(self, batch):
        energies, forces, _ = self.forces(batch)
        springs = 0.5 * self.k * batch.positions.square().sum(dim=1)
        return Prediction(energies + batch.sum_over_atoms(springs), forces - self.k * batch.positions, None)


class Committee:
    """The mean of several potentials."""

    def __init__(self, potentials):
        self.members = [PotentialForces(potential) for potential in potentials]

    def __call__(self, batch):
        energies, forces, _ = zip(*(member(batch) for member in self.members))
        return Prediction(sum(energies) / len(energies), sum(forces) / len(forces), None)


def test_a_bias_drives_the_dynamics():
    """⟨x²⟩ = kT/(k + k_bias) for every coordinate, within 4.5 standard errors over replicas."""
    forces = Bias(Harmonic(k=1.0), 2.0)
    integrator = Langevin(5.0 * units.fs, 0.02 / units.fs)
    state = initial_state(wells(200), forces, T, fix_com=False)
    state = simulate(state, integrator, forces, 400)
    recorder = Recorder(state, 400, every=100)
    simulate(state, integrator, forces, 400, [recorder])
    frames, _, replica = recorder.trajectory.frames()
    squares = frames.sum_over_atoms(frames.positions.square().mean(dim=1)) / 8
    own = torch.zeros(200, dtype=torch.float64).index_add(0, replica, squares) / 4
    error = float(own.std()) / 200**0.5
    assert error < 0.03 * KT / 3.0
    assert abs(float(own.mean()) - KT / 3.0) < 4.5 * error + 0.01 * KT / 3.0


def test_a_committee_drives_the_dynamics():
    """The mean of two wells is the well of the mean spring."""
    committee, mean = Committee([Harmonic(k=1.0), Harmonic(k=3.0)]), PotentialForces(Harmonic(k=2.0))
    integrator = Langevin(5.0 * units.fs, 0.02 / units.fs)
    ends = [simulate(initial_state(wells(3), forces, T, fix_com=False), integrator, forces, 50) for forces in (committee, mean)]
    torch.testing.assert_close(ends[0].batch.positions, ends[1].batch.positions)


class Spy:
    """Writes down what it is shown, and stops the first replica that is left at some step."""

    def __init__(self, every, stop_at=None):
        self.every, self.stop_at, self.seen = every, stop_at, []

    def look(self, steps_done, running, active):
        self.seen.append((steps_done, running.n_systems, active.tolist()))
        return torch.arange(len(active)) == 0 if steps_done == self.stop_at else None


def test_observers_are_called_at_their_intervals_and_at_the_end():
    forces, spies = PotentialForces(Harmonic(k=1.0)), [Spy(4), Spy(6, stop_at=6), Spy(100)]
    state = initial_state(wells(3), forces, T, fix_com=False)
    end = simulate(state, VelocityVerlet(0.1), forces, 15, spies)
    assert [step for step, *_ in spies[0].seen] == [4, 8, 12, 15]
    assert spies[1].seen == [(6, 3, [0, 1, 2]), (12, 2, [1, 2]), (15, 2, [1, 2])]
    assert [step for step, *_ in spies[2].seen] == [15]
    assert end.step.tolist() == [6, 15, 15]
    assert simulate(state, VelocityVerlet(0.1), forces, 0, spies) is not None and len(spies[0].seen) == 4


def test_an_attached_function_stops_nobody():
    forces, seen = PotentialForces(Harmonic(k=1.0)), []
    state = initial_state(wells(2), forces, T, fix_com=False)
    end = simulate(state, VelocityVerlet(0.1), forces, 10, [Attached(lambda *given: seen.append(given[0]), 5)])
    assert seen == [5, 10] and end.step.tolist() == [10, 10]


# -- criteria that remember


class Lasting:
    """Unstable once another criterion has been so for several looks in a row."""

    name, unit = "lasting", "looks"

    def __init__(self, criterion, n_looks):
        self.criterion, self.n_looks = criterion, n_looks

    def memory(self, batch):
        return {"lasting": torch.zeros(batch.n_systems, dtype=torch.int64)}

    def for_model(self, potential):
        return self

    def judge(self, state):
        unstable = self.criterion.judge(state).unstable
        looks = torch.where(unstable, state.extra["lasting"] + 1, 0)
        return Verdict(looks.double() / (self.n_looks - 0.5), looks.double(), looks.new_zeros((len(looks), 0)), {"lasting": looks})

    def describe(self):
        return f"{self.criterion.describe()}, {self.n_looks} times in a row"


def stretched(*amplitudes):
    """Diatomics whose bonds oscillate, without a heat bath; the bond is out of its limits for part of each period."""
    frames = [Atoms("N2", [[0, 0, 0], [1.1 + a, 0, 0]]) for a in amplitudes]
    forces = PotentialForces(Morse(depth=9.8, a=2.7, r0=1.1))
    state = initial_state(AtomsBatch.from_atoms(frames), forces, 1e-6)
    bond = BondLengthDeviation(torch.tensor([[0], [1]]), torch.tensor([1.1], dtype=torch.float64), tolerance=0.05)
    return state, forces, bond


def looks_in_a_row(state, forces, bond, n):
    """When the bond was out of its limits for so many looks in a row, counted frame by frame."""
    seen = []
    simulate(state, VelocityVerlet(0.05), forces, 200, [Attached(lambda k, now: seen.append(bond.judge(now).unstable), 2)])
    flags, steps = torch.stack(seen), []
    for replica in flags.T.tolist():
        runs = [k for k in range(n - 1, len(replica)) if all(replica[k - n + 1 : k + 1])]
        steps.append(2 * (runs[0] + 1) if runs else -1)
    return steps


@pytest.mark.parametrize("n_looks", [1, 3, 6])
def test_a_criterion_remembers_what_it_has_seen(n_looks):
    """Also across simulations, and while other replicas are stopped."""
    state, forces, bond = stretched(0.02, 0.08, 0.3)
    expected = looks_in_a_row(state, forces, bond, n_looks)
    assert expected[0] == -1 and (n_looks > 3 or expected[1] > 0)
    criterion = Lasting(bond, n_looks)
    end, _, failures = watched(state, VelocityVerlet(0.05), forces, 200, [criterion], check_every=2)
    assert failures.step.tolist() == expected and set(failures.causes) <= {"lasting"}
    assert all(a == [] for a in failures.atoms)
    found, now = [-1] * 3, state
    for done in range(0, 200, 10):  # in pieces, all replicas in each
        now, _, part = watched(now, VelocityVerlet(0.05), forces, 10, [criterion], check_every=2, stop_unstable=False)
        found = [done + step if step > 0 and old < 0 else old for old, step in zip(found, part.step.tolist())]
    assert found == expected


def test_what_is_remembered_is_rewound_with_the_replica():
    state, forces, bond = stretched(0.3, 0.3)
    criterion = Lasting(bond, 100)
    middle, _, _ = watched(state, VelocityVerlet(0.05), forces, 4, [criterion], check_every=2)
    assert middle.extra["lasting"].tolist() == [2, 2]
    end, _, _ = watched(middle, VelocityVerlet(0.05), forces, 2, [criterion], check_every=2)
    assert end.extra["lasting"].tolist() == [3, 3] and middle.extra["lasting"].tolist() == [2, 2]
    mixed = end.put([1], with_memory(state, [criterion]).select([1]))
    assert mixed.extra["lasting"].tolist() == [3, 0]
    assert torch.equal(state.restore(end.tensors()).extra["lasting"], end.extra["lasting"])


def test_two_criteria_each_with_its_cause():
    """A bond that is too long and one replica that moves away from its start."""

    class Displacement(OneFrame):
        name, unit = "displacement", "Å"

        def judge(self, state):
            x = state.batch.positions.view(state.n_systems, -1, 3).mean(dim=1).norm(dim=1)
            return Verdict(x / 2.0, x, torch.full((state.n_systems, 1), -1))

        def describe(self):
            return "a centre more than 2 Å from the origin"

    state, forces, bond = stretched(0.3, 0.0, 0.0)
    flight = torch.zeros_like(state.momenta)
    flight[2:4, 1] = 14.0 * 0.5
    _, _, failures = watched(state.replace(momenta=flight), VelocityVerlet(0.05), forces, 200, [bond, Displacement()], check_every=2)
    assert failures.criterion == ["bonds", "displacement", None]
    assert failures.atoms == [[0, 1], [], []]


def test_a_watch_among_other_observers():
    state, forces, bond = stretched(0.3, 0.02)
    watch = Watch(state, [bond], every=2)
    recorder = Recorder(state, 20, 2, columns={"severity": lambda _, active: watch.severity[active]})
    simulate(state, VelocityVerlet(0.05), forces, 20, [watch, recorder])
    assert watch.failures.step.tolist() == [2, -1]
    assert recorder.trajectory.valid.sum(dim=0).tolist() == [1, 10]
    assert recorder.trajectory.columns["severity"][0, 0] > 1.0


@pytest.mark.parametrize("momenta", [False, True])
def test_a_trajectory_as_atoms(momenta):
    """Replica by replica, with the energy of that frame; what is no valid frame is left out."""
    forces, integrator = PotentialForces(Harmonic(k=1.0)), VelocityVerlet(2.0 * units.fs)
    state = initial_state(wells(3, 2), forces, T, seed=1)
    recorder = Recorder(state, 20, 10, momenta=momenta)
    end = simulate(state, integrator, forces, 20, [recorder])
    whole = recorder.trajectory
    kept = whole.keep(torch.tensor([[True, True, True], [True, False, True]])).to_atoms(2.0)
    assert [[atoms.info["time_fs"] for atoms in images] for images in kept] == [[20.0, 40.0], [20.0], [20.0, 40.0]]
    for replica, expected in enumerate(end.batch.to_atoms()):
        last = whole.to_atoms(2.0)[replica][-1]
        np.testing.assert_array_equal(last.positions, expected.positions)
        assert last.get_potential_energy() == float(end.potential_energy[replica]) and last.info["replica"] == replica
        wanted = end.momenta.numpy()[2 * replica : 2 * replica + 2] if momenta else np.zeros((2, 3))
        np.testing.assert_array_equal(last.get_momenta(), wanted)
