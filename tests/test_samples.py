"""What a window tells: averages along trajectories, and weights of energies on the way out."""

import numpy as np
import pytest
import tiny
import torch

from stabie_ase.boltzmann import estimate, response_weights
from stabie_ase.dynamics import Trajectory
from stabie_ase.observables import DistanceDistribution
from stabie_ase.training.samples import Samples, trajectory_averages

T = 500.0


def by_hand(values, frame, replica, half_width):
    """Sample by sample, in numpy."""
    rows = []
    for f, r in zip(frame, replica):
        near = (np.abs(frame - f) <= half_width) & (replica == r)
        rows.append(values[near].mean(axis=0))
    return np.stack(rows)


@pytest.mark.parametrize("half_width", [0, 1, 3, 50])
def test_averages_run_along_each_trajectory(half_width):
    rng = np.random.default_rng(half_width)
    frame, replica = np.nonzero(rng.random((9, 4)) < 0.7)  # replicas with gaps, as frames that are not finite leave them
    values = rng.normal(size=(len(frame), 3))
    averages = trajectory_averages(*(torch.from_numpy(x) for x in (values, frame, replica)), half_width)
    assert averages.dtype == torch.float64
    np.testing.assert_allclose(averages, by_hand(values, frame, replica, half_width), rtol=0, atol=1e-12)


def test_nothing_averages_to_nothing():
    empty = torch.zeros(0, dtype=torch.int64)
    assert trajectory_averages(torch.zeros(0, 5), empty, empty, 3).shape == (0, 5)


def test_a_frame_on_its_way_out_counts_as_what_it_will_be():
    """Two states, one of them not in the reference; replica 0 changes half-way, and is seen through large noise."""
    torch.manual_seed(0)
    frame, replica = (x.flatten() for x in torch.meshgrid(torch.arange(20), torch.arange(10), indexing="ij"))
    lost = (replica == 0) & (frame >= 10)

    def response(values, half_width):
        return response_weights(trajectory_averages(values, frame, replica, half_width), torch.ones(1), T)[0]

    noisy = lost.double()[:, None] + torch.randn(200, 1, dtype=torch.float64)
    plain, smooth = (float(torch.corrcoef(torch.stack([-response(noisy, n), lost.double()]))[0, 1]) for n in (0, 4))
    assert smooth > 1.5 * plain > 0.0
    clear = response(lost.double()[:, None], 4)
    on_the_way = (replica == 0) & (frame >= 6) & (frame < 10)
    assert (clear[on_the_way] < clear[replica > 0].min()).all()  # their energies are raised too


def samples(cross=False):
    """Those of three frames of six replicas of a tetrahedron."""
    batch = tiny.AtomsBatch.from_atoms([tiny.reference().frames[k] for k in range(6)])
    generator = torch.Generator().manual_seed(1)
    positions = batch.positions + 0.1 * torch.randn(3, *batch.positions.shape, generator=generator, dtype=torch.float64)
    energies = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    energies[1, 2] = torch.nan
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[2, 4] = False
    cells, severity = batch.cells.expand(3, -1, 3, 3), torch.arange(18.0).view(3, 6)
    trajectory = Trajectory(batch, positions, cells, energies, torch.arange(3), valid, severity)
    return Samples.from_trajectory(trajectory, DistanceDistribution.from_reference(tiny.reference().frames), 0)


def test_frames_that_are_not_finite_or_not_there_are_left_out():
    found = samples()
    assert len(found) == 16 and found.frames.n_systems == 16 and torch.isfinite(found.energies).all()
    assert len(found.half(0)) == 7 and len(found.half(1)) == 9
    assert len(found.select(torch.tensor([3, 5]))) == 2
    assert found.within(4.0).severity.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("cross_fit", [False, True])
def test_without_averages_the_weights_are_the_estimators(cross_fit):
    found = samples()
    target, c = found.values[0] + 0.1, torch.rand(found.values.shape[1], dtype=torch.float64)
    weights, _ = found.weights(found.residuals(target, c, cross_fit), T)
    fold = found.replica % 2 == 0 if cross_fit else None
    expected = estimate(found.values, target, c, T, None, fold).sample_weights
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("cross_fit", [False, True])
def test_effective_number_falls_with_the_change_of_the_energies(cross_fit):
    found = samples()
    residuals = found.residuals(found.values[0], torch.ones(found.values.shape[1]), cross_fit)
    counts = [found.weights(residuals, T, change * torch.arange(16.0))[1] for change in (0.0, 0.02, 0.2)]
    assert counts[0] == pytest.approx(16.0) and counts[0] > counts[1] > counts[2]
