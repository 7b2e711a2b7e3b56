"""Neighbourhoods against ASE's distances of centres of mass, molecules across the faces of the cell among them."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbourhoods import centre_distances, formulas, nearest, units, within
from stabie_ase.structures.topology import Groups, Topology

CELL = np.array([[9.3, 0.0, 0.0], [1.5, 9.6, 0.0], [-0.8, 1.1, 10.2]])


def waters(n_frames=3, seed=0, wrapped=True):
    """27 waters in a triclinic cell; wrapped, some lie across its faces."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n_frames):
        atoms = Atoms(cell=CELL, pbc=True)
        for point in np.ndindex(3, 3, 3):
            water = molecule("H2O")
            water.rotate(rng.uniform(0, 360), rng.normal(size=3), center="COM")
            water.translate((np.array(point) / 3) @ CELL + rng.normal(0, 0.15, 3))
            atoms += water
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        if wrapped:
            atoms.wrap()
        frames.append(atoms)
    return frames


FRAMES = waters()
TOPOLOGY = Topology.from_frames(FRAMES)


def members(groups, batch):
    """The atoms of each group, as sets of pairs of a system and an atom of it."""
    index = batch.index_in_system[groups.atoms].tolist()
    found = [set() for _ in range(groups.n_groups)]
    for atom, group in zip(index, groups.group.tolist()):
        found[group].add(atom)
    assert torch.equal(batch.system[groups.atoms], groups.system[groups.group]) and bool((groups.group.diff() >= 0).all())
    return found


def ase_distances(whole):
    """Of centres of mass, from ASE, where molecules are whole."""
    centres = np.array([whole[3 * k : 3 * k + 3].get_center_of_mass() for k in range(len(whole) // 3)])
    return Atoms("X" * len(centres), centres, cell=whole.cell, pbc=True).get_all_distances(mic=True)


def test_centres_of_molecules_across_the_faces():
    assert units(TOPOLOGY).tolist() == np.repeat(np.arange(27), 3).tolist() and set(formulas(TOPOLOGY)) == {"H2O"}
    found = centre_distances(AtomsBatch.from_atoms(FRAMES), TOPOLOGY.molecule)
    for k, whole in enumerate(waters(wrapped=False)):
        expected = ase_distances(whole)
        near = expected < 4.5  # half the width of the cell
        np.testing.assert_allclose(found[k].numpy()[near], expected[near], atol=1e-10)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_the_nearest_molecules(k):
    batch = AtomsBatch.from_atoms(FRAMES)
    groups = nearest(batch, TOPOLOGY, k)
    assert groups.n_groups == 3 * 27 and groups.system.tolist() == np.repeat([0, 1, 2], 27).tolist()
    found = members(groups, batch)
    for frame, whole in enumerate(waters(wrapped=False)):
        order = np.argsort(ase_distances(whole), axis=1)[:, : k + 1]
        for centre in range(27):
            expected = {3 * m + a for m in order[centre] for a in range(3)}
            assert found[27 * frame + centre] == expected


def test_within_a_radius():
    batch = AtomsBatch.from_atoms(FRAMES)
    found = members(within(batch, TOPOLOGY, 3.6), batch)
    for frame, whole in enumerate(waters(wrapped=False)):
        near = ase_distances(whole) < 3.6
        for centre in range(27):
            assert found[27 * frame + centre] == {3 * m + a for m in np.flatnonzero(near[centre]) for a in range(3)}
    assert len({len(group) for group in found}) > 1


def test_atoms_where_there_are_no_molecules():
    """The 12 nearest of an atom in fcc are its first shell, whatever the element; a framework's atoms are units too."""
    for element, a, shell in (("Ar", 5.3, 12), ("Si", 5.43, 4)):
        crystal = bulk(element, "fcc" if element == "Ar" else "diamond", a=a, cubic=True).repeat(2)
        batch, topology = AtomsBatch.from_atoms(crystal), Topology.from_frames([crystal])
        found = members(nearest(batch, topology, shell), batch)
        distance = a / np.sqrt(2) if element == "Ar" else a * np.sqrt(3) / 4
        near = crystal.get_all_distances(mic=True) < distance + 0.1
        assert found == [set(np.flatnonzero(row).tolist()) for row in near]
        assert found == members(within(batch, topology, distance + 0.1), batch)


def test_a_group_for_every_molecule_of_frames_that_are_not_finite():
    batch = AtomsBatch.from_atoms(FRAMES)
    batch.positions[4, 1] = torch.nan
    groups = nearest(batch, TOPOLOGY, 3)
    found = members(groups, batch)
    assert [len(group) for group in found] == [12] * 81 and {3, 4, 5} <= found[1]
    rest = batch.select([1, 2])
    assert found[27:] == members(nearest(rest, TOPOLOGY, 3), rest)
    assert all({3 * k, 3 * k + 1, 3 * k + 2} <= group for k, group in enumerate(members(within(batch, TOPOLOGY, 3.0), batch)[:27]))


def test_no_frames_have_no_groups():
    none = AtomsBatch.from_atoms(FRAMES).select([])
    for groups in (nearest(none, TOPOLOGY, 3), within(none, TOPOLOGY, 3.0), Groups.molecules(none, TOPOLOGY)):
        assert groups.n_groups == len(groups.atoms) == 0


def test_overlapping_groups_add_their_weights_at_each_atom():
    """W_a = Σ_{j∋a} w_j, also of the groups of some of the frames."""
    batch = AtomsBatch.from_atoms(FRAMES)
    groups = nearest(batch, TOPOLOGY, 4)
    weights = torch.randn(81, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.zeros(batch.n_atoms)
    for group, (found, frame) in enumerate(zip(members(groups, batch), groups.system.tolist())):
        expected[[81 * frame + a for a in found]] += float(weights[group])
    np.testing.assert_allclose(groups.spread(weights, batch), expected, atol=1e-14)
    some = torch.tensor([0, 2])
    rest = batch.select(some)
    kept = groups.of_systems(some, batch)
    assert members(kept, rest) == members(nearest(rest, TOPOLOGY, 4), rest)


@pytest.mark.parametrize("k", [-1, 0, 26, 27, 1000])
def test_as_many_as_there_are_is_refused(k):
    with pytest.raises(ValueError, match=rf"nearest:{k} of 27 molecules or atoms, expected 1 to 25; .* global"):
        nearest(AtomsBatch.from_atoms(FRAMES), TOPOLOGY, k)
