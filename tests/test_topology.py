"""Bonds from frames, and frames whose bonds are not those of the others."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.neighborlist import build_neighbor_list, natural_cutoffs

from stabie_ase.stability import BondLengthDeviation
from stabie_ase.structures.topology import Topology


def rattled(atoms, n=20, width=0.05):
    """Frames of a molecule with a little noise, the same each time."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(n):
        frames.append(atoms.copy())
        frames[-1].positions += rng.normal(scale=width, size=atoms.positions.shape)
    return frames


@pytest.mark.parametrize("name", ["CH3CH2OH", "C6H6", "CH3COOH", "C4H4S", "SiH4", "CH3SiH3", "N2H4"])
def test_bonds_are_those_that_ase_finds(name):
    atoms = molecule(name)
    topology = Topology.from_frames(rattled(atoms))
    found = {tuple(pair) for pair in topology.pairs[:, topology.bonded].T.tolist()}
    near = build_neighbor_list(atoms, [1.25 * c for c in natural_cutoffs(atoms)], skin=0.0, self_interaction=False, bothways=False)
    assert found == {tuple(sorted(pair)) for pair in near.get_connectivity_matrix().keys()}  # noqa: SIM118 - a matrix


def test_bonds_between_atoms_are_counted_along_the_shortest_path():
    """Butadiene-like chain C0-C1-C2-C3 with a ring closed by no one; an atom apart belongs to no path."""
    chain = Atoms("C4He", [[1.5 * k, 0.3 * (k % 2), 0] for k in range(4)] + [[0, 9, 0]])
    topology = Topology.from_frames(rattled(chain, width=0.01))
    between = {tuple(p): s for p, s in zip(topology.pairs.T.tolist(), topology.separation.tolist())}
    assert [between[0, k] for k in (1, 2, 3)] == [1, 2, 3] and between[0, 4] == np.inf


def test_means_and_shortest_distances_do_not_depend_on_how_frames_are_chunked():
    frames = rattled(molecule("CH3CH2OH"), 300)
    topology = Topology.from_frames(frames)
    everything = np.array([atoms.get_all_distances()[np.triu_indices(len(atoms), 1)] for atoms in frames])
    np.testing.assert_allclose(topology.mean, everything.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(topology.shortest, everything.min(axis=0), rtol=1e-12)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_a_frame_whose_atoms_are_in_another_order_is_named(fraction):
    """The hydroxyl hydrogen and one of the methyl group have changed places in some frames."""
    frames = rattled(molecule("CH3CH2OH"))
    order = np.arange(9)
    hydroxyl = int(np.argmin([frames[0].get_distance(2, k) if frames[0].numbers[k] == 1 else 9 for k in range(9)]))
    methyl = int(np.argmax([frames[0].get_distance(2, k) if frames[0].numbers[k] == 1 else 0 for k in range(9)]))
    order[[hydroxyl, methyl]] = methyl, hydroxyl
    swapped = [3, 7, *range(8, 8 + round(20 * fraction) - 2)]
    for k in swapped:
        frames[k] = frames[k][order]
    with pytest.raises(ValueError, match=r"frame (\d+): atoms \d+ and \d+ .* in another order\?") as error:
        Topology.from_frames(frames)
    assert fraction == 0.5 or int(str(error.value).split()[1][:-1]) in swapped


def test_a_proton_that_hops_is_no_other_order():
    """O-H...O: bonded to either oxygen in half of the frames, never far from both."""
    frames = [Atoms("O2H", [[0, 0, 0], [2.5, 0, 0], [1.0 if k % 2 else 1.5, 0, 0]]) for k in range(20)]
    topology = Topology.from_frames(rattled(frames[0], 1) + frames)
    assert topology.bonded.sum() <= 1


def test_never_all_pairs_of_all_frames_at_once(monkeypatch):
    """The largest tensor of distances holds a bounded number of them, however many frames there are."""
    import stabie_ase.structures.topology

    sizes, real = [], stabie_ase.structures.topology._distances

    def counted(batch, pairs, *rest):
        for part in real(batch, pairs, *rest):
            sizes.append(part.numel())
            yield part

    monkeypatch.setattr(stabie_ase.structures.topology, "_distances", counted)
    places = np.random.default_rng(0).uniform(0, 14, (100, 3))
    BondLengthDeviation.from_reference([Atoms("C100", positions=places + 0.001 * k) for k in range(200)], 0.5)
    assert sum(sizes) == 200 * 4950 and max(sizes) <= 2**17
