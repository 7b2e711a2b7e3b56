"""States before failures: which are kept, which are run again, and who learns beside them."""

import pytest
import torch
from test_stabie_loop import loop, same_state, until_learning, weights

from stabie_ase.training.bank import Bank, joined
from stabie_ase.training.pool import MIN_SOUND_LEARNERS
from stabie_ase.training.schedule import SIMULATION


@pytest.fixture(scope="module")
def states():
    return loop().pools[0].replicas


def numbered(states, *numbers):
    """Replicas that can be told apart by their steps."""
    return states.select(torch.zeros(len(numbers), dtype=torch.int64)).replace(step=torch.tensor(numbers))


def flags(text):
    return torch.tensor([letter == "f" for letter in text])


def test_joined_states_are_both(states):
    one, two = states.select([0, 1, 2]), states.select([5, 4])
    both = joined(one, two)
    assert both.n_systems == 5 and same_state(both.select([0, 1, 2]), one) and same_state(both.select([3, 4]), two)


def test_what_no_longer_fails_goes_first_then_the_oldest(states):
    bank = Bank(4)
    bank.add(numbered(states, 1, 2, 3), flags("fsf"))
    bank.add(numbered(states, 4, 5), flags("fs"))
    assert bank.states.step.tolist() == [1, 3, 4, 5] and bank.failing.tolist() == [True, True, True, False]
    bank.add(numbered(states, 6, 7), flags("ff"))
    assert bank.states.step.tolist() == [3, 4, 6, 7]
    bank.add(numbered(states, *range(10, 20)), flags("f" * 10))
    assert bank.states.step.tolist() == [16, 17, 18, 19] and len(bank) == 4


def test_what_still_fails_is_chosen_first_then_the_latest(states):
    bank = Bank(10)
    bank.add(numbered(states, 0, 1, 2, 3), flags("fssf"))
    assert [bank.choose(n).tolist() for n in (0, 1, 2, 3, 9)] == [[], [3], [0, 3], [0, 2, 3], [0, 1, 2, 3]]
    bank.note(torch.tensor([3, 1]), torch.tensor([False, True]))
    assert bank.failing.tolist() == [True, True, False, False] and bank.choose(2).tolist() == [0, 1]


def test_a_bank_without_room_keeps_nothing(states):
    bank = Bank(0)
    bank.add(numbered(states, 1), flags("f"))
    assert len(bank) == 0 and bank.choose(5).tolist() == [] and bank.state() == {}


def few_failures(**changes):
    """A loop of 40 replicas of which a phase ends once a tenth has failed."""
    phases = {"bank": 1.0, "upper_fraction": 0.1, "lower_fraction": 0.05, "random_resets": 0.0, "max_simulation_windows": 40}
    return loop(replicas=40, window_fs=10.0, **phases, **changes)


def test_learning_takes_few_sound_replicas_where_few_fail():
    training = few_failures()
    until_learning(training)
    pool, failed = training.pools[0], training.pools[0].failed.clone()
    assert 4 <= int(failed.sum()) < 16
    steps = pool.counters.md_steps
    record, _ = training.step()
    lesson, n_failed = pool.lesson, int(failed.sum())
    assert failed[lesson.rows].sum() == n_failed and len(lesson.rows) == n_failed + max(n_failed, MIN_SOUND_LEARNERS)
    assert pool.counters.md_steps - steps <= len(lesson.rows) * 10 and record["updates"] > 0
    assert pool.failed_again(pool.learn()[2]) <= 1.0


def test_failures_of_earlier_phases_are_learned_from_again():
    """A state of the bank is run from where it was, with the noise that it had: under the same weights it fails again."""
    training = few_failures(max_learning_windows=1, updates_per_window=1, observable_weight=1e-6, learning_rate=0.0)
    until_learning(training)
    pool = training.pools[0]
    first = pool.replicas.select(pool.failed.nonzero()[:, 0])
    training.step()
    assert training.progress.phase == SIMULATION and same_state(pool.bank.states, first, but=("forces", "potential_energy"))
    assert pool.bank.failing.all()
    until_learning(training)
    _, _, failures = pool.learn()
    lesson = pool.lesson
    assert len(lesson.banked) == first.n_systems and failures.failed[len(lesson.rows) :].all()
    again = lesson.state.select(range(len(lesson.rows), lesson.state.n_systems))
    assert same_state(again, pool.bank.states, but=("forces", "potential_energy"))


def test_replicas_that_did_not_learn_stay_where_they_are():
    training = few_failures(max_learning_windows=1)
    until_learning(training)
    pool, before = training.pools[0], training.pools[0].replicas
    rows = []
    learn = pool.learn
    pool.learn = lambda **settings: (learn(**settings), rows.append(pool.lesson.rows))[0]
    training.step()
    others = torch.ones(40, dtype=torch.bool).index_fill(0, rows[0], False).nonzero()[:, 0]
    assert len(others) > 8
    assert same_state(pool.replicas.select(others), before.select(others), but=("forces", "potential_energy"))
    assert not torch.equal(pool.replicas.step, before.step)


def test_a_bank_restores_exactly(tmp_path):
    one = few_failures(max_learning_windows=2)
    for _ in range(2):
        until_learning(one)
        one.step()
        one.progress.phase == SIMULATION or one.step()
    until_learning(one)
    one.step()
    torch.save(one.state(), tmp_path / "state.pt")
    other = few_failures(max_learning_windows=2)
    other.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert len(other.pools[0].bank) == len(one.pools[0].bank) > 0
    for _ in range(3):
        assert one.step()[0] == other.step()[0]
    assert all(torch.equal(x, weights(other)[name]) for name, x in weights(one).items())


def test_without_a_bank_all_is_as_it_was():
    """Where half of the replicas have failed all learn, whether there is a bank or not."""
    ends = []
    for bank in (0.0, 1.0):
        training = loop(bank=bank)
        for _ in range(6):
            training.step()
        ends.append(weights(training))
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())
