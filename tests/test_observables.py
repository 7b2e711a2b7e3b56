"""h(r): normalisation, limits, invariances, and what it refuses."""

from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.geometry import find_mic
from matscipy.neighbours import neighbour_list
from scipy.stats import norm

from stabie_ase.observables import BondLengths, DistanceDistribution, RadialDistribution, Target, default_observable, observables_from
from stabie_ase.observables.averages import noise_floor
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import in_parts, nearest_images, pair_distances
from stabie_ase.structures.neighbourhoods import nearest
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups, Topology


def molecules(n_frames=4, n_atoms=6, seed=0):
    """Random clouds of atoms a few Å wide."""
    rng = np.random.default_rng(seed)
    return [Atoms(f"C{n_atoms}", rng.uniform(0.0, 4.0, (n_atoms, 3))) for _ in range(n_frames)]


def diatomic(distance):
    return AtomsBatch.from_atoms(Atoms("N2", [[0.3, -0.2, 0.1], [0.3, -0.2, 0.1 + distance]]))


def integral(observable, values):
    """∫ h(r) dr for every frame."""
    return values @ observable.measure


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
    near = np.abs(observable.axis.values.numpy() - distance) < 5 * smearing
    np.testing.assert_allclose(values[near], expected[near], rtol=0, atol=1e-9)
    np.testing.assert_allclose(values[~near], expected[~near], rtol=0, atol=1e-4)


def test_what_lies_beyond_the_range_is_missing():
    observable = DistanceDistribution(r_max=5.0)
    for distance, fraction in [(4.0, 1.0), (5.0, 0.5), (5.3, 0.0), (1e5, 0.0), (1e30, 0.0), (np.inf, 0.0)]:
        assert float(integral(observable, observable(diatomic(distance)))) == pytest.approx(fraction, abs=1e-6)
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
    parts = list(in_parts(batch, 15, at_once=31))
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
    assert observable.axis.values.shape == observable.measure.shape == (observable.n_bins,)
    assert observable(AtomsBatch.from_atoms(frames)).shape == (4, observable.n_bins)
    torch.testing.assert_close(observable.axis.values[:2], torch.tensor([0.025, 0.075]).double())
    named = observables_from("hr:O-H,r_max=6", Setting([molecule("CH3CH2OH")], 300.0))[0]
    assert named.elements == (8, 1) and (named.name, named.subject, named.label) == ("hr:O-H", "hr:H-O", "h(r), O-H (1/Å)")
    named = observables_from("hr,r_max=6,bin_width=0.05", Setting(frames, 300.0))
    assert named == [DistanceDistribution(r_max=6.0, bin_width=0.05)] and named[0].name == "hr"


def test_loss_does_not_depend_on_the_number_of_bins():
    """Σ c (h - h')² is an integral: half the bin width changes it by the discretisation only."""

    def loss(bin_width):
        observable = DistanceDistribution(r_max=4.0, bin_width=bin_width, smearing=0.1)
        difference = observable(diatomic(1.1))[0] - observable(diatomic(1.3))[0]
        return float((observable.measure * difference.square()).sum())

    exact = (1 - np.exp(-(0.2**2) / (4 * 0.1**2))) / (0.1 * np.sqrt(np.pi))
    assert loss(0.01) == pytest.approx(exact, rel=2e-3)
    assert loss(0.005) == pytest.approx(exact, rel=5e-4)


def in_a_box(frames):
    for atoms in frames:
        atoms.set_cell([10, 10, 10])
        atoms.pbc = [False, False, True]
    return frames


def test_h_of_r_of_two_elements_is_that_of_their_pairs():
    """Beside histograms of numpy over all distances of the pairs, as sharp as bins allow; together they are h(r), by numbers of pairs."""
    frames = [molecule("CH3CH2OH") for _ in range(3)]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=k)
    batch, numbers = AtomsBatch.from_atoms(frames), frames[0].numbers
    first, second = np.triu_indices(len(numbers), 1)
    whole, together, n_pairs = DistanceDistribution(r_max=9.0), 0.0, 0
    for a, b in combinations_with_replacement(sorted(set(numbers.tolist())), 2):
        chosen = ((numbers[first] == a) & (numbers[second] == b)) | ((numbers[first] == b) & (numbers[second] == a))
        if not chosen.any():
            with pytest.raises(ValueError, match="no .* pairs of atoms in a molecule"):
                DistanceDistribution(r_max=9.0, elements=(a, b))(batch)
            continue
        found = DistanceDistribution(r_max=9.0, elements=(a, b))(batch)
        assert torch.equal(found, DistanceDistribution(r_max=9.0, elements=(b, a))(batch))
        sharp = DistanceDistribution(r_max=9.0, bin_width=0.3, smearing=1e-6, elements=(a, b))
        for k, atoms in enumerate(frames):
            r = atoms.get_all_distances()[first, second][chosen]
            expected = np.histogram(r, bins=30, range=(0.0, 9.0))[0] / (len(r) * 0.3)
            np.testing.assert_allclose(sharp(batch)[k], expected, atol=1e-9)
        together, n_pairs = together + int(chosen.sum()) * found, n_pairs + int(chosen.sum())
    torch.testing.assert_close(together / n_pairs, whole(batch))


def test_h_of_r_of_a_liquid_is_that_of_its_molecules_wherever_they_cross_the_cell():
    """The mean over the molecules as if each were alone, whatever lies between them."""
    box, alone = Atoms(cell=[9.0, 9.0, 9.0], pbc=True), []
    for k, at in enumerate([(0.1, 0.2, 8.9), (4.5, 4.4, 0.1), (1.0, 5.0, 5.0), (6.0, 8.8, 4.0)]):
        water = molecule("H2O")
        water.set_distance(0, 1, 0.9 + 0.05 * k)
        water.rotate(40.0 * k, (1, k, 2))
        water.translate(np.array(at) - water.positions[0])
        alone.append(water)
        box += water
    box.wrap()
    setting = Setting([box], 300.0)
    assert default_observable(setting).startswith("hr,")
    found = observables_from("hr", setting)[0]
    assert found.r_max == 4.0 and found(AtomsBatch.from_atoms([box])).shape == (1, 200)
    by_hand = replace(found, molecule=None)(AtomsBatch.from_atoms(alone))
    frames = AtomsBatch.from_atoms([box, box])
    own = found(frames, Groups.molecules(frames, setting.topology))
    torch.testing.assert_close(own, by_hand.repeat(2, 1))
    torch.testing.assert_close(found(frames), by_hand.mean(dim=0).expand(2, -1))
    with pytest.raises(ValueError, match="no pairs of atoms in a molecule"):
        DistanceDistribution.from_reference([box], molecule=torch.arange(12))


@pytest.mark.parametrize(
    "frames, message",
    [
        (in_a_box(molecules(2)), "the reference is periodic and no liquid of molecules"),
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


@pytest.mark.parametrize("settings, told", [
    ({"r_max": 0.01}, "r_max > bin_width > 0"),
    ({"r_max": 5.0, "bin_width": 0.0}, "r_max > bin_width > 0"),
    ({"r_max": float("inf")}, "at most 100000 bins, got r_max=inf"),
    ({"r_max": float("nan")}, "got r_max=nan"),
    ({"r_max": 5.0, "bin_width": 1e-9}, "at most 100000 bins"),
    ({"r_max": 5.0, "smearing": -0.1}, "a smearing above 0"),
    ({"r_max": 5.0, "smearing": 1e9}, "a smearing above 0 and below its range of 5 Å"),
])  # fmt: skip
def test_refuses_a_grid_without_meaning(settings, told):
    with pytest.raises(ValueError, match=told):
        DistanceDistribution(**settings)


# -- nearest images


SHAPES = {
    "cubic": np.diag([9.0, 9.0, 9.0]),
    "skewed": np.array([[9.0, 0, 0], [4.0, 8.0, 0], [-3.0, 2.5, 8.5]]),
    "slab": np.array([[9.0, 0, 0], [3.0, 8.0, 0], [0, 0, 0]]),
    "hexagonal, 60 degrees": np.array([[5.1, 0, 0], [2.55, 4.417, 0], [0, 0, 0]]),
    "rhombohedral": 4.0 * np.array([[0, 1.0, 1.0], [1.0, 0, 1.0], [1.0, 1.0, 0]]),
    "far from reduced": np.array([[6.0, 0, 0], [31.0, 7.0, 0], [-22.0, 40.0, 8.0]]),
    "chain": np.array([[5.0, 0, 0], [0, 0, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_images_are_those_of_ase(shape):
    """Whatever their length, one batch of a cell and of the same a little deformed."""
    rng, cell = np.random.default_rng(0), SHAPES[shape]
    pbc = cell.any(axis=1)
    cells = [cell, cell @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3)))]
    vectors = rng.normal(size=(2, 300, 3)) * rng.uniform(0.0, 30.0, (2, 300, 1))
    batch = AtomsBatch.from_atoms([Atoms("He", cell=cell, pbc=pbc) for cell in cells])
    found = nearest_images(torch.as_tensor(vectors), batch).numpy()
    for k, cell in enumerate(cells):
        expected, lengths = find_mic(vectors[k], cell, pbc)
        np.testing.assert_allclose(np.linalg.norm(found[k], axis=1), lengths, atol=1e-10)
        whole = np.linalg.lstsq(cell[pbc].T, (vectors[k] - found[k]).T, rcond=None)[0]
        np.testing.assert_allclose(whole, whole.round(), atol=1e-9)
        np.testing.assert_allclose(whole.T.round() @ cell[pbc], vectors[k] - found[k], atol=1e-9)


def test_nearest_images_of_what_has_exploded_are_no_error():
    cells = [np.diag([9.0] * 3), np.full((3, 3), np.nan), np.diag([1e300] * 3)]
    batch = AtomsBatch.from_atoms([Atoms("He", cell=SHAPES["skewed"], pbc=True)] * 3).replace(cells=torch.tensor(np.array(cells)))
    vectors = torch.tensor([[[8.0, 0.0, 0.0], [np.nan] * 3, [np.inf] * 3, [1e30] * 3]], dtype=torch.float64).repeat(3, 1, 1)
    np.testing.assert_allclose(nearest_images(vectors, batch)[0, 0], [-1.0, 0.0, 0.0], atol=1e-12)


def test_bonds_across_a_small_hexagonal_cell():
    """Rounding fractions of a cell of 60° takes an image at 4.4 Å for the neighbour at 2.55 Å."""
    slab = fcc111("Cu", (2, 2, 1), vacuum=5.0)
    pairs = torch.triu_indices(4, 4, offset=1)
    np.testing.assert_allclose(pair_distances(AtomsBatch.from_atoms(slab), pairs)[0], 3.61 / np.sqrt(2.0), atol=1e-6)


# -- bond lengths


def water_box(n=3, seed=0, wrap=True):
    """n³ molecules at random orientations on a lattice."""
    rng, box = np.random.default_rng(seed), Atoms(cell=[3.1 * n] * 3, pbc=True)
    for k in np.ndindex(n, n, n):
        water = molecule("H2O")
        water.euler_rotate(*rng.uniform(0.0, 360.0, 3))
        water.positions += 3.1 * np.array(k) + rng.normal(scale=0.02, size=(3, 3))
        box += water
    if wrap:
        box.wrap()
    return box


def test_bond_lengths_across_the_faces_of_a_cell():
    frames = [water_box(seed=k) for k in range(3)]
    setting = Setting(frames, 300.0)
    assert setting.topology.molecule.tolist() == [k // 3 for k in range(81)]
    lengths = BondLengths(setting.topology, (8, 1))
    assert lengths.name == "bond-length:O-H" and lengths.axis.names[:2] == ("O0-H1", "O0-H2") and len(lengths.axis.names) == 54
    expected = [[atoms.get_distance(i, j, mic=True) for i, j in lengths.bonds.T.tolist()] for atoms in frames]
    np.testing.assert_allclose(lengths(AtomsBatch.from_atoms(frames)), expected, atol=1e-12)
    torch.testing.assert_close(lengths.measure.sum(), torch.tensor(1.0).double())


def alcohols(n=3, seed=0):
    """n³ ethanols in a cell, wrapped."""
    rng, box = np.random.default_rng(seed), Atoms(cell=[5.5 * n] * 3, pbc=True)
    for k in np.ndindex(n, n, n):
        ethanol = molecule("CH3CH2OH")
        ethanol.euler_rotate(*rng.uniform(0.0, 360.0, 3))
        ethanol.positions += 5.5 * np.array(k) + rng.normal(scale=0.03, size=(9, 3))
        box += ethanol
    box.wrap()
    return box


def test_bond_lengths_of_molecules_that_are_alike_are_means_by_kind():
    """Of a system and of any group of its molecules, from ASE's distances; their mean over molecules is that of the system."""
    frames = [alcohols(2, seed) for seed in range(3)]
    setting, batch = Setting(frames, 300.0), AtomsBatch.from_atoms(frames)
    (lengths,) = observables_from("bond-length", setting)
    assert sorted(lengths.axis.names) == ["C-C", "C-H", "O-C", "O-H"]
    groups = nearest(batch, setting.topology, 2)
    symbols, topology = frames[0].symbols, setting.topology
    for kind, name in enumerate(lengths.axis.names):
        bonds = [(i, j) for i, j in topology.bonds.T.tolist() if sorted(f"{symbols[i]}-{symbols[j]}") == sorted(name)]
        by_hand = torch.tensor([[atoms.get_distance(i, j, mic=True) for i, j in bonds] for atoms in frames]).double()
        torch.testing.assert_close(lengths(batch)[:, kind], by_hand.mean(dim=1), rtol=1e-6, atol=0)
        some, found = torch.tensor([i for i, _ in bonds]), lengths(batch, groups)[:, kind]
        for group in (0, 7, 8, 23):
            members = batch.index_in_system[groups.atoms[groups.group == group]]
            inside = torch.isin(some, members)
            assert float(found[group]) == pytest.approx(float(by_hand[group // 8, inside].mean()), rel=1e-6)
    whole, molecules = (Target.from_frames(lengths, frames, of) for of in (Groups.systems, partial(Groups.molecules, topology=topology)))
    torch.testing.assert_close(molecules.value, whole.value)
    assert molecules.samples.shape == (24, 4) and molecules.n_frames == 3
    (single,) = observables_from("bond-length:O-H", setting)
    assert single.axis.names == ("O-H",) and torch.equal(single.values(batch), lengths(batch)[:, [lengths.axis.names.index("O-H")]])


def test_a_group_without_a_bond_of_a_kind_is_refused():
    frames = [alcohols(2)] * 2
    (lengths,) = observables_from("bond-length", Setting(frames, 300.0))

    def methyls(batch):
        return Groups(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0]))

    with pytest.raises(ValueError, match="bond-length is to be of groups .* have no O-. bond; try larger ones, or global"):
        Target.from_frames(lengths, frames, methyls)


def test_groups_of_one_frame_are_one_piece_of_evidence():
    """The floor of a mean over molecules is that of the frames' means, whatever their number; so is that of g(r)."""
    frames = [water_box(2, seed) for seed in range(12)]
    topology = Topology.from_frames(frames)
    molecules = partial(Groups.molecules, topology=topology)
    for text in ("bond-length:O-H", "rdf:O-H,r_max=3,bin_width=0.2"):
        (observable,) = observables_from(text, Setting(frames, 300.0))
        whole, local = (Target.from_frames(observable, frames, of) for of in (Groups.systems, molecules))
        torch.testing.assert_close(local.value, whole.value)
        assert local.floor == pytest.approx(whole.floor) and local.n_frames == whole.n_frames == 12
        assert len(local.samples) == 8 * len(whole.samples) == 96


def test_bonds_of_two_elements_are_chosen():
    setting = Setting([molecule("CH3CH2OH")] * 2, 300.0)
    names = {text: observables_from(f"bond-length:{text}", setting)[0].axis.names for text in ("C-C", "O-H", "H-O", "C-H")}
    assert len(names["C-C"]) == 1 and names["O-H"] == names["H-O"] and len(names["C-H"]) == 5
    assert len(observables_from("bond-length", setting)[0].axis.names) == 8


@pytest.mark.parametrize(("kind", "frames"), [("bond-length", [molecule("CH3CH2OH")] * 2), ("rdf", [water_box(n=2)] * 2)])
def test_two_elements_are_named_in_the_order_in_which_they_are_asked_for(kind, frames):
    setting, pairs = Setting(frames, 300.0), ("O-H", "H-O")
    found = [observables_from(f"{kind}:{pair}", setting)[0] for pair in pairs]
    assert [one.name for one in found] == [f"{kind}:{pair}" for pair in pairs]
    batch = AtomsBatch.from_atoms(frames)
    torch.testing.assert_close(found[0](batch), found[1](batch))
    with pytest.raises(ValueError, match=f"'{kind}:H-O' is given twice .*, as '{kind}:O-H' too"):
        observables_from([f"{kind}:{pair}" for pair in pairs], setting)


# -- radial distribution functions


def gas(n_frames, symbols, seed=0):
    rng = np.random.default_rng(seed)
    cell = np.array([[11.0, 0, 0], [2.0, 10.0, 0], [-1.0, 2.0, 12.0]])
    return [Atoms(symbols, rng.uniform(0, 1, (len(Atoms(symbols)), 3)) @ cell, cell=cell, pbc=True) for _ in range(n_frames)]


@pytest.mark.parametrize("pair", ["Ar-Ar", "Ar-Ne", "Ne-Ar"])
def test_an_ideal_gas_has_a_radial_distribution_of_one(pair):
    """Within 4.5 standard errors over frames, at any distance, also beyond half the cell."""
    frames = gas(400, "Ar12Ne8")
    (rdf,) = observables_from(f"rdf:{pair},r_max=9,bin_width=0.5", Setting(frames, 300.0))
    values = rdf(AtomsBatch.from_atoms(frames))
    error = values.std(dim=0) / len(frames) ** 0.5
    assert ((values.mean(dim=0) - 1.0).abs() < 4.5 * error + 1e-12).all()
    assert float(error[4:].max()) < 0.05


@pytest.mark.parametrize("pair", ["Ar-Ar", "Ar-Ne"])
def test_radial_distributions_are_counted_as_by_matscipy(pair):
    frames = gas(3, "Ar20Ne11", seed=1)
    (rdf,) = observables_from(f"rdf:{pair},r_max=4.2,bin_width=0.1", Setting(frames, 300.0))
    edges = np.linspace(0.0, 4.2, 43)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    for atoms, values in zip(frames, rdf(AtomsBatch.from_atoms(frames))):
        i, j, d = neighbour_list("ijd", atoms, 4.2)
        symbols = np.array(atoms.get_chemical_symbols())
        a, b = pair.split("-")
        chosen = (symbols[i] == a) & (symbols[j] == b)
        n_a, n_b = (symbols == a).sum(), (symbols == b).sum() - (a == b)
        expected = np.histogram(d[chosen], edges)[0] / shells * atoms.get_volume() / (n_a * n_b)
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_coordination_numbers_of_a_crystal():
    """N_b/V ∫ 4π r² g(r) dr counts 12, 6 and 24 neighbours in the shells of fcc."""
    crystal = bulk("Ar", "fcc", a=5.3, cubic=True).repeat(3)
    rdf = RadialDistribution((18, 18), r_max=7.0, bin_width=0.05)
    values = rdf(AtomsBatch.from_atoms(crystal))[0].numpy()
    edges = 0.05 * np.arange(141)
    counts = np.cumsum(values * 4 / 3 * np.pi * np.diff(edges**3)) * (len(crystal) - 1) / crystal.get_volume()
    for r, expected in ((3.9, 12), (5.5, 18), (6.7, 42)):
        assert counts[round(r / 0.05)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("frame, reach", [
    (bulk("Ni", "hcp", a=2.49, c=4.07) * (2, 2, 2), 5.0),  # half its width is 2.16 Å, its nearest neighbours are at 2.47
    (bulk("Ar", a=5.26, cubic=True) * (2, 2, 2), 5.26),
    (bulk("Ar", a=5.26, cubic=True) * (4, 4, 4), 8.0),
])  # fmt: skip
def test_a_range_that_nobody_gave_holds_the_first_neighbours(frame, reach):
    (rdf,) = observables_from("rdf", Setting([frame], 80.0))
    assert rdf.r_max == pytest.approx(reach)
    assert float(rdf(AtomsBatch.from_atoms(frame)).max()) > 5.0


def test_each_frame_has_its_own_volume():
    crystals = [bulk("Ar", "fcc", a=a, cubic=True).repeat(2) for a in (5.3, 5.6)]
    rdf = RadialDistribution((18, 18), r_max=5.0, bin_width=0.1)
    together = rdf(AtomsBatch.from_atoms(crystals))
    for k, crystal in enumerate(crystals):
        assert torch.equal(together[k], rdf(AtomsBatch.from_atoms(crystal))[0])


def test_molecules_as_groups():
    """The mean over groups, each weighted by its atoms, is that of the system; groups that overlap carry weights to atoms."""
    frames = [water_box(n=2, seed=k) for k in range(2)]
    batch, topology = AtomsBatch.from_atoms(frames), Topology.from_frames(frames)
    groups = Groups.molecules(batch, topology)
    assert groups.n_groups == 16 and groups.system.tolist() == [0] * 8 + [1] * 8
    rdf = RadialDistribution((8, 1), r_max=3.0, bin_width=0.1)
    torch.testing.assert_close(rdf(batch, groups).view(2, 8, -1).mean(dim=1), rdf(batch))
    own = groups.batch(batch)
    assert own.sizes == [3] * 16 and torch.equal(own.numbers.view(16, 3), torch.tensor([8, 1, 1]).expand(16, 3))
    single = BondLengths(Topology.from_frames([molecule("H2O")] * 2))
    whole = BondLengths(topology)(batch).view(16, 2)
    torch.testing.assert_close(single(batch, groups), whole)
    weights = torch.arange(16.0)
    assert torch.equal(groups.spread(weights, batch), weights.repeat_interleave(3))
    overlapping = Groups(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0]))
    assert overlapping.spread(torch.tensor([1.0, 10.0]), batch)[:4].tolist() == [1.0, 11.0, 10.0, 0.0]
    assert torch.equal(Groups.systems(batch).batch(batch).positions, batch.positions)


# -- specifications


def test_weights_of_observables():
    """By default one; a copy has another, and the target has that of its observable."""
    frames = [molecule("CH3CH2OH")] * 2
    found = observables_from("hr,r_max=5,weight=2.5,bond-length:C-H", Setting(frames, 300.0))
    assert [one.weight for one in found] == [2.5, 1.0] and [one.describe() for one in found] == ["hr (weight 2.5)", "bond-length:C-H"]
    assert [Target.from_frames(one, frames).weight for one in found] == [2.5, 1.0]
    assert found[0].r_max == 5.0 and found[0].name == "hr" and found[1].weighted(3.0).weight == 3.0 and found[1].weight == 1.0
    with pytest.raises(ValueError, match="a weight is -1, expected a positive finite number"):
        found[0].weighted(-1.0)


REFUSED = {
    "h": "unknown observable 'h'; did you mean 'hr'? known: adf, angle, bond-length, .*, rdf, stress, or FILE.py:CLASS",
    "hr,r_mx=5": "'hr,r_mx=5' has an unknown option 'r_mx'; did you mean 'r_max'?",
    "hr,r_max=far": "r_max='far', expected a number",
    "hr:O-O": "the reference has no O-O pairs of atoms in a molecule",
    "hr:Na-O": "'hr:Na-O': the reference has no Na, only",
    "hr:O": "expected two elements, as O-H",
    "hr,hr": "observable 'hr' is given twice",
    "": "no observable is given",
    "hr,weight=0": "'hr,weight=0' has weight='0', expected a positive finite number",
    "hr,weight=-1": "weight='-1', expected a positive finite number",
    "hr,weight=inf": "weight='inf', expected a positive finite number",
    "hr,weight=nan": "weight='nan', expected a positive finite number",
    "hr,weight=much": "weight='much', expected a positive finite number",
    "hr,weight=1,weight=2": "gives weight twice",
    "hr,wieght=2": "has an unknown option 'wieght'; did you mean 'weight'?",
    "bond-length:C-H,wight=2": "did you mean 'weight'? known: elements, weight",
    "weight=2": "begins with an option",
    "hr,,rdf": "empty part",
    "r_max=5": "begins with an option",
    "bond-length:O-X-H": "expected two elements, as O-H",
    "bond-length:O-Si": "no O-Si bonds",
    "rdf:O-O": "periodic in all directions",
    "nowhere.py:Thing": "nowhere.py: no such file",
    "os.path:Thing": "os.path has no Thing",
    "no.such.module:Thing": "cannot be imported: ModuleNotFoundError",
}


@pytest.mark.parametrize("text", REFUSED)
def test_specifications_that_say_nothing(text):
    with pytest.raises(ValueError, match=REFUSED[text].replace("?", r"\?")):
        observables_from(text, Setting([molecule("CH3CH2OH")] * 2, 300.0))


def test_an_observable_in_a_file_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from stabie_ase.observables import Axis, Observable\n"
        "class Gyration(Observable):\n"
        "    name, label, axis = 'gyration', 'R (Å)', Axis.of_names('', ['R'])\n"
        "    def values(self, batch):\n"
        "        centre = batch.sum_over_atoms(batch.positions) / batch.counts[:, None]\n"
        "        squares = (batch.positions - centre[batch.system]).square().sum(dim=1)\n"
        "        return (batch.sum_over_atoms(squares) / batch.counts).sqrt()[:, None]\n"
    )
    frames = [molecule("CH3CH2OH"), molecule("CH3CH2OH")]
    found = observables_from(["hr", f"{tmp_path}/mine.py:Gyration"], Setting(frames, 300.0))
    assert [observable.name for observable in found] == ["hr", "gyration"]
    expected = np.sqrt(np.mean(np.sum((frames[0].positions - frames[0].positions.mean(axis=0)) ** 2, axis=1)))
    torch.testing.assert_close(found[1](AtomsBatch.from_atoms(frames)), torch.full((2, 1), expected).double())


def test_a_target_from_frames():
    frames = molecules(40)
    hr = DistanceDistribution(r_max=9.0)
    target = Target.from_frames(hr, frames)
    torch.testing.assert_close(target.value, target.samples.mean(dim=0))
    assert target.n_frames == 40 and target.floor == noise_floor(target.samples, hr.measure)
