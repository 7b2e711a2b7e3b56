"""The bond criterion, and the statistics of times to the first failure."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.io import read

import stabie_ase
from stabie_ase.dynamics import PotentialForces, initial_state
from stabie_ase.potentials.analytic import Harmonic
from stabie_ase.stability import (
    BondLengthDeviation,
    Failures,
    StabilityStatistics,
    criteria_from,
    stability_statistics,
)
from stabie_ase.stability.frames import blamed
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting

ASPIRIN = Path(stabie_ase.__file__).parent / "data" / "aspirin_xtb_train.xyz"


@pytest.fixture(scope="module")
def aspirin():
    """50 frames at 500 K."""
    return read(ASPIRIN, ":")


@pytest.fixture(scope="module")
def criterion(aspirin):
    return BondLengthDeviation.from_reference(aspirin, tolerance=0.5)


def at_rest(frames):
    """A state of these frames, as criteria judge it."""
    return initial_state(AtomsBatch.from_atoms(frames), PotentialForces(Harmonic()), 1e-3)


# -- bonds


def test_bonds_come_from_mean_distances(aspirin, criterion):
    """Aspirin, C9H8O4 with one ring, has 21 bonds, each as long as in the mean."""
    assert criterion.bonds.shape == (2, 21)
    assert "(21 bonds)" in criterion.describe()
    for (i, j), length in zip(criterion.bonds.T.tolist(), criterion.lengths.tolist()):
        assert length == pytest.approx(np.mean([atoms.get_distance(i, j) for atoms in aspirin]))
    symbols = aspirin[0].get_chemical_symbols()
    valence = np.bincount(criterion.bonds.flatten().numpy())
    assert all(valence[k] == 1 for k, symbol in enumerate(symbols) if symbol == "H")
    assert all(valence[k] in (1, 2) for k, symbol in enumerate(symbols) if symbol == "O")


def test_one_hot_frame_does_not_make_the_topology(aspirin):
    """The frame alone misses the bond; among 50 it does not count."""
    i, j = BondLengthDeviation.from_reference(aspirin, 0.5).bonds[:, -1].tolist()
    hot = aspirin[0].copy()
    hot.set_distance(i, j, hot.get_distance(i, j) + 0.6, fix=0)
    assert BondLengthDeviation.from_reference([hot], 0.5).bonds.shape[1] == 20
    assert BondLengthDeviation.from_reference([hot, *aspirin[1:]], 0.5).bonds.shape[1] == 21


@pytest.mark.parametrize("change", [0.62, -0.62])
def test_says_which_bond_is_off_and_by_how_much(aspirin, criterion, change):
    """Too long or too short; the systems of a batch are judged one by one."""
    bond = next(b for b, (_, j) in enumerate(criterion.bonds.T.tolist()) if aspirin[0].symbols[j] == "H")
    i, j = criterion.bonds[:, bond].tolist()
    broken = aspirin[1].copy()
    broken.set_distance(i, j, float(criterion.lengths[bond]) + change, fix=0)
    verdict = criterion.judge(at_rest([aspirin[0], broken, aspirin[2]]))
    assert verdict.unstable.tolist() == [False, True, False]
    assert verdict.atoms[1].tolist() == [i, j]
    assert float(verdict.value[1]) == pytest.approx(abs(change))
    assert (verdict.value[[0, 2]] < 0.2).all()


def pair(*distances, tolerance=0.25):
    """Diatomics, held against a bond of 1 Å."""
    state = at_rest([Atoms("H2", [[0, 0, 0], [0, 0, d]]) for d in distances])
    bond = BondLengthDeviation(torch.tensor([[0], [1]]), torch.tensor([1.0], dtype=torch.float64), tolerance)
    return bond.judge(state)


def test_deviation_counts_in_both_directions():
    verdict = pair(1.0, 1.24, 1.26, 0.76, 0.74)
    assert verdict.unstable.tolist() == [False, False, True, False, True]
    torch.testing.assert_close(verdict.value, torch.tensor([0.0, 0.24, 0.26, 0.24, 0.26]).double())
    assert verdict.atoms.tolist() == [[0, 1]] * 5


def test_numbers_that_are_not_finite_are_unstable():
    assert pair(1.0, np.nan, np.inf).unstable.tolist() == [False, True, True]


def test_worst_bond_is_blamed():
    bonds = BondLengthDeviation(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, dtype=torch.float64), 0.25)
    chains = [Atoms("H3", [[0, 0, 0], [0, 0, a], [0, 0, a + b]]) for a, b in [(1.4, 1.5), (1.5, 0.6), (1.1, 0.8)]]
    verdict = bonds.judge(at_rest(chains))
    assert verdict.atoms.tolist() == [[1, 2], [0, 1], [1, 2]]
    assert verdict.unstable.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "frames, tolerance, message",
    [
        ([Atoms("H2", [[0, 0, 0], [0, 0, 0.7]])], 0.0, "tolerance must be a positive length, got 0"),
        ([Atoms("H2"), Atoms("H3")], 0.5, "one molecule with its atoms in one order"),
        ([Atoms("H2", [[0, 0, 0], [0, 0, 3.0]])], 0.5, "has no bonds"),
    ],
)
def test_refuses_a_reference_without_meaning(frames, tolerance, message):
    with pytest.raises(ValueError, match=message):
        BondLengthDeviation.from_reference(frames, tolerance)


def test_bonds_across_the_faces_of_a_cell():
    """A wrapped molecule is whole; the same molecule, unwrapped and stretched, is not sound."""
    atoms = Atoms("N2", [[0.2, 0, 0], [4.1, 0, 0]], cell=[[5, 0, 0], [2, 5, 0], [0, 0, 5]], pbc=True)  # 1.1 Å by the nearest image
    bonds = BondLengthDeviation.from_reference([atoms], 0.25)
    stretched = atoms.copy()
    stretched.positions[1, 0] -= 0.5
    moved = atoms.copy()
    moved.positions[1] += atoms.cell[1] - 2 * atoms.cell[0]
    verdict = bonds.judge(at_rest([atoms, stretched, moved]))
    torch.testing.assert_close(verdict.value, torch.tensor([0.0, 0.5, 0.0]).double(), atol=1e-12, rtol=0)


def test_contacts_are_for_molecules():
    """A chain that bonds to its own image is none."""
    atoms = Atoms("N2", [[0.2, 0, 0], [1.3, 0, 0]], cell=[2.4, 5, 5], pbc=True)
    with pytest.raises(ValueError, match="periodic and has none .*; see intermolecular"):
        criteria_from("contacts:0.25", Setting([atoms], 300.0))


# -- molecules that come close


def two_waters(distance, cell=None):
    """O...O at this distance along x, hydrogens turned away from each other."""
    first, second = molecule("H2O"), molecule("H2O")
    first.rotate(90, "y", center=first.positions[0])
    second.rotate(-90, "y", center=second.positions[0])
    if first.positions[1:, 0].mean() > first.positions[0, 0]:
        first, second = second, first
    second.positions += first.positions[0] - second.positions[0] + [distance, 0, 0]
    both = first + second
    if cell:
        both.set_cell(cell)
        both.pbc = True
    return both


@pytest.mark.parametrize("cell", [None, [12, 12, 12]])
def test_the_smallest_distance_of_two_molecules(cell):
    """Bonds within a molecule do not count; the two atoms are named; the severity is 1 at the distance given."""
    reference = [two_waters(2.9, cell)] * 3
    (criterion,) = criteria_from("intermolecular:2.4", Setting(reference, 300.0))
    frames = [two_waters(d, cell) for d in (2.9, 2.4, 2.0, 9.0 if cell is None else 5.5)]
    verdict = criterion.judge(at_rest(frames))
    torch.testing.assert_close(verdict.value[:3], torch.tensor([2.9, 2.4, 2.0]).double())
    torch.testing.assert_close(verdict.severity[:3], 2.4 / verdict.value[:3])
    assert verdict.atoms[:3].tolist() == [[0, 3]] * 3 and verdict.atoms[3].tolist() == [-1, -1]
    assert verdict.unstable.tolist() == [False, False, True, False]
    (by_itself,) = criteria_from("intermolecular", Setting(reference, 300.0))
    assert by_itself.smallest == pytest.approx(2.9 - 0.25)


def test_molecules_come_close_through_the_faces_of_a_cell():
    frames = [two_waters(9.5, [12, 12, 12])]
    (criterion,) = criteria_from("intermolecular:1.2", Setting([two_waters(6.0, [12, 12, 12])], 300.0))
    expected = min(
        frames[0].get_distance(i, j, mic=True) for i in range(3) for j in range(3, 6)
    )
    assert float(criterion.judge(at_rest(frames)).value[0]) == pytest.approx(expected)


def test_atoms_to_blame_in_frames():
    """Those of the criterion by which a frame is worst; all of one that is stable, or too low in energy. What remembers says nothing."""
    cell = [12.0, 12.0, 12.0]
    frames = [two_waters(2.9, cell), two_waters(2.0, cell), two_waters(2.9, cell), two_waters(2.9, cell)]
    frames[2].positions[4] += 2.0 * (frames[2].positions[4] - frames[2].positions[3])
    setting = Setting([two_waters(2.9, cell)] * 3, 300.0, timestep_fs=1.0, check_every_fs=5.0)
    criteria = criteria_from("bonds:0.5,intermolecular:2.4,energy,temperature,rdf:3.0", setting)
    criteria = [criterion.for_model(Harmonic()) for criterion in criteria]
    batch = AtomsBatch.from_atoms(frames)
    sound = float(at_rest(frames[:1]).potential_energy)
    energies = torch.tensor([sound, sound, sound, sound - 1000.0]).double()
    found = blamed(batch, criteria, energies, 300.0).view(4, 6).int().tolist()
    assert found == [[1] * 6, [1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [1] * 6]


def test_refuses_a_batch_of_several_molecules(criterion, aspirin):
    with pytest.raises(ValueError, match=r"got systems of \[20, 21\] atoms"):
        criterion.judge(at_rest([aspirin[0], aspirin[1][:20]]))


def test_criteria_by_name(aspirin):
    (made,) = criteria_from("bonds:0.25", Setting(aspirin, 500.0))
    assert made.tolerance == 0.25 and made.bonds.shape[1] == 21
    names = [c.name for c in criteria_from("contacts:0.3, energy", Setting(aspirin, 500.0), others="bonds:0.5,energy,temperature")]
    assert sorted(names) == ["bonds", "contacts", "energy", "temperature"]
    assert criteria_from("", Setting(aspirin, 500.0)) == []


@pytest.mark.parametrize(
    "spec, message",
    [
        ("torsions:3", "unknown criterion 'torsions'; known: angles, bonds, contacts"),
        ("bond:3", "did you mean 'bonds'"),
        ("bonds", "has no tolerance; write it as in bonds:0.25"),
        ("bonds:", "expected a number"),
        ("bonds:0.5,contacts:wide", "'contacts:wide' has tolerance='wide', expected a number"),
        ("bonds:-1", "must be a positive length"),
        ("contacts:inf", "must be a positive length"),
        ("energy:3", "takes no argument"),
        ("bonds:0.5,bonds:0.3", "given twice"),
        ("bonds:0.5,", "empty part"),
        ("intermolecular:1.2", "the reference is one molecule"),
    ],
)
def test_criteria_that_mean_nothing(aspirin, spec, message):
    with pytest.raises(ValueError, match=message):
        criteria_from(spec, Setting(aspirin, 500.0))


# -- statistics of failures

RATE = 0.4
"""Failures per ps in the simulated runs."""


def exponential_failures(n, end, rng, dropout=False):
    """Failure times at a constant rate, censored at the end of the run, or earlier at random."""
    times = rng.exponential(1 / RATE, n)
    ends = rng.uniform(0.2 * end, end, n) if dropout else np.full(n, end)
    return StabilityStatistics(np.minimum(times, ends), times <= ends)


@pytest.mark.parametrize("dropout", [False, True])
def test_many_exponential_failures_give_their_rate(dropout):
    """20 000 replicas: hazard, median ln 2 / rate and the whole curve within four standard errors."""
    sample = exponential_failures(20_000, 4.0, np.random.default_rng(0), dropout)
    assert sample.hazard_per_ps == pytest.approx(RATE, abs=4 * RATE / sample.n_failed**0.5)
    median, low, high = sample.median_ps()
    assert low < median < high
    # The error of a median is that of the fraction, at most 0.5/√n_at_risk, over the density RATE/2.
    at_risk = (sample.times_ps > median).sum()
    assert median == pytest.approx(np.log(2) / RATE, abs=4 * 0.5 / at_risk**0.5 / (RATE / 2))
    times, fraction, low, high = sample.survival()
    middle = times < 3.0
    error = 0.5 / (sample.times_ps > 3.0).sum() ** 0.5
    assert np.abs(fraction - np.exp(-RATE * times))[middle].max() < 4 * error
    assert (low <= fraction).all() and (fraction <= high).all() and (np.diff(fraction) <= 0).all()


@pytest.mark.parametrize("dropout", [False, True])
def test_intervals_of_few_replicas_cover_the_truth(dropout):
    """500 runs of 24 replicas; a coverage of 95 % has a standard error of 1 %.

    Garwood's interval covers at least its level. Those of Kaplan and Meier are asymptotic and miss a little more often.
    """
    rng, covered = np.random.default_rng(1), {"hazard": 0, "survival": 0, "median": 0}
    n_runs, truth = 500, np.log(2) / RATE
    for _ in range(n_runs):
        sample = exponential_failures(24, 4.0, rng, dropout)
        low, high = sample.hazard_interval()
        covered["hazard"] += low <= RATE <= high
        times, _, low, high = sample.survival()
        at = np.searchsorted(times, 1.0, side="right") - 1
        covered["survival"] += low[at] <= np.exp(-RATE * 1.0) <= high[at]
        _, low, high = sample.median_ps()
        covered["median"] += (low is not None and low <= truth) and (high is None or truth <= high)
    for name, count in covered.items():
        assert 0.92 < count / n_runs < 0.99, name


def test_kaplan_meier_by_hand():
    """Failures at 1 and 3 ps, one replica lost at 2, one alive at 4: 3/4, then 3/4 · 1/2."""
    sample = StabilityStatistics(np.array([3.0, 1.0, 2.0, 4.0]), np.array([True, True, False, False]))
    times, fraction, low, high = sample.survival()
    np.testing.assert_allclose(times, [0, 1, 2, 3, 4])
    np.testing.assert_allclose(fraction, [1, 0.75, 0.75, 0.375, 0.375])
    assert sample.median_ps()[0] == 3.0
    assert sample.hazard_per_ps == pytest.approx(2 / 10)
    # Greenwood at 1 ps: θ = log(-log S) with standard error √(1/(4·3)) / |log S|.
    theta, error = np.log(-np.log(0.75)), (1 / 12) ** 0.5 / abs(np.log(0.75))
    np.testing.assert_allclose(low[1], np.exp(-np.exp(theta + 1.959964 * error)), rtol=1e-6)
    np.testing.assert_allclose(high[1], np.exp(-np.exp(theta - 1.959964 * error)), rtol=1e-6)


@pytest.mark.parametrize("n", [2, 24, 38, 44, 128])
def test_median_where_half_outlive_the_run(n):
    """The time at which half have failed, whatever the product of fractions rounds to."""
    times = np.minimum(np.arange(1.0, n + 1), n / 2 + 0.5)
    sample = StabilityStatistics(times, times <= n / 2)
    assert sample.median_ps()[0] == n / 2


def test_nobody_fails():
    """The upper end of Garwood's interval for no event is -ln 0.025 over the time observed."""
    sample = StabilityStatistics(np.full(8, 5.0), np.zeros(8, dtype=bool))
    assert sample.hazard_per_ps == 0.0 and sample.n_failed == 0
    assert sample.hazard_interval() == (0.0, pytest.approx(-np.log(0.025) / 40.0))
    assert sample.median_ps() == (None, None, None)
    times, fraction, low, high = sample.survival()
    assert times.tolist() == [0.0, 5.0]
    assert fraction.tolist() == low.tolist() == high.tolist() == [1.0, 1.0]


def test_all_fail_at_once():
    sample = StabilityStatistics(np.full(8, 0.01), np.ones(8, dtype=bool))
    assert sample.hazard_per_ps == pytest.approx(100.0)
    assert sample.median_ps() == (0.01, 0.01, None)
    times, fraction, low, high = sample.survival()
    assert fraction.tolist() == [1.0, 0.0] and low.tolist() == [1.0, 0.0] and high.tolist() == [1.0, 1.0]


def test_band_is_monotonic_and_whole_to_both_ends():
    """Losses before the first failure do not open the band, and the last failure does not either."""
    times = np.array([0.5, 0.7, 1.0, 1.4, 2.0, 2.2, 2.5, 3.0, 3.3, 3.9])
    sample = StabilityStatistics(times, times > 0.8)
    curves = sample.survival()[1:]
    for curve in curves:
        assert np.isfinite(curve).all() and (np.diff(curve) <= 0).all()
    fraction, low, high = curves
    assert low[:3].tolist() == [1.0, 1.0, 1.0]
    assert fraction[-1] == 0.0 and high[-1] == high[-2] < 1.0
    assert sample.median_ps()[1] >= 1.0


def test_statistics_of_a_run():
    """Steps become ps; who has not failed counts to the end of the run."""
    failures = Failures.none(AtomsBatch.from_atoms([Atoms("H")] * 4))
    assert failures.fraction == 0.0 and not failures.failed.any()
    failures = replace(failures, step=torch.tensor([200, -1, 1000, -1]))
    sample = stability_statistics(failures, n_steps=4000, timestep=0.5 * units.fs)
    np.testing.assert_allclose(sample.times_ps, [0.1, 2.0, 0.5, 2.0])
    assert sample.failed.tolist() == [True, False, True, False]
    assert sample.stable_replica_ps == pytest.approx(4.6)
    assert failures.fraction == 0.5
