"""The path gradient against finite differences of a path's probability, dense autograd, and an oscillator's exact propagator."""

import math

import numpy as np
import pytest
import torch
from ase import Atoms, units
from helpers import schnet

from stabie_ase.boltzmann.path import Paths, SquaredDisplacement, VelocityAutocorrelation, accumulate_path_gradient, path_estimate
from stabie_ase.dynamics import Langevin, NoseHooverChain, PotentialForces, initial_state
from stabie_ase.potentials.analytic import Harmonic, Morse
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

T = 300.0
KT = units.kB * T
K, STEP, FRICTION = 0.7, 0.25, 0.6
"""Of a hydrogen atom's well, in eV/Å² and ASE units: 30 steps a period, underdamped."""


class Chosen:
    """Given numbers as the values of paths."""

    def __init__(self, values, last_steps):
        self.values, self.last_steps = values, torch.tensor(last_steps)

    def __call__(self, paths):
        return self.values


def gradient(potential, paths, observable, loss, chunk_size=5000):
    potential.zero_grad()
    accumulate_path_gradient(potential, paths, path_estimate(paths, observable, loss), chunk_size)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in potential.parameters()])


def molecules(potential, n=2, n_steps=7, held=False, dtype=torch.float64):
    """Paths of a few hot molecules, every second one smaller; third atoms may be held."""
    rng = np.random.default_rng(0)
    start = np.array([[0.0, 0, 0], [1.2, 0, 0], [0, 1.3, 0]])
    images = [Atoms("COH", start + rng.normal(0, 0.1, (3, 3)))[: 3 - k % 2] for k in range(n)]
    batch = AtomsBatch.from_atoms(images, dtype=dtype)
    mobile = batch.index_in_system < (2 if held else 3)
    forces = PotentialForces(potential)
    state = initial_state(batch, forces, 500.0, fix_com=False, mobile=mobile)
    return Paths.record(state, Langevin(0.1, 0.5), forces, n_steps)[0]


def forces_along(potential, paths):
    """Forces at every step with their graph, shape (n_steps + 1, n_atoms, 3)."""
    found, batch = [], paths.start.batch
    for positions in paths.positions:
        frame = batch.replace(positions=positions)
        found.append(potential.compute(frame, neighbor_list(frame, potential.cutoff), create_graph=True).forces)
    return torch.stack(found) * paths.start.mobile[:, None]


def log_probability(potential, paths):
    """ln P(x_0, p_0, x_1, ..., x_N) without what does not contain θ, by running BAOAB along the positions.

    Of every replica and step, shape (n_steps, n_replicas), and of the start, shape (n_replicas,); momenta at full steps too.
    """
    batch, h, forces, x = paths.start.batch, paths.integrator.timestep, forces_along(potential, paths), paths.positions
    kT, mobile, m = units.kB * paths.start.temperature[batch.system, None], paths.start.mobile[:, None], batch.masses[:, None]
    c = math.exp(-paths.integrator.friction * h)
    p, steps, momenta = paths.momenta[0], [], [paths.momenta[0]]
    for t in range(paths.n_steps):
        p = p + h / 2 * forces[t]
        middle = x[t] + h / 2 * p / m
        after = (x[t + 1] - middle) * 2 * m / h
        density = -0.5 * (after - c * p) ** 2 / ((1 - c**2) * m * kT)
        steps.append(batch.sum_over_atoms(torch.where(mobile, density, 0.0).sum(dim=1)))
        p = after + h / 2 * forces[t + 1]
        momenta.append(p)
    start = -potential(batch, neighbor_list(batch, potential.cutoff)) / (units.kB * paths.start.temperature)
    return torch.stack(steps), start, torch.stack(momenta)


@pytest.mark.parametrize("held", [False, True])
def test_score_is_the_finite_difference_of_a_path_s_probability(held):
    """At fixed x_0, p_0, x_1, ..., x_N, for atoms of unlike masses with anharmonic bonds, and each parameter by itself."""
    potential = Morse(3.0, 1.8, 1.2)
    paths = molecules(potential, held=held)
    found = gradient(potential, paths, Chosen(torch.tensor([[1.0], [0.0]]).double(), [paths.n_steps]), lambda mean: mean[0])
    for parameter, derivative in zip(potential.parameters(), found):
        sides = []
        for change in (1e-5, -2e-5):
            with torch.no_grad():
                parameter += change
            steps, start, _ = log_probability(potential, paths)
            sides.append(steps.detach().sum(dim=0) + start.detach())
        with torch.no_grad():
            parameter += 1e-5
        scores = (sides[0] - sides[1]) / 2e-5
        assert abs(float(scores[0] - scores[1])) > 1e-3  # two paths, values 1 and 0: the covariance is half of this
        assert float(derivative) == pytest.approx(0.5 * float(scores[0] - scores[1]), rel=1e-6, abs=1e-8)


def test_noise_is_what_the_positions_tell():
    """The path's probability is that of the recorded noise."""
    potential = Morse(3.0, 1.8, 1.2)
    paths = molecules(potential)
    steps, _, momenta = log_probability(potential, paths)
    squares = paths.start.batch.sum_over_atoms(paths.noise.square().sum(dim=2).T).T
    torch.testing.assert_close(steps.detach(), -0.5 * squares, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(momenta.detach(), paths.momenta, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("kind", [VelocityAutocorrelation, SquaredDisplacement])
def test_accumulated_gradient_is_that_of_dense_autograd(kind, chunk_size):
    """Covariances with the scores of noise before each lag, and the explicit derivative of momenta; every parameter of a network."""
    potential = schnet()
    paths = molecules(potential, n=3, n_steps=6)
    lags, reference = (2, 5), torch.tensor([0.3, -0.1]).double()
    found = gradient(potential, paths, kind(lags), lambda mean: (mean - reference).square().sum(), chunk_size)

    steps, start, momenta = log_probability(potential, paths)
    x, batch = paths.positions, paths.start.batch
    v = momenta / batch.masses[:, None]
    pairs = [v[0] * v[lag] if kind is VelocityAutocorrelation else (x[lag] - x[0]) ** 2 for lag in lags]
    values = torch.stack([batch.sum_over_atoms(pair.sum(dim=1)) / batch.counts for pair in pairs], dim=1)
    fixed, surrogate = values.detach(), 0.0
    residual = 2 * (fixed.mean(dim=0) - reference)
    for j, lag in enumerate(lags):
        score = steps[:lag].sum(dim=0) + start
        baseline = (fixed[:, j].sum() - fixed[:, j]) / 2
        surrogate = surrogate + residual[j] * (((fixed[:, j] - baseline) * score).mean() + values[:, j].mean())
    expected = torch.autograd.grad(surrogate, list(potential.parameters()), allow_unused=True)
    expected = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(potential.parameters(), expected)])
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


# -- the oscillator, one coordinate


def wells(n, seed, n_steps):
    """Paths of atoms in wells, one a replica, from exact samples of their Boltzmann distribution."""
    generator = torch.Generator().manual_seed(seed)
    positions = (KT / K) ** 0.5 * torch.randn((n, 3), generator=generator, dtype=torch.float64)
    forces = PotentialForces(Harmonic(K))
    batch = AtomsBatch.from_atoms(Atoms("H")).repeat(n).replace(positions=positions)
    return Paths.record(initial_state(batch, forces, T, seed=seed, fix_com=False), Langevin(STEP, FRICTION), forces, n_steps)[0]


def exact_means(k, n_steps):
    """VACF and mean squared displacement of three coordinates after n steps of BAOAB from the Boltzmann distribution at k.

    (x, p) goes by a linear map and noise; initial positions have the variance kT/k.
    """
    m, c = float(AtomsBatch.from_atoms(Atoms("H")).masses[0]), math.exp(-FRICTION * STEP)
    kick, drift = np.array([[1.0, 0.0], [-k * STEP / 2, 1.0]]), np.array([[1.0, STEP / (2 * m)], [0.0, 1.0]])
    step = kick @ drift @ np.diag([1.0, c]) @ drift @ kick
    noise = kick @ drift @ np.array([0.0, math.sqrt((1 - c**2) * m * KT)])
    first = np.diag([KT / k, m * KT])
    covariance, power = first, np.eye(2)
    for _ in range(n_steps):
        covariance, power = step @ covariance @ step.T + np.outer(noise, noise), step @ power
    later = power @ first
    return 3 * later[1, 1] / m**2, 3 * (covariance[0, 0] + first[0, 0] - 2 * later[0, 0])


def exact_derivatives(lag):
    above, below = exact_means(K + 1e-4, lag), exact_means(K - 1e-4, lag)
    return [(a - b) / 2e-4 for a, b in zip(above, below)]


def blocks(paths, size):
    return [paths.select(part) for part in torch.arange(paths.start.n_systems).split(size)]


def derivatives(paths, observable, size):
    """∂⟨A_j⟩/∂k from each block of so many paths, shape (n_blocks, d)."""
    potential, d = Harmonic(K), len(observable.last_steps)
    return torch.stack(
        [torch.cat([gradient(potential, block, observable, lambda mean: mean[j]) for j in range(d)]) for block in blocks(paths, size)]
    )


LAGS = (4, 12, 22)


@pytest.mark.parametrize("n", [512, 2048, 8192])
@pytest.mark.parametrize("which, kind", [(0, VelocityAutocorrelation), (1, SquaredDisplacement)])
def test_derivative_of_a_correlation_is_that_of_the_exact_propagator(which, kind, n):
    """Within three standard errors, with ever more paths; the mean too."""
    paths = wells(n, seed=n, n_steps=max(LAGS))
    observable = kind(LAGS)
    values = observable(paths)
    expected = torch.tensor([exact_means(K, lag)[which] for lag in LAGS]).double()
    assert ((values.mean(dim=0) - expected).abs() < 3 * values.std(dim=0) / n**0.5).all()
    found = derivatives(paths, observable, n // 32)
    expected = torch.tensor([exact_derivatives(lag)[which] for lag in LAGS]).double()
    error = found.std(dim=0) / 32**0.5
    assert ((found.mean(dim=0) - expected).abs() < 3 * error).all(), (found.mean(dim=0), expected, error)
    if n == 8192:
        assert (error < 0.25 * expected.abs().max()).all()


def by_hand(paths, observable):
    """∂⟨A⟩/∂k of the first component: energies are k x²/2 and forces -k x."""
    found = path_estimate(paths, observable, lambda mean: mean[0])
    energies = 0.5 * paths.positions[0].square().sum(dim=1) @ found.energy_weights
    return float(energies - (found.force_weights * paths.positions).sum())


@pytest.mark.parametrize("which, kind, lag", [(0, VelocityAutocorrelation, 6), (1, SquaredDisplacement, 20)])
def test_baseline_leaves_no_bias_with_as_few_as_two_paths(which, kind, lag):
    """Counted from the mean of all paths, itself among them, half of the derivative would be missing."""
    found = torch.tensor([by_hand(pair, kind((lag,))) for pair in blocks(wells(4000, seed=5, n_steps=lag), 2)])
    expected, error = exact_derivatives(lag)[which], float(found.std() / len(found) ** 0.5)
    assert error < 0.1 * abs(expected)
    assert abs(float(found.mean()) - expected) < 3 * error


def test_noise_after_the_last_look_is_only_noise():
    """Its scores leave the mean where it is and make the variance larger."""
    paths, short = wells(4096, seed=9, n_steps=40), VelocityAutocorrelation((10,))

    class Blind(VelocityAutocorrelation):
        last_steps = torch.tensor([40])

    windowed, whole = (derivatives(paths, kind, 128)[:, 0] for kind in (short, Blind((10,))))
    expected = exact_derivatives(10)[0]
    for found in (windowed, whole):
        assert abs(float(found.mean()) - expected) < 3 * float(found.std()) / 32**0.5
    assert float(whole.var()) > 1.5 * float(windowed.var())


def test_frames_after_the_last_look_are_not_worked_out():
    paths = wells(4, seed=0, n_steps=9)
    estimate = path_estimate(paths, SquaredDisplacement((3,)), lambda mean: mean[0])
    assert (estimate.force_weights[3:] == 0).all() and (estimate.force_weights[:3] != 0).all()


def test_single_precision():
    """Alternating sums cost it little: weights are worked out in double."""
    single, double = Morse(3.0, 1.8, 1.2, dtype=torch.float32), Morse(3.0, 1.8, 1.2)
    paths = molecules(single, n=3, n_steps=60, dtype=torch.float32)
    found, expected = (gradient(p, paths, VelocityAutocorrelation((60,)), lambda mean: mean[0]).double() for p in (single, double))
    assert paths.noise.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


# -- what is refused


def test_a_path_goes_on_where_another_ended():
    """Noise is that of the replicas' own stream."""
    forces, integrator = PotentialForces(Harmonic(K)), Langevin(STEP, FRICTION)
    first, end = Paths.record(wells(3, 0, 2).start, integrator, forces, 2)
    second, _ = Paths.record(end, integrator, forces, 3)
    whole, _ = Paths.record(first.start, integrator, forces, 5)
    for name in ("positions", "momenta"):
        assert torch.equal(getattr(whole, name)[2:], getattr(second, name))
    assert torch.equal(whole.noise, torch.cat([first.noise, second.noise]))


@pytest.mark.parametrize("integrator", [Langevin(STEP, FRICTION, fix_com=True), Langevin(STEP, 0.0), NoseHooverChain(STEP, 10.0)])
def test_dynamics_without_a_known_probability_are_refused(integrator):
    with pytest.raises(ValueError, match=r"Langevin\(friction > 0, fix_com=False\), got"):
        Paths.record(wells(2, 0, 1).start, integrator, PotentialForces(Harmonic(K)), 2)


def test_what_paths_cannot_give_is_refused():
    paths = wells(3, 0, 5)
    with pytest.raises(ValueError, match=r"lags are \[2, 6\], expected some from 0 to 5"):
        path_estimate(paths, VelocityAutocorrelation((2, 6)), torch.sum)
    with pytest.raises(ValueError, match="two paths or more, got 1"):
        path_estimate(paths.select(torch.tensor([1])), VelocityAutocorrelation((2,)), torch.sum)
    hot = paths.start.replace(temperature=torch.tensor([300.0, 300.0, 400.0]).double())
    with pytest.raises(ValueError, match="several temperatures"):
        Paths.record(hot, paths.integrator, PotentialForces(Harmonic(K)), 2)
    with pytest.raises(ValueError, match="3 of 3 replicas met numbers that are not finite within 60 steps"):
        Paths.record(paths.start, Langevin(1e60, FRICTION), PotentialForces(Harmonic(K)), 60)
