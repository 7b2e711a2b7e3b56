"""Failures of which none takes the gradient of the others: each replica's count alike, and none is farther off than the median one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Vector, samples_of

from stabie_ase.boltzmann import Estimator, StatePoint
from stabie_ase.boltzmann.winsorizing import THRESHOLD, evened, winsorized
from stabie_ase.observables import Target
from stabie_ase.system.options import BadOption
from stabie_ase.training.options import EstimatorOptions

POINT = StatePoint(300.0)
RESIDUAL = torch.tensor([2.0, 0.0], dtype=torch.float64)


def window(unstable, sound=(-2.0, -1.0, 0.0, 1.0, 2.0)):
    """Sound frames whose first component has an interquartile mean of zero, then unstable ones; the second component is three times it."""
    x = torch.tensor([*sound, *unstable], dtype=torch.float64)
    severity = torch.tensor([0.5] * len(sound) + [1.5] * len(unstable), dtype=torch.float64)
    return samples_of(torch.stack([x, 3.0 * x], dim=1), torch.arange(len(x)), severity=severity)


def bounded(samples, residual=RESIDUAL):
    return winsorized(samples, [Target(Vector(2), torch.zeros(2).double())], residual).values["vector"]


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_what_is_beyond_the_median_unstable_frame_is_scaled_down_to_it(spread):
    """The whole vector, along the line to the middle of the sound frames, by hand: bounded, then less by the threshold on either side."""
    x = torch.tensor([-2 * spread, -spread, 0.0, spread, 2 * spread, 1.5, 1.5, -50.0, 4.0, 1e6], dtype=torch.float64)
    threshold = min(THRESHOLD * 2 * spread / 1.349, 0.75)  # half of the median unstable frame's at most
    expected = [np.sign(v) * max(abs(min(v, 1.5)) - threshold, 0.0) for v in x.tolist()]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(bounded(window(x[5:].tolist(), sound=x[:5].tolist())), torch.stack([expected, 3.0 * expected], dim=1))


@pytest.mark.parametrize("samples", [window([]), window([3.0, 4.0, 1e6], sound=())], ids=["no unstable ones", "no sound ones"])
def test_otherwise_nothing_changes(samples):
    assert torch.equal(bounded(samples), samples.values["vector"])


def test_unstable_frames_off_to_the_other_side_bound_nothing():
    found = bounded(window([-30.0, -40.0, -1e6]))[:, 0]
    threshold = THRESHOLD * 2.0 / 1.349
    torch.testing.assert_close(found[5:], torch.tensor([-30.0, -40.0, -1e6]).double() + threshold)


def test_sound_frames_that_are_about_to_explode_do_not_move_the_middle():
    """Averages along trajectories have some of them explode already: the mean of all would be beyond what is merely broken."""
    samples = window([3.0, 3.0, 1e6], sound=(-0.2, -0.1, 0.0, 0.0, 0.1, 1e6))
    assert float(bounded(samples)[:, 0].max()) == pytest.approx(3.0 - THRESHOLD * 0.2 / 1.349)


def test_a_few_broken_molecules_are_not_drowned_by_thousands_of_sound_ones():
    """Most of the gradient's weight, where without it was noise; what is in noise cannot be told, and half of a failure's stays."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(4000), torch.full((6,), 12.0)]).double()
    severity = torch.cat([torch.full((4000,), 0.5), torch.full((6,), 2.0)]).double()
    samples, target = samples_of(x[:, None], torch.arange(4006), severity=severity), [Target(Vector(1), torch.zeros(1).double())]
    shares = []
    for on in (False, True):
        weights = Estimator(POINT, winsorized=on)(samples, target).weights
        raised = weights.clamp(max=0.0)
        shares.append(float(raised[4000:].sum() / raised.sum()))
    assert shares[0] < 0.1 and shares[1] > 0.3


def test_a_failure_counts_once_however_long_it_goes_on():
    """Of replicas with six, two and no unstable frames near the criteria, all of them together as much as before; a far one as it did."""
    replica = torch.tensor([0] * 8 + [1] * 8 + [2] * 8)
    severity = torch.tensor([0.5, 0.5, *[1.5] * 6, *[0.5] * 5, 2.0, 3.0, 9.0, *[0.9] * 8], dtype=torch.float64)
    samples = samples_of(torch.zeros(24, 1).double(), replica, severity=severity)
    counts = evened(samples, 4.0).log_weights.exp()
    near = (severity > 1.0) & (severity <= 4.0)
    torch.testing.assert_close(counts[near], torch.tensor([4 / 6] * 6 + [4 / 2] * 2).double())
    assert float(counts[near].sum()) == pytest.approx(8.0) and (counts[~near] == 1.0).all()
    favoured = evened(replace(samples, log_weights=torch.full((24,), 2.0).double()), 4.0)
    torch.testing.assert_close(favoured.log_weights, 2.0 + counts.log())
    sound = samples.within(1.0)
    assert evened(sound) is sound


def test_what_fails_late_is_raised_as_much_as_what_fails_early():
    """Two kinds of failures, each off by one in a component of its own, one over twenty frames and one over two."""
    sound = torch.randn((200, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    early, late = torch.tensor([[9.0, 0.0]] * 20).double(), torch.tensor([[0.0, 9.0]] * 2).double()
    severity = torch.cat([torch.full((200,), 0.5), torch.full((22,), 2.0)]).double()
    samples = samples_of(torch.cat([sound, early, late]), _replicas(), severity=severity)
    plain, even = (
        Estimator(POINT, winsorized=on)(samples, [Target(Vector(2), sound.mean(dim=0))]).weights for on in (False, True)
    )
    by_kind = [(w[200:220].sum(), w[220:].sum()) for w in (plain, even)]
    assert by_kind[0][0] < 20 * by_kind[0][1] < 0  # before: ten times as many frames that are also ten times as much of the mean
    assert float(by_kind[1][0]) == pytest.approx(float(by_kind[1][1]), rel=0.1)


def _replicas():
    """Of two hundred sound frames in ten replicas, twenty frames of another and two of one more."""
    return torch.cat([torch.arange(200) % 10, torch.full((20,), 10), torch.full((2,), 11)])


def test_an_explosion_does_not_hide_what_breaks():
    """Weights of energies that are raised: of three frames that are off alike but for an explosion, or of the explosion alone."""
    x = torch.cat([torch.linspace(-1.0, 1.0, 40), torch.tensor([3.0, 3.0, 1e5])]).double()
    severity = torch.tensor([0.5] * 40 + [1.5] * 3, dtype=torch.float64)
    samples, target = samples_of(x[:, None], torch.arange(43), severity=severity), [Target(Vector(1), torch.zeros(1).double())]
    plain, robust = (Estimator(POINT, winsorized=on)(samples, target).weights for on in (False, True))
    assert (plain[:42] > 0).all() and plain[42] < 0
    assert (robust[40:] < 0).all() and robust[40] == pytest.approx(float(robust[42]), rel=1e-6)
    assert Estimator(POINT, winsorized=True)(samples, target).losses == Estimator(POINT)(samples, target).losses


def test_it_is_a_bias_that_cross_fitting_is_there_to_avoid():
    with pytest.raises(ValueError, match="choose one of them"):
        Estimator(POINT, cross_fit=True, winsorized=True)
    with pytest.raises(BadOption, match="cross-fitted, so that a gradient has no bias, or winsorized"):
        EstimatorOptions(cross_fit=True, winsorized=True)
