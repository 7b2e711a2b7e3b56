"""When a phase ends."""

import numpy as np
import pytest

from stabie_ase.training.schedule import FINISHED, LEARNING, SIMULATION, Schedule

SCHEDULE = Schedule(0.5, 0.1, 3.0, 40, 6)


@pytest.mark.parametrize(
    "window, unstable, following",
    [
        (1, 0.49, SIMULATION),
        (1, 0.5, LEARNING),  # half
        (14, 0.21, SIMULATION),
        (15, 0.21, LEARNING),  # a fifth after a longer time
        (39, 0.05, SIMULATION),
        (40, 0.05, LEARNING),  # long enough
        (40, 0.0, FINISHED),
    ],
)
def test_the_fewer_fail_the_fewer_are_waited_for(window, unstable, following):
    assert SCHEDULE.after(SIMULATION, window, unstable, unstable) == following


@pytest.mark.parametrize("hazard", [0.0003, 0.003, 0.03])
def test_the_time_that_is_waited_is_the_best_one_whatever_the_hazard(hazard):
    """What a cycle teaches per time, n / (n + n0) in t + L, against the best of all times; hazards in failures per window."""
    n0, learning, replicas = 2.0, 7.0, 32
    schedule = Schedule(1.0, 0.1, n0 * learning / replicas, 1000, 6)
    windows = np.arange(1, 1000)
    n = replicas * hazard * windows
    rates = n / (n + n0) / (windows + learning)
    ended = next(k for k, w in enumerate(windows) if schedule.after(SIMULATION, int(w), hazard * w, hazard * w) == LEARNING)
    assert rates[ended] > 0.98 * rates.max()


@pytest.mark.parametrize(
    "window, unstable, failed, following",
    [
        (1, 0.11, 0.5, LEARNING),
        (1, 0.1, 0.5, SIMULATION),  # a fifth of those that had failed
        (1, 0.03, 0.125, LEARNING),
        (1, 0.025, 0.125, SIMULATION),  # a fifth of fewer
        (1, 0.1, 1.0, SIMULATION),
        (6, 0.5, 0.5, SIMULATION),
    ],
)
def test_learning_ends_where_a_fifth_of_those_that_had_failed_still_do(window, unstable, failed, following):
    assert SCHEDULE.after(LEARNING, window, unstable, failed) == following
    assert SCHEDULE.teaches(unstable, failed) == (unstable > 0.2 * min(failed, 0.5))
