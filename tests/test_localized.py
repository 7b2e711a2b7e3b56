"""The localized estimator (Raja et al., eq. 5): which groups, and that it is exact where subsystems are independent of each other."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from stabie_ase.boltzmann import WHOLE, Estimator, Samples, StatePoint, accumulate_gradient, choose_grouping, grouping, grouping_from
from stabie_ase.boltzmann.gradient import energy_change, group_energies, with_group_energies
from stabie_ase.boltzmann.weights import weighted_mean
from stabie_ase.dynamics import Langevin, PotentialForces, initial_state, simulate
from stabie_ase.observables import BondLengths, Observable, RadialDistribution, Target, observables_from
from stabie_ase.observables.base import Axis
from stabie_ase.potentials.analytic import Harmonic, LennardJones, Morse
from stabie_ase.potentials.base import Potential
from stabie_ase.stability import criteria_from
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbourhoods import nearest
from stabie_ase.structures.reference import reference_of
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups, Topology
from stabie_ase.training.loop import TrainingLoop
from stabie_ase.training.updates.found import Found, find
from stabie_ase.training.updates.gradients import telling

T = 300.0
KT = units.kB * T
K = 0.7


class MeanSquare(Observable):
    """⟨x²⟩ over the atoms of a group, in Å²."""

    name, label, axis = "x2", "x² (Å²)", Axis.of_names("", ["x²"])

    def values(self, batch):
        return (batch.sum_over_atoms(batch.positions[:, 0].square()) / batch.counts)[:, None]


def samples_of(frames, groups, observable):
    zeros = torch.zeros(frames.n_systems, dtype=torch.float64)
    index = torch.arange(frames.n_systems)
    return Samples(frames, groups, {observable.name: observable(frames, groups)}, zeros, zeros, 0 * index, index)


def flat_gradient(potential, found):
    potential.zero_grad()
    accumulate_gradient(potential, found.samples.frames, found.weights, found.samples.parts, chunk_size=5000)
    return torch.cat([p.grad.flatten() for p in potential.parameters()])


# -- exact where subsystems are independent


def wells(n_frames, n_atoms, seed):
    """Independent atoms in wells, straight from their Boltzmann distribution."""
    generator = torch.Generator().manual_seed(seed)
    positions = (KT / K) ** 0.5 * torch.randn((n_frames * n_atoms, 3), generator=generator, dtype=torch.float64)
    return AtomsBatch.from_atoms(Atoms(f"H{n_atoms}", np.zeros((n_atoms, 3)))).repeat(n_frames).replace(positions=positions)


def atoms_in(frames, size=1):
    """Groups of so many atoms."""
    group = torch.arange(frames.n_atoms) // size
    return Groups(torch.arange(frames.n_atoms), group, frames.system[::size])


def derivatives(n_frames, n_atoms, groups_of, n_sets=80):
    """∂⟨x²⟩/∂k of several sets of frames: the gradient of (ḡ - g^ref)², over its residual 2 (ḡ - g^ref)."""
    potential, observable, found = Harmonic(K), MeanSquare(), []
    for seed in range(n_sets):
        frames = wells(n_frames, n_atoms, seed)
        samples = samples_of(frames, groups_of(frames), observable)
        target = Target(observable, samples.values["x2"].mean(dim=0) - 0.5)
        found.append(float(flat_gradient(potential, Estimator(StatePoint(T))(samples, [target]))))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("n_frames", [25, 100, 400])
@pytest.mark.parametrize("size", [1, 2])
def test_exact_where_subsystems_are_independent(n_frames, size):
    """∂⟨x²⟩/∂k = -kT/k² within three standard errors over 80 sets of frames, the variance as many times smaller as it should be.

    A product of two deviations has the variance v_g v_u + c² + κ/m for groups of m atoms, in units of kT/k and kT: v_g = 2, v_u = 3/2,
    c = 1, and 12 for the joint cumulant κ. Of n atoms there are n/m groups.
    """
    n_atoms = 8
    local, whole = (derivatives(n_frames, n_atoms, of) for of in (lambda frames: atoms_in(frames, size), Groups.systems))
    expected, error = -KT / K**2, float(local.std()) / 80**0.5
    assert abs(float(local.mean()) - expected) < 3 * error < 0.12 * abs(expected)
    fewer = n_atoms / size * (4 + 12 / n_atoms) / (4 + 12 / size)
    assert 0.6 * fewer < float(whole.var() / local.var()) < fewer / 0.6  # a ratio of variances of 80 numbers is known to a fifth


def test_a_group_that_is_the_whole_system_is_the_global_estimator():
    """Weights, gradient and energies to round-off, by energies of atoms on one side and of systems on the other."""
    rng = np.random.default_rng(0)
    ethanol, potential = molecule("CH3CH2OH"), Morse(1.0, 1.5, 1.2)
    frames = [Atoms(ethanol.numbers, ethanol.positions + rng.normal(0, 0.05, (9, 3))) for _ in range(10)]
    batch, topology = AtomsBatch.from_atoms(frames), Topology.from_frames(frames)
    lengths = BondLengths(topology)
    target = Target(lengths, lengths(batch)[0])
    samples = [samples_of(batch, groups, lengths) for groups in (Groups.systems(batch), Groups.molecules(batch, topology))]
    assert [s.parts for s in samples] == [None, None]
    found = [Estimator(StatePoint(T))(s, [target]) for s in samples]
    torch.testing.assert_close(found[1].weights, found[0].weights, rtol=1e-13, atol=0)
    expected = flat_gradient(potential, found[0])
    potential.zero_grad()
    accumulate_gradient(potential, batch, found[1].weights, samples[1].groups)
    torch.testing.assert_close(torch.stack([p.grad for p in potential.parameters()]), expected, rtol=1e-11, atol=1e-14)


def test_overlapping_neighbourhoods_are_the_explicit_formula():
    """Eq. 5 with each neighbourhood's own energy and its own gradient, worked out one by one."""
    frames, potential = argon(6), LennardJones(0.0103, 3.4, 5.5)
    batch, topology = AtomsBatch.from_atoms(frames), Topology.from_frames(frames)
    observable = RadialDistribution((18, 18), 5.0, 0.5)
    samples = samples_of(batch, nearest(batch, topology, 5), observable)
    values = samples.values[observable.name]
    target = Target(observable, 0.9 * values.mean(dim=0))
    found = flat_gradient(potential, Estimator(StatePoint(T))(samples, [target]))
    rows = []
    for group in range(samples.groups.n_groups):
        one = torch.zeros(samples.groups.n_groups, dtype=torch.float64)
        one[group] = 1.0
        potential.zero_grad()
        accumulate_gradient(potential, batch, one, samples.groups)
        rows.append(torch.stack([p.grad.clone() for p in potential.parameters()]))
    jacobian, n = torch.stack(rows), len(values)
    centred = values - values.mean(dim=0)
    derivative = -centred.T @ jacobian / (n - 1) / KT
    expected = (2.0 * observable.measure * (values.mean(dim=0) - target.value)) @ derivative
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_neighbourhoods_are_reweighted_by_their_own_energies():
    frames, potential = argon(4), LennardJones(0.0103, 3.4, 5.5)
    batch = AtomsBatch.from_atoms(frames)
    samples = samples_of(batch, nearest(batch, Topology.from_frames(frames), 4), RadialDistribution((18, 18), 5.0, 0.5))
    with pytest.raises(ValueError, match="with_group_energies"):
        energy_change(potential, samples)
    samples = with_group_energies(potential, samples)
    assert with_group_energies(LennardJones(1.0), samples) is samples  # once, by those that drove them
    assert float(energy_change(potential, samples).abs().max()) == 0.0
    with torch.no_grad():
        potential.epsilon.mul_(1.1)
    torch.testing.assert_close(energy_change(potential, samples), 0.1 * samples.group_energies)
    some = samples.select(torch.tensor([1, 3]))
    torch.testing.assert_close(energy_change(potential, some), 0.1 * some.group_energies)
    torch.testing.assert_close(group_energies(potential, some.frames, some.groups), 1.1 * some.group_energies)


# -- which groups


def argon(n_frames=3, repeat=2, symbol="Ar"):
    rng = np.random.default_rng(1)
    crystal = bulk(symbol, "fcc", a=5.72, cubic=True).repeat(repeat)
    frames = [crystal.copy() for _ in range(n_frames)]
    for atoms in frames:
        atoms.positions += rng.normal(0, 0.25, atoms.positions.shape)
    return frames


def waters(n=2, n_frames=3):
    rng, frames = np.random.default_rng(0), []
    for _ in range(n_frames):
        box = Atoms(cell=[3.1 * n] * 3, pbc=True)
        for k in np.ndindex(n, n, n):
            water = molecule("H2O")
            water.euler_rotate(*rng.uniform(0.0, 360.0, 3))
            water.positions += 3.1 * np.array(k) + rng.normal(scale=0.02, size=(3, 3))
            box += water
        frames.append(box)
    return frames


def salt(n_frames=2):
    return [bulk("NaCl", "rocksalt", a=5.64, cubic=True)] * n_frames


SYSTEMS = {
    "argon": argon(),
    "water": waters(),
    "ethanol": [molecule("CH3CH2OH")] * 3,
    "silicon": [bulk("Si", "diamond", a=5.43, cubic=True).repeat(2)] * 2,
    "salt": salt(),
    "brine": [atoms + Atoms("Ar", [[1.5, 1.5, 1.5]]) for atoms in waters()],
    "two": [Atoms("Ar2", [[0, 0, 0], [4, 4, 4]], cell=[8] * 3, pbc=True)] * 2,
    "mixed": [bulk("Ar", cubic=True), bulk("Ne", cubic=True)],
}
SETTINGS = {name: Setting(frames, T) for name, frames in SYSTEMS.items()}

REFUSED = {
    ("argon", "nearest:31"): "nearest:31 of 32 molecules or atoms, expected 1 to 30; .* global",
    ("argon", "nearest:0"): "nearest:0 of 32 molecules or atoms, expected 1 to 30",
    ("argon", "nearest"): "'nearest' gives no number, expected one as in nearest:12",
    ("argon", "nearest:few"): "k='few', expected a whole number",
    ("argon", "nearest:3,r=2"): "unknown option 'r'",
    ("argon", "radius:6"): "radius:6 reaches beyond half the width of the cell, 5.72 Å; give a smaller radius",
    ("argon", "radius:1"): r"radius:1 finds nobody beside the centre: the smallest distance of two centres is [23]\..* Å; give a larger",
    ("argon", "radius:-1"): "radius='-1', expected a positive distance in Å",
    ("argon", "radius:nan"): "radius='nan', expected a positive distance in Å",
    ("argon", "radius"): "'radius' gives no number",
    ("argon", "local"): "expected one estimator, got 'local'; .*known: global, molecules, conditional, nearest, radius",
    ("argon", "molecule"): "did you mean 'molecules'?",
    ("argon", "global,molecules"): "expected one estimator, got 'global,molecules'",
    ("argon", ""): "expected one estimator, got ''",
    ("water", "molecules:3"): "'molecules' takes no argument",
    ("water", "nearest:7"): "nearest:7 of 8 molecules or atoms, expected 1 to 6",
    ("ethanol", "molecules"): "molecules makes a group of all 9 atoms; make it smaller, or give --estimator global",
    ("ethanol", "nearest:3"): r"groups around molecules or atoms that differ \(C, H, O\), .* one distribution; give --estimator global",
    ("salt", "radius:2.9"): "radius:2.9 reaches beyond half the width",
    ("salt", "nearest:4"): r"that differ \(Cl, Na\)",
    ("brine", "molecules"): r"that differ \(Ar, H2O\)",
    ("two", "nearest:1"): "nearest:1 of 2 molecules or atoms, expected more molecules or atoms to choose from",
    ("mixed", "nearest:1"): "one molecule with its atoms in one order",
}


@pytest.mark.parametrize(("system", "text"), REFUSED)
def test_what_is_no_neighbourhood_is_refused_in_a_line(system, text):
    with pytest.raises(ValueError, match=REFUSED[system, text].replace("'?", r"'\?")) as error:
        grouping_from(text, SETTINGS[system])
    assert "\n" not in str(error.value)


def test_a_radius_that_holds_everybody_is_refused():
    cluster = Atoms("Ar4", [[0, 0, 0], [3.8, 0, 0], [0, 3.8, 0], [0, 0, 3.8]])
    with pytest.raises(ValueError, match="radius:6 makes a group of all 4 atoms; make it smaller"):
        grouping_from("radius:6", Setting([cluster] * 2, T))


def test_what_is_asked_for():
    batch = AtomsBatch.from_atoms(SYSTEMS["water"])
    sizes = {text: grouping_from(text, SETTINGS["water"])(batch).group.bincount() for text in ("molecules", "nearest:3", "radius:3.05")}
    assert set(sizes["molecules"].tolist()) == {3} and set(sizes["nearest:3"].tolist()) == {12} and len(sizes["radius:3.05"].unique()) > 1
    assert grouping_from("global", SETTINGS["mixed"]).whole
    assert [grouping_from(text, SETTINGS["water"]).lasting for text in ("molecules", "nearest:3", "radius:3.05")] == [True, False, False]


class Opaque(Potential):
    """Gives energies of systems only."""

    family, cutoff = "opaque", 4.0

    def energies(self, batch, neighbors):
        return batch.sum_over_atoms(batch.positions.square().sum(dim=1))


class Count(MeanSquare):
    """Of a system the number of its atoms, which is no mean over molecules."""

    name = "count"

    def values(self, batch):
        return batch.counts.double()[:, None]


CHOSEN = {
    "argon": ("nearest:12", "the system is 32 atoms Ar"),
    "water": ("molecules", "the system is 8 molecules H2O, and nothing that is matched is of their conformations"),
    "ethanol": ("global", "the system is not periodic"),
    "silicon": ("nearest:12", "the system is 64 atoms Si"),
    "salt": ("global", r"molecules or atoms that differ (Cl, Na) are not samples of one distribution"),
    "brine": ("global", r"molecules or atoms that differ (Ar, H2O) are not samples of one distribution"),
    "two": ("global", "the system has few atoms"),
    "mixed": ("global", "the reference has no one set of bonds"),
}


@pytest.mark.parametrize("system", CHOSEN)
def test_what_suits_is_chosen_by_the_system(system):
    found = choose_grouping(None, SETTINGS[system], [], Harmonic())
    assert (found.name, found.reason) == CHOSEN[system] and found.describe() == f"{found.name} ({found.reason})"
    assert choose_grouping("global", SETTINGS[system], [], Opaque()).whole


def test_energies_of_atoms_are_needed():
    found = choose_grouping(None, SETTINGS["water"], [], Opaque())
    assert found.name == "global" and found.reason == "molecules would suit, but the opaque potential gives no energies of atoms"
    with pytest.raises(ValueError, match="--estimator molecules needs energies of atoms, and the opaque potential gives none; give"):
        choose_grouping("molecules", SETTINGS["water"], [], Opaque())
    lengths = BondLengths.from_spec(SimpleNamespace(read=lambda *_: {}), SETTINGS["water"])
    for text in (None, "conditional"):  # conditional energies are of whole systems
        assert choose_grouping(text, SETTINGS["water"], [lengths], Opaque()).conformers is not None
    with pytest.raises(ValueError, match="--estimator conditional needs energies of atoms, and the opaque potential gives none; give"):
        choose_grouping("conditional", SETTINGS["water"], [lengths, RadialDistribution((8, 8), 3.0)], Opaque())


def test_an_observable_that_is_no_mean_over_molecules_keeps_its_system_whole():
    setting = SETTINGS["water"]
    lengths = BondLengths.from_spec(SimpleNamespace(read=lambda *_: {}), setting)
    assert choose_grouping(None, setting, [lengths], Harmonic()).describe() == "conditional (the system is 8 molecules H2O)"
    found = choose_grouping(None, setting, [lengths, Count()], Harmonic())
    assert found.name == "global" and found.reason == "conditional would suit, but count of the system is not a mean over molecules"
    found = choose_grouping(None, setting, [BondLengths(setting.topology)], Harmonic())
    assert found.name == "global" and "not for bond-length: bond lengths are of a system of 24 atoms" in found.reason
    asked = choose_grouping("molecules", setting, [Count()], Harmonic())
    assert (asked.name, asked.reason) == ("molecules", "as asked for")


def test_what_would_have_been_chosen_is_told_why_if_it_is_asked_for():
    """As a run asks for it that goes on."""
    setting = SETTINGS["water"]
    hr = observables_from("hr", setting)
    chosen = choose_grouping(None, setting, hr, Harmonic())
    assert chosen.name == "conditional" and choose_grouping("conditional", setting, hr, Harmonic()).reason == chosen.reason


def test_the_means_of_g_of_r_over_molecules_is_that_of_the_system():
    setting = SETTINGS["water"]
    rdf = RadialDistribution((8, 1), r_max=3.0, bin_width=0.1)
    own, whole = (Target.from_frames(rdf, setting.frames, of) for of in (grouping_from("molecules", setting), WHOLE))
    torch.testing.assert_close(own.value, whole.value)
    assert replace(WHOLE, reason="").describe() == "global ()"


# -- training


DIMERS, CUTOFF = 8, 3.5


@cache
def gas(n_frames=24):
    """Labelled frames of eight dimers C2 in a cell, bound by a Morse potential that does not reach from one to another."""
    generator = np.random.default_rng(0)
    box = Atoms(cell=[11.0] * 3, pbc=True)
    for k in np.ndindex(2, 2, 2):
        direction = generator.normal(size=3)
        half = 0.75 * direction / np.linalg.norm(direction)
        box += Atoms("C2", [5.5 * np.array(k) - half, 5.5 * np.array(k) + half])
    truth = PotentialForces(Morse(3.0, 1.8, 1.5, CUTOFF))
    state = initial_state(AtomsBatch.from_atoms([box] * n_frames), truth, 1200.0, seed=0)
    state = simulate(state, Langevin(2.0 * units.fs, 0.02 / units.fs), truth, 60)
    frames = state.batch.to_atoms()
    for atoms, energy, forces in zip(frames, state.potential_energy.tolist(), state.forces.split(2 * DIMERS)):
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces.numpy())
        atoms.info["temperature_K"] = 600.0
    return reference_of(frames)


def loop(estimator, update="natural", observables="bond-length:C-C", potential=None, **changes):
    """On a potential whose bonds are far too soft."""
    reference, potential = gas(), potential or Morse(1.0, 1.2, 1.5, CUTOFF)
    setting = Setting(reference.frames, 600.0)
    options = changes if estimator is None else {"estimator": estimator, **changes}
    usual = {"sample_every_fs": 10.0, "replicas": 6, "force_error_bound": 100.0, "energy_error_bound": 100.0, "update": update}
    config = tiny.config(**{**usual, **options})
    return TrainingLoop.from_reference(
        potential, reference, observables_from(observables, setting), criteria_from("bonds:0.3", setting), config
    )


class Parting(Morse):
    """Soft bonds, and a parameter that moves energy from short dimers to long ones: no total energy and no force depends on it."""

    def __init__(self):
        super().__init__(1.0, 1.2, 1.5, CUTOFF)
        self.between = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def atomic_energies(self, batch, neighbors):
        distances = neighbors.vectors(batch).norm(dim=1)
        lengths = distances.new_zeros(batch.n_atoms).index_add(0, neighbors.pairs[0], distances)
        mean = batch.sum_over_atoms(lengths) / batch.counts
        return super().atomic_energies(batch, neighbors) + self.between * (lengths - mean[batch.system])


def matching(**changes):
    """The lengths of bonds are the goal, and samples the molecules."""
    return loop("molecules", potential=Parting(), **{"goal": "observables", "qm_steps": 0, "updates_per_window": 1, **changes})


def test_a_natural_step_changes_energies_and_not_whose_they_are():
    """Bonds get shorter, and no molecule gets energy from others: a step of 0.14 eV/Å that did nothing else once took all there was."""
    training = matching()
    record, potential = training.step()[0], training.potential
    assert record["updates"] == 1 and record["ess_fraction"] > 0.9
    assert float(potential.r0.detach()) < 1.499 and abs(float(potential.between.detach())) < 2e-3


@pytest.mark.parametrize("bound", [100.0, 1e-6])
def test_steps_on_labels_follow_a_step_for_observables_where_errors_are_near_their_bounds(bound):
    """Labels know of the same frames, and would take back what experiment has asked for."""
    training = matching(qm_steps=5, force_error_bound=bound, energy_error_bound=bound)
    assert training.step()[0]["updates"] == 1
    assert (training.rule.steps.runs > 0) is (bound < 1.0)


@pytest.mark.parametrize("factor", [0.1, 1.0])
def test_a_step_for_observables_goes_no_farther_than_to_them(factor):
    """By reweighted samples: a short one some of the way, one of three times what it takes to the target, but for what is not linear."""
    training = matching(observable_weight=factor)
    pool = training.pools[0]
    samples = training._samples(pool.condition, pool.learn(everyone=True)[1])
    target, name = pool.condition.targets[0], "bond-length:C-C"
    found = with_group_energies(training.potential, samples)
    training.rule.apply_([(pool.condition, samples)])
    change = energy_change(training.potential, found)
    before, after = (weighted_mean(samples.values[name], pool.condition.point, x)[0] - target.value for x in (None, change))
    part = float((before - after) / before)
    assert 0.1 < part < 0.6 if factor == 0.1 else 0.9 < part < 1.1


def test_further_steps_for_observables_are_for_what_the_first_have_left():
    """A window's second direction is by the residual of the changed mean, which reweighting tells."""
    training = matching(observable_weight=0.3)
    pool = training.pools[0]
    found = find(training.rule.work, pool.condition, training._samples(pool.condition, pool.learn(everyone=True)[1]))[0]
    training.potential.r0.data -= 0.01
    residuals = {afresh: found.reweighted(training.potential, afresh).estimate for afresh in (False, True)}
    values = found.estimate.samples.values["bond-length:C-C"]
    mean = weighted_mean(values, pool.condition.point, energy_change(training.potential, found.estimate.samples))[0]
    assert torch.equal(residuals[False].residuals[0][1], found.estimate.residuals[0][1])
    expected = found.estimate.residuals[0][1] * (mean - found.targets[0].value) / (values.mean(dim=0) - found.targets[0].value)
    torch.testing.assert_close(residuals[True].residuals[0][1], expected, rtol=0.1, atol=0.0)
    assert float(expected / found.estimate.residuals[0][1]) < 0.9


@pytest.mark.parametrize(
    ("estimator", "update"),
    [
        (None, "natural"),
        ("molecules", "natural"),
        ("nearest:2", "natural"),
        ("radius:5.5", "natural"),
        ("molecules", "penalized:sgd,learning_rate=1e-3"),
        ("conditional", "penalized:sgd,learning_rate=1e-3"),
    ],
)
def test_training_on_groups(estimator, update):
    """A liquid's molecules are its samples, by default too; updates are made, and repeat to the bit."""
    ends = []
    for _ in range(2):
        training = loop(estimator, update)
        condition = training.pools[0].condition
        assert condition.grouping.name == (estimator or "conditional") and condition.targets[0].samples.shape == (24 * DIMERS, 1)
        records = []
        while not any(record.get("updates") for record in records):
            records.append(training.step()[0])
        ends.append(torch.stack([p.detach().clone() for p in training.potential.parameters()]))
    last = records[-1]
    assert last["n_samples"] % DIMERS == 0 and last["n_samples"] > 6 * DIMERS and np.isfinite(last["observable_loss"])
    assert 0.0 < last.get("ess_fraction", 0.5) < 1.0
    assert torch.equal(*ends) and not torch.equal(ends[0], torch.tensor([1.0, 1.2, 1.5]).double())


def test_drawn_samples_serve_as_long_as_others(monkeypatch):
    """What counts is what a step has left of their effective number, which favours and weights make small from the beginning."""
    monkeypatch.setattr(grouping, "MOST_CONDITIONAL", 32)
    training = loop("conditional", updates_per_window=3, observable_weight=1e-3, sample_every_fs=2.0)
    while not (record := training.step()[0]).get("updates"):
        pass
    assert record["n_samples"] > 256 and training.progress.updates == 3 and 0.9 < record["ess_fraction"] < 1.0


def test_a_liquid_that_fails_needs_no_sound_replicas_beside_it():
    """Most of its molecules are sound; of whole systems as many that did not fail take part."""
    learners = {}
    for estimator in ("molecules", "global"):
        training = loop(estimator)
        while training.pools[0].lesson is None:
            failed = training.pools[0].failed.clone()
            training.step()
        rows = training.pools[0].lesson.rows
        learners[estimator] = (len(rows), int(failed[rows].sum()), int(failed.sum()))
    n, taught, n_failed = learners["molecules"]
    assert 0 < n == taught == n_failed < 6 == learners["global"][0]


@pytest.mark.parametrize(("noisy", "kept"), [("rdf:C-C", [0]), ("bond-length:C-C", [1]), ("none", [0, 1]), ("both", [0, 1])])
def test_a_gradient_that_is_noise_is_left_out(noisy, kept, monkeypatch):
    """Of two of one window, with energies of their own; both are followed if neither tells anything, and seen as one later."""
    training = loop("conditional", observables="bond-length:C-C,rdf:C-C")
    samples = []
    training.rule.apply_, real = lambda windows: samples.append(windows) or real(windows), training.rule.apply_
    while not samples:
        training.step()
    rule = loop("conditional", observables="bond-length:C-C,rdf:C-C").rule
    known = find(rule.work, *samples[0][0])
    names = [[target.observable.name for target in found.targets] for found in known]
    assert names == [["bond-length:C-C"], ["rdf:C-C"]]
    errors = {name: 2.0 if noisy in (name, "both") else 0.5 for (name,) in names}

    def known_gradient(potential, at):
        return {"gradient_norm": 1.0, "gradient_norm_error": errors[at[0].targets[0].observable.name]}

    monkeypatch.setattr("stabie_ase.training.updates.gradients.known_gradient", known_gradient)
    told, figures = telling(rule.work, known)
    assert bool(figures) is (len(kept) == 1) and len(told) == len(kept) and all(told[n] is known[k] for n, k in enumerate(kept))


def test_failures_are_as_much_rarer_as_boltzmann_factors_say():
    """Of two failures alike one is lifted by 20 kT: they are rarer by a factor of two, whatever their mean rise is; of both, by e^20."""
    training, point = loop("conditional"), StatePoint(600.0)
    estimate = SimpleNamespace(weights=torch.tensor([-1.0, -1.0, 1.0, 1.0]).double())
    zero = torch.zeros(4, dtype=torch.float64)
    found = Found(replace(training.pools[0].condition, point=point), None, [], estimate, None, zero, 4.0)
    for lifted, expected in (([20, 0, 0, 0], np.log(2)), ([20, 20, 0, 0], 20.0), ([3, 3, 1, 1], 2.0), ([0, 0, 0, 0], 0.0)):
        assert found.rarer(torch.tensor(lifted).double() / point.beta) == pytest.approx(expected, abs=1e-6)


def test_updates_know_where_groups_came_from():
    """Each later update of a window is weighted by how far its groups' energies are from those that drove the dynamics."""
    training = loop("molecules")
    samples = []
    training.rule.apply_, real = lambda windows: samples.append(windows) or real(windows), training.rule.apply_
    while not samples:
        training.step()
    (condition, window), rule = samples[0][0], loop("molecules").rule
    (known,) = find(rule.work, condition, window)
    estimator, targets, estimate = known.estimator, known.targets, known.estimate
    assert estimator.half_width == training.config.half_width(whole=False) == 0 and not estimator.within and estimator.winsorized
    potential = rule.work.potential
    torch.testing.assert_close(
        estimate.samples.group_energies, group_energies(potential, estimate.samples.frames, estimate.samples.groups)
    )
    with torch.no_grad():
        potential.depth.mul_(1.02)
    change = group_energies(potential, estimate.samples.frames, estimate.samples.groups) - estimate.samples.group_energies
    found = known.reweighted(potential).estimate
    torch.testing.assert_close(found.weights, estimator.reweighted(estimate, targets, change).weights)
    assert 1.0 < found.effective_samples < len(found.samples)
