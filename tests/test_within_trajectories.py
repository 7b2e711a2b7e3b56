"""Covariances within trajectories: against autograd of the stratified mean, a mixture whose answer is known, and spreads."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from helpers import Vector, samples_of

from stabie_ase.boltzmann import Estimator, Samples, StatePoint, accumulate
from stabie_ase.boltzmann.projection import projection
from stabie_ase.observables import Target
from stabie_ase.potentials.analytic import Harmonic
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.topology import Groups, Topology

T = 300.0
KT = units.kB * T
WITHIN = Estimator(StatePoint(T), within=True)
POOLED = Estimator(StatePoint(T))


def vector(reference):
    return [Target(Vector(len(reference)), torch.as_tensor(reference).double())]


@pytest.mark.parametrize("changed", [False, True])
def test_weights_are_those_of_a_mixture_of_trajectories(changed):
    """dL/dθ of U = U_0 + θ u from autograd of ḡ = Σ_s n_s/N Σ_(i in s) p_i g_i, each stratum with Bessel's correction of its own."""
    generator = torch.Generator().manual_seed(0)
    replica = torch.tensor([0] * 3 + [1] * 5 + [2] * 2 + [3])
    g, u = (torch.randn((11, k), generator=generator, dtype=torch.float64) for k in (2, 1))
    change = 0.02 * torch.randn(11, generator=generator, dtype=torch.float64) if changed else None
    found = WITHIN(samples_of(g, replica), vector([0.3, -0.2]), change)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    mean, slope = torch.zeros(2).double(), torch.zeros(2).double()
    for s in range(4):
        mine = replica == s
        p = torch.softmax(-((0.0 if change is None else change[mine]) + theta * u[mine, 0]) / KT, dim=0)
        of_stratum, n = p @ g[mine], float(1.0 / p.detach().square().sum())
        share, bessel = float(mine.sum()) / 11, n / (n - 1.0) if mine.sum() > 1 else 1.0
        mean += share * of_stratum.detach()
        slope += share * bessel * torch.stack([torch.autograd.grad(x, theta, retain_graph=True)[0] for x in of_stratum])
    torch.testing.assert_close(found.means["vector"], mean)
    residual = 2.0 * vector([0.3, -0.2])[0].metric * (mean - torch.tensor([0.3, -0.2]).double())
    torch.testing.assert_close(found.weights @ u[:, 0], residual @ slope)
    assert (found.effective_samples < 10.99) is changed


def mixtures(n_sets, n_replicas=16, n_frames=20):
    """x and ∂U/∂k of trajectories in wells of one force constant that differ in where they are and in what k adds to their bottom."""
    generator = torch.Generator().manual_seed(1)
    shape = (n_sets, n_replicas, n_frames)
    centres, bottoms = 3.0 * torch.randn((2, *shape[:2], 1), generator=generator, dtype=torch.float64)
    y = torch.randn(shape, generator=generator, dtype=torch.float64)  # in units where kT = k = 1
    return (centres + y).reshape(n_sets, -1, 1), (0.5 * y.square() + bottoms).reshape(n_sets, -1)


def test_what_a_start_has_set_is_no_response_to_the_parameters():
    """∂⟨x²⟩/∂k = -kT/k² = -1 in every well; which well a trajectory is in does not depend on k while it is short.

    Of all samples together the covariance is that of the wells' places and bottoms, which is zero only on average.
    """
    replica, found = torch.arange(16).repeat_interleave(20), {}
    for name, estimator in (("within", WITHIN), ("pooled", POOLED)):
        slopes = []
        for x, u in zip(*mixtures(400)):
            g = x.square()
            target = vector([float(g.mean()) - 0.5])  # a residual of one
            slopes.append(float(KT * estimator(samples_of(g, replica), target).weights @ u))
        found[name] = np.array(slopes)
    within, error = found["within"].mean(), found["within"].std() / 20
    assert abs(within + 1.0) < 4 * error < 0.15
    assert abs(found["pooled"].mean() + 1.0) < 4 * found["pooled"].std() / 20
    assert found["pooled"].std() > 10 * found["within"].std()


def test_of_a_single_trajectory_both_are_the_same():
    g = torch.randn((30, 3), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    samples, change = samples_of(g, torch.zeros(30).long()), 0.01 * g[:, 0]
    for energies in (None, change):
        within, pooled = (estimator(samples, vector([0.1, 0.2, 0.3]), energies) for estimator in (WITHIN, POOLED))
        torch.testing.assert_close(within.weights, pooled.weights)
        assert within.losses == pytest.approx(pooled.losses) and within.effective_samples == pytest.approx(pooled.effective_samples)


def test_frames_that_are_alone_in_their_trajectory_change_nothing():
    found = WITHIN(samples_of(torch.randn((6, 2)).double()), vector([5.0, 5.0]))
    assert found.loss > 1.0 and not found.weights.any()


def test_molecules_have_trajectories_of_their_own():
    pair = molecule("H2O") + Atoms("H2", [[6, 0, 0], [6.7, 0, 0]])
    frames = AtomsBatch.from_atoms([pair] * 6)
    groups = Groups.molecules(frames, Topology.from_frames([pair]))
    index, none = torch.arange(6), torch.zeros(6)
    samples = Samples(frames, groups, {"vector": torch.zeros((12, 1))}, none, none, index % 2, index // 2)
    assert samples.trajectory.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]


def test_the_error_of_such_a_gradient_along_a_direction():
    """It is by what the gradients of many sets of replicas differ; each replica has a well of its own, of one force constant."""
    potential, k, replica = Harmonic(0.7), 0.7, torch.arange(30).repeat_interleave(8)
    generator, found, errors = torch.Generator().manual_seed(3), [], []
    target = Target(Vector(1), torch.tensor([0.02]).double())
    for _ in range(150):
        x = (KT / k) ** 0.5 * torch.randn((240, 3), generator=generator, dtype=torch.float64)
        frames = AtomsBatch.from_atoms(Atoms("H")).repeat(240).replace(positions=x)
        offsets = 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
        samples = samples_of(x[:, :1].square() + offsets[replica][:, None], replica, frames)
        estimate = WITHIN(samples, [target])
        potential.zero_grad()
        accumulate(potential, estimate)
        along = projection(potential, estimate, [target], StatePoint(T), [torch.tensor(2.0).double()], WITHIN.strata(samples))
        assert along.value == pytest.approx(2.0 * float(potential.k.grad), rel=0.01, abs=5e-5)
        found.append(along.value)
        errors.append(along.error)
    # The spread of 150 numbers is known to 6 %, and the error of 30 replicas is a little small.
    assert np.mean(errors) == pytest.approx(np.std(found, ddof=1), rel=0.2)
