"""Angles, torsions, coordination, density, gyration: closed forms, ASE and matscipy, invariances, groups, and what is refused."""

import re

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from matscipy.angle_distribution import angle_distribution
from matscipy.neighbours import neighbour_list
from scipy.stats import norm

from stabie_ase.observables import (
    AngularDistribution,
    BondAngles,
    BondLengths,
    Coordination,
    DihedralDistribution,
    RadiusOfGyration,
    Target,
    adf,
    observables_from,
)
from stabie_ase.observables.shells import first_minimum
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups, Topology
from stabie_ase.testing import check_observable


def asked(text, frames):
    """The observable that a command line names, for these frames."""
    (observable,) = observables_from(text, Setting(frames, 300.0))
    return observable


def values(observable, frames, groups=None):
    return observable(AtomsBatch.from_atoms(frames), groups).numpy()


def water(angle=104.5, length=0.96):
    half = np.deg2rad(angle / 2)
    return Atoms("OH2", length * np.array([[0, 0, 0], [np.sin(half), 0, np.cos(half)], [-np.sin(half), 0, np.cos(half)]]))


def peroxide(angle):
    """H-O-O-H with this dihedral angle: looked at along O-O, the far bond is turned clockwise by it."""
    turned = np.deg2rad(angle)
    far = [1.45, 0.9 * np.cos(turned), 0.9 * np.sin(turned)]  # x away from the viewer, y up: z is to the right, clockwise from y
    return Atoms("HOOH", [[0.0, 0.9, 0.0], [0.0, 0.0, 0.0], [1.45, 0.0, 0.0], far])


def box_of(one, seed=0, n=2, spacing=4.0):
    """n³ molecules at random orientations on a lattice, rattled and wrapped into the cell."""
    rng, box = np.random.default_rng(seed), Atoms(cell=[spacing * n, spacing * n + 0.3, spacing * n + 0.6], pbc=True)
    for k in np.ndindex(n, n, n):
        new = one.copy()
        new.euler_rotate(*rng.uniform(0.0, 360.0, 3))
        new.positions += spacing * np.array(k) + rng.normal(scale=0.02, size=(len(one), 3))
        box += new
    box.wrap()
    return box


def boxes(one, n_frames=3):
    return [box_of(one, seed) for seed in range(n_frames)]


def gas(n_frames, symbols, seed=0):
    rng = np.random.default_rng(seed)
    cell = np.array([[7.0, 0, 0], [2.0, 6.0, 0], [-1.0, 2.0, 8.0]])
    return [Atoms(symbols, rng.uniform(0, 1, (len(Atoms(symbols)), 3)) @ cell, cell=cell, pbc=True) for _ in range(n_frames)]


def chain(positions):
    return Atoms(f"C{len(positions)}", positions)


def rattled(atoms, n=3, width=0.03):
    rng = np.random.default_rng(1)
    moved = [atoms.copy() for _ in range(n)]
    for one in moved:
        one.positions += rng.normal(scale=width, size=atoms.positions.shape)
    return moved


def within_errors(samples, expected, n_errors=4.5):
    """Whether the mean over frames is the expected one within its standard error, where there is one."""
    error = samples.std(axis=0, ddof=1) / len(samples) ** 0.5
    return (abs(samples.mean(axis=0) - expected) <= n_errors * error + 1e-12).all()


# -- angles


def test_a_perfect_water():
    frames = [water(104.5), water(109.47)]
    np.testing.assert_allclose(values(asked("angle:H-O-H", frames), frames), [[104.5], [109.47]], atol=1e-10)
    found = values(asked("adf:H-O-H", frames), frames)
    assert (found[:, [52, 54]] == [[0.5, 0.0], [0.0, 0.5]]).all() and (found.sum(axis=1) == 0.5).all()  # bins of 2°


@pytest.mark.parametrize("angle", [0.0, 1e-6, 90.0, 180.0 - 1e-6, 180.0])
def test_angles_are_exact_at_their_ends(angle):
    """Where a cosine would have lost half of its digits."""
    topology = Topology.from_frames([chain([[1.4, 0, 0], [0, 0, 0], [0, 1.4, 0]])])
    turned = np.deg2rad(angle)
    atoms = chain([[1.4, 0, 0], [0, 0, 0], [1.4 * np.cos(turned), 1.4 * np.sin(turned), 0]])
    assert values(BondAngles(topology), atoms)[0, 0] == pytest.approx(angle, abs=1e-12)


def test_angles_and_torsions_of_a_molecule_are_those_of_its_graph():
    """Butane: 13 bonds; 4·6 angles; 3·9 torsions, of which one C-C-C-C."""
    butane = rattled(molecule("trans-butane"))
    counts = {"angle": 24, "angle:C-C-C": 2, "angle:H-C-C": 14, "angle:C-C-H": 14, "angle:H-C-H": 8}
    assert {text: len(asked(text, butane).axis.names) for text in counts} == counts
    counts = {"dihedral": 27, "dihedral:C-C-C-C": 1, "dihedral:H-C-C-C": 10, "dihedral:C-C-C-H": 10, "dihedral:H-C-C-H": 16}
    assert {text: asked(text, butane).dihedrals.shape[1] for text in counts} == counts
    ring = rattled(molecule("C6H6"))
    assert len(asked("angle:C-C-C", ring).axis.names) == 6 and asked("dihedral:C-C-C-C", ring).dihedrals.shape[1] == 6
    triangle = [chain([[0, 0, 0], [1.45, 0, 0], [0.72, 1.26, 0]])]
    with pytest.raises(ValueError, match="no dihedral angles"):
        asked("dihedral", triangle)


def test_angles_across_the_faces_of_a_cell_are_those_of_ase():
    frames = boxes(molecule("CH3OH"), 2)
    angles = asked("angle", frames)
    expected = [[atoms.get_angle(*ijk, mic=True) for ijk in angles.angles.T.tolist()] for atoms in frames]
    np.testing.assert_allclose(values(angles, frames), expected, atol=1e-9)


# -- torsions


def density_at(observable, angle, found):
    """The bin of an angle in a distribution."""
    edges = np.append(observable.axis.values.numpy() - observable.bin_width / 2, 180.0)
    return found[np.searchsorted(edges, angle, side="right") - 1]


@pytest.mark.parametrize("angle", [0.0, 61.0, 121.0, 179.0, -179.0, -121.0, -61.0])
def test_signs_of_torsions_are_those_of_iupac(angle):
    """Cis 0°, gauche ±60°, trans 180°; clockwise is positive. ASE counts them from 0° to 360°."""
    atoms = peroxide(angle)
    dihedral = asked("dihedral:H-O-O-H", [peroxide(100.0)])
    found = values(dihedral, atoms)[0]
    assert density_at(dihedral, angle, found) == 1 / dihedral.bin_width and found.sum() == 1 / dihedral.bin_width
    assert float(dihedral.angles(AtomsBatch.from_atoms(atoms))) == pytest.approx(angle, abs=1e-12)
    assert atoms.get_dihedral(0, 1, 2, 3) % 360 == pytest.approx(angle % 360, abs=1e-9)
    mirrored = atoms.copy()
    mirrored.positions[:, 1] *= -1.0
    np.testing.assert_array_equal(values(dihedral, mirrored)[0], found[::-1] if angle else found)


def test_trans_is_on_either_end_of_the_circle():
    dihedral = asked("dihedral,bin_width=10", [peroxide(100.0)])
    for angle in (180.0, -180.0):
        found = values(dihedral, peroxide(angle))[0]
        assert found[0] + found[-1] == pytest.approx(0.1)


def test_torsions_across_the_faces_of_a_cell_are_those_of_ase():
    frames = [box_of(peroxide(angle), seed, spacing=5.0) for seed, angle in enumerate((-70.0, 100.0, 175.0))]
    dihedral = asked("dihedral:H-O-O-H,bin_width=20", frames)
    for atoms, found in zip(frames, values(dihedral, frames)):
        angles = [(atoms.get_dihedral(*four, mic=True) + 180) % 360 - 180 for four in dihedral.dihedrals.T.tolist()]
        np.testing.assert_allclose(found, np.histogram(angles, bins=18, range=(-180, 180), density=True)[0])


# -- angular distribution functions


@pytest.mark.parametrize("kind", ["Ar-Ar-Ar", "Ne-Ar-Ne", "Ar-Ne-Ne"])
def test_an_ideal_gas_has_angles_like_a_sine(kind):
    """sin θ / 2 per radian, one after the correction; pooled over frames, each of which counts by its angles."""
    frames = gas(300, "Ar12Ne8")
    distribution, corrected = (asked(f"adf:{kind},r_max=3.5,bin_width=15{more}", frames) for more in ("", ",cone_correction=yes"))
    edges = np.deg2rad(15.0 * np.arange(13))
    ideal = -0.5 * np.diff(np.cos(edges)) / 15.0
    found = values(distribution, frames)
    some = found.sum(axis=1) > 0  # a frame may have no angle
    assert within_errors(found[some], ideal) and within_errors(values(corrected, frames)[some], 1.0)
    assert corrected.measure.tolist() == pytest.approx(15.0 * ideal)
    for observable in (distribution, corrected):
        np.testing.assert_allclose(values(observable, frames)[some] @ observable.measure.numpy(), 1.0)
    difference = [abs(values(o, frames[:1]) - values(o, frames[1:2])) @ o.measure.numpy() for o in (distribution, corrected)]
    assert difference[0] == pytest.approx(difference[1])


def test_angles_between_neighbours_are_those_of_matscipy():
    """All angles of one element, also with cutoffs beyond half the cell."""
    for r_max in (2.5, 6.0):
        atoms = gas(1, "Ar20", seed=3)[0]
        i, j, d = neighbour_list("ijD", atoms, r_max)
        expected = angle_distribution(i, j, d, 36, r_max).astype(float)
        found = values(asked(f"adf:Ar-Ar-Ar,r_max={r_max},bin_width=5", [atoms]), [atoms])[0]
        np.testing.assert_allclose(found * 5.0, expected / expected.sum(), atol=1e-12)


def test_angles_between_neighbours_of_three_elements():
    """Against a loop over all atoms of a molecule; each neighbour within its own cutoff."""
    rng = np.random.default_rng(4)
    atoms = Atoms("C5O6N4", rng.uniform(0, 4, (15, 3)))
    observable = AngularDistribution((6, 8, 7), (2.5, 3.0), bin_width=10.0)
    near, numbers = atoms.get_all_distances(), atoms.numbers
    angles = [atoms.get_angle(i, j, k) for i, j, k in np.ndindex(15, 15, 15)
              if (numbers[[i, j, k]] == [6, 8, 7]).all() and near[i, j] < 2.5 and near[j, k] < 3.0]  # fmt: skip
    assert len(angles) > 20
    np.testing.assert_allclose(values(observable, atoms)[0], np.histogram(angles, bins=18, range=(0, 180), density=True)[0])
    reverse = AngularDistribution((7, 8, 6), (3.0, 2.5), bin_width=10.0)
    np.testing.assert_allclose(values(reverse, atoms), values(observable, atoms))
    assert reverse.subject == observable.subject


def test_cutoffs_of_angles_are_first_shells():
    """Of a liquid each pair's own, of a molecule its bonds."""
    frames = boxes(molecule("H2O"), 20)
    found = asked("adf:H-O-O", frames).cutoffs
    assert 1.0 < found[0] < 3.0 and 4.3 < found[1] < 5.7  # bonds of 1 Å, a lattice of 4 Å
    assert asked("adf:H-O-O,r_max=3.0", frames).cutoffs == (3.0, 3.0)
    assert asked("adf:H-C-O", rattled(molecule("CH3OH"))).cutoffs == pytest.approx((1.25 * 1.07, 1.25 * 1.42))


BONDS = [(1.0, 30.0, 0.03), (3.0, 2.0, 0.2)]
LIQUID_SHELLS = [(2.8, 2.0, 0.12), (3.4, -0.3, 0.2), (4.5, 0.2, 0.3)]


@pytest.mark.parametrize("shells, start, end", [(BONDS, 3.0, 1.8), (LIQUID_SHELLS, 2.5, 3.4)])
def test_the_first_minimum_of_a_radial_distribution(shells, start, end):
    """The middle of an empty gap, which the smoothed shells leave from 1.3 to 2.3 Å, or a shallow minimum; with noise as of few frames."""
    r = 0.05 * (np.arange(160) + 0.5)
    g = (r > start) + sum(height * np.exp(-0.5 * ((r - at) / width) ** 2) for at, height, width in shells)
    noisy = g * np.random.default_rng(0).poisson(400, len(r)) / 400
    assert first_minimum(noisy) == pytest.approx(end, abs=0.1)


@pytest.mark.parametrize("g", [np.ones(160), 1.0 + 1e-15 * np.arange(160), 1.0 + np.exp(-0.05 * np.arange(160))])
def test_a_flat_or_falling_radial_distribution_has_no_first_minimum(g):
    """However its smoothing is rounded, which differs between processors."""
    assert first_minimum(g) is None and first_minimum(np.nextafter(g, np.resize([0.0, 2.0], len(g)))) is None


def test_angles_may_be_worked_out_a_few_at_a_time(monkeypatch):
    frames = gas(3, "Ar12Ne8")
    observable = asked("adf:Ar-Ar-Ar,r_max=4", frames)
    expected = values(observable, frames)
    monkeypatch.setattr(adf, "VECTORS_AT_ONCE", 50)
    np.testing.assert_array_equal(values(observable, frames), expected)


# -- coordination


def crystal(*arguments, repeat=3, **settings):
    return [bulk(*arguments, cubic=True, **settings).repeat(repeat)]


CRYSTALS = {
    "coordination:Cu-Cu": (crystal("Cu", "fcc", a=3.615), 12),
    "coordination:Si-Si": (crystal("Si", "diamond", a=5.431), 4),
    "coordination:Na-Cl": (crystal("NaCl", "rocksalt", a=5.64), 6),
    "coordination:Na-Na": (crystal("NaCl", "rocksalt", a=5.64), 12),
    "coordination:Fe-Fe,r_cut=2.67": (crystal("Fe", "bcc", a=2.87), 8),
    "coordination:Cu-Cu,r_cut=3.1": ([bulk("Cu", "fcc", a=3.615)], 12),  # one atom in a cell: all neighbours are images
}


@pytest.mark.parametrize("text", CRYSTALS)
def test_coordination_of_crystals(text):
    frames, number = CRYSTALS[text]
    assert values(asked(text, frames), frames) == number
    distribution = values(asked(f"{text},n_max=13", frames), frames)[0]
    assert distribution[number] == 1.0 and distribution.sum() == 1.0


def test_coordination_is_the_integral_of_a_radial_distribution():
    frames = gas(20, "Ar12Ne8")
    rdf, number = asked("rdf:Ar-Ne,r_max=4,bin_width=0.1", frames), asked("coordination:Ar-Ne,r_cut=4", frames)
    edges, density = 0.1 * np.arange(41), 8 / frames[0].get_volume()
    integral = values(rdf, frames) @ (4 / 3 * np.pi * np.diff(edges**3)) * density
    np.testing.assert_allclose(values(number, frames)[:, 0], integral)


@pytest.mark.parametrize("distance, width", [(1.5, 0.1), (2.0, 0.3), (2.4, 0.05)])
def test_a_smooth_count(distance, width):
    atoms = Atoms("CO", [[0, 0, 0], [0, 0, distance]])
    observable = Coordination((6, 8), 2.0, width)
    assert values(observable, atoms)[0, 0] == pytest.approx(1 / (1 + np.exp((distance - 2.0) / width)), rel=1e-12)
    sharp, narrow = Coordination((6, 8), 2.01), Coordination((6, 8), 2.01, 1e-4)
    assert values(sharp, atoms)[0, 0] == pytest.approx(values(narrow, atoms)[0, 0], abs=1e-12) == float(distance < 2.01)


def test_the_distribution_of_coordination():
    """The mean number is its first moment; more than n_max counts as n_max."""
    frames = gas(5, "Ar12Ne8")
    mean, numbers, few = (asked(f"coordination:Ar-Ne,r_cut=3{more}", frames) for more in ("", ",n_max=8", ",n_max=1"))
    assert {mean.name, numbers.name} == {"coordination:Ar-Ne", "coordination-distribution:Ar-Ne"}
    found = values(numbers, frames)
    np.testing.assert_allclose(found @ numbers.axis.values.numpy(), values(mean, frames)[:, 0])
    np.testing.assert_allclose(values(few, frames), np.stack([found[:, 0], 1 - found[:, 0]], axis=1))


# -- bond lengths


def test_moments_of_bond_lengths():
    frames = boxes(molecule("CH3OH"))
    moments, bonds = asked("bond-length-moments:H-C", frames), BondLengths(Topology.from_frames(frames), (6, 1))
    lengths = values(bonds, frames)
    mean, spread = values(moments, frames).mean(axis=0)
    assert (mean, spread) == pytest.approx((lengths.mean(), lengths.std())) == (moments.mean, moments.spread)
    stretched = [atoms.copy() for atoms in frames]
    for atoms in stretched:  # all bonds longer by a hundredth
        atoms.set_cell(1.01 * atoms.cell.array, scale_atoms=True)
    mean, spread = values(moments, stretched).mean(axis=0)
    variance = np.mean((1.01 * lengths - lengths.mean()) ** 2)
    assert mean == pytest.approx(1.01 * lengths.mean()) and moments.spread * (2 * spread - moments.spread) == pytest.approx(variance)


def test_moments_of_a_gaussian():
    """A spring of a known mean and width, within 4.5 errors of each."""
    rng = np.random.default_rng(2)
    frames = [Atoms("N2", [[0, 0, 0], [0, 0, r]]) for r in rng.normal(1.1, 0.05, 2000)]
    found = values(asked("bond-length-moments", frames), frames).mean(axis=0)
    assert abs(found[0] - 1.1) < 4.5 * 0.05 / 2000**0.5 and abs(found[1] - 0.05) < 4.5 * 0.05 / 4000**0.5


# -- density, gyration


@pytest.mark.parametrize("frames, measured", [  # CRC Handbook, at room temperature
    (crystal("Si", "diamond", a=5.431, repeat=1), 2.329), (crystal("NaCl", "rocksalt", a=5.640, repeat=1), 2.165),
    (crystal("Cu", "fcc", a=3.615, repeat=1), 8.93), (crystal("W", "bcc", a=3.165, repeat=1), 19.3),
])  # fmt: skip
def test_densities_of_crystals(frames, measured):
    assert values(asked("density", frames), frames)[0, 0] == pytest.approx(measured, rel=3e-3)
    molecules = Groups.molecules(AtomsBatch.from_atoms(frames), Topology.from_frames(frames))
    assert (values(asked("density", frames), frames, molecules) == values(asked("density", frames), frames)).all()


def rod(n=9, length=1.5):
    return chain(length * np.arange(n)[:, None] * [0.6, 0.0, 0.8])


def ring(n=12, radius=2.9):
    angles = 2 * np.pi * np.arange(n) / n
    return chain(radius * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1))


def test_radii_of_gyration():
    """A rod of n beads b apart has b² (n² - 1) / 12, a ring its radius, two masses m1 m2 d² / (m1 + m2)²."""
    assert values(asked("gyration", [rod()]), [rod()])[0, 0] == pytest.approx(1.5 * ((81 - 1) / 12) ** 0.5)
    assert values(asked("gyration", [ring()]), [ring()])[0, 0] == pytest.approx(2.9)
    pair = Atoms("HF", [[0, 0, 0], [0, 0, 0.92]])
    m = pair.get_masses()
    assert values(asked("gyration", [pair]), [pair])[0, 0] == pytest.approx(0.92 * (m[0] * m[1]) ** 0.5 / m.sum())


@pytest.mark.parametrize("shape", [rod, ring])
def test_a_molecule_longer_than_half_its_cell_is_put_together(shape):
    """Along its bonds, from an atom in the middle too."""
    atoms = shape()
    order = np.roll(np.arange(len(atoms)), 4)
    atoms = atoms[order]
    radius = values(asked("gyration", [atoms]), [atoms])
    atoms.cell, atoms.pbc = np.diag([8.2, 8.0, 10.0]) + 0.3, True
    topology = Topology.from_frames([atoms])
    atoms.wrap()
    np.testing.assert_allclose(values(RadiusOfGyration(topology), atoms), radius)


def test_gyration_of_a_liquid_is_the_mean_over_its_molecules():
    """An atom by itself has none."""
    frames = boxes(molecule("CH3OH"), 2)
    for atoms in frames:
        atoms.extend(Atoms("He", [[2.0, 2.0, 2.0]]))
    found = values(asked("gyration", frames), frames)
    expected = []
    for atoms in frames:
        whole = [atoms[6 * k : 6 * k + 6] for k in range(8)]
        for one in whole:
            one.positions = one[0].position + one.get_distances(0, range(6), mic=True, vector=True)
        squares = [(one.get_masses() @ ((one.positions - one.get_center_of_mass()) ** 2).sum(1)) / one.get_masses().sum() for one in whole]
        expected.append([np.mean(np.sqrt(squares))])
    np.testing.assert_allclose(found, expected)


# -- smallest distances


def test_smallest_distances_of_molecules():
    """Against ASE's distances; a Gaussian at each, whose mean over the grid is the distance."""
    frames = boxes(molecule("CH3OH"))
    observable = asked("min-distance", frames)
    number = np.arange(48) // 6
    apart = number[:, None] != number
    expected = np.array([atoms.get_all_distances(mic=True)[apart].min() for atoms in frames])
    np.testing.assert_allclose(observable.distances(AtomsBatch.from_atoms(frames)), expected)
    assert expected.max() + 0.5 <= observable.r_max <= expected.max() + 1.0
    found, edges = values(observable, frames), 0.02 * np.arange(observable.n_bins + 1)
    np.testing.assert_allclose(found, np.diff(norm.cdf(edges, expected[:, None], 0.02), axis=1) / 0.02, atol=1e-9)
    np.testing.assert_allclose(found @ observable.measure.numpy(), 1.0)
    np.testing.assert_allclose(found @ (observable.measure * observable.axis.values).numpy(), expected, atol=1e-6)


def test_molecules_that_are_far_apart():
    """A cluster: the grid goes to where they are; beyond a grid there is nothing."""
    far = molecule("H2O") + Atoms("OH2", molecule("H2O").positions + [0, 0, 20.0])
    observable = asked("min-distance", [far])
    assert 18.0 < observable.r_max < 20.5 and values(observable, far)[0] @ observable.measure.numpy() == pytest.approx(1.0)
    assert (values(asked("min-distance,r_max=5", [far]), far) == 0.0).all()


# -- what holds for all of them


LIQUID = ["adf:H-O-H", "adf:H-O-O,r_max=4.4", "adf:O-O-O,r_max=4.5,cone_correction=yes", "angle:H-O-H", "bond-length-moments:O-H",
          "min-distance", "coordination:O-O,r_cut=4.4", "coordination:O-O,r_cut=4.4,n_max=8", "coordination:H-O,width=0.2", "density",
          "gyration"]  # fmt: skip
MOLECULE = ["adf:H-C-H", "angle", "angle:C-C-O", "dihedral", "dihedral:H-C-C-O,bin_width=10", "bond-length-moments:C-H",
            "coordination:C-H", "gyration"]  # fmt: skip
CASES = [(text, "liquid") for text in LIQUID] + [(text, "molecule") for text in MOLECULE]


def frames_of(system):
    return boxes(molecule("H2O")) if system == "liquid" else rattled(molecule("CH3CH2OH"))


@pytest.mark.parametrize("text, system", CASES)
def test_the_contract(text, system):
    frames = frames_of(system)
    observable = asked(text, frames)
    check_observable(observable, frames)
    target = Target.from_frames(observable, frames)
    assert torch.isfinite(target.value).all() and observable.weighted(2.0).weight == 2.0
    single = observable(AtomsBatch.from_atoms(frames, dtype=torch.float32))
    assert single.dtype == torch.float64


@pytest.mark.parametrize("text", LIQUID)
def test_images_and_the_order_of_molecules_do_not_matter(text):
    frames = frames_of("liquid")
    observable = asked(text, frames)
    rng = np.random.default_rng(0)
    changed = []
    for atoms in frames:
        order = (3 * rng.permutation(8)[:, None] + [0, 2, 1]).ravel()
        changed.append(atoms[order])
        changed[-1].positions += rng.integers(-2, 3, (24, 3)) @ atoms.cell.array
    before, after = values(observable, frames), values(observable, changed)
    if text.startswith("angle"):  # a component for each
        before, after = np.sort(before), np.sort(after)
    np.testing.assert_allclose(after, before, atol=1e-9)


@pytest.mark.parametrize("text, system", CASES)
def test_a_frame_that_is_not_finite_keeps_that_to_itself(text, system):
    frames = frames_of(system)
    observable = asked(text, frames)
    expected = values(observable, frames)
    frames[1].positions[0] = np.nan
    np.testing.assert_array_equal(values(observable, frames)[[0, 2]], expected[[0, 2]])


SHARED = {  # how many terms each molecule has, if not as many as any other
    "adf:H-O-H": None, "adf:O-O-O,r_max=4.5": ("coordination:O-O,r_cut=4.5", lambda n: n * (n - 1)),
    "adf:H-O-O,r_max=4.4": ("coordination:O-H,r_cut=4.4", "coordination:O-O,r_cut=4.4"), "bond-length-moments:O-H": None,
    "coordination:O-O,r_cut=4.4": None, "coordination:H-O,r_cut=4.4,n_max=5": None, "density": None, "gyration": None,
}  # fmt: skip


@pytest.mark.parametrize("text", SHARED)
def test_the_mean_over_molecules_is_that_of_the_whole(text):
    """Each weighted by its terms."""
    frames, shares = frames_of("liquid"), SHARED[text]
    molecules = Groups.molecules(AtomsBatch.from_atoms(frames), Topology.from_frames(frames))
    found = values(asked(text, frames), frames, molecules).reshape(3, 8, -1)
    weights = np.ones((3, 8, 1))
    if shares:
        numbers = [values(asked(name, frames), frames, molecules).reshape(3, 8, 1) for name in shares if isinstance(name, str)]
        weights = shares[1](numbers[0]) if callable(shares[1]) else numbers[0] * numbers[1]
    whole = values(asked(text, frames), frames)
    np.testing.assert_allclose((weights * found).sum(axis=1) / weights.sum(axis=1), whole, atol=1e-12)


def test_groups_that_overlap_and_groups_without_terms():
    """A group is told by its own atoms, whichever others have them."""
    frames = [peroxide(100.0) + Atoms("He", [[9.0, 0, 0]])]
    dihedral = DihedralDistribution(Topology.from_frames(frames), bin_width=10.0)
    whole = dihedral(AtomsBatch.from_atoms(frames))[0]
    groups = Groups(torch.tensor([0, 1, 2, 3, 2, 3, 4]), torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.zeros(3, dtype=torch.int64))
    found = dihedral(AtomsBatch.from_atoms(frames), groups)
    assert torch.equal(found[0], whole) and torch.equal(found[1], whole) and (found[2] == 0.0).all()


@pytest.mark.parametrize("text, copies", [("adf:Ar-Ar-Ar,r_max=3", 1500), ("coordination:Ar-Ne,r_cut=3", 1500), ("dihedral", 50_000)])
def test_many_frames_are_worked_out_in_parts(text, copies):
    frames = [peroxide(100.0)] if text == "dihedral" else gas(1, "Ar12Ne8")
    observable, batch = asked(text, frames), AtomsBatch.from_atoms(frames)
    torch.testing.assert_close(observable(batch.repeat(copies)), observable(batch).expand(copies, -1))


def test_the_same_by_another_name_is_given_twice():
    for frames, texts in ((frames_of("liquid"), "adf:H-O-O,r_max=3,adf:O-O-H,r_max=3"), (frames_of("molecule"), "angle:H-C-C,angle:C-C-H"),
                          (frames_of("molecule"), "dihedral:H-C-C-O,dihedral:O-C-C-H"),
                          (frames_of("molecule"), "bond-length-moments:O-H,bond-length-moments:H-O")):  # fmt: skip
        with pytest.raises(ValueError, match="is given twice"):
            observables_from(texts, Setting(frames, 300.0))
    both = observables_from("coordination:O-H,coordination:H-O", Setting(frames_of("liquid"), 300.0))
    assert [values(one, frames_of("liquid"))[0, 0] for one in both] == [2.0, 1.0]


# -- refusals


ARGON = [Atoms("Ar3", [[0, 0, 0], [4, 0, 0], [0, 4, 0]])]
REFUSED = [
    ("adf", "liquid", "'adf' names no elements; write adf:A-B-C, with B at the centre"),
    ("adf:O-O", "liquid", "elements='O-O', expected three elements, as H-O-H"),
    ("adf:H-Si-H", "liquid", "the reference has no Si, only H, O"),
    ("adf:H-O-H,r_max=-1", "liquid", "adf:H-O-H needs positive cutoffs, one for one element, got -1 and -1 Å"),
    ("adf:H-O-H,r_max=nan", "liquid", "needs positive cutoffs"),
    ("adf:H-O-H,r_max=1e9", "liquid", "Is the cutoff in Å?"),
    ("adf:H-O-H,bin_width=7", "liquid", "needs bins that divide 180 degrees, got bin_width=7; try 5"),
    ("adf:H-O-H,bin_width=0", "liquid", "needs bins that divide 180 degrees, got bin_width=0"),
    ("adf:H-O-H,cone_correction=perhaps", "liquid", "cone_correction='perhaps', expected yes or no"),
    ("adf:H-O-H,r_mx=3", "liquid", "unknown option 'r_mx'; did you mean 'r_max'?"),
    ("adf:O-C-O", "argon", "the reference has no O and no C and no O, only Ar"),
    ("adf:Ar-Ar-Ar", "argon", "is not periodic in all directions and has no Ar-Ar bonds to tell r_max; give r_max=, in Å"),
    ("adf:Ar-Ar-Ar", "one", "g(r) of Ar-Ar in the reference has no first minimum within 8 Å to tell r_max; give r_max=, in Å"),
    ("angle", "argon", "the reference has no angles between bonds"),
    ("angle:O-H-O", "liquid", "the reference has no O-H-O angles between bonds, so that they cannot be matched"),
    ("angle:O-X-O", "liquid", "expected three elements, as H-O-H"),
    ("angle,bin_width=2", "molecule", "unknown option 'bin_width'"),
    ("dihedral", "liquid", "the reference has no dihedral angles, so that they cannot be matched"),
    ("dihedral:O-O-O-O", "molecule", "the reference has no O-O-O-O dihedral angles"),
    ("dihedral:H-C-C", "molecule", "expected four elements, as C-C-C-C"),
    ("dihedral,bin_width=1e-9", "molecule", "dihedral needs bins that divide 360 degrees, got bin_width=1e-09; try 0.0036"),
    ("dihedral,bin_width=7", "molecule", "dihedral needs bins that divide 360 degrees, got bin_width=7; try 7.05882"),
    ("bond-length-moments", "argon", "the reference has no bonds"),
    ("bond-length-moments:O-C", "liquid", "the reference has no O-C bonds"),
    ("bond-length-moments", "still", "needs bonds whose lengths differ, in the reference their standard deviation is 0 Å"),
    ("min-distance", "molecule", "the reference is one molecule: there is no distance to others; hr is for the atoms within one"),
    ("min-distance,bin_width=0", "liquid", "min-distance needs r_max > bin_width > 0"),
    ("min-distance,r_max=inf", "liquid", "min-distance needs r_max > bin_width > 0 and at most 100000 bins, got r_max=inf"),
    ("coordination", "liquid", "'coordination' names no elements; write coordination:A-B for the number of B around A"),
    ("coordination:O-Si", "liquid", "the reference has no Si, only H, O"),
    ("coordination:O-H,r_cut=0", "liquid", "needs r_cut > 0 and width >= 0, got r_cut=0, width=0 Å"),
    ("coordination:O-H,width=-1", "liquid", "needs r_cut > 0 and width >= 0"),
    ("coordination:O-H,width=0.1,n_max=4", "liquid", "needs n_max >= 1 and a sharp count, got n_max=4, width=0.1 Å"),
    ("coordination:Ar-Ar", "argon", "has no Ar-Ar bonds to tell r_cut; give r_cut=, in Å"),
    ("density", "molecule", "a density needs a reference that is periodic in all directions; a molecule has no volume"),
    ("density:O", "liquid", "'density' takes no argument"),
    ("gyration", "argon", "the reference has no bonds and so no molecules, of which to have radii of gyration"),
    ("gyration:O", "liquid", "'gyration' takes no argument"),
]  # fmt: skip


@pytest.mark.parametrize("text, system, message", REFUSED)
def test_what_has_no_meaning_is_refused_in_a_line(text, system, message):
    known = {"argon": ARGON, "one": [Atoms("Ar", cell=[6.0] * 3, pbc=True)], "still": [molecule("N2")] * 2}
    frames = known.get(system) or frames_of(system)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        observable = asked(text, frames)
        values(observable, frames)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["angle", "dihedral", "bond-length-moments", "gyration", "min-distance,r_max=5"])
def test_systems_of_another_size_are_refused(text):
    frames = boxes(molecule("H2O2")) if text.startswith("min") else rattled(molecule("H2O2"))
    with pytest.raises(ValueError, match=r"of a (whole )?system of \d+ atoms, got systems of \[3\]"):
        values(asked(text, frames), [molecule("H2O")])


def test_frames_without_a_cell_have_no_density():
    with pytest.raises(ValueError, match="a density needs frames that are periodic in all directions"):
        values(asked("density", crystal("Cu")), [molecule("H2O")])
