"""h(r): normalisation, limits, invariances, and what it refuses."""

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.stats import norm

from stabie_ase.observables import OBSERVABLES, DistanceDistribution
from stabie_ase.observables.distances import _chunks
from stabie_ase.structures.batch import AtomsBatch


def molecules(n_frames=4, n_atoms=6, seed=0):
    """Random clouds of atoms a few Å wide."""
    rng = np.random.default_rng(seed)
    return [Atoms(f"C{n_atoms}", rng.uniform(0.0, 4.0, (n_atoms, 3))) for _ in range(n_frames)]


def diatomic(distance):
    return AtomsBatch.from_atoms(Atoms("N2", [[0.3, -0.2, 0.1], [0.3, -0.2, 0.1 + distance]]))


def integral(observable, values):
    """∫ h(r) dr for every frame."""
    return values @ observable.weights


def test_integrates_to_one():
    """What lies beyond five standard deviations, 6e-7, is left out."""
    observable = DistanceDistribution(r_max=9.0)
    torch.testing.assert_close(
        integral(observable, observable(AtomsBatch.from_atoms(molecules()))), torch.ones(4).double(), rtol=0, atol=1e-6
    )


def test_is_a_histogram_without_smearing():
    observable = DistanceDistribution(r_max=8.0, bin_width=0.1, smearing=1e-9)
    frames = molecules()
    for atoms, values in zip(frames, observable(AtomsBatch.from_atoms(frames))):
        distances = atoms.get_all_distances()[np.triu_indices(len(atoms), 1)]
        expected, _ = np.histogram(distances, bins=80, range=(0.0, 8.0), density=True)
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("bin_width, smearing", [(0.02, 0.02), (0.05, 0.02), (0.02, 0.1)])
@pytest.mark.parametrize("distance", [1.1, 1.237, 6.6])
def test_diatomic_is_a_gaussian(bin_width, smearing, distance):
    """A bin holds the mean over its width of a normalised Gaussian at the distance."""
    observable = DistanceDistribution(r_max=8.0, bin_width=bin_width, smearing=smearing)
    values = observable(diatomic(distance))[0].numpy()
    edges = bin_width * np.arange(observable.n_bins + 1)
    expected = np.diff(norm.cdf(edges, distance, smearing)) / bin_width
    near = np.abs(observable.grid.numpy() - distance) < 5 * smearing
    np.testing.assert_allclose(values[near], expected[near], rtol=0, atol=1e-9)
    np.testing.assert_allclose(values[~near], expected[~near], rtol=0, atol=1e-4)


def test_what_lies_beyond_the_range_is_missing():
    observable = DistanceDistribution(r_max=5.0)
    for distance, share in [(4.0, 1.0), (5.0, 0.5), (5.3, 0.0), (1e5, 0.0), (1e30, 0.0), (np.inf, 0.0)]:
        assert float(integral(observable, observable(diatomic(distance)))) == pytest.approx(share, abs=1e-6)
    triangle = AtomsBatch.from_atoms(Atoms("N3", [[0, 0, 0], [0, 0, 1], [0, 0, 7]]))  # distances 1, 6, 7
    assert float(integral(observable, observable(triangle))) == pytest.approx(1 / 3, abs=1e-6)


def test_is_the_same_for_a_reference_and_for_a_model():
    """One function, whatever made the frames: mean over ASE frames = mean over tensors, in either precision."""
    frames = molecules(10)
    observable = DistanceDistribution.from_reference(frames)
    batch = AtomsBatch.from_atoms(frames)
    reference = torch.stack([observable(AtomsBatch.from_atoms(atoms))[0] for atoms in frames]).mean(dim=0)
    torch.testing.assert_close(observable(batch).mean(dim=0), reference, rtol=0, atol=1e-12)
    single = observable(batch.to(dtype=torch.float32))
    assert single.dtype == torch.float64
    # Positions rounded by 1e-7 Å move a Gaussian of slope 0.24/σ² by 1e-4 at most, in one of 15 distances.
    torch.testing.assert_close(single.mean(dim=0), reference, rtol=0, atol=2e-4)


def test_does_not_see_order_place_or_orientation():
    rng = np.random.default_rng(1)
    observable, atoms = DistanceDistribution(r_max=9.0), molecules(1)[0]
    expected = observable(AtomsBatch.from_atoms(atoms))
    changed = atoms[rng.permutation(len(atoms))]
    changed.rotate(50.0, (1, 2, 3))
    changed.positions = changed.positions * [1, 1, -1] + rng.normal(size=3)
    torch.testing.assert_close(observable(AtomsBatch.from_atoms(changed)), expected, rtol=0, atol=1e-9)


def test_chunks_give_the_same():
    batch, observable = AtomsBatch.from_atoms(molecules(7)), DistanceDistribution(r_max=9.0)
    parts = _chunks(batch, n_distances=31)
    assert [part.n_systems for part in parts] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([observable(part) for part in parts]), observable(batch))


def test_numbers_that_are_not_finite_stay_in_their_frame():
    frames, observable = molecules(3), DistanceDistribution(r_max=9.0)
    expected = observable(AtomsBatch.from_atoms(frames))
    frames[1].positions[2, 0] = np.nan
    values = observable(AtomsBatch.from_atoms(frames))
    assert torch.equal(values[[0, 2]], expected[[0, 2]])
    assert torch.isfinite(values).all()
    assert float(integral(observable, values)[1]) == pytest.approx(10 / 15, abs=1e-6)  # five of 15 distances are lost


def test_grid_and_weights():
    frames = molecules()
    longest = max(atoms.get_all_distances().max() for atoms in frames)
    observable = DistanceDistribution.from_reference(frames, margin=1.5, bin_width=0.05)
    assert longest + 1.5 <= observable.r_max < longest + 2.5
    assert observable.grid.shape == observable.weights.shape == (observable.n_bins,)
    assert observable(AtomsBatch.from_atoms(frames)).shape == (4, observable.n_bins)
    torch.testing.assert_close(observable.grid[:2], torch.tensor([0.025, 0.075]).double())
    assert OBSERVABLES[observable.name] is DistanceDistribution


def test_loss_does_not_depend_on_the_number_of_bins():
    """Σ c (h - h')² is an integral: half the bin width changes it by the discretisation only."""

    def loss(bin_width):
        observable = DistanceDistribution(r_max=4.0, bin_width=bin_width, smearing=0.1)
        difference = observable(diatomic(1.1))[0] - observable(diatomic(1.3))[0]
        return float((observable.weights * difference.square()).sum())

    exact = (1 - np.exp(-(0.2**2) / (4 * 0.1**2))) / (0.1 * np.sqrt(np.pi))
    assert loss(0.01) == pytest.approx(exact, rel=2e-3)
    assert loss(0.005) == pytest.approx(exact, rel=5e-4)


def in_a_box(frames):
    for atoms in frames:
        atoms.set_cell([10, 10, 10])
        atoms.pbc = [False, False, True]
    return frames


@pytest.mark.parametrize(
    "frames, message",
    [
        (in_a_box(molecules(2)), "isolated molecules, but the reference is periodic"),
        (molecules(1, 4) + molecules(1, 5), "one molecule of two atoms or more"),
        ([Atoms("CO", [[0, 0, 0], [0, 0, 1]]), Atoms("OC", [[0, 0, 0], [0, 0, 1]])], "in one atom order"),
        ([Atoms("H")], "two atoms or more"),
    ],
)
def test_refuses_a_reference_without_meaning(frames, message):
    with pytest.raises(ValueError, match=message):
        DistanceDistribution.from_reference(frames)


def test_refuses_a_batch_of_several_molecules():
    batch = AtomsBatch.from_atoms(molecules(1, 4) + molecules(1, 6))
    with pytest.raises(ValueError, match=r"frames of one molecule, got systems of \[4, 6\] atoms"):
        DistanceDistribution(r_max=9.0)(batch)


@pytest.mark.parametrize("settings", [{"r_max": 0.01}, {"r_max": 5.0, "bin_width": 0.0}, {"r_max": 5.0, "smearing": -0.1}])
def test_refuses_a_grid_without_meaning(settings):
    with pytest.raises(ValueError, match="positive bin width and smearing"):
        DistanceDistribution(**settings)
