"""The Boltzmann estimators against closed forms, explicit formulas and re-sampling."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from helpers import Vector, estimate, samples_of

from stabie_ase.boltzmann import Estimator, Samples, StatePoint, accumulate, accumulate_gradient, fluctuation_weights, group_energies
from stabie_ase.boltzmann.projection import projection
from stabie_ase.dynamics import Langevin, PotentialForces, initial_state
from stabie_ase.observables import PotentialEnergy, Target
from stabie_ase.observables.energetics import Energetics
from stabie_ase.potentials.analytic import Harmonic
from stabie_ase.potentials.energies import potential_energies
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.stability import watched
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.topology import Groups

T = 300.0
KT = units.kB * T
K = 0.7
"""Force constant of the wells in eV/Å²; with it ⟨x²⟩ = kT/K and ∂⟨x²⟩/∂K = -kT/K²."""


def frames_at(positions):
    """One atom a frame at these positions, shape (n, 3)."""
    return AtomsBatch.from_atoms(Atoms("H")).repeat(len(positions)).replace(positions=positions)


def exact_samples(n, k=K, seed=0):
    """Independent frames of one atom in a well, straight from its Boltzmann distribution."""
    generator = torch.Generator().manual_seed(seed)
    return frames_at((KT / k) ** 0.5 * torch.randn((n, 3), generator=generator, dtype=torch.float64))


def x_squared(frames):
    return frames.positions[:, :1].square()


def gradient(potential, frames, sample_weights, chunk_size=5000):
    """∇_θ Σ w U as one vector, from fresh `.grad`s."""
    potential.zero_grad()
    accumulate_gradient(potential, frames, sample_weights, chunk_size=chunk_size)
    return torch.cat([p.grad.flatten() for p in potential.parameters()])


def derivative_of_mean(potential, frames, values, **options):
    """∂ḡ/∂θ for a scalar observable: the gradient of (ḡ - g^ref)² where the residual is one half."""
    mean = estimate(values, values[0], torch.ones(1), T, **options).mean
    return gradient(potential, frames, estimate(values, mean - 0.5, torch.ones(1), T, **options).sample_weights)


def mean_and_error(numbers):
    numbers = torch.as_tensor(numbers)
    return float(numbers.mean()), float(numbers.std() / len(numbers) ** 0.5)


def small_schnet():
    torch.manual_seed(0)
    return SchNetPotential.build(
        {6: -1.0, 8: -2.0}, hidden_channels=8, num_filters=8, num_interactions=2, num_gaussians=8, cutoff=4.0
    ).double()


def molecules(n, seed=0):
    rng = np.random.default_rng(seed)
    start = np.array([[0.0, 0, 0], [1.2, 0, 0], [0, 1.3, 0], [0, 0, 1.4]])
    return AtomsBatch.from_atoms([Atoms("C2O2", start + rng.normal(0, 0.1, (4, 3))) for _ in range(n)])


def random_values(n, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values, reference, weights = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((n, d), d, d))
    return values, reference, weights


# -- closed form


def test_derivative_of_a_mean_square_displacement():
    """∂⟨x²⟩/∂k = -kT/k²; 40 sets of 4000 samples give it to 1 %."""
    potential = Harmonic(K)
    derivatives = []
    for seed in range(40):
        frames = exact_samples(4000, seed=seed)
        derivatives.append(float(derivative_of_mean(potential, frames, x_squared(frames))))
    mean, error = mean_and_error(derivatives)
    expected = -KT / K**2
    assert error < 0.02 * abs(expected)
    assert abs(mean - expected) < 4 * error


def test_derivative_from_a_simulation():
    """The same from Langevin dynamics; the replicas' own estimates tell the error."""
    potential = Harmonic(K)
    start = initial_state(exact_samples(100), PotentialForces(potential), T, fix_com=False)
    _, trajectory, _ = watched(start, Langevin(0.4, friction=1.5), PotentialForces(potential), 2000, sample_every=20)
    frames, _, replica = trajectory.frames()
    derivatives = []
    for k in range(100):
        own = frames.select((replica == k).nonzero()[:, 0])
        derivatives.append(float(derivative_of_mean(potential, own, x_squared(own))))
    mean, error = mean_and_error(derivatives)
    expected = -KT / K**2
    assert error < 0.05 * abs(expected)
    assert abs(mean - expected) < 4 * error + 0.02 * abs(expected)  # 100 frames, a little correlated: N/(N-1) is too small


# -- the explicit formula


def jacobian_of_energies(potential, frames):
    """∂U(Γ_i)/∂θ, shape (n_samples, n_parameters), one sample at a time."""
    rows = []
    for k in range(frames.n_systems):
        frame = frames.select([k])
        energy = potential(frame, neighbor_list(frame, potential.cutoff)).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(energy, list(potential.parameters()))]))
    return torch.stack(rows)


def derivative_of_means(values, jacobian):
    """∂ḡ_k/∂θ = -β N/(N-1) [⟨g_k ∂U/∂θ⟩ - ⟨g_k⟩⟨∂U/∂θ⟩], shape (d, n_parameters)."""
    n = len(values)
    covariance = values.T @ jacobian / n - torch.outer(values.mean(dim=0), jacobian.mean(dim=0))
    return -n / (n - 1) / KT * covariance


def test_a_weight_of_two_doubles_an_observable_s_part_of_the_gradient():
    (a, reference_a, _), (b, reference_b, _) = random_values(12), random_values(12, d=3, seed=1)
    samples = samples_of({"a": a, "b": b})

    def found(weight_a, weight_b):
        pairs = ((Vector(5, "a").weighted(weight_a), reference_a), (Vector(3, "b").weighted(weight_b), reference_b))
        return Estimator(StatePoint(T))(samples, [Target(vector, reference, weight=vector.weight) for vector, reference in pairs])

    both, more = found(1.0, 1.0), found(1.0, 2.0)
    part = Estimator(StatePoint(T))(samples, [Target(Vector(3, "b"), reference_b)])
    torch.testing.assert_close(more.weights - both.weights, part.weights, rtol=1e-12, atol=1e-15)
    assert more.losses == {"a": both.losses["a"], "b": pytest.approx(2 * both.losses["b"])} and more.loss > both.loss
    assert float(part.weights.abs().max()) > 0


def test_one_weighted_backward_is_the_explicit_formula():
    """To round-off, with every parameter of a neural network."""
    potential, frames, (values, reference, weights) = small_schnet(), molecules(12), random_values(12)
    result = estimate(values, reference, weights, T)
    mean = values.mean(dim=0)
    expected = 2 * weights * (mean - reference) @ derivative_of_means(values, jacobian_of_energies(potential, frames))
    torch.testing.assert_close(gradient(potential, frames, result.sample_weights), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.mean, mean)
    torch.testing.assert_close(result.loss, (weights * (mean - reference) ** 2).sum())
    assert result.effective_samples == pytest.approx(12)
    assert expected.abs().max() > 1e-3


def test_cross_fitting_is_the_explicit_formula():
    """Each half's residual with the other half's covariance; halves may differ in size."""
    potential, frames, (values, reference, weights) = small_schnet(), molecules(12), random_values(12)
    fold = torch.arange(12) % 3 == 0
    result = estimate(values, reference, weights, T, fold=fold)
    jacobian, expected = jacobian_of_energies(potential, frames), 0.0
    for own in (fold, ~fold):
        residual = 2 * weights * (values[~own].mean(dim=0) - reference)
        expected = expected + 0.5 * residual @ derivative_of_means(values[own], jacobian[own])
    torch.testing.assert_close(gradient(potential, frames, result.sample_weights), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.mean, values.mean(dim=0))


@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_chunks_do_not_matter(chunk_size):
    potential, frames, (values, reference, weights) = small_schnet(), molecules(12), random_values(12)
    w = estimate(values, reference, weights, T).sample_weights
    whole = gradient(potential, frames, w, chunk_size=12)
    torch.testing.assert_close(gradient(potential, frames, w, chunk_size=chunk_size), whole, rtol=1e-10, atol=1e-14)
    energies = accumulate_gradient(potential, frames, w, chunk_size=chunk_size)
    torch.testing.assert_close(potential_energies(potential, frames, chunk_size), energies, rtol=1e-12, atol=0)
    assert energies.dtype == torch.float64 and not energies.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_groups_of_atoms_have_energies_of_their_own(chunk_size):
    """Eq. 5: samples are groups, U(γ) the sum of their atoms' energies; groups that overlap are counted as they come."""
    potential, frames = small_schnet(), molecules(6)
    n = frames.n_atoms // frames.n_systems
    members = torch.tensor([[0, 1], [1, 2]])  # two overlapping pairs a frame
    atoms = (members.flatten() + n * torch.arange(6)[:, None]).flatten()
    groups = Groups(atoms, torch.arange(12).repeat_interleave(2), torch.arange(6).repeat_interleave(2))
    values, reference, weights = random_values(12)
    w = estimate(values, reference, weights, T).sample_weights
    rows = []
    for k in range(6):
        frame = frames.select([k])
        atomic = potential.atomic_energies(frame, neighbor_list(frame, potential.cutoff))
        for pair in members.tolist():
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(
                atomic[pair].sum(), list(potential.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
            )]))  # fmt: skip
    expected = 2 * weights * (values.mean(dim=0) - reference) @ derivative_of_means(values, torch.stack(rows))
    potential.zero_grad()
    energies = accumulate_gradient(potential, frames, w, groups, chunk_size)
    found = torch.cat([p.grad.flatten() for p in potential.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(energies, potential_energies(potential, frames))
    of_groups = group_energies(potential, frames, groups, chunk_size)
    assert of_groups.shape == (12,) and not of_groups.requires_grad
    whole = group_energies(potential, frames, Groups.systems(frames))
    torch.testing.assert_close(whole, energies)


def test_targets_add_up():
    """The weights of two targets are the sum of those of each, each times its own weight."""
    values, other = random_values(12)[0], random_values(12, seed=5)[0][:, :2]
    both = samples_of({"a": values, "b": other})
    targets = [Target(Vector(values.shape[1], "a"), values[0], weight=2.0), Target(Vector(2, "b"), other[1], weight=0.5)]
    estimator = Estimator(StatePoint(T))
    found, alone = estimator(both, targets), [estimator(both, [target]) for target in targets]
    torch.testing.assert_close(found.weights, alone[0].weights + alone[1].weights)
    assert found.loss == pytest.approx(alone[0].loss + alone[1].loss) and set(found.means) == {"a", "b"}


def test_frames_far_away_tell_what_is_off_and_are_left_as_they_are():
    values, reference, weights = random_values(12)
    severity = torch.arange(12.0).double()
    target = Target(Vector(values.shape[1], weights=weights), reference)
    found = Estimator(StatePoint(T), near=7.0)(samples_of(values, severity=severity), [target])
    torch.testing.assert_close(found.means["vector"], values.mean(dim=0))
    assert found.samples.severity.tolist() == severity[:8].tolist()
    residual = 2 * weights * (values.mean(dim=0) - reference)
    a = values[:8] @ residual
    torch.testing.assert_close(found.weights, -(a - a.mean()) / 7 / KT)
    change = torch.linspace(0.0, 0.02, 8)
    p = torch.softmax(-change.double() / KT, dim=0)
    again = Estimator(StatePoint(T), near=7.0).reweighted(found, [target], change)
    n = float(1 / p.square().sum())
    torch.testing.assert_close(again.weights, -p * (a - p @ a) * n / (n - 1) / KT)
    assert again.effective_samples == pytest.approx(n)


def test_state_points():
    assert StatePoint(T).beta == pytest.approx(1 / KT)
    torch.testing.assert_close(StatePoint(T).exponent(torch.tensor([KT])), torch.tensor([-1.0]))
    at_pressure = StatePoint(T, pressure_GPa=2.0).exponent(torch.tensor([0.0]), torch.tensor([KT / (2.0 * units.GPa)]))
    torch.testing.assert_close(at_pressure, torch.tensor([-1.0]))
    with pytest.raises(ValueError, match="give volumes"):
        StatePoint(T, 1.0).exponent(torch.zeros(1))
    with pytest.raises(ValueError, match="above 0 K"):
        StatePoint(0.0)


# -- changed potentials


def test_reweighting_without_a_change_is_the_global_estimator():
    values, reference, weights = random_values(12)
    plain = estimate(values, reference, weights, T)
    for energy_change in (torch.zeros(12), torch.full((12,), -37.0)):  # a constant shift is no change
        same = estimate(values, reference, weights, T, energy_change)
        torch.testing.assert_close(same.sample_weights, plain.sample_weights, rtol=1e-12, atol=0)
        torch.testing.assert_close(same.mean, plain.mean, rtol=1e-12, atol=0)
        assert same.effective_samples == pytest.approx(12)


def test_reweighting_reaches_another_force_constant():
    """Samples at K serve 1.2 K: mean, its derivative and Kish's size against closed forms, from 40 sets of 2000.

    With weights exp(-β (k - K) r²/2), N_eff/N = [K (2k - K)/k²]^(3/2) for large N.
    """
    k = 1.2 * K
    before, after = Harmonic(K), Harmonic(k)
    means, derivatives, sizes = [], [], []
    for seed in range(40):
        frames = exact_samples(2000, seed=seed)
        values = x_squared(frames)
        change = potential_energies(after, frames, 2000) - potential_energies(before, frames, 2000)
        result = estimate(values, torch.zeros(1), torch.ones(1), T, change)
        means.append(float(result.mean))
        sizes.append(result.effective_samples / 2000)
        derivatives.append(float(derivative_of_mean(after, frames, values, energy_change=change)))
    for found, expected in [
        (means, KT / k),
        (derivatives, -KT / k**2),
        (sizes, (K * (2 * k - K) / k**2) ** 1.5),
    ]:
        mean, error = mean_and_error(found)
        assert error < 0.02 * abs(expected)
        assert abs(mean - expected) < 4 * error


def test_effective_sample_size_is_kishs():
    """(Σw)²/Σw² with w = exp(-βΔU)."""
    change = torch.tensor([0.0, 0.3, -0.2, 1.0, 0.1], dtype=torch.float64) * KT
    w = torch.exp(-change / KT)
    result = estimate(*random_values(5), T, change)
    assert result.effective_samples == pytest.approx(float(w.sum() ** 2 / w.square().sum()))


def test_a_single_effective_sample_gives_no_infinities():
    result = estimate(*random_values(5), T, torch.tensor([0.0, 9.0, 9.0, 9.0, 9.0]))
    assert result.effective_samples == pytest.approx(1.0)
    assert torch.isfinite(result.sample_weights).all()


# -- bias and variance


def repeated_gradients(n, reference, n_repeats, cross_fit):
    """dL/dk of L = (⟨x²⟩ - g^ref)² from many sets of n samples, in units where kT = k = 1; lengths in √(kT/K)."""
    generator = torch.Generator().manual_seed(n)
    g = torch.randn((n_repeats, n, 1), generator=generator, dtype=torch.float64).square()
    fold = torch.arange(n) % 2 == 0 if cross_fit else None
    target, one = torch.tensor([reference]), torch.ones(1)
    # U = k x²/2, hence ∂U/∂k = g/2; estimate's weights carry β.
    return torch.stack([KT * estimate(x, target, one, T, fold=fold).sample_weights @ (x[:, 0] / 2) for x in g])


@pytest.mark.parametrize("n", [8, 16])
def test_cross_fitting_has_no_bias_and_the_plain_estimate_has(n):
    """L = (⟨x²⟩ - 2)²: dL/dk = 2 (1 - 2)(-1) = 2.

    The plain estimate's residual and covariance come from the same samples; the expectation of their product is off by
    the third cumulant of (g, g, ∂U/∂k) over N: -2 · (8/2)/N.
    """
    truth, bias = 2.0, -8.0 / n
    mean, error = mean_and_error(repeated_gradients(n, 2.0, 2500, cross_fit=True))
    assert error < abs(bias) / 6
    assert abs(mean - truth) < 4 * error
    mean, error = mean_and_error(repeated_gradients(n, 2.0, 2500, cross_fit=False))
    assert error < abs(bias) / 6
    assert abs(mean - truth - bias) < 4 * error


def test_cross_fitting_costs_no_variance_to_first_order():
    """With r the residual and C the covariance, noises δr·C and r·δC are the same; only that of δr·δC, in 1/N², grows.

    A ratio of two variances from 2000 repeats has a standard error of 4 to 10 % here.
    """
    cross, plain = (repeated_gradients(200, 2.0, 2000, cross_fit).var() for cross_fit in (True, False))
    assert 0.8 < cross / plain < 1.4


def test_gradient_by_resampling():
    """dL/dk against finite differences: samples at k ± 2 % from the same random numbers, four observables at once."""
    potential, weights = Harmonic(K), torch.tensor([1.0, 0.5, 2.0, 3.0], dtype=torch.float64)
    width = (KT / K) ** 0.5

    def observables(frames):
        x = frames.positions[:, 0] / width
        return torch.stack([x.square(), x.square().square(), torch.cos(x), (x.abs() < 1).double()], dim=1)

    reference = torch.tensor([0.8, 2.0, 0.7, 0.6], dtype=torch.float64)
    differences = []
    for seed in range(30):
        frames, step = exact_samples(3000, seed=seed), 0.02 * K

        def loss(k):
            mean = observables(exact_samples(3000, k=k, seed=seed)).mean(dim=0)
            return float((weights * (mean - reference).square()).sum())

        found = gradient(potential, frames, estimate(observables(frames), reference, weights, T).sample_weights)
        differences.append([float(found), (loss(K + step) - loss(K - step)) / (2 * step)])
    found, resampled = torch.tensor(differences).T
    mean, error = mean_and_error(found - resampled)
    assert error < 0.05 * abs(resampled.mean())
    assert abs(mean) < 4 * error


# -- the potential is left as it was


def test_gradients_add_up_and_parameters_stay_as_they_are():
    """What was in `.grad` stays in the sum; a parameter that is held fixed gets none; nothing else changes."""
    potential, frames, (values, reference, weights) = small_schnet(), molecules(12), random_values(12)
    w = estimate(values, reference, weights, T).sample_weights
    once = gradient(potential, frames, w)
    accumulate_gradient(potential, frames, w)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in potential.parameters()]), 2 * once)
    fixed = potential.network.lin2.weight
    fixed.requires_grad_(False)
    potential.zero_grad(set_to_none=True)
    before = [(p.requires_grad, p.detach().clone()) for p in potential.parameters()]
    accumulate_gradient(potential, frames, w)
    for p, (requires_grad, value) in zip(potential.parameters(), before):
        assert p.requires_grad == requires_grad and torch.equal(p, value)
    assert fixed.grad is None and not frames.positions.requires_grad


def test_energies_alone_make_no_graph():
    potential, frames = small_schnet(), molecules(3)
    energies = potential_energies(potential, frames)
    assert energies.dtype == torch.float64 and not energies.requires_grad
    assert all(p.requires_grad and p.grad is None for p in potential.parameters())


@pytest.mark.parametrize("n, fold", [(1, None), (3, [True, False, False]), (4, [True] * 4)])
def test_a_covariance_needs_two_samples(n, fold):
    with pytest.raises(ValueError, match="two samples or more, got [01]"):
        estimate(*random_values(n), T, fold=None if fold is None else torch.tensor(fold))


# -- weights by fluctuation


def test_fluctuation_weights_are_inverse_variances():
    values = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, -2.0]])  # variances 1, 0, 4; their mean 5/3
    weights = fluctuation_weights(values, torch.tensor([1.0, 1.0, 2.0]), floor=0.1)
    torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, 0.7 / 0.1, 2 * 0.7 / 2.5], dtype=torch.float64))
    assert float(weights.sum()) == pytest.approx(4.0)


def test_fluctuation_weights_with_a_high_floor_or_nothing_that_fluctuates_are_the_observables_own():
    own = torch.tensor([0.02, 0.02, 0.5], dtype=torch.float64)
    values = torch.randn((20, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fluctuation_weights(values, own, 1e9), own)
    torch.testing.assert_close(fluctuation_weights(values[:1].repeat(5, 1), own, 0.01), own)


def test_fluctuation_weights_make_the_estimator_see_a_rare_event_through_the_noise():
    """Scores of frames that carry a small signal in a quiet component, next to noise in others: Fisher's discriminant."""
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn((200, 50), generator=generator, dtype=torch.float64) * torch.linspace(0.02, 1.0, 50)
    frames = torch.randn((200, 50), generator=generator, dtype=torch.float64) * torch.linspace(0.02, 1.0, 50)
    broken = torch.arange(200) < 20
    frames[broken, 0] += 1.0
    equal = torch.ones(50, dtype=torch.float64)

    def correlation(weights):
        scores = -estimate(frames, reference.mean(dim=0), weights, T).sample_weights
        return float(torch.corrcoef(torch.stack([scores, broken.double()]))[0, 1])

    assert correlation(fluctuation_weights(reference, equal, 1e-3)) > 0.9 > 0.5 > correlation(equal)


@pytest.mark.parametrize("kind", ["x2", "potential-energy"])
def test_the_error_of_a_gradient_along_a_direction(kind):
    """It is by what the gradients of many sets of replicas differ, whose frames tell nothing that their first does not.

    With four frames that are all alike the error of independent frames would be half of this one. The value is the gradient's
    component itself, but for Bessel's correction; the second observable contains the force constant.
    """
    found, errors, potential, index = [], [], Harmonic(K), torch.arange(240)
    observable = PotentialEnergy() if kind == "potential-energy" else Vector(1, "x2")
    target = Target(observable, torch.tensor([0.02]).double())
    for seed in range(150):
        frames = exact_samples(60, seed=seed).select(index // 4)
        known = Energetics.by(potential, frames)
        values = {kind: observable.sample(frames, None, known) if observable.needs else x_squared(frames)}
        samples = Samples(frames, Groups.systems(frames), values, known.energies, 0.0 * index, index % 4, index // 4, energetics=known)
        found_here = Estimator(StatePoint(T))(samples, [target])
        potential.zero_grad()
        accumulate(potential, found_here)
        along = projection(potential, found_here, [target], StatePoint(T), [torch.tensor(2.0).double()])
        assert along.value == pytest.approx(2.0 * float(potential.k.grad), rel=0.01, abs=5e-5)
        found.append(along.value)
        errors.append(along.error)
    # The spread of 150 numbers is known to 6 %, and the error of 60 replicas is a little small.
    assert np.mean(errors) == pytest.approx(np.std(found, ddof=1), rel=0.2)
    assert float(potential.k.detach()) == K
