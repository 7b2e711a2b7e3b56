"""What was lifted is held: which frames, how far they have sunk, and that steps on energies and forces keep it up."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from helpers import samples_of
from test_stabie_loop import loop, until_learning, weights

from stabie_ase.boltzmann.samples import Samples
from stabie_ase.potentials.analytic import Morse
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.topology import Groups
from stabie_ase.training.accuracy import Bounds, Growth
from stabie_ase.training.labels import energy_offset
from stabie_ase.training.schedule import LEARNING, SIMULATION
from stabie_ase.training.updates import natural
from stabie_ase.training.updates.found import find
from stabie_ase.training.updates.label_steps import LEAST_MENDED
from stabie_ase.training.updates.lifted import MAX_FRAMES, Lifted
from stabie_ase.training.updates.natural import MAX_MENDING_RUNS, MENDED_FRACTION, MENDING_LENGTH

TRUTH = tiny.truth()


def estimate(frames, weights, severity, groups=None):
    """Of which only samples and weights matter here."""
    n, weights = frames.n_systems, torch.tensor(weights, dtype=torch.float64)
    of_frames = samples_of(torch.zeros(n, 1).double(), frames=frames, severity=torch.tensor(severity, dtype=torch.float64))
    nothing = {"vector": torch.zeros(n if groups is None else groups.n_groups, 1).double()}
    samples = of_frames if groups is None else replace(of_frames, groups=groups, values=nothing)
    return SimpleNamespace(samples=samples, weights=weights)


def stretched(*lengths):
    """Pairs of carbon atoms."""
    return AtomsBatch.from_atoms([Atoms("C2", [[0, 0, 0], [x, 0, 0]]) for x in lengths])


def energies(frames, potential=TRUTH):
    with torch.no_grad():
        return potential(frames, neighbor_list(frames, potential.cutoff))


def test_held_are_frames_that_are_unstable_and_to_become_rarer():
    frames = stretched(1.5, 2.0, 2.5, 3.0)
    held = Lifted.of(TRUTH, estimate(frames, [-1.0, -0.2, 0.3, -1e-9], [0.9, 1.1, 2.0, 3.0]))
    torch.testing.assert_close(held.frames.positions, frames.select([1, 3]).positions)
    torch.testing.assert_close(held.energies, energies(frames)[[1, 3]])
    assert held.atoms.all()


@pytest.mark.parametrize("weights, severity", [([1.0, 0.0], [2.0, 2.0]), ([-1.0, -1.0], [1.0, 0.0])], ids=["common", "sound"])
def test_without_such_frames_nothing_is_held(weights, severity):
    assert Lifted.of(TRUTH, estimate(stretched(1.5, 2.0), weights, severity)) is None


def test_of_groups_those_that_weigh_most_count():
    """Two pairs far apart are a frame; the energy of the broken one alone is held, and what the other does is none of its business."""
    pair = [[0, 0, 0], [2.5, 0, 0], [0, 50, 0], [1.5, 50, 0]]
    frames = AtomsBatch.from_atoms([Atoms("C4", pair)] * 2)
    groups = Groups(torch.arange(8), torch.arange(8) // 2, torch.tensor([0, 0, 1, 1]))
    held = Lifted.of(TRUTH, estimate(frames, [-1.0, -0.1, -0.1, -1.0], [2.0, 2.0], groups))
    assert held.atoms.tolist() == [True, True, False, False, False, False, True, True]
    expected = energies(stretched(2.5, 1.5))
    torch.testing.assert_close(held.energies, expected)
    assert float(held.sunk(TRUTH).detach()) == 0.0


def test_of_many_frames_some_are_held_from_first_to_last():
    n = 3 * MAX_FRAMES
    lengths = np.linspace(1.5, 3.0, n)
    held = Lifted.of(TRUTH, estimate(stretched(*lengths), [-1.0] * n, [2.0] * n))
    assert len(held) == MAX_FRAMES
    assert held.frames.positions[1, 0] == lengths[0] and held.frames.positions[-1, 0] == lengths[-1]


def test_only_what_has_sunk_counts_by_its_square_an_atom():
    frames = stretched(1.5, 2.0, 2.5)
    now = energies(frames)
    held = Lifted(frames, torch.ones(6, dtype=torch.bool), now + torch.tensor([0.3, -5.0, 0.1]).double())
    assert float(held.sunk(TRUTH).detach()) == pytest.approx((0.3**2 + 0.1**2) / 2 / 3)


class Shifted(Morse):
    """The truth but for 0.7 eV an atom."""

    def evaluate(self, inputs):
        return super().evaluate(inputs) + 0.7


@pytest.mark.parametrize("groups", [None, Groups(torch.arange(4), torch.arange(4) // 2, torch.tensor([0, 0]))], ids=["frames", "groups"])
def test_what_all_atoms_are_off_by_has_not_sunk(groups):
    """U* and U are on the scale of the labels, whatever all energies have in common, of frames and of groups in them."""
    frames = AtomsBatch.from_atoms([Atoms("C4", [[0, 0, 0], [2.5, 0, 0], [0, 50, 0], [1.5, 50, 0]])])
    given = estimate(frames, [-1.0] if groups is None else [-1.0, -0.1], [2.0], groups)
    shifted = Shifted(depth=3.0, a=1.8, r0=tiny.BOND)
    held = Lifted.of(shifted, given, offset=0.7)
    torch.testing.assert_close(held.energies, Lifted.of(TRUTH, given).energies)
    higher = replace(held, energies=held.energies + 0.3)
    n = 4 if groups is None else 2
    for potential, offset in ((shifted, 0.7), (TRUTH, 0.0)):
        assert float(higher.sunk(potential, offset).detach()) == pytest.approx(0.3**2 / n)


def test_what_is_between_molecules_is_told_beside_where_they_were_when_sound():
    """Soundest of the same trajectory, shortly before; whatever else has moved is as it is now. No force knows how energy is parted."""
    potential, shifted = (kind(3.0, 1.8, tiny.BOND, 6.0) for kind in (Morse, Shifted))
    lengths, others = [1.6, 1.5, 1.7, 2.2, 2.4], [1.5, 1.52, 1.54, 1.56, 1.58]
    frames = AtomsBatch.from_atoms(
        [Atoms("C4", [[0, 0, 0], [x, 0, 0], [0, 9, 0], [y, 9, 0]], cell=[50] * 3, pbc=True) for x, y in zip(lengths, others)]
    )
    groups = Groups(torch.arange(20), torch.arange(20) // 2, torch.arange(5).repeat_interleave(2))
    known = estimate(frames, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, -1.0, -0.1, -1.0, -0.1], [0.1, 0.2, 0.9, 2.0, 2.0], groups)
    of = {"replica": torch.tensor([0, 0, 0, 0, 1]), "frame": torch.tensor([0, 1, 2, 3, 4])}
    known.samples = known.all_samples = replace(known.samples, **of)
    held = Lifted.beside_before(potential, known, 2)
    assert torch.equal(held.frames.positions, frames.select([3]).positions) and held.atoms.tolist() == [True, True, False, False]
    assert held.at_rest.positions[:, 0].tolist() == pytest.approx([0, 1.5, 0, 1.56])
    alone = energies(stretched(2.2, 1.5), potential)
    torch.testing.assert_close(held.energies, alone[[0]] - alone[[1]])
    higher = replace(held, energies=held.energies + 0.3)
    assert float(higher.sunk(shifted, 0.7).detach()) == pytest.approx(0.3**2 / 2)
    assert Lifted.beside_before(potential, known, 9).at_rest.positions[1, 0] == 1.6
    known.samples = known.all_samples = replace(known.samples, severity=torch.tensor([0.1, 1.2, 1.9, 2.0, 2.0]).double())
    assert Lifted.beside_before(potential, known, 2) is None


def test_saved_and_restored_it_is_the_same():
    held = Lifted.of(TRUTH, estimate(stretched(1.8, 2.5), [-1.0, -0.5], [2.0, 2.0]))
    again = Lifted.restored(held.tensors(), torch.device("cpu"))
    assert all(torch.equal(x, again.tensors()[name]) for name, x in held.tensors().items()) and again.frames.sizes == [2, 2]


def after_a_step(**changes):
    """A loop, the estimate of a window of which a step has lifted the failures, and what is held of it."""
    training = loop(**changes)
    until_learning(training)
    pool = training.pools[0]
    _, trajectory, _ = pool.learn()
    targets = pool.condition.targets
    samples = Samples.from_trajectory(trajectory, [t.observable for t in targets], pool.condition.grouping, training.potential)
    (found,) = find(training.work, pool.condition, samples)
    held = Lifted.of(training.potential, found.estimate)
    return training, replace(held, energies=held.energies + 5.0)  # as if a step had lifted all by so much


def test_steps_on_energies_and_forces_keep_up_what_is_held():
    """The same steps without it, which know labels alone, leave it farther below."""
    training, held = after_a_step(qm_steps=60, learning_rate=1e-3, gradient_clip=1e3)
    before, left = weights(training), []

    def sunk():
        offset = energy_offset(training.potential, training.work.some_labelled())
        return float(held.sunk(training.potential, offset).detach())

    begun = sunk()
    for lifted in ([], [held]):
        training.potential.load_state_dict(before)
        training.rule.steps.run(lifted)
        left.append(sunk())
    assert left[1] < 0.9 * min(begun, left[0])


def test_what_is_held_is_saved_with_a_run():
    training, _ = after_a_step()
    training.rule.apply_([(training.pools[0].condition, samples) for samples in [_samples(training)]])
    assert training.rule.lifted
    other = loop()
    other.restore(training.state())
    for mine, theirs in zip(training.rule.lifted, other.rule.lifted, strict=True):
        assert all(torch.equal(x, theirs.tensors()[name]) for name, x in mine.tensors().items())


def _samples(training):
    pool = training.pools[0]
    observables = [target.observable for target in pool.condition.targets]
    return Samples.from_trajectory(pool.learn()[1], observables, pool.condition.grouping, training.potential)


@pytest.mark.parametrize(
    "force_growths, runs",
    [
        ([0.19], 1),
        ([0.9, 0.6, 0.1], 3),
        ([0.9, 0.9 - 0.9 * LEAST_MENDED], 2),
        ([9.0 - k for k in range(20)], 1 + MAX_MENDING_RUNS),
    ],
    ids=["small at once", "small at last", "no smaller", "for ever"],
)
def test_errors_are_mended_while_that_makes_them_smaller(force_growths, runs, monkeypatch):
    """Errors of which each run of steps leaves what is given here, as parts of their bound."""
    training = loop()
    rule, told = training.rule, iter(force_growths)
    assert 0.19 < MENDED_FRACTION < 0.8
    bound = training.work.bounds.force
    monkeypatch.setattr(training.accuracy, "measure", lambda _: Growth(0.0, next(told) * bound, 0.0, 0.0))
    rule._mend([])
    assert rule.steps.runs == 1 + (runs - 1) * MENDING_LENGTH


@pytest.mark.parametrize(
    "growth, bounds, part",
    [
        ((0.02, 0.01), (0.05, 0.1), 0.4),
        ((0.0, 0.05), (0.05, 0.1), 0.5),
        ((-0.1, -0.1), (0.05, 0.1), -1.0),
        ((0.01, 0.0), (0.0, 0.1), np.inf),
    ],
)
def test_the_part_of_the_bounds_that_is_used_up(growth, bounds, part):
    assert Growth(1.0, growth[0], 1.0, growth[1]).part(Bounds(*bounds)) == pytest.approx(part)


@pytest.mark.parametrize("error, updates", [(0.9, 1), (1.1, 0)], ids=["known", "noise"])
def test_a_gradient_that_is_shorter_than_its_standard_error_moves_nothing_and_ends_the_phase(error, updates, monkeypatch):
    """A window of the same weights, starts and noise would be the same window again."""
    training = loop(updates_per_window=1, max_learning_windows=9, force_error_bound=100.0, energy_error_bound=100.0)
    until_learning(training)
    before = weights(training)
    monkeypatch.setattr(natural, "known_gradient", lambda potential, estimates: {"gradient_norm": 1.0, "gradient_norm_error": error})
    record, _ = training.step()
    assert record["updates"] == updates and record["gradient_norm_error"] == error
    assert all(torch.equal(x, before[name]) for name, x in weights(training).items()) is (updates == 0)
    assert training.progress.phase == (LEARNING if updates else SIMULATION)
