"""What a window tells: averages along trajectories, and weights of energies on the way out."""

import numpy as np
import pytest
import tiny
import torch
from helpers import samples_of

from stabie_ase.boltzmann import Estimator, Samples, StatePoint
from stabie_ase.boltzmann.samples import trajectory_averages
from stabie_ase.boltzmann.weights import response_weights, weighted_mean
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


class Pairs(BondLengths):
    """The distance of the two atoms of each group."""

    name = "pairs"

    def values(self, batch):
        first, second = batch.positions.view(batch.n_systems, 2, 3).unbind(dim=1)
        return (second - first).norm(dim=1)[:, None]


def pairs_of(batch, members=((0, 1), (2, 3))):
    """Two groups a frame."""
    atoms = torch.tensor(members).flatten() + 4 * torch.arange(batch.n_systems)[:, None]
    group = torch.arange(2 * batch.n_systems).repeat_interleave(2)
    return Groups(atoms.flatten(), group, torch.arange(batch.n_systems).repeat_interleave(2))


PAIRS = Pairs(Topology.from_frames(tiny.reference().frames))


def test_samples_that_are_groups_of_atoms():
    """Pairs of atoms of each frame: chosen with their frames, their values those of the pair alone."""
    found = Samples.from_trajectory(trajectory(), [PAIRS], pairs_of)
    assert len(found) == 32 and found.frames.n_systems == 16 and found.values["pairs"].shape == (32, 1)
    some = found.select(torch.tensor([2, 5, 9]))
    assert len(some) == 6 and torch.equal(some.values["pairs"], found.values["pairs"][[4, 5, 10, 11, 18, 19]])
    positions = some.frames.positions.view(3, 4, 3)
    torch.testing.assert_close(some.values["pairs"][:, 0].view(3, 2), (positions[:, 1::2] - positions[:, ::2]).norm(dim=2))
    assert found.parts is found.groups and Samples.from_trajectory(trajectory(), [HR]).parts is None


def test_groups_that_keep_their_atoms_have_trajectories_of_their_own():
    """Each pair is averaged along its own; groups that change from frame to frame have none."""
    found = Samples.from_trajectory(trajectory(), [PAIRS], pairs_of)
    averages = found.averaged(1).values["pairs"].view(16, 2)
    for k in range(2):
        own = trajectory_averages(found.values["pairs"][k::2], found.frame, found.replica, 1)
        torch.testing.assert_close(averages[:, k : k + 1], own, rtol=1e-13, atol=0)
    assert found.averaged(0) is found

    def changing(batch):
        groups = pairs_of(batch)
        groups.atoms[4:8] = groups.atoms[4:8].roll(1)
        return groups

    with pytest.raises(ValueError, match="groups that keep their atoms"):
        Samples.from_trajectory(trajectory(), [PAIRS], changing).averaged(1)


# -- favoured groups


def strays(n=2000, seed=0):
    """Groups of which three in a hundred deviate far: (x, u) with u ~ x² and some noise."""
    generator = torch.Generator().manual_seed(seed)
    rare = torch.rand(n, generator=generator) < 0.03
    x = 0.3 * torch.randn(n, generator=generator).double() + 4.0 * rare * (0.6 + 0.8 * torch.rand(n, generator=generator).double())
    return x, torch.stack([x, x.square() + 0.3 * torch.randn(n, generator=generator).double()], dim=1)


def estimates(found):
    """ḡ, and the weighted sum of u that stands for the gradient of ḡ."""
    x, u = found.values["vector"][:, :1], found.values["vector"][:, 1]
    mean = weighted_mean(x, StatePoint(T), log_weights=found.log_weights)[0]
    weights = response_weights(x, torch.ones(1), StatePoint(T), log_weights=found.log_weights)[0]
    return torch.stack([mean[0], weights @ u])


def test_favoured_groups_tell_what_all_do_and_rare_ones_better():
    """Over 300 draws of 100 in 2000: the mean within four standard errors, variances far below those of groups drawn blindly."""
    x, values = strays()
    everything = samples_of(values)
    expected = estimates(everything)
    favoured = torch.stack([estimates(everything.favouring(x, 100, seed)) for seed in range(300)])
    blind = torch.stack([
        estimates(everything.select(torch.randperm(2000, generator=torch.Generator().manual_seed(seed))[:100].sort().values))
        for seed in range(300)
    ])  # fmt: skip
    error = favoured.std(dim=0) / 300**0.5
    assert ((favoured.mean(dim=0) - expected).abs() < 4 * error).all() and (error < 0.02 * expected.abs()).all()
    assert (favoured.var(dim=0) < torch.tensor([0.5, 0.01]) * blind.var(dim=0)).all()


def test_what_is_drawn():
    """As many of each bin as there are to be had, each once, counting for those that were not; the seed decides which."""
    x, values = strays()
    found = samples_of(values).favouring(x, 100, seed=1)
    width = (x.max() - x.min()) / 10
    bins, all_bins = (((y - x.min()) / width).long().clamp(max=9) for y in (found.values["vector"][:, 0], x))
    drawn, sizes = bins.bincount(minlength=10), all_bins.bincount(minlength=10)
    assert len(found) == 100 == len(found.values["vector"].unique(dim=0)) and torch.equal(drawn > 0, sizes > 0)
    assert ((drawn == sizes) | (drawn >= 100 // 10)).all()
    torch.testing.assert_close(found.log_weights.exp(), (sizes.double() / drawn)[bins])
    again, other = (samples_of(values).favouring(x, 100, seed).values["vector"] for seed in (1, 2))
    assert torch.equal(again, found.values["vector"]) and not torch.equal(other, found.values["vector"])
    near = samples_of(values, severity=x).favouring(x, 100, seed=1).within(1.0)
    assert torch.equal(near.log_weights, found.log_weights[found.values["vector"][:, 0] <= 1.0])


def test_of_groups_that_are_drawn_only_their_frames_are_kept():
    found = Samples.from_trajectory(trajectory(), [PAIRS], pairs_of)
    deviation = found.values["pairs"][:, 0]
    some = found.favouring(deviation, 8, seed=0, n_bins=2)
    assert len(some) == 8 and some.frames.n_systems == len(some.groups.system.unique()) < 16
    torch.testing.assert_close(PAIRS(some.frames, some.groups), some.values["pairs"])
    assert len(found.favouring(deviation, 32, seed=0)) == 32
    assert float(found.favouring(deviation, 32, seed=0).log_weights.abs().max()) == 0.0


@pytest.mark.parametrize("n", [0, 2, 33])
def test_too_many_or_too_few_to_draw(n):
    found = Samples.from_trajectory(trajectory(), [PAIRS], pairs_of)
    with pytest.raises(ValueError, match=f"{n} of 32 groups are to be drawn, .* bins of the deviation; try fewer bins"):
        found.favouring(found.values["pairs"][:, 0], n, seed=0)


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
