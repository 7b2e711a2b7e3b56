"""What a window tells: averages along trajectories, and weights of energies on the way out."""

import numpy as np
import pytest
import tiny
import torch

from stabie_ase.boltzmann import Estimator, Samples, StatePoint
from stabie_ase.boltzmann.estimate import response_weights
from stabie_ase.boltzmann.samples import trajectory_averages
from stabie_ase.dynamics import Trajectory
from stabie_ase.observables import BondLengths, DistanceDistribution, Target
from stabie_ase.structures.topology import Groups, Topology

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
        return response_weights(trajectory_averages(values, frame, replica, half_width), torch.ones(1), StatePoint(T))[0]

    noisy = lost.double()[:, None] + torch.randn(200, 1, dtype=torch.float64)
    plain, smooth = (float(torch.corrcoef(torch.stack([-response(noisy, n), lost.double()]))[0, 1]) for n in (0, 4))
    assert smooth > 1.5 * plain > 0.0
    clear = response(lost.double()[:, None], 4)
    on_the_way = (replica == 0) & (frame >= 6) & (frame < 10)
    assert (clear[on_the_way] < clear[replica > 0].min()).all()  # their energies are raised too


def trajectory():
    """Three frames of six replicas of a tetrahedron, one without an energy, one of a replica that had been stopped."""
    batch = tiny.AtomsBatch.from_atoms([tiny.reference().frames[k] for k in range(6)])
    generator = torch.Generator().manual_seed(1)
    positions = batch.positions + 0.1 * torch.randn(3, *batch.positions.shape, generator=generator, dtype=torch.float64)
    energies = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    energies[1, 2] = torch.nan
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[2, 4] = False
    severity = {"severity": torch.arange(18.0).view(3, 6)}
    return Trajectory(batch, positions, batch.cells.expand(3, -1, 3, 3), energies, torch.arange(3), valid, columns=severity)


HR = DistanceDistribution.from_reference(tiny.reference().frames)


def test_frames_that_are_not_finite_or_not_there_are_left_out():
    found = Samples.from_trajectory(trajectory(), [HR])
    assert len(found) == 16 and found.frames.n_systems == 16 and torch.isfinite(found.energies).all()
    assert int(found.half(0).sum()) == 7 and int(found.half(1).sum()) == 9 and found.half(None).all()
    assert len(found.select(torch.tensor([3, 5]))) == 2
    assert found.within(4.0).severity.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    torch.testing.assert_close(found.values["hr"], HR(found.frames))


def test_samples_that_are_groups_of_atoms():
    """Pairs of atoms of each frame: chosen with their frames, their values those of the pair alone."""
    class Pairs(BondLengths):
        name = "pairs"

        def values(self, batch):
            first, second = batch.positions.view(batch.n_systems, 2, 3).unbind(dim=1)
            return (second - first).norm(dim=1)[:, None]

    def pairs(batch):
        atoms = torch.tensor([0, 1, 2, 3]) + 4 * torch.arange(batch.n_systems)[:, None]
        group = torch.arange(2 * batch.n_systems).repeat_interleave(2)
        return Groups(atoms.flatten(), group, torch.arange(batch.n_systems).repeat_interleave(2))

    found = Samples.from_trajectory(trajectory(), [Pairs(Topology.from_frames(tiny.reference().frames))], pairs)
    assert len(found) == 32 and found.frames.n_systems == 16 and found.values["pairs"].shape == (32, 1)
    some = found.select(torch.tensor([2, 5, 9]))
    assert len(some) == 6 and torch.equal(some.values["pairs"], found.values["pairs"][[4, 5, 10, 11, 18, 19]])
    positions = some.frames.positions.view(3, 4, 3)
    torch.testing.assert_close(some.values["pairs"][:, 0].view(3, 2), (positions[:, 1::2] - positions[:, ::2]).norm(dim=2))
    with pytest.raises(ValueError, match="whole systems only"):
        found.averaged(2)


@pytest.mark.parametrize("cross_fit", [False, True])
def test_averages_stand_in_the_covariance_only(cross_fit):
    found = Samples.from_trajectory(trajectory(), [HR])
    target = Target(HR, found.values["hr"][0] + 0.1)
    smooth = Estimator(StatePoint(T), cross_fit, half_width=1)(found, [target])
    plain = Estimator(StatePoint(T), cross_fit)(found, [target])
    assert smooth.losses == plain.losses and not torch.allclose(smooth.weights, plain.weights)
    averages = trajectory_averages(found.values["hr"], found.frame, found.replica, 1)
    torch.testing.assert_close(smooth.samples.values["hr"], averages)
    for (_, residual), (_, same) in zip(smooth.residuals, plain.residuals):
        assert torch.equal(residual, same)


@pytest.mark.parametrize("cross_fit", [False, True])
def test_effective_number_falls_with_the_change_of_the_energies(cross_fit):
    found, estimator = Samples.from_trajectory(trajectory(), [HR]), Estimator(StatePoint(T), cross_fit)
    targets = [Target(HR, found.values["hr"][0])]
    first = estimator(found, targets)
    counts = [estimator.reweighted(first, targets, change * torch.arange(16.0)).effective_samples for change in (0.0, 0.02, 0.2)]
    assert counts[0] == pytest.approx(16.0) and counts[0] > counts[1] > counts[2]
