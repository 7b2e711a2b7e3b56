"""Neighbour lists: against brute force and ASE, symmetric, confined to their system, rebuilt in time."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import primitive_neighbor_list
from helpers import METHANOL, WATER, brute_force_pairs, crystal
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matscipy.neighbours import neighbour_list

from stabie_ase.potentials.analytic import LennardJones
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import VerletList, alchemi, all_pairs, cell_list, neighbor_list


def _matscipy(quantities, pbc, cell, positions, cutoff):
    return neighbour_list(quantities, positions=positions, cell=cell, pbc=pbc, cutoff=cutoff)


def as_set(neighbors) -> set[tuple[int, ...]]:
    columns = torch.cat([neighbors.pairs.T, neighbors.shifts], dim=1).tolist()
    pairs = set(map(tuple, columns))
    assert len(pairs) == len(columns), "a pair occurs twice"
    return pairs


@st.composite
def periodic_systems(draw):
    """Few atoms, inside or far outside of small skew cells, periodic in one to three directions."""
    pbc = np.array(draw(st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1)])), dtype=bool)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cell = np.diag(rng.uniform(1.5, 7.0, 3)) + rng.normal(0.0, draw(st.sampled_from([0.0, 0.5, 1.5])), (3, 3))
    cell[~pbc & (rng.random(3) < 0.4)] = 0.0
    n_atoms = draw(st.integers(1, 6))
    positions = rng.uniform(-1.0, 2.0, (n_atoms, 3)) @ cell + rng.normal(0.0, draw(st.sampled_from([0.5, 8.0])), 3)
    return Atoms("H" * n_atoms, positions=positions, cell=cell, pbc=pbc)


@settings(deadline=None, max_examples=150)
@given(periodic_systems(), st.floats(0.5, 6.0))
def test_every_pair_and_no_other(atoms, cutoff):
    full_cell = atoms.cell.complete()
    assume(full_cell.volume > 2.0)
    found = neighbor_list(AtomsBatch.from_atoms(atoms), cutoff)
    assert as_set(found) == brute_force_pairs(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)


needs_alchemi = pytest.mark.skipif(not alchemi.available(), reason="needs nvalchemi-toolkit-ops (the extra gpu)")
for_other_devices = pytest.mark.parametrize(
    "half_list", [cell_list.half_list, pytest.param(alchemi.half_list, marks=needs_alchemi)], ids=["cells", "alchemi"]
)
"""What other devices are given, computed on this one."""


def same_pairs(half_list, batch, cutoff):
    pairs, shifts = half_list(batch, cutoff)
    half = neighbor_list(batch, cutoff).half
    return torch.equal(pairs, half.pairs) and torch.equal(shifts, half.shifts)


@for_other_devices
@settings(deadline=None, max_examples=150)
@given(st.lists(periodic_systems(), min_size=1, max_size=3), st.floats(0.5, 6.0))
def test_other_backends_find_the_same_pairs(half_list, systems, cutoff):
    assume(all(atoms.cell.complete().volume > 2.0 for atoms in systems))
    assert same_pairs(half_list, AtomsBatch.from_atoms(systems), cutoff)


@for_other_devices
def test_many_bins_and_none(half_list):
    """A large crystal, a slab, an isolated chain that is longer than any bin, a single atom and one that flew away."""
    rng = np.random.default_rng(2)
    large, slab = bulk("Ar", "fcc", 5.3, cubic=True).repeat(5), bulk("Ar", "fcc", 5.3).repeat((7, 6, 2))
    slab.pbc = (True, True, False)
    chain = Atoms("H90", positions=np.cumsum(rng.normal(size=(90, 3)), axis=0))
    lost = bulk("Ar", "fcc", 5.3, cubic=True)
    lost.positions[1] = 1e9
    systems = [large, slab, chain, Atoms("H"), lost]
    for atoms in systems[:2]:
        atoms.positions += rng.normal(scale=0.2, size=atoms.positions.shape) + 40.0
    for cutoff in (3.0, 8.0):
        assert all(same_pairs(half_list, AtomsBatch.from_atoms(part), cutoff) for part in (systems[:4], systems[:1], lost))


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 0, 1), (0, 0, 1)])
@pytest.mark.parametrize("cutoff", [2.0, 5.5, 9.0])
@pytest.mark.parametrize("peer", [primitive_neighbor_list, _matscipy], ids=["ase", "matscipy"])
def test_same_pairs_as_others(peer, pbc, cutoff):
    atoms = crystal()
    atoms.pbc = pbc
    atoms.positions += np.random.default_rng(0).integers(-2, 3, (len(atoms), 3)) * pbc @ atoms.cell
    i, j, shifts = peer("ijS", atoms.pbc, atoms.cell, atoms.positions, cutoff)
    expected = set(map(tuple, np.column_stack([i, j, shifts]).tolist()))
    assert as_set(neighbor_list(AtomsBatch.from_atoms(atoms), cutoff)) == expected


def test_vectors_point_from_i_to_the_image_of_j():
    batch = AtomsBatch.from_atoms(Atoms("H2", positions=[[0.5, 0, 0], [3.5, 0, 0]], cell=[4, 9, 9], pbc=True))
    found = neighbor_list(batch, 1.5)
    vectors = dict(zip(map(tuple, found.pairs.T.tolist()), found.vectors(batch).tolist()))
    assert vectors == {(0, 1): [-1.0, 0.0, 0.0], (1, 0): [1.0, 0.0, 0.0]}


@pytest.mark.parametrize("atoms", [WATER, crystal(), [WATER, METHANOL], [crystal(3), WATER, crystal(5)]])
def test_second_half_is_the_first_reversed(atoms):
    found = neighbor_list(AtomsBatch.from_atoms(atoms), 4.0)
    n = found.n_pairs // 2
    assert n > 0 and found.n_pairs == 2 * n
    assert torch.equal(found.pairs[:, n:], found.pairs[:, :n].flip(0))
    assert torch.equal(found.shifts[n:], -found.shifts[:n])
    again = found.half.full
    assert torch.equal(again.pairs, found.pairs) and torch.equal(again.shifts, found.shifts)


def test_batch_holds_the_pairs_of_each_system_and_none_between_them():
    systems = [crystal(3), WATER, crystal(5, seed=2), Atoms("H", cell=[9, 9, 9], pbc=True)]
    together = neighbor_list(AtomsBatch.from_atoms(systems), 4.5)
    expected, start = set(), 0
    for atoms in systems:
        alone = neighbor_list(AtomsBatch.from_atoms(atoms), 4.5)
        if not atoms.pbc.any():  # alone, a small molecule's list holds all its pairs; here all are near anyway
            alone = alone.within(AtomsBatch.from_atoms(atoms), 4.5)
        expected |= {(i + start, j + start, *shift) for i, j, *shift in as_set(alone)}
        start += len(atoms)
    assert as_set(together) == expected


def test_within_trims_to_the_cutoff_and_keeps_both_directions():
    atoms = crystal()
    batch = AtomsBatch.from_atoms(atoms)
    trimmed = neighbor_list(batch, 6.0).within(batch, 3.0)
    assert as_set(trimmed) == brute_force_pairs(atoms.positions, atoms.cell.array, atoms.pbc, 3.0)
    n = trimmed.n_pairs // 2
    assert torch.equal(trimmed.pairs[:, n:], trimmed.pairs[:, :n].flip(0))


def test_many_neighbors_are_not_capped():
    batch = AtomsBatch.from_atoms(bulk("Ar", "fcc", 3.0))
    # fcc shells up to 2.1 nearest-neighbour distances: 12 + 6 + 24 + 12
    assert neighbor_list(batch, 2.1 * 3.0 / np.sqrt(2)).n_pairs == 54


def test_large_molecule_is_searched_and_small_one_is_not():
    rng = np.random.default_rng(0)
    large = Atoms("H65", positions=rng.uniform(0, 12, (65, 3)))
    found = neighbor_list(AtomsBatch.from_atoms(large), 3.0)
    assert as_set(found) == brute_force_pairs(large.positions, np.zeros((3, 3)), large.pbc, 3.0)
    assert neighbor_list(AtomsBatch.from_atoms(large[:64]), 3.0).n_pairs == 64 * 63


@pytest.mark.parametrize("cell", [[5, 5, 0], [[5, 0, 0], [5, 0, 0], [0, 0, 5]]])
def test_flat_periodic_cell_is_refused(cell):
    batch = AtomsBatch.from_atoms([crystal(), Atoms("H2", positions=[[0, 0, 0], [1, 0, 0]], cell=cell, pbc=True)])
    with pytest.raises(ValueError, match="system 1 .* lattice vector"):
        neighbor_list(batch, 2.0)


def test_infinite_cutoff_means_all_pairs_of_what_is_not_periodic():
    batch = AtomsBatch.from_atoms(Atoms("H70", positions=np.arange(210.0).reshape(70, 3)))
    assert neighbor_list(batch, float("inf")).n_pairs == 70 * 69
    with pytest.raises(ValueError, match="infinite cutoff in a periodic system"):
        neighbor_list(AtomsBatch.from_atoms(crystal()), float("inf"))


def test_cutoff_that_no_list_can_hold():
    """And it is said before anything is searched."""
    batch = AtomsBatch.from_atoms([crystal(3), crystal(5)])
    with pytest.raises(ValueError, match="a cutoff of 5000 Å means about .* pairs in system 0, with 3 atoms in .* Is the cutoff in Å"):
        neighbor_list(batch, 5000.0)


def test_cutoff_whose_list_has_no_room(monkeypatch):
    """A machine without memory kills the process: it is seen beforehand."""
    asked = []
    monkeypatch.setattr("stabie_ase.structures.neighbors.list.free_bytes", lambda device: asked.append(device) or 2e9)
    batch = AtomsBatch.from_atoms([crystal(6)] * 4)
    per_atom = 4.0 / 3.0 * np.pi * 200.0**3 * batch.n_atoms / float(torch.linalg.det(batch.cells).sum())
    with pytest.raises(MemoryError, match=f"200 Å means about {per_atom:.0f} neighbours of each of {batch.n_atoms} atoms.*; 2 GB are free"):
        neighbor_list(batch, 200.0)
    assert asked == [batch.device]
    assert neighbor_list(batch, 5.0).n_pairs and len(asked) == 1  # memory is not looked at where there is no need


@pytest.mark.parametrize("nowhere", [1e9, 1e30, np.inf, np.nan])
def test_atom_that_flew_away_costs_no_time_and_leaves_the_others_alone(nowhere):
    atoms = Atoms("H3", positions=[[0, 0, 0], [1, 0, 0], [nowhere, 0, 0]], cell=[5, 5, 5], pbc=True)
    batch = AtomsBatch.from_atoms(atoms)
    verlet = VerletList(2.0, skin=0.5)
    near = verlet(batch).within(batch, 2.0)
    assert as_set(near) == {(0, 1, 0, 0, 0), (1, 0, 0, 0, 0)}
    verlet(batch)
    assert verlet.n_builds == 1, "rebuilt although nothing moved"


@for_other_devices
def test_cell_that_is_not_finite_gives_an_empty_list(half_list):
    good, bad = crystal(), crystal()
    bad.cell[0, 0] = np.nan
    found = neighbor_list(AtomsBatch.from_atoms([good, bad]), 3.0)
    assert as_set(found) == as_set(neighbor_list(AtomsBatch.from_atoms(good), 3.0))
    assert same_pairs(half_list, AtomsBatch.from_atoms([good, bad]), 3.0)


@pytest.mark.parametrize("nothing", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("pbc", [(0, 0, 0), (1, 1, 0), (0, 1, 0)])
@for_other_devices
def test_vectors_that_are_not_finite_play_no_part_where_nothing_is_periodic(half_list, pbc, nothing):
    """Neither on their way from ASE nor in a batch made by hand, beside an ordinary system."""
    chain = Atoms("H90", positions=np.cumsum(np.random.default_rng(2).normal(size=(90, 3)), axis=0), cell=[40, 40, 40], pbc=pbc)
    bare, odd = chain.copy(), chain.copy()
    bare.cell[~chain.pbc] = 0.0
    odd.cell[~chain.pbc, ~chain.pbc] = nothing
    expected = AtomsBatch.from_atoms([bare, crystal()])
    cells = torch.tensor(np.stack([odd.cell.array, crystal().cell.array]))
    for batch in (AtomsBatch.from_atoms([odd, crystal()]), expected.replace(cells=cells)):
        found, wanted = neighbor_list(batch, 3.0), neighbor_list(expected, 3.0)
        assert as_set(found) == as_set(wanted) and wanted.n_pairs > 100
        assert torch.equal(found.vectors(batch), wanted.vectors(expected))
        assert same_pairs(half_list, batch, 3.0)


@for_other_devices
@pytest.mark.parametrize("pbc", [False, True])
def test_a_system_far_from_the_origin_has_the_pairs_it_has_there(half_list, pbc):
    atoms = bulk("Ar", "fcc", 5.3, cubic=True).repeat(3)
    atoms.pbc = pbc
    atoms.rattle(0.2, seed=1)
    expected = as_set(neighbor_list(AtomsBatch.from_atoms(atoms), 6.0))
    atoms.positions += 3e7
    found = neighbor_list(AtomsBatch.from_atoms(atoms), 6.0)
    assert len(expected) == found.n_pairs and {p[:2] for p in expected} == {p[:2] for p in as_set(found)}
    assert same_pairs(half_list, AtomsBatch.from_atoms(atoms), 6.0)


def moved(batch, distance):
    step = torch.zeros_like(batch.positions)
    step[1, 0] = distance
    return batch.replace(positions=batch.positions + step)


def test_verlet_list_is_rebuilt_just_beyond_half_the_skin():
    batch = AtomsBatch.from_atoms(Atoms("H3", positions=np.diag([1.0, 2.0, 3.0]), cell=[8, 8, 8], pbc=True))
    verlet = VerletList(3.0, skin=0.5)
    first = verlet(batch)
    assert verlet(moved(batch, 0.25)) is first
    assert verlet(moved(batch, -0.25)) is first
    assert verlet(moved(batch, 0.2500001)) is not first
    assert verlet.n_builds == 2


def test_verlet_list_is_rebuilt_when_cell_or_atoms_change():
    batch = AtomsBatch.from_atoms(crystal())
    verlet = VerletList(3.0)
    verlet(batch)
    verlet(batch.replace(cells=batch.cells.clone()))
    assert verlet.n_builds == 1
    verlet(batch.replace(cells=batch.cells * 0.5))
    assert verlet.n_builds == 2
    verlet(batch.replace(pbc=~batch.pbc))
    assert verlet.n_builds == 3
    verlet(AtomsBatch.from_atoms(crystal(4)))
    assert verlet.n_builds == 4


@pytest.mark.parametrize("cell", [np.diag([5.0, 5.0, 0.0]), np.diag([5.0, 5.0, np.nan])])
def test_verlet_list_of_a_slab_without_a_third_vector_follows_its_cell(cell):
    batch = AtomsBatch.from_atoms(Atoms("H2", positions=[[0, 0, 0], [2.6, 0, 0]], cell=cell, pbc=(1, 1, 0)))
    verlet = VerletList(3.0, skin=0.5)
    for scale in (1.0, 0.99, 0.6):
        strained = batch.replace(positions=scale * batch.positions, cells=scale * batch.cells)
        assert as_set(verlet(strained).within(strained, 3.0)) == as_set(neighbor_list(strained, 3.0))


def test_all_pairs_of_a_molecule_never_go_out_of_date():
    batch = AtomsBatch.from_atoms(METHANOL)
    verlet = VerletList(3.0)
    assert verlet(batch) is verlet(moved(batch, 50.0))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_verlet_list_misses_no_pair_while_it_is_kept(seed):
    rng = np.random.default_rng(seed)
    atoms = crystal(seed=3)
    verlet = VerletList(2.5, skin=0.6)
    verlet(AtomsBatch.from_atoms(atoms))
    for _ in range(4):
        directions = rng.normal(size=(len(atoms), 3))
        atoms.positions += 0.1 * directions / np.linalg.norm(directions, axis=1)[:, None]
        batch = AtomsBatch.from_atoms(atoms)
        kept = verlet(batch).within(batch, 2.5)
        assert as_set(kept) == brute_force_pairs(atoms.positions, atoms.cell.array, atoms.pbc, 2.5)
    assert verlet.n_builds <= 2


@pytest.mark.parametrize("cutoff, skin", [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (3.0, -0.1)])
def test_impossible_cutoff_or_skin_is_refused(cutoff, skin):
    with pytest.raises(ValueError, match="cutoff must be positive and skin not negative"):
        VerletList(cutoff, skin)


def test_gradients_reach_positions_and_cells_through_the_vectors():
    batch = AtomsBatch.from_atoms(crystal())
    found = neighbor_list(batch, 4.0)
    positions, cells = batch.positions.clone().requires_grad_(), batch.cells.clone().requires_grad_()
    weights = torch.arange(found.n_pairs, dtype=torch.float64)[:, None].expand(-1, 3)
    (found.vectors(batch.replace(positions=positions, cells=cells)) * weights).sum().backward()
    i, j = found.pairs
    expected = torch.zeros_like(positions).index_add(0, j, weights).index_add(0, i, -weights)
    assert torch.allclose(positions.grad, expected)
    assert torch.allclose(cells.grad[0], found.shifts.double().T @ weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_list_on_the_device_equals_that_on_the_cpu():
    batch = AtomsBatch.from_atoms([crystal(), WATER])
    there = neighbor_list(batch.to(device="cuda"), 4.0)
    assert there.pairs.is_cuda and as_set(there) == as_set(neighbor_list(batch, 4.0))
    molecules = AtomsBatch.from_atoms([WATER, METHANOL])
    assert as_set(all_pairs(molecules.to(device="cuda"))) == as_set(all_pairs(molecules))
    energy = LennardJones().to("cuda").compute(batch.to(device="cuda"), there).energies
    assert torch.allclose(energy.cpu(), LennardJones().compute(batch, neighbor_list(batch, 4.0)).energies)
