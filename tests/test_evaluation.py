"""Errors of what an evaluation reports, against closed forms and repeated experiments."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from ase import Atoms

from stabie_ase.dynamics import PotentialForces
from stabie_ase.observables import DistanceDistribution
from stabie_ase.observables.averages import SlicedMeans, jackknife_error, noise_floor
from stabie_ase.runs.evaluation import StabilityResult, StabilityTest, Yardstick, run_stability_test, start
from stabie_ase.runs.summaries import summarize
from stabie_ase.stability import watched
from stabie_ase.structures.setting import Setting


def test_jackknife_of_a_mean_is_its_standard_error():
    """Groups of one size: the textbook's standard error of the mean of n independent group means."""
    means = torch.randn(9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.full((9,), 4)
    expected = float(means.std()) / 3.0
    assert jackknife_error(4 * means, counts, lambda mean: mean[:, 0]) == pytest.approx(expected, rel=1e-12)


def test_jackknife_tells_the_spread_of_repeated_experiments():
    """Groups of unequal size with correlated members, and a statistic with a kink: an absolute deviation from 0.3.

    2000 experiments: the standard deviation is known to 1.6 %, the mean of the estimates to less. Efron and Stein: the
    jackknife's variance is not below the true one on average; the excess is of order 1/n.
    """
    n, rng = 40, np.random.default_rng(1)
    values, errors = [], []
    for _ in range(2000):
        counts = rng.integers(1, 12, n)
        sums = counts[:, None] * rng.normal(size=(n, 2)) + np.sqrt(counts)[:, None] * rng.normal(size=(n, 2))

        def error(mean):
            return (mean - 0.3).abs().sum(dim=-1)

        sums, counts = torch.from_numpy(sums), torch.from_numpy(counts)
        values.append(float(error(sums.sum(dim=0) / counts.sum())))
        errors.append(jackknife_error(sums, counts, error))
    ratio = np.mean(np.square(errors)) / np.var(values)
    assert 0.93 < ratio < 1.2  # the excess here: 0.11 (measured), 2 σ of the variance: 0.06


def test_groups_without_samples_do_not_count():
    sums, counts = torch.tensor([[1.0], [0.0], [3.0]]), torch.tensor([1, 0, 2])
    assert jackknife_error(sums, counts, lambda mean: mean[:, 0]) == pytest.approx(
        jackknife_error(sums[[0, 2]], counts[[0, 2]], lambda mean: mean[:, 0])
    )


@pytest.mark.parametrize("counts", [[5], [0, 5], [0, 0]])
def test_one_group_tells_no_error(counts):
    counts = torch.tensor(counts)
    assert jackknife_error(counts[:, None].double(), counts, lambda mean: mean[:, 0]) is None


# -- the floor


@pytest.mark.parametrize("n", [10, 50, 51])
def test_floor_is_the_error_of_the_reference_mean(n):
    """Independent Gaussian components: E|ḡ - μ| = √(2/π) σ/√n each; 200 references, the mean of the floors within 4 errors."""
    generator = torch.Generator().manual_seed(n)
    weights, sigma = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    floors = [
        noise_floor(sigma * torch.randn(n, 2, generator=generator, dtype=torch.float64), weights, n_splits=20) for _ in range(200)
    ]
    expected = float((weights * sigma).sum()) * (2.0 / np.pi / n) ** 0.5
    assert np.mean(floors) == pytest.approx(expected, abs=4 * np.std(floors) / 200**0.5)


def test_a_perfect_model_is_at_the_floor():
    """The h(r) error of many frames of the truth against 40 others of it; the two differ by the many's own noise."""
    few, many = tiny.frames(40, seed=1), tiny.frames(400, seed=9)
    observable = DistanceDistribution.from_reference(few)
    reference, sample = (observable(tiny.AtomsBatch.from_atoms(frames)) for frames in (few, many))
    error = float((observable.measure * (sample.mean(dim=0) - reference.mean(dim=0)).abs()).sum())
    assert error == pytest.approx(noise_floor(reference, observable.measure), rel=0.3)


def test_a_few_frames_tell_no_floor():
    assert noise_floor(torch.zeros(3, 2), torch.ones(2)) is None


# -- what a test measures


def setting_of(reference, temperature_K=tiny.TEMPERATURE):
    return Setting(reference.frames, temperature_K, reference.temperature_K)


TEST = StabilityTest(tiny.TEMPERATURE, replicas=16, time_ps=0.06, timestep_fs=1.0, check_every_fs=1.0, sample_every_fs=1.0, slice_ps=0.02)


@pytest.fixture(scope="module")
def measured():
    """A test of the unstable model, and by hand the same dynamics with the frames of all replicas."""
    reference = tiny.reference()
    observable = DistanceDistribution.from_reference(reference.frames)
    yardstick = replace(Yardstick.from_reference("bonds:0.3", setting_of(reference), [observable]), distribution=None)
    result = run_stability_test(tiny.model(), reference.frames, yardstick, TEST)
    potential = tiny.model()
    state = start(potential, reference.frames, 16, tiny.TEMPERATURE, TEST.integrator, TEST.seed)
    criteria = [criterion.for_model(potential) for criterion in yardstick.criteria]
    _, trajectory, failures = watched(state, TEST.integrator, PotentialForces(potential), 60, criteria, check_every=1, sample_every=1)
    return yardstick, result, trajectory, failures


def test_the_frame_of_the_failure_does_not_count(measured):
    """Frames are those before it, one by one."""
    yardstick, result, trajectory, failures = measured
    assert int(failures.failed.sum()) > 3
    frames, frame, replica = trajectory.frames()
    step = torch.where(failures.failed, failures.step, 10**9)
    before = (trajectory.steps[frame] < step[replica]).nonzero()[:, 0]
    expected = yardstick.targets[0].observable(frames.select(before)).mean(dim=0)
    torch.testing.assert_close(result.observed["hr"].mean(), expected)
    assert int(result.observed["hr"].counts.sum()) == len(before) < len(frame)


def test_slices_hold_the_frames_of_their_time(measured):
    _, result, _, failures = measured
    assert result.observed["hr"].counts.shape == result.whole.shape == (16, 3)
    for k, step in enumerate(failures.step.tolist()):
        last = 61 if step < 0 else step
        assert result.observed["hr"].counts[k].tolist() == [max(0, min(20, last - 1 - 20 * s)) for s in range(3)]
        assert result.whole[k].tolist() == [20 * (s + 1) < last for s in range(3)]


def test_causes_and_frames_of_failures(measured):
    _, result, _, failures = measured
    assert result.causes == failures.causes and sum(result.causes.values()) == int(failures.failed.sum()) == len(result.unstable)
    for atoms in result.unstable:
        k = atoms.info["replica"]
        assert atoms.info["time_ps"] == pytest.approx(int(failures.step[k]) * 1e-3)
        assert atoms.info["criterion"] == failures.criterion[k]
        np.testing.assert_allclose(atoms.positions, failures.frames.positions.view(16, -1, 3)[k])
        np.testing.assert_allclose(atoms.get_momenta(), failures.momenta.view(16, -1, 3)[k])


def test_replicas_that_fail_at_the_first_look_leave_no_frames(measured):
    """Which is a result: no observable, and a hazard of one failure a look."""
    yardstick = replace(measured[0], distribution=Yardstick.from_reference(
        "bonds:0.3", setting_of(tiny.reference()), []).distribution)
    apart = [Atoms("C4", 3.0 * tiny.TETRAHEDRON)] * 4
    result = run_stability_test(tiny.truth(), apart, yardstick, replace(TEST, replicas=4))
    assert result.causes == {"bonds": 4} and result.observed["hr"].mean() is None and not result.whole.any()
    summary = summarize(result, yardstick, None, tiny_errors(), result)
    assert summary["hr_error"] is None and summary["hr_error_while_both_stable"] is None


@pytest.mark.parametrize("temperature, judged", [(600.0, True), (615.0, True), (450.0, False), (800.0, False)])
def test_distances_of_another_temperature_are_no_yardstick(caplog, temperature, judged):
    """They differ for good reason; a reference that tells no temperature is taken at its word."""
    told, untold = tiny.reference(), replace(tiny.reference(), temperature_K=None)
    assert told.temperature_K == 600.0
    observable = DistanceDistribution.from_reference(told.frames)
    yardstick = Yardstick.from_reference("bonds:0.3", setting_of(told, temperature), [observable])
    assert (yardstick.distribution is not None) == judged == (not caplog.messages)
    assert judged or f"of 600 K, the dynamics are of {temperature:g} K" in caplog.text
    assert Yardstick.from_reference("bonds:0.3", setting_of(untold, temperature), [observable]).distribution is not None


def test_what_outlives_every_look_may_fail_over_a_window():
    """A tetrahedron held open at twice its size: no criterion of single frames is asked, the windows say it."""
    reference = tiny.reference()
    observable = DistanceDistribution.from_reference(reference.frames)
    yardstick = Yardstick.from_reference("bonds:9", setting_of(reference), [observable])
    yardstick = replace(yardstick, criteria=[])
    wide = [Atoms("C4", 1.7 * tiny.TETRAHEDRON, info={}) for _ in range(4)]
    test = StabilityTest(1.0, replicas=4, time_ps=0.004, timestep_fs=0.5, sample_every_fs=0.5, slice_ps=0.002)
    result = run_stability_test(tiny.truth(), wide, yardstick, test)
    assert result.causes == {"distribution": 4} and result.statistics.times_ps.tolist() == [0.002] * 4
    assert not result.unstable and not result.whole[:, 0].any()
    sound = run_stability_test(tiny.truth(), reference.frames, yardstick, TEST)
    assert not sound.statistics.n_failed


def test_over_the_time_in_which_both_are_stable_both_see_the_same(measured):
    """A model against itself has one error there; one that fails at once leaves no such time."""
    yardstick, result, _, _ = measured
    errors = tiny_errors()
    summary = summarize(result, yardstick, errors, errors, result)
    expected, _ = result.observed["hr"].keep(result.whole).distance(yardstick.targets[0].value, yardstick.targets[0].observable.measure)
    assert summary["hr_error_while_both_stable"] == expected
    nobody = StabilityResult(result.statistics, result.causes, [], result.observed, torch.zeros_like(result.whole))
    assert summarize(result, yardstick, errors, errors, nobody)["hr_error_while_both_stable"] is None


def tiny_errors():
    from stabie_ase.training.labels import LabelledFrames, qm_errors

    return qm_errors(tiny.model(), LabelledFrames.from_reference(tiny.reference()))


def test_pooled_rounds_are_one_test(measured):
    _, result, _, _ = measured
    twice = StabilityResult.pool([result, result])
    assert twice.statistics.n_failed == 2 * result.statistics.n_failed
    assert twice.statistics.hazard_per_ps == pytest.approx(result.statistics.hazard_per_ps)
    torch.testing.assert_close(twice.observed["hr"].mean(), result.observed["hr"].mean())
    assert twice.causes == {name: 2 * n for name, n in result.causes.items()}
    first_half = twice.stretch(0, 3)
    assert first_half.shape == (32, 3) and first_half.sum() == 32


def test_distances_of_means_and_their_errors():
    """Two cells of three replicas against a target, by hand."""
    means = SlicedMeans(torch.tensor([[[1.0], [3.0]], [[2.0], [0.0]], [[6.0], [0.0]]]).double(), torch.tensor([[1, 1], [1, 0], [2, 0]]))
    error, _ = means.distance(torch.tensor([1.0]).double(), torch.tensor([2.0]).double())
    assert error == pytest.approx(2 * abs(12 / 5 - 1))
    first, _ = means.keep(torch.tensor([[True, False]] * 3)).distance(torch.tensor([1.0]).double(), torch.ones(1).double())
    assert first == pytest.approx(9 / 4 - 1)
    assert SlicedMeans.none(2, 2, 1).distance(torch.zeros(1), torch.ones(1)) == (None, None)
