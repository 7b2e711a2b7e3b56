"""Conditional energies: a molecule in its surroundings, beside the same with the molecule in a sound conformation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from scipy.spatial.transform import Rotation

from stabie_ase.boltzmann import Estimator, Samples, StatePoint, accumulate, grouping_from
from stabie_ase.boltzmann.gradient import energy_change, group_energies, with_group_energies
from stabie_ase.boltzmann.projection import projection
from stabie_ase.observables import Observable, Target
from stabie_ase.observables.base import Axis
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.conformers import Conformers
from stabie_ase.structures.geometry import pair_vectors
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups, Topology
from stabie_ase.training.updates.lifted import Lifted

T = 300.0
KT = units.kB * T
CELL = np.array([[9.0, 0.0, 0.0], [2.5, 8.5, 0.0], [-1.5, 2.0, 8.0]])
WATER = molecule("H2O")


def liquid(seed, n=4, noise=0.05, formula="H2O"):
    """Molecules turned at random on a line of places in a skewed cell, some across its faces."""
    rng, box = np.random.default_rng(seed), Atoms(cell=CELL, pbc=True)
    one = molecule(formula)
    for k in range(n):
        other = one.copy()
        other.positions = Rotation.random(rng=rng).apply(one.positions - one.get_center_of_mass()) + (k / n) * CELL.sum(axis=0)
        other.positions += rng.normal(0, noise, (len(one), 3))
        box += other
    box.wrap()
    return box


FRAMES = [liquid(seed) for seed in range(3)]
TOPOLOGY = Topology.from_frames(FRAMES)


def unfolded(atoms, k, size=3):
    """Positions of one molecule from its first atom, by ASE."""
    first = size * k
    return atoms.positions[first] + atoms.get_distances(first, range(first, first + size), mic=True, vector=True)


# -- what is put in place of a molecule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_molecule_at_rest_is_its_conformation_turned_onto_it(dtype):
    """scipy's Wahba solution on the nearest of the conformations, about the centre of mass, whatever face the molecule lies across."""
    frames = [liquid(seed, noise=0.2) for seed in (10, 11)]
    batch = AtomsBatch.from_atoms(frames, dtype=dtype)
    groups, masses = Groups.molecules(batch, TOPOLOGY).select(torch.tensor([0, 3, 6])), WATER.get_masses()
    found = Conformers.of(FRAMES, TOPOLOGY).at_rest(batch, groups).to_atoms()
    for atoms, (frame, k) in zip(found, ((0, 0), (0, 3), (1, 2))):
        now, best = unfolded(frames[frame], k), None
        centre = masses @ now / masses.sum()
        for shape in (unfolded(sound, k) for sound in FRAMES):
            off = shape - masses @ shape / masses.sum()
            turn, distance = Rotation.align_vectors(now - centre, off, weights=masses)
            if best is None or distance < best[0]:
                best = distance, turn.apply(off) + centre
        mine = slice(3 * k, 3 * k + 3)
        off = atoms.positions[mine] - best[1]
        off -= np.round(off @ np.linalg.inv(CELL)) @ CELL
        np.testing.assert_allclose(off, 0.0, atol=1e-5 if dtype == torch.float32 else 1e-9)
        others = np.delete(np.arange(12), mine)
        np.testing.assert_array_equal(atoms.positions[others], batch.positions.view(2, -1, 3)[frame][others].numpy())


def test_sound_molecules_are_at_rest_where_they_are():
    batch = AtomsBatch.from_atoms(FRAMES)
    groups = Groups.molecules(batch, TOPOLOGY)
    found = Conformers.of(FRAMES, TOPOLOGY).at_rest(batch, groups)
    torch.testing.assert_close(found.positions, batch.select(groups.system).positions, rtol=0, atol=1e-10)
    none = groups.select(torch.tensor([], dtype=torch.int64))
    assert Conformers.of(FRAMES, TOPOLOGY).at_rest(batch, none).n_systems == 0


@pytest.mark.parametrize("formula", ["N2", "CO2", "CH3CH2OH"])
def test_molecules_of_any_shape_keep_their_distances_at_rest(formula):
    """Linear ones too, for which one turn is as good as another."""
    size = len(molecule(formula))
    sound, hot = ([liquid(seed, 2, noise, formula) for seed in seeds] for noise, seeds in ((0.0, (0,)), (0.1, (5, 6))))
    topology, batch = Topology.from_frames(sound), AtomsBatch.from_atoms(hot)
    found = Conformers.of(sound, topology).at_rest(batch, Groups.molecules(batch, topology))
    for k, atoms in enumerate(found.to_atoms()):
        at, expected = unfolded(atoms, k % 2, size), unfolded(sound[0], k % 2, size)
        distances = [np.linalg.norm(x[:, None] - x, axis=2) for x in (at, expected)]
        np.testing.assert_allclose(*distances, atol=1e-9)


def test_no_conformation_is_mirrored():
    """A mirror image would be nearest to its own mirror image; what is put there can be reached without breaking bonds."""
    sound = molecule("CH3CH2OH")
    sound.positions += np.random.default_rng(0).normal(0, 0.05, sound.positions.shape)  # ethanol has a mirror plane
    mirrored = sound.copy()
    mirrored.positions *= [-1, 1, 1]
    topology, batch = Topology.from_frames([sound]), AtomsBatch.from_atoms(mirrored)
    (found,) = Conformers.of([sound], topology).at_rest(batch, Groups.molecules(batch, topology)).to_atoms()
    handed = [np.linalg.det(atoms.positions[[1, 2, 5]] - atoms.positions[0]) for atoms in (found, sound)]
    assert handed[0] == pytest.approx(handed[1]) and abs(handed[1]) > 0.01


# -- energies


class Springs(Potential):
    """Each bond O-H a spring, and as much of each bond's energy as `moved` says told of the next molecule: forces do not know of it."""

    family, cutoff, gives_atomic_energies = "springs", 3.0, True

    def __init__(self, stiffness=3.0, moved=0.0):
        super().__init__()
        self.stiffness = torch.nn.Parameter(torch.tensor(float(stiffness), dtype=torch.float64))
        self.moved = torch.nn.Parameter(torch.tensor(float(moved), dtype=torch.float64))

    def forward(self, batch, neighbors, of_atoms=False):
        n = batch.n_atoms // batch.n_systems
        vectors = pair_vectors(batch, torch.stack([torch.arange(n) // 3 * 3, torch.arange(n)]))
        stretch = (vectors.square().sum(dim=2) + (torch.arange(n) % 3 == 0)).sqrt() - 1.0
        own = 0.5 * self.stiffness * stretch.square()
        atomic = ((1.0 - self.moved) * own + self.moved * own.roll(3, dims=1)).flatten()
        return atomic if of_atoms else batch.sum_over_atoms(atomic)


class Stretch(Observable):
    """The mean square stretch of a molecule's bonds, in Å²."""

    name, label, axis, internal = "stretch", "(Å²)", Axis.of_names("", ["stretch"]), True

    def values(self, batch):
        return Springs(2.0)(batch, None)[:, None].detach() / 2.0


def stretched(seed, stiffness, n_frames):
    """Frames of the liquid with bonds O-H straight from their Boltzmann distribution, but for the Jacobian."""
    generator, batch = torch.Generator().manual_seed(seed), AtomsBatch.from_atoms([FRAMES[0]] * n_frames)
    positions = batch.positions.view(n_frames, -1, 3).clone()
    for k in range(4):
        at = torch.as_tensor(unfolded(FRAMES[0], k))
        for h in (1, 2):
            length = 1.0 + (KT / stiffness) ** 0.5 * torch.randn((n_frames, 1), generator=generator, dtype=torch.float64)
            positions[:, 3 * k + h] = at[0] + length * (at[h] - at[0]) / (at[h] - at[0]).norm()
    return batch.replace(positions=positions.view(-1, 3))


def samples_of(frames, conformers=None, severity=0.0):
    groups, index = Groups.molecules(frames, TOPOLOGY), torch.arange(frames.n_systems)
    zeros = torch.zeros(frames.n_systems, dtype=torch.float64)
    values = {"stretch": Stretch()(frames, groups)}
    return Samples(frames, groups, values, zeros, zeros + severity, 0 * index, index, conformers=conformers)


CONFORMERS = Conformers.of(FRAMES, TOPOLOGY)


def gradient(potential, found):
    potential.zero_grad()
    accumulate(potential, found)
    return [float(p.grad) for p in (potential.stiffness, potential.moved)]


def test_where_molecules_are_independent_conditional_energies_are_their_own():
    """Less that at rest; the sum over its own atoms tells the same only while none of it is told of the next molecule."""
    frames = stretched(0, 3.0, 6)
    groups, potential = Groups.molecules(frames, TOPOLOGY), Springs()
    own = group_energies(potential, frames, groups)
    at_rest = CONFORMERS.at_rest(frames, groups)
    molecule_of = torch.arange(groups.n_groups) % 4
    rest = group_energies(potential, at_rest, Groups.molecules(at_rest, TOPOLOGY)).view(-1, 4)[torch.arange(groups.n_groups), molecule_of]
    for moved in (0.0, 0.7):
        found = group_energies(Springs(moved=moved), frames, groups, conformers=CONFORMERS)
        torch.testing.assert_close(found, own - rest, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(group_energies(Springs(moved=0.7), frames, groups), own, rtol=0.1)


@pytest.mark.parametrize("n_frames", [25, 100, 400])
def test_the_gradient_is_exact_where_molecules_are_independent(n_frames):
    """∂⟨s²⟩/∂k = -kT/k² of a spring's stretch s within three standard errors, by all conformations and by some of them.

    Bonds at rest have lengths of their own that the parameter bears on, but no covariance with those that they take the place of:
    they are the same conformations for all frames, up to which of three is nearest, so one is given.
    """
    one = Conformers(CONFORMERS.molecule, CONFORMERS.shapes[:1])
    for drawn in (None, 64):
        found = []
        for seed in range(40):
            samples = samples_of(stretched(seed, 3.0, n_frames), one)
            target = Target(Stretch(), samples.values["stretch"].mean(dim=0) - 0.5)
            here = Estimator(StatePoint(T), drawn=drawn)(samples, [target])
            assert len(here.samples) == min(drawn or len(samples), len(samples))
            found.append(gradient(Springs(), here))
        found = np.array(found)
        expected, error = 2 * 0.5 * -KT / 3.0**2, found[:, 0].std(ddof=1) / 40**0.5
        assert abs(found[:, 0].mean() - expected) < 3 * error < 0.3 * abs(expected)
        np.testing.assert_allclose(found[:, 1], 0.0, atol=1e-12)  # how energies are parted among atoms is no matter of dynamics


@pytest.mark.parametrize("drawn", [None, 64])
def test_the_standard_error_is_the_scatter_of_gradients(drawn):
    """Of 30 sets of frames; means are those of all samples and known as well as these tell, however few of them are drawn."""
    target = Target(Stretch(), torch.tensor([0.7 * KT / 3.0], dtype=torch.float64))
    one, potential = Conformers(CONFORMERS.molecule, CONFORMERS.shapes[:1]), Springs()
    direction = [torch.ones_like(potential.stiffness), torch.zeros_like(potential.moved)]
    found = []
    for seed in range(30):
        estimate = Estimator(StatePoint(T), drawn=drawn)(samples_of(stretched(seed, 3.0, 400), one), [target])
        found.append(projection(potential, estimate, [target], StatePoint(T), direction))
    values, errors = (np.array([getattr(part, name) for part in found]) for name in ("value", "error"))
    # A variance of 30 has a relative error of 0.26.
    assert values.std(ddof=1) ** 2 == pytest.approx((errors**2).mean(), rel=3 * 0.26)


def test_halves_are_drawn_from_apart():
    """Each of two halves that are held against one another has the weight of all of its samples."""
    samples = samples_of(stretched(1, 3.0, 100), CONFORMERS)
    target = Target(Stretch(), samples.values["stretch"].mean(dim=0) - 0.5)
    found = Estimator(StatePoint(T), cross_fit=True, drawn=64)(samples, [target]).samples
    assert len(found) == 64
    for k in (0, 1):
        assert float(found.log_weights[found.half(k)].exp().sum()) == pytest.approx(int(samples.half(k).sum()))


def test_own_energies_of_molecules_follow_how_energies_are_parted():
    """Which is why there are conditional ones: a step may move energies from molecules to their neighbours, and nothing else."""
    frames = stretched(3, 3.0, 50)
    samples = samples_of(frames)
    target = Target(Stretch(), samples.values["stretch"].mean(dim=0) - 0.5)
    assert abs(gradient(Springs(), Estimator(StatePoint(T))(samples, [target]))[1]) > 1e-3


def test_energies_of_samples_are_those_of_the_gradient():
    """energy_change and the gradient's projection by finite differences are of the same energies as the backward pass."""
    potential, samples = Springs(moved=0.2), samples_of(stretched(1, 3.0, 8), CONFORMERS)
    target = Target(Stretch(), samples.values["stretch"].mean(dim=0) - 0.01)
    found = Estimator(StatePoint(T))(samples, [target])
    found = replace(found, samples=with_group_energies(potential, found.samples))
    slope = gradient(potential, found)
    known = projection(potential, found, [target], StatePoint(T), [torch.tensor(1.0).double(), torch.tensor(0.0).double()])
    assert known.value * 32 / 31 == pytest.approx(slope[0], rel=1e-6)  # Bessel's correction, of 32 samples
    with torch.no_grad():
        potential.stiffness += 0.3
    assert float(found.weights @ energy_change(potential, found.samples)) == pytest.approx(0.3 * slope[0], rel=1e-9)


def test_each_observable_meets_the_energies_that_it_is_a_matter_of():
    class Other(Stretch):
        name, internal = "other", False

    conditional, plain = (samples_of(stretched(0, 3.0, 2), conformers) for conformers in (CONFORMERS, None))
    targets = [Target(observable, torch.zeros(1).double()) for observable in (Stretch(), Other())]
    own, rest = conditional.by_energies(targets)
    assert own[0].conformers is CONFORMERS and own[1] == targets[:1]
    assert rest[0].conformers is None and rest[1] == targets[1:]
    assert conditional.by_energies(targets[:1]) == [(conditional, targets[:1])]
    assert plain.by_energies(targets) == [(plain, targets)]


# -- what is held


def test_conditional_energies_are_held():
    """Of molecules that are to become rarer in unstable frames, one frame for each, and without a say of how energies are parted."""
    potential, samples = Springs(), samples_of(stretched(2, 3.0, 3), CONFORMERS, torch.tensor([0.5, 2.0, 2.0]))
    weights = torch.full((12,), 0.01).double()
    weights[[1, 4, 6, 11]] = torch.tensor([-1.0, -1.0, -0.6, -0.3]).double()
    found = replace(Estimator(StatePoint(T))(samples, [Target(Stretch(), torch.zeros(1).double())]), samples=samples, weights=weights)
    held = Lifted.of(potential, found, offset=0.3)
    assert len(held) == 3 and held.atoms.view(3, 12).sum(dim=1).tolist() == [3, 3, 3]
    expected = group_energies(potential, samples.frames, samples.groups, conformers=CONFORMERS)[[4, 6, 11]]
    torch.testing.assert_close(held.energies, expected)
    assert float(held.sunk(Springs(moved=0.9), 5.0).detach()) == pytest.approx(0.0, abs=1e-20)
    softer = held.sunk(Springs(2.0))
    assert float(softer.detach()) == pytest.approx(float((expected.clamp(min=0.0) / 3.0).square().mean() / 3.0), rel=1e-9)
    again = Lifted.restored(held.tensors(), torch.device("cpu"))
    assert float(again.sunk(Springs(2.0)).detach()) == float(softer.detach())
    assert float(held.select(torch.tensor([1])).sunk(Springs(2.0)).detach()) == pytest.approx(
        float((expected[1].clamp(min=0.0) / 3.0).square() / 3.0), rel=1e-9
    )


def test_atoms_have_no_conformations():
    argon = Atoms("Ar8", 3.8 * np.array(list(np.ndindex(2, 2, 2))), cell=[7.6] * 3, pbc=True)
    with pytest.raises(ValueError, match="conditional is for conformations of molecules, and these are atoms; give --estimator"):
        grouping_from("conditional", Setting([argon], T))
