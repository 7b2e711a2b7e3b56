"""Sites that atoms stay at, the kind of system, and the criteria that suit it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, graphene, molecule
from ase.spacegroup import crystal

from stabie_ase.boltzmann import choose_grouping
from stabie_ase.observables import default_observable, observables_from
from stabie_ase.runs.evaluation import Yardstick
from stabie_ase.stability import criteria_from, default_criteria
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.kind import ATOMIC_LIQUID, ISOLATED, MOLECULAR_LIQUID, SOLID, SURFACE, kind_of
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.sites import Sites


def argon(n=3):
    return bulk("Ar", "fcc", a=5.3, cubic=True).repeat(n)


def boxed(name, size, repeat=1, **pbc):
    atoms = molecule(name)
    atoms.set_cell([size] * 3)
    atoms.pbc = pbc.get("pbc", True)
    atoms.center()
    return atoms.repeat([repeat if periodic else 1 for periodic in atoms.pbc])


def rattled(atoms, n, width, seed=0):
    rng, frames = np.random.default_rng(seed), []
    for _ in range(n):
        frames.append(atoms.copy())
        frames[-1].positions += rng.normal(scale=width, size=atoms.positions.shape)
    return frames


def monolayer():
    atoms = graphene(size=(3, 3, 1), vacuum=8.0)
    atoms.pbc = True
    return atoms


def slab(periodic):
    atoms = fcc111("Al", (3, 3, 4), vacuum=8.0)
    atoms.pbc = [True, True, periodic]
    return atoms


def wet(periodic=True, touching=False):
    """Two molecules of water on a slab; one may be near enough for a bond to it."""
    atoms = slab(periodic)
    top = atoms.positions[:, 2].max()
    for place in ([2.0, 2.0, top + (2.0 if touching else 3.2)], [6.0, 3.0, top + 3.4]):
        water = molecule("H2O")
        water.rotate(180, "x")
        water.translate(place - water.positions[0])
        atoms += water
    return atoms


def confined():
    """The same between two slabs, with no vacuum left."""
    atoms = wet()
    low, high = atoms.positions[:, 2].min(), atoms.positions[:, 2].max()
    atoms.cell[2, 2] = high - low + 3.0
    return atoms


def pyrite():
    return crystal(["Fe", "S"], [(0, 0, 0), (0.385, 0.385, 0.385)], spacegroup=205, cellpar=[5.42] * 3 + [90] * 3)


def stirred(atoms, n, width=0.1, seed=0):
    """Frames in each of which the atoms are at other places."""
    rng, frames = np.random.default_rng(seed), rattled(atoms, n, width, seed)
    for atoms in frames:
        atoms.positions[:] = atoms.positions[rng.permutation(len(atoms))]
    return frames


def with_a_close_pair():
    frames = stirred(argon(), 5)
    frames[0].positions[1] = frames[0].positions[0] + [2.6, 0, 0]
    return frames


@pytest.mark.parametrize(
    "frames, name, bonding, at_sites",
    [
        ([molecule("CH3CH2OH")], ISOLATED, "none", False),
        ([boxed("H2O", 4.0, 2)], MOLECULAR_LIQUID, "molecules", False),
        ([boxed("CH3CH2OH", 12.0)], MOLECULAR_LIQUID, "molecules", False),
        ([bulk("Si")], SOLID, "network", True),  # its one bond reaches an image of the other atom
        ([bulk("Cu")], SOLID, "network", True),  # bonded to itself only
        ([bulk("NaCl", "rocksalt", a=5.64, cubic=True)], SOLID, "network", True),
        (rattled(argon(), 10, 0.25), SOLID, "none", True),
        (stirred(argon(), 5), ATOMIC_LIQUID, "none", False),
        (with_a_close_pair(), ATOMIC_LIQUID, "none", False),
        ([slab(False)], SURFACE, "network", True),
        ([slab(True)], SURFACE, "network", True),
        ([monolayer()], SURFACE, "network", True),
        ([boxed("H2O", 4.0, 2, pbc=[True, True, False])], SURFACE, "molecules", False),
        (rattled(wet(False), 3, 0.05), SURFACE, "both", True),
        (rattled(wet(True), 3, 0.05), SURFACE, "both", True),
        (rattled(confined(), 3, 0.05), SOLID, "both", True),
        (rattled(pyrite(), 3, 0.05), SOLID, "both", True),  # its sulfur is in pairs
    ],
)  # fmt: skip
def test_kinds(frames, name, bonding, at_sites):
    kind = kind_of(frames)
    assert (kind.name, kind.bonding, kind.at_sites) == (name, bonding, at_sites), kind.describe()
    assert kind.reason and kind.describe().startswith(name)


def brine(n=1, moves=False, ion="Na"):
    """Ions among water, each with the oxygen of a molecule, another one in every frame if it moves, within reach of a bond."""
    waters, frames = boxed("H2O", 4.0, 3), []
    for k in range(n):
        oxygen = waters.positions[3 * (k if moves else 0)]
        frames.append(waters + Atoms(ion, [oxygen + [0, 0, 2.3]]))
    return frames


@pytest.mark.parametrize("moves", [False, True])
def test_neighbours_of_an_ion_are_not_its_molecule(moves):
    """Whether or not those of the reference change: in a run of dynamics they will."""
    setting = Setting(brine(10, moves), 300.0, timestep_fs=1.0)
    assert setting.kind.name == MOLECULAR_LIQUID and sorted({len(atoms) for atoms in setting.topology.members}) == [1, 3]
    assert default_criteria(setting, 0.25) == "bonds:0.25,angles:20,contacts:0.25,intermolecular,energy,temperature"


def test_of_a_mixture_each_frame_is_a_sample_and_molecules_of_any_kind_are_to_blame():
    setting = Setting(brine(10), 300.0)
    grouping = choose_grouping(None, setting, observables_from("hr", setting), SimpleNamespace(gives_atomic_energies=True))
    assert grouping.whole and "differ (H2O, Na)" in grouping.reason
    frames = AtomsBatch.from_atoms(brine(2))
    assert grouping.blamed(frames).group.bincount().tolist() == ([3] * 27 + [1]) * 2
    assert choose_grouping("global", setting, [], None).describe() == grouping.describe()
    alone = Setting([boxed("CH3CH2OH", 12.0)], 300.0)
    assert choose_grouping("global", alone, [], None).blamed is None


def test_what_binds_an_ion_without_a_cell_is_a_bond_if_it_lasts():
    bound = Setting([molecule("LiF")] * 3, 300.0)
    assert bound.topology.bonded.tolist() == [True]
    cluster = [atoms[:9] + atoms[-1:] for atoms in brine(3, moves=True)]  # its ion goes from one water to the next
    for atoms in cluster:
        atoms.pbc = False
    assert sorted({len(atoms) for atoms in Setting(cluster, 300.0).topology.members}) == [1, 3]


def test_a_melt_of_ions_has_no_bonds_and_their_crystal_is_a_network():
    crystal = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(2)
    assert kind_of(rattled(crystal, 5, 0.1)).bonding == "network"
    melted = rattled(crystal, 8, 0.1)
    for k, atoms in enumerate(melted):  # cations and anions change places among themselves
        atoms.positions[0::2], atoms.positions[1::2] = (np.roll(atoms.positions[n::2], 5 * k, axis=0) for n in (0, 1))
    melt = Setting(melted, 1100.0, timestep_fs=1.0)
    assert (melt.kind.name, melt.kind.bonding) == (ATOMIC_LIQUID, "none")
    assert default_criteria(melt, 0.25) == "intermolecular,energy,temperature"


def test_what_reacts_is_judged_without_bonds_where_others_are_named():
    """A proton of water goes to the molecule at the other end of the box and back."""
    frames = [atoms.copy() for atoms in [boxed("H2O", 4.0, 3)] * 6]
    for atoms in frames[::2]:
        atoms.positions[[1, 40]] = atoms.positions[[40, 1]]
    setting = Setting(frames, 300.0, timestep_fs=1.0)
    assert not setting.bonds_last
    with pytest.raises(ValueError, match="name criteria and observables that need no bonds: --criterion energy,temperature"):
        default_criteria(setting, 0.25)
    assert default_criteria(setting, 0.25, chosen=True) == "energy,temperature"
    assert default_criteria(Setting(frames[:1], 300.0), 0.25, chosen=True).startswith("bonds")


@pytest.mark.parametrize("periodic", [False, True])
def test_molecules_beside_a_network_are_judged_and_matched(periodic):
    """Those too that metals of the network bind."""
    setting = Setting(rattled(wet(periodic), 5, 0.05), 300.0, timestep_fs=1.0)
    assert setting.kind.beside == tuple(range(36, 42)) and setting.molecules.bonds.T.tolist() == [[36, 37], [36, 38], [39, 40], [39, 41]]
    assert default_criteria(setting, 0.25) == "bonds:0.25,angles:20,contacts:0.25,lindemann,energy,temperature"
    bonds, angles, contacts = criteria_from("bonds:0.25,angles:20,contacts:0.25", setting)
    assert (bonds.bonds >= 36).all() and angles.angles.shape[1] == 2 and contacts.pairs.T.tolist() == [[37, 38], [40, 41]]
    names = default_observable(setting).split(",")
    assert names[:3] == ["hr", "hr:H-H", "hr:H-O"] and ("rdf:Al-O" in names) == periodic
    assert len(observables_from(default_observable(setting), setting)) == len(names)
    bound = Setting(rattled(wet(periodic, touching=True), 5, 0.05), 300.0, timestep_fs=1.0)
    assert bound.kind.beside == tuple(range(36, 42)) and bound.molecules.bonds.tolist() == setting.molecules.bonds.tolist()


def test_of_a_network_with_molecules_beside_it_its_own_atoms_have_sites():
    """Whose molecules go anywhere, and judged by the network alone: its atom that is farthest off is to blame."""
    frames = rattled(wet(), 5, 0.05)
    for k, atoms in enumerate(frames):
        atoms.positions[36:] += [0.8 * k, 0.5 * k, 0.0]
    setting = Setting(frames, 300.0)
    assert setting.kind.at_sites and "lindemann" in default_criteria(setting, 0.25)
    (criterion,) = criteria_from("lindemann", setting)
    (bare,) = criteria_from("lindemann", Setting([atoms[:36] for atoms in frames], 300.0))
    hot = rattled(wet(), 1, 0.4)[0]
    hot.positions[38] += 3.0
    found = criterion.judge(SimpleNamespace(batch=AtomsBatch.from_atoms([hot, hot])))
    expected = bare.judge(SimpleNamespace(batch=AtomsBatch.from_atoms([hot[:36]] * 2)))
    torch.testing.assert_close(found.value, expected.value)
    assert found.atoms.tolist() == expected.atoms.tolist() and float(found.severity[0]) > 0.5


def test_molecules_that_a_network_breaks_are_not_asked_for():
    """A hydrogen goes from one molecule on a surface to the other: judged as the network alone would be."""
    frames = rattled(wet(), 6, 0.05)
    for atoms in frames[::2]:
        atoms.positions[[37, 40]] = atoms.positions[[40, 37]]
    setting = Setting(frames, 300.0, timestep_fs=1.0)
    assert setting.kind.beside and not setting.bonds_last
    assert default_criteria(setting, 0.25) == "lindemann,energy,temperature" and default_observable(setting).startswith("rdf:")


def test_a_melt_whose_bonds_come_and_go_is_a_liquid():
    """Its atoms have no one set of bonds, which nobody asks for."""
    setting = Setting(stirred(bulk("Cu", cubic=True).repeat(3), 8), 1500.0, timestep_fs=1.0)
    with pytest.raises(ValueError, match="in another order"):
        assert setting.topology
    assert setting.kind.name == ATOMIC_LIQUID and default_criteria(setting, 0.5, windows=True) == "energy,temperature,rdf"


@pytest.mark.parametrize(
    "frames, training, verdict",
    [
        ([molecule("CH3CH2OH")] * 2, "bonds:0.25,contacts:0.25,energy,temperature", "bonds:0.5,contacts:0.5,energy,temperature"),
        ([boxed("H2O", 4.0, 2)], "bonds:0.25,angles:20,contacts:0.25,intermolecular,energy,temperature",
         "bonds:0.5,angles:40,contacts:0.5,intermolecular,energy,temperature,rdf"),
        ([boxed("N2", 4.0, 2)], "bonds:0.25,intermolecular,energy,temperature", "bonds:0.5,intermolecular,energy,temperature,rdf"),
        ([boxed("CH3CH2OH", 12.0)], "bonds:0.25,angles:20,contacts:0.25,energy,temperature",
         "bonds:0.5,angles:40,contacts:0.5,energy,temperature,rdf"),
        (stirred(argon(), 5), "intermolecular,energy,temperature", "intermolecular,energy,temperature,rdf"),
        ([bulk("Cu", cubic=True)], "lindemann,energy,temperature", "lindemann,energy,temperature,rdf"),
        ([slab(True)], "lindemann,energy,temperature", "lindemann,energy,temperature"),
    ],
)
def test_what_suits_a_kind(frames, training, verdict):
    setting = Setting(frames * 2, 300.0, timestep_fs=0.5)
    assert default_criteria(setting, 0.25) == training
    assert default_criteria(setting, 0.5, windows=True) == verdict


def test_the_verdict_of_a_periodic_system_has_radial_distributions():
    """If the time step is known, frames are several, and of the temperature of the dynamics."""
    frames = rattled(argon(2), 5, 0.2)

    def names(frames=frames, reference_K=90.0, timestep_fs=2.0):
        return [c.name for c in Yardstick.from_reference(None, Setting(frames, 90.0, reference_K, timestep_fs, 10.0), []).criteria]

    assert names() == ["intermolecular", "lindemann", "energy", "temperature", "rdf"]
    for without in (names(timestep_fs=None), names(frames=frames[:1]), names(reference_K=150.0)):
        assert without == ["intermolecular", "lindemann", "energy", "temperature"]
    isolated = Setting([molecule("CH3CH2OH")] * 2, 90.0, 90.0, 2.0, 10.0)
    yardstick = Yardstick.from_reference(None, isolated, [])
    assert [c.name for c in yardstick.criteria] == ["bonds", "contacts", "energy", "temperature"] and yardstick.distribution


# -- sites


def test_sites_of_a_rattled_crystal():
    """Means over frames that drift by any amount and are wrapped, whose spread is the width that they were made with."""
    crystal, width = argon(), 0.2
    frames = rattled(crystal, 50, width)
    for k, atoms in enumerate(frames):
        atoms.positions += [1.7 * k, -0.4 * k, 0.9]
        atoms.wrap()
    sites = Sites.from_frames(frames)
    n = 3 * len(crystal) * 49
    assert sites.spread == pytest.approx(3**0.5 * width * (1 - 1 / len(crystal)) ** 0.5, rel=5 / (2 * n) ** 0.5)
    assert sites.spacing == pytest.approx(5.3 / 2**0.5, rel=0.02)
    moved = sites.displacements(AtomsBatch.from_atoms(crystal))  # all alike to what the means do not know better
    assert float(moved.norm(dim=2).mean()) < 3 * width / 50**0.5


def test_displacements_do_not_depend_on_drift_image_or_size_of_the_cell():
    crystal = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(2)
    sites = Sites.from_frames([crystal])
    displaced = rattled(crystal, 1, 0.3)[0]
    drifted, larger = displaced.copy(), displaced.copy()
    drifted.positions += 0.75 * crystal.cell.array.sum(axis=0)
    drifted.positions[::3] += crystal.cell.array[1] - 2 * crystal.cell.array[2]
    larger.set_cell(1.1 * crystal.cell.array, scale_atoms=True)
    u = displaced.positions - crystal.positions
    u = u - np.average(u, axis=0, weights=crystal.get_masses())
    found = sites.displacements(AtomsBatch.from_atoms([displaced, drifted, larger])).numpy()
    for k, factor in enumerate((1.0, 1.0, 1.1)):
        np.testing.assert_allclose(found[k], factor * u, atol=1e-10)


@pytest.mark.parametrize("atoms, expected", [(bulk("Cu", "fcc", a=3.6), 3.6 / 2**0.5), (bulk("Fe", "bcc", a=2.87), 2.87 * 0.75**0.5),
                                             (slab(False), 4.05 / 2**0.5), (Atoms("Ar", cell=[30] * 3, pbc=True), 30.0)])  # fmt: skip
def test_the_distance_of_neighbours(atoms, expected):
    assert Sites.from_frames([atoms]).spacing == pytest.approx(expected)


def test_sites_of_what_changes():
    with pytest.raises(ValueError, match="one system with its atoms in one order"):
        Sites.from_frames([argon(1), argon(2)])
    with pytest.raises(ValueError, match=r"the sites are those of 4 atoms, got systems of \[32\]"):
        Sites.from_frames([argon(1)]).displacements(AtomsBatch.from_atoms(argon(2)))


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([molecule("H2O")] * 2, "hr,hr:H-H,hr:H-O"), ([molecule("N2")] * 2, "hr"),
        ([bulk("Cu", cubic=True)] * 2, "rdf:Cu-Cu"),
        ([bulk("NaCl", "rocksalt", 5.64, cubic=True)] * 2, "rdf:Cl-Cl,rdf:Cl-Na,rdf:Na-Na"),
    ],
)
def test_default_observables_are_made_for_the_system(frames, expected):
    assert default_observable(Setting(frames, 300.0)) == expected


def test_default_observables_of_water():
    """h(r) within the molecules and all three radial distributions, each of which can be made."""
    setting = Setting(rattled(boxed("H2O", 4.0, repeat=2), 3, 0.01), 300.0)
    assert default_observable(setting) == "hr,hr:H-H,hr:H-O,rdf:H-H,rdf:H-O,rdf:O-O"
    assert len(observables_from(default_observable(setting), setting)) == 6
