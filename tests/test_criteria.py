"""Criteria beside the bonds: contacts, energy, temperature, and distances over a window."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.data import covalent_radii
from ase.io import read
from scipy import stats

import stabie_ase
from stabie_ase.dynamics import Langevin, PotentialForces, initial_state, simulate
from stabie_ase.potentials.analytic import Harmonic
from stabie_ase.stability import BondLengthDeviation, Contacts, EnergyRange, KineticTemperature, look, watched
from stabie_ase.stability.criteria import criteria_from
from stabie_ase.stability.criteria.contacts import MAX_CONTACT_EXCESS, NEW_BOND_FACTOR
from stabie_ase.stability.criteria.distribution import BIN_WIDTH, MARGIN_FACTOR, DistanceShift
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology

ASPIRIN = Path(stabie_ase.__file__).parent / "data" / "aspirin_xtb_train.xyz"


@pytest.fixture(scope="module")
def aspirin():
    """50 frames at 500 K."""
    return read(ASPIRIN, ":")


@pytest.fixture(scope="module")
def topology(aspirin):
    return Topology.from_frames(aspirin)


def state_of(frames, potential=None, temperature_K=500.0):
    return initial_state(AtomsBatch.from_atoms(frames), PotentialForces(potential or Harmonic()), temperature_K)


# -- contacts


def test_reference_frames_have_no_contacts(aspirin, topology):
    verdict = Contacts.from_topology(topology, 0.25).judge(state_of(aspirin))
    assert float(verdict.severity.max()) == 0.0 and not verdict.unstable.any()


@pytest.mark.parametrize("tolerance", [0.25, 0.5])
def test_a_contact_is_seen_blamed_and_measured(aspirin, topology, tolerance):
    """Two hydrogens on different groups moved towards each other along their line; nothing else of the frame counts."""
    contacts = Contacts.from_topology(topology, tolerance)
    hydrogens = (topology.numbers[contacts.pairs] == 1).all(dim=0).nonzero()[:, 0]
    k = max(hydrogens.tolist(), key=lambda p: aspirin[0].get_distance(*contacts.pairs[:, p].tolist()))
    i, j = contacts.pairs[:, k].tolist()
    for beyond in (0.9, 1.1):
        atoms = aspirin[0].copy()
        aim = float(contacts.shortest[k] - beyond * contacts.tolerances[k])
        atoms.set_distance(i, j, aim, fix=0)
        bare = Contacts(contacts.pairs[:, [k]], contacts.shortest[[k]], contacts.tolerances[[k]], tolerance)
        verdict = bare.judge(state_of([atoms]))
        assert float(verdict.severity) == pytest.approx(beyond) and verdict.unstable.tolist() == [beyond > 1]
        assert verdict.atoms.tolist() == [[i, j]]
        assert float(verdict.value) == pytest.approx(float(contacts.shortest[k]) - aim)


def test_what_counts_as_a_contact(topology, aspirin):
    """Bonds never; a pair with a common neighbour by its own shortest distance; others by their elements', and never farther than
    0.9 Å beyond the covalent radii; never so lax that a bond would do."""
    contacts = Contacts.from_topology(topology, 0.5)
    everything = np.array([atoms.get_all_distances() for atoms in aspirin]).min(axis=0)
    numbers = topology.numbers.numpy()
    separation = {tuple(p): s for p, s in zip(topology.pairs.T.tolist(), topology.separation.tolist())}
    assert contacts.pairs.shape[1] == 21 * 20 // 2 - 21
    shortest = {}
    for (i, j), s in separation.items():
        if s > 2:
            kind = tuple(sorted((numbers[i], numbers[j])))
            shortest[kind] = min(shortest.get(kind, np.inf), everything[i, j])
    for (i, j), allowed, tolerance in zip(contacts.pairs.T.tolist(), contacts.shortest.tolist(), contacts.tolerances.tolist()):
        radii = covalent_radii[numbers[i]] + covalent_radii[numbers[j]]
        if separation[i, j] == 2:
            assert allowed == pytest.approx(everything[i, j])
        else:
            assert allowed == pytest.approx(min(shortest[tuple(sorted((numbers[i], numbers[j])))], radii + MAX_CONTACT_EXCESS))
        assert tolerance == pytest.approx(min(0.5, max(allowed - NEW_BOND_FACTOR * radii, 0.05)))


def test_a_molecule_all_of_whose_atoms_are_bonded_has_no_contacts():
    verdict = Contacts.from_reference([molecule("H2"), molecule("H2")], 0.25).judge(state_of([molecule("H2")] * 2))
    assert verdict.severity.tolist() == [0.0, 0.0] and verdict.atoms.shape == (2, 0)


def water_and_hydrogen_sulfide(seed=0, which=None, distance=None, angle=None):
    """Two of each in a skewed cell, wrapped, with a little noise; the hydrogens of one molecule at a distance in Å or an angle."""
    rng = np.random.default_rng(seed)
    atoms = Atoms(cell=[[6.5, 0, 0], [2, 7, 0], [0, 1, 6]], pbc=True)
    for k, name in enumerate(("H2O", "SH2", "H2O", "SH2")):
        one = molecule(name)
        one.rotate(float(rng.uniform(0, 360)), "x")
        one.positions += np.array([k % 2, k // 2, 0.5 * k]) * 3.2 + rng.normal(scale=0.03, size=(3, 3))
        if k == which and distance is not None:
            one.set_distance(1, 2, distance, fix=0.5)
        elif k == which:
            one.set_angle(1, 0, 2, angle)
        atoms += one
    atoms.wrap()
    return atoms


def test_contacts_within_the_molecules_of_a_liquid():
    """A closing angle: measured by the nearest image, by what like molecules do, and not by what molecules do to each other."""
    frames = [water_and_hydrogen_sulfide(seed) for seed in range(20)]
    (contacts,) = criteria_from("contacts:0.25", Setting(frames, 300.0))
    assert contacts.pairs.tolist() == [[1, 4, 7, 10], [2, 5, 8, 11]]
    of_molecules = np.array([[atoms.get_distance(*pair, mic=True) for pair in contacts.pairs.T.tolist()] for atoms in frames])
    least = of_molecules.min(axis=0)
    assert contacts.shortest.tolist() == pytest.approx([min(least[0::2]), min(least[1::2])] * 2)
    for which in range(4):
        for beyond in (0.9, 1.1):
            state = state_of([water_and_hydrogen_sulfide(99, which, float(contacts.shortest[which]) - beyond * 0.25)])
            verdict = contacts.judge(state)
            assert float(verdict.severity) == pytest.approx(beyond) and verdict.unstable.tolist() == [beyond > 1]
            assert verdict.atoms.tolist() == [[3 * which + 1, 3 * which + 2]]


def test_places_in_molecules_and_bonds_between_atoms_do_not_ask_for_their_order():
    """Atoms of two molecules shuffled among each other: what is known of pairs is the same."""
    frames = [water_and_hydrogen_sulfide(seed) for seed in range(5)]
    order = np.random.default_rng(1).permutation(12)
    kinds = []
    for images in (frames, [atoms[order] for atoms in frames]):
        topology = Topology.from_frames(images).within_molecules(images)
        kinds.append(sorted(zip(topology.separation.tolist(), topology.mean.tolist(), topology.shortest.tolist())))
        assert topology.bonds.shape[1] == 8 and topology.pairs.shape[1] == 12
        assert all(len(set(topology.numbers[topology.place == place].tolist())) == 1 for place in topology.place)
    assert np.array(kinds[0]) == pytest.approx(np.array(kinds[1]))


@pytest.mark.parametrize("angle", [0.0, 50.0, 110.0, 180.0])
def test_angles_within_the_molecules_of_a_liquid(angle):
    """The whole range of an angle, as ASE measures it by the nearest image, against what like molecules do."""
    frames = [water_and_hydrogen_sulfide(seed) for seed in range(20)]
    (criterion,) = criteria_from("angles:20", Setting(frames, 300.0))
    centres = [0, 3, 6, 9]
    assert sorted(criterion.angles[1].tolist()) == centres
    seen = np.array([[atoms.get_angle(k + 1, k, k + 2, mic=True) for k in centres] for atoms in frames])
    bounds = [(seen[:, k::2].min(), seen[:, k::2].max()) for k in range(2)]
    for which in range(4):
        smallest, largest = bounds[which % 2]
        out = max(smallest - angle, angle - largest, 0.0)
        verdict = criterion.judge(state_of([water_and_hydrogen_sulfide(99, which, angle=angle)]))
        assert float(verdict.value) == pytest.approx(out, abs=1e-5) and verdict.unstable.tolist() == [out > 20]
        assert not out or verdict.atoms.tolist() == [[3 * which + 1, 3 * which, 3 * which + 2]]


def test_angles_that_cannot_be_judged():
    for tolerance in ("0", "180", "-3", "nan", "inf"):
        with pytest.raises(ValueError, match="angles must be between 0 and 180 degrees, got"):
            criteria_from(f"angles:{tolerance}", Setting([molecule("H2O")], 300.0))
    with pytest.raises(ValueError, match="no atom with two bonds"):
        criteria_from("angles:20", Setting([molecule("N2")], 300.0))
    with pytest.raises(ValueError, match="as in angles:20"):
        criteria_from("angles", Setting([molecule("H2O")], 300.0))


# -- energies


def test_energies_of_the_reference_are_within_the_range(aspirin):
    potential = Harmonic(k=0.1)
    criterion = EnergyRange.from_reference(aspirin, 500.0).for_model(potential)
    verdict = criterion.judge(state_of(aspirin, potential))
    assert (verdict.severity < 1).all()
    energies = state_of(aspirin, potential).potential_energy
    assert criterion.lowest == pytest.approx(float(energies.min())) and criterion.centre == pytest.approx(float(energies.mean()))
    torch.testing.assert_close(verdict.value, energies - energies.mean())


def test_a_constant_of_the_model_plays_no_part(aspirin):
    """The limits move with it."""

    class Shifted(Harmonic):
        def energies(self, batch, neighbors):
            return super().energies(batch, neighbors) - 1e4

    a, b = (EnergyRange.from_reference(aspirin, 500.0).for_model(p).judge(state_of(aspirin, p)) for p in (Harmonic(), Shifted()))
    torch.testing.assert_close(a.severity, b.severity, rtol=1e-6, atol=1e-6)


def test_both_sides_of_the_range(aspirin):
    criterion = replace(EnergyRange.from_reference(aspirin, 500.0), centre=-3.0, lowest=-3.5, highest=-2.0)
    state = state_of(aspirin[:4])
    limits = [criterion.lowest - criterion.below, criterion.highest + criterion.above]
    energies = torch.tensor([limits[0] - 0.01, limits[0] + 0.01, limits[1] - 0.01, limits[1] + 0.01], dtype=torch.float64)
    assert criterion.judge(state.replace(potential_energy=energies)).unstable.tolist() == [True, False, False, True]
    assert criterion.judge(state.replace(potential_energy=energies * torch.nan)).unstable.all()


def test_the_room_is_that_of_a_harmonic_molecule():
    """The width of ½ kT χ²_f beyond its mean at a chance of 10⁻¹², from the frames' edges, and f k ΔT/2 for a warmer run."""
    frames = [molecule("CH3CH2OH")] * 3
    half_kT, f = 0.5 * units.kB * 500.0, 21
    criterion = EnergyRange.from_reference(frames, 500.0, 500.0)
    assert stats.chi2.sf((criterion.above + f * half_kT) / half_kT, f) == pytest.approx(1e-12, rel=1e-3)
    assert stats.chi2.cdf((f * half_kT - criterion.below) / half_kT, f) == pytest.approx(1e-12, rel=1e-3)
    warmer = EnergyRange.from_reference(frames, 500.0, 300.0)
    assert warmer.above - criterion.above == pytest.approx(0.5 * f * units.kB * 200.0) and warmer.below == criterion.below
    colder = EnergyRange.from_reference(frames, 500.0, 700.0)
    assert colder.below - criterion.below == pytest.approx(0.5 * f * units.kB * 200.0) and colder.above == criterion.above


def test_sound_dynamics_of_an_exact_model_set_off_no_alarm():
    """Springs at 500 K, judged by criteria made of 40 of their own frames: 64 replicas, 400 looks each."""
    potential = Harmonic(k=2.0)
    atoms = Atoms("Ar6", positions=np.zeros((6, 3)))
    integrator = Langevin(5 * units.fs, 0.02 / units.fs)
    state = initial_state(AtomsBatch.from_atoms([atoms] * 64), PotentialForces(potential), 500.0, fix_com=False)
    state = simulate(state, integrator, PotentialForces(potential), 400)
    frames = state.batch.to_atoms()[:40]
    criteria = [EnergyRange.from_reference(frames, 500.0).for_model(potential), KineticTemperature.for_atoms(6)]
    _, _, failures = watched(state, integrator, PotentialForces(potential), 4000, criteria, check_every=10)
    assert not failures.failed.any(), failures.causes


# -- temperature


def test_kinetic_temperature():
    """The limit is where χ² has 10⁻¹² left; a replica at rest has a severity of zero, one at the limit of one."""
    criterion, f = KineticTemperature.for_atoms(9), 27
    assert stats.chi2.sf(criterion.ratio * f, f) == pytest.approx(1e-12, rel=1e-3)
    state = state_of([molecule("CH3CH2OH")] * 3)
    kinetic = state.batch.sum_over_atoms(0.5 * state.momenta.square().sum(dim=1) / state.batch.masses)
    scale = (0.5 * f * units.kB * torch.tensor([0.0, 0.99, 1.01], dtype=torch.float64) * criterion.ratio * 500.0 / kinetic).sqrt()
    state = state.replace(momenta=state.momenta * scale[state.batch.system][:, None])
    verdict = criterion.judge(state)
    assert verdict.unstable.tolist() == [False, False, True] and float(verdict.severity[0]) == 0.0
    torch.testing.assert_close(verdict.value, torch.tensor([0.0, 0.99, 1.01], dtype=torch.float64) * criterion.ratio * 500.0)
    cold = criterion.judge(state.replace(temperature=state.temperature / 2))  # the bath's is what it is measured by
    assert cold.unstable.tolist() == [False, True, True]
    # Started from frames at 500 K, a bath of 250 K meets up to 375 K until their heat is gone.
    hot_starts = KineticTemperature.for_atoms(9, 500.0)
    measured = state.replace(temperature=state.temperature / 2, momenta=state.momenta * 0.75**0.5)
    assert hot_starts.judge(measured).unstable.tolist() == [False, False, True]
    assert criterion.judge(measured).unstable.tolist() == [False, True, True]


# -- windows


def test_distances_over_a_window(aspirin, topology):
    """No reference frame deviates by more than 1/1.25 of what is allowed, the mean of all not at all."""
    criterion = DistanceShift.from_reference(aspirin, topology)
    values = criterion.cumulative(AtomsBatch.from_atoms(aspirin))
    severity, _ = criterion.severity(values)
    assert float(severity.max()) == pytest.approx(1 / MARGIN_FACTOR) and float(criterion.severity(values.mean(dim=0))[0]) < 1e-12
    assert float(criterion.severity(values[:20].mean(dim=0))[0]) <= float(severity[:20].max())  # convex


def test_the_shift_is_wassersteins_distance(aspirin, topology):
    """Against scipy's, of the distances of each kind, but for the width of a bin."""
    criterion = DistanceShift.from_reference(aspirin, topology)
    moved = aspirin[3].copy()
    moved.positions *= 1.15
    pairs = criterion.pairs.numpy()

    def distances(frames):
        return np.array([atoms.get_all_distances()[pairs[0], pairs[1]] for atoms in frames])

    values = criterion.cumulative(AtomsBatch.from_atoms([moved])).view(len(criterion.labels), -1)
    for k in range(len(criterion.labels)):
        chosen = (criterion.kind == k).numpy()
        expected = stats.wasserstein_distance(distances([moved])[:, chosen].ravel(), distances(aspirin)[:, chosen].ravel())
        assert float(BIN_WIDTH * (values[k] - criterion.target[k]).abs().sum()) == pytest.approx(expected, abs=BIN_WIDTH)


def test_atoms_of_one_kind_may_change_places(aspirin, topology):
    """The hydrogens of the methyl group, say: no distance of any kind changes."""
    criterion = DistanceShift.from_reference(aspirin, topology)
    numbers, bonds = topology.numbers.tolist(), topology.pairs[:, topology.bonded].T.tolist()
    neighbors = {k: {a for bond in bonds for a in bond if k in bond} - {k} for k in range(21)}
    methyl = next(c for c in range(21) if sum(numbers[a] == 1 for a in neighbors[c]) == 3)
    h = [a for a in neighbors[methyl] if numbers[a] == 1]
    order = np.arange(21)
    order[h] = h[1], h[2], h[0]
    values = criterion.cumulative(AtomsBatch.from_atoms([aspirin[5], aspirin[5][order]]))
    torch.testing.assert_close(values[0], values[1])


def test_a_collapsed_molecule_is_seen(aspirin, topology):
    """All angles at one carbon of the ring closed up, no bond off its length."""
    criterion = DistanceShift.from_reference(aspirin, topology)
    numbers, bonds = topology.numbers.tolist(), topology.pairs[:, topology.bonded].T.tolist()
    i, j = next((a, b) for a, b in bonds if numbers[a] == 6 and numbers[b] == 1)
    i, j = (i, j) if numbers[i] == 6 else (j, i)
    other = next(a for bond in bonds if i in bond for a in bond if a not in (i, j))
    frames = [atoms.copy() for atoms in aspirin[:10]]
    for atoms in frames:
        atoms.set_angle(j, i, other, 50.0, indices=[j])
    severity, worst = criterion.severity(criterion.cumulative(AtomsBatch.from_atoms(frames)).mean(dim=0))
    assert float(severity) > 1 and "2 bonds apart" in criterion.labels[int(worst)]
    assert not BondLengthDeviation.from_topology(topology, 0.25).judge(state_of(frames)).unstable.any()


# -- several at once


def test_the_worst_criterion_is_blamed_and_numbers_that_are_not_finite_before_all(aspirin, topology):
    bonds, contacts = BondLengthDeviation.from_topology(topology, 0.25), Contacts.from_topology(topology, 0.25)
    i, j = bonds.bonds[:, -1].tolist()
    broken = aspirin[0].copy()
    broken.set_distance(i, j, float(bonds.lengths[-1]) + 0.6, fix=0, indices=[j])
    state = state_of([aspirin[0], broken, aspirin[1]])
    state = state.replace(alive=torch.tensor([True, True, False]))
    seen = look(state, [contacts, bonds])
    assert seen.unstable.tolist() == [False, True, True] and seen.worst.tolist()[1:] == [2, 0]
    expected = torch.stack([c.judge(state).severity for c in (contacts, bonds)]).amax(dim=0)
    torch.testing.assert_close(seen.severity[:2], expected[:2])
    assert seen.severity[2] == torch.inf
