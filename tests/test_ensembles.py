"""Ensembles beyond Langevin and Nosé-Hoover: distributions in closed form, held atoms, ramps, cells that move."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.cluster import Icosahedron
from ase.constraints import FixAtoms, FixBondLength, FixCom
from helpers import crystal
from scipy import optimize, stats

from stabie_ase.dynamics import (
    Attached,
    Langevin,
    NoseHooverChain,
    PotentialForces,
    StochasticCellRescaling,
    StochasticVelocityRescaling,
    TemperatureRamp,
    VelocityVerlet,
    initial_state,
    integrator_for,
    kinetic_energy,
    mobile_atoms,
    simulate,
)
from stabie_ase.dynamics.steps import advance
from stabie_ase.potentials.analytic import LennardJones, Morse
from stabie_ase.potentials.base import Potential
from stabie_ase.stability import Verdict, watched
from stabie_ase.stability.criteria.base import OneFrame
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import VerletList, neighbor_list

FS = units.fs
P_MIN = 1e-3
"""Of the Kolmogorov-Smirnov tests: one seed in a thousand would fail."""

BONDS = Morse(depth=4.5, a=1.9, r0=1.1)
TRIANGLE = Atoms("N3", [[0, 0, 0], [1.1, 0, 0], [0.55, 0.95, 0]])


class CellSprings(Potential):
    """An ideal gas in a cell of springs: U = k/2 Σ h_ij², whose isobaric distribution is Wishart's."""

    cutoff = 1.0

    def __init__(self, k):
        super().__init__()
        self.k = k

    def energies(self, batch, neighbors):
        nothing = batch.sum_over_atoms(0.0 * batch.positions).sum(dim=1)
        return 0.5 * self.k * batch.cells.square().sum(dim=(1, 2)) + nothing


def gas(n_replicas, n_atoms, volume, potential, temperature, pressure_GPa=0.0, fix_com=False):
    side = volume ** (1 / 3)
    points = np.random.default_rng(0).uniform(0.0, side, (n_replicas, n_atoms, 3))
    frames = [Atoms(f"Ar{n_atoms}", x, cell=[side] * 3, pbc=True) for x in points]
    forces = PotentialForces(potential, stress=True)
    batch = AtomsBatch.from_atoms(frames)
    return initial_state(batch, forces, temperature, fix_com=fix_com, pressure_GPa=pressure_GPa), forces


def volumes(state):
    return torch.linalg.det(state.batch.cells)


def ks(samples, distribution):
    return stats.kstest(np.asarray(samples), distribution.cdf).pvalue


# -- temperature


@pytest.mark.parametrize("held", [[], [1]], ids=["free", "held"])
@pytest.mark.parametrize(
    "integrator",
    [
        StochasticVelocityRescaling(0.5 * FS, relaxation_time=10 * FS),
        Langevin(0.5 * FS, 0.1 / FS),
        Langevin(0.5 * FS, 0.1 / FS, fix_com=True),
    ],
    ids=["rescaling", "langevin", "langevin at rest"],
)
def test_kinetic_energy_is_canonical(integrator, held):
    """2K/(k_B T) ~ χ²(N_f) for 400 molecules started at half the temperature of the bath."""
    temperature, n = 400.0, 400
    molecule = TRIANGLE.copy()
    molecule.set_constraint(FixAtoms(held))
    state = initial_state(
        AtomsBatch.from_atoms([molecule] * n),
        PotentialForces(BONDS),
        temperature / 2,
        fix_com=integrator.fix_com,
        mobile=mobile_atoms([molecule] * n),
    )
    state = state.replace(temperature=state.temperature * 2.0)
    state = advance(state, integrator, PotentialForces(BONDS), 400)
    n_f = 6 if held or integrator.fix_com else 9
    assert ks(2.0 * kinetic_energy(state) / (units.kB * temperature), stats.chi2(n_f)) > P_MIN


def test_the_centre_of_mass_rests_and_atoms_share_the_heat_by_their_masses():
    """⟨p_i²⟩ = 3 m_i (1 - m_i/M) k_B T where Σ p = 0, for 400 molecules of three elements."""
    temperature, n = 400.0, 400
    frames = [Atoms("NHO", TRIANGLE.positions)] * n
    integrator = Langevin(0.25 * FS, 0.2 / FS, fix_com=True)
    start = initial_state(AtomsBatch.from_atoms(frames), PotentialForces(BONDS), temperature / 2)
    start = start.replace(temperature=start.temperature * 2.0)
    end = advance(start, integrator, PotentialForces(BONDS), 300)
    masses = start.batch.masses.reshape(n, 3)

    def centres(state):
        return (masses[:, :, None] * state.batch.positions.reshape(n, 3, 3)).sum(dim=1) / masses.sum(dim=1)[:, None]

    assert float((centres(end) - centres(start)).abs().max()) < 1e-12
    squares = end.momenta.reshape(n, 3, 3).square().sum(dim=2)
    expected = 3.0 * masses * (1.0 - masses / masses.sum(dim=1)[:, None]) * units.kB * temperature
    error = (2.0 / 3.0 / n) ** 0.5  # of the mean of n such χ²(3)
    assert ((squares / expected).mean(dim=0) - 1.0).abs().max() < 4 * error


def test_velocity_rescaling_relaxes_as_published():
    """Without forces d⟨K⟩/dt = (K̄ - ⟨K⟩)/τ exactly."""
    temperature, tau, n = 300.0, 100 * FS, 2000
    nobody = LennardJones(epsilon=0.0, sigma=1.0, cutoff=0.5)
    state = initial_state(AtomsBatch.from_atoms([TRIANGLE] * n), PotentialForces(nobody), 0.0)
    state = initial_state(state.batch, PotentialForces(nobody), 100.0)
    state = state.replace(temperature=torch.full_like(state.temperature, temperature))
    before = kinetic_energy(state)
    after = kinetic_energy(advance(state, StochasticVelocityRescaling(2.0 * FS, tau), PotentialForces(nobody), 50))
    target = 3.0 * units.kB * temperature  # N_f = 6
    expected = target + (before - target) * np.exp(-1.0)
    error = (after - expected).std() / n**0.5
    assert float((after - expected).mean().abs()) < 4 * float(error)
    assert float(error) < 0.02 * target


def test_a_ramp_moves_the_bath():
    integrator = TemperatureRamp(Langevin(1.0 * FS, 0.1 / FS), 100.0, 500.0, n_steps=200)
    batch = AtomsBatch.from_atoms([TRIANGLE] * 200)
    state = initial_state(batch, PotentialForces(BONDS), 100.0, fix_com=integrator.fix_com)
    middle = simulate(state, integrator, PotentialForces(BONDS), 100)
    assert torch.allclose(middle.temperature, torch.full_like(middle.temperature, 100.0 + 400.0 * 99 / 200))
    end = simulate(middle, integrator, PotentialForces(BONDS), 150)
    assert (end.temperature == 500.0).all()
    assert ks(2.0 * kinetic_energy(end) / (units.kB * 500.0), stats.chi2(9)) > P_MIN


@pytest.mark.parametrize(
    "integrator",
    [
        Langevin(5 * FS, 0.005 / FS),
        NoseHooverChain(5 * FS, relaxation_time=200 * FS),
        StochasticVelocityRescaling(5 * FS, relaxation_time=200 * FS),
    ],
    ids=lambda x: type(x).__name__,
)
def test_two_temperatures_are_consistent(integrator):
    """ln P₂(U)/P₁(U) has the slope β₁ - β₂ in the potential energy (Shirts, J. Chem. Theory Comput. 9, 909, 2013).

    Clusters of 13 argon atoms at 20 and 26 K, solid: 33 vibrations. The slope by logistic regression; replicas are
    independent, and the error comes from their jackknife in ten groups, about 6 %. The fluctuations of U are what it tests:
    halved, they would double the slope.
    """
    temperatures, n = (20.0, 26.0), 60
    cluster = Atoms(Icosahedron("Ar", 2, latticeconstant=5.45))
    potential = LennardJones(epsilon=0.01032, sigma=3.405, cutoff=20.0)
    both = torch.tensor(temperatures).repeat_interleave(n)
    state = initial_state(AtomsBatch.from_atoms([cluster] * 2 * n), PotentialForces(potential), 2.0 * both, fix_com=integrator.fix_com)
    state = state.replace(temperature=both.double())
    state = advance(state, integrator, PotentialForces(potential), 500)
    energies = []
    simulate(
        state, integrator, PotentialForces(potential), 900, [Attached(lambda k, now: energies.append(now.potential_energy), 45)]
    )
    energies = torch.stack(energies).reshape(-1, 2, n).numpy()

    def slope(samples):
        x = (samples - samples.mean()) / samples.std()

        def cost(a):
            z = a[0] + a[1] * x
            return np.logaddexp(0, z[:, 0]).mean() + np.logaddexp(0, -z[:, 1]).mean()

        return optimize.minimize(cost, [0.0, 0.0]).x[1] / samples.std()

    beta = 1.0 / (units.kB * np.array(temperatures))
    groups = [np.delete(energies, range(k, n, 10), axis=2) for k in range(10)]
    error = np.sqrt(9 * np.var([slope(g) for g in groups]))
    assert error < 0.12 * (beta[0] - beta[1])
    assert abs(slope(energies) - (beta[0] - beta[1])) < 4 * error


# -- atoms that are held


@pytest.mark.parametrize(
    "integrator",
    [
        VelocityVerlet(0.5 * FS),
        Langevin(0.5 * FS, 0.1 / FS),
        Langevin(0.5 * FS, 0.1 / FS, fix_com=True),
        NoseHooverChain(0.5 * FS, relaxation_time=20 * FS),
        StochasticVelocityRescaling(0.5 * FS, relaxation_time=20 * FS),
    ],
    ids=["verlet", "langevin", "langevin at rest", "nose-hoover", "rescaling"],
)
def test_held_atoms_stay(integrator):
    """Held in one replica, free in the other, which then moves as it does alone."""
    held = TRIANGLE.copy()
    held.set_constraint([FixAtoms([2]), FixCom()])
    frames = [held, TRIANGLE]
    start = initial_state(
        AtomsBatch.from_atoms(frames),
        PotentialForces(BONDS),
        400.0,
        fix_com=integrator.fix_com,
        mobile=mobile_atoms(frames),
    )
    end = advance(start, integrator, PotentialForces(BONDS), 100)
    moved = (end.batch.positions != start.batch.positions).any(dim=1)
    assert moved.tolist() == [True, True, False, True, True, True]
    alone = advance(start.select([1]), integrator, PotentialForces(BONDS), 100)
    assert torch.equal(alone.batch.positions, end.select([1]).batch.positions)


def test_other_constraints_are_refused_by_name():
    molecule = TRIANGLE.copy()
    molecule.set_constraint(FixBondLength(0, 1))
    with pytest.raises(ValueError, match="FixBondLength"):
        mobile_atoms([molecule])


@pytest.mark.parametrize(
    "integrator", [NoseHooverChain(FS, 20 * FS), StochasticVelocityRescaling(FS, 20 * FS), Langevin(FS, 0.1 / FS, fix_com=True)]
)
def test_nothing_that_moves_is_refused(integrator):
    state = initial_state(AtomsBatch.from_atoms(Atoms("N")), PotentialForces(BONDS), 300.0)
    with pytest.raises(ValueError, match="nothing that can move"):
        simulate(state, integrator, PotentialForces(BONDS), 1)


# -- pressure


@pytest.mark.parametrize("fix_com", [False, True])
def test_volume_of_an_ideal_gas(fix_com):
    """V ~ Gamma(N + 1, k_B T/P) for 500 gases started at two thirds of the mean, whether or not their centres rest."""
    n, temperature, pressure = 5, 300.0, 0.05
    mean = (n + 1) * units.kB * temperature / (pressure * units.GPa)
    nobody = LennardJones(epsilon=0.0, sigma=1.0, cutoff=0.5)
    state, _ = gas(500, n, mean / 1.5, nobody, temperature, pressure, fix_com)
    compressibility = 1.0 / (pressure * units.GPa)
    integrator = StochasticCellRescaling(2.0 * FS, 0.02 / FS, fix_com, relaxation_time=100 * FS, compressibility=compressibility)
    end = simulate(state, integrator, PotentialForces(nobody, stress=True), 350)
    assert end.alive.all()
    assert ks(volumes(end), stats.gamma(n + 1, scale=units.kB * temperature / (pressure * units.GPa))) > P_MIN
    assert ks(2.0 * kinetic_energy(end) / (units.kB * temperature), stats.chi2(3 * n - 3 * fix_com)) > P_MIN
    shape = end.batch.cells / volumes(end)[:, None, None] ** (1 / 3)
    torch.testing.assert_close(shape, torch.eye(3).expand_as(shape).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("fix_com", [False, True])
def test_shape_of_a_flexible_cell(fix_com):
    """p(h) ~ |det h|^(N-2) exp(-k|h|²/(2 k_B T)), so h hᵀ is Wishart with N + 1 degrees of freedom."""
    n, temperature, k = 6, 300.0, 0.002
    scale = units.kB * temperature / k
    springs = CellSprings(k)
    state, _ = gas(500, n, (scale * n) ** 1.5, springs, temperature, fix_com=fix_com)
    compressibility = float(volumes(state)[0]) / (units.kB * temperature * n)
    integrator = StochasticCellRescaling(
        2.0 * FS, 0.02 / FS, fix_com, relaxation_time=100 * FS, compressibility=compressibility, flexible=True
    )
    end = simulate(state, integrator, PotentialForces(springs, stress=True), 450)
    gram = (end.batch.cells @ end.batch.cells.mT) / scale
    assert ks(gram.diagonal(dim1=1, dim2=2).sum(dim=1), stats.chi2(3 * (n + 1))) > P_MIN
    exact = stats.chi2.rvs([n + 1, n, n - 1], size=(20_000, 3), random_state=1).prod(axis=1)
    assert stats.ks_2samp(torch.linalg.det(gram).numpy(), exact).pvalue > P_MIN
    off = gram[:, 0, 1] / (gram[:, 0, 0] * gram[:, 1, 1]).sqrt()
    assert ks((off + 1.0) / 2.0, stats.beta(n / 2, n / 2)) > P_MIN  # of a Wishart matrix's correlations


def argon_crystal(n_replicas, pressure_GPa=0.0, temperature=60.0):
    potential = LennardJones(epsilon=0.0103, sigma=3.4, cutoff=6.5)
    frames = [bulk("Ar", "fcc", a=5.35, cubic=True).repeat(2)] * n_replicas
    forces = PotentialForces(potential, stress=True)
    batch = AtomsBatch.from_atoms(frames)
    return initial_state(batch, forces, temperature, fix_com=False, pressure_GPa=pressure_GPa), potential


def test_inner_and_outer_pressure_of_a_crystal_balance():
    """⟨V P_int⟩ = P ⟨V⟩ - k_B T in each direction and ⟨V (P_int)_xy⟩ = 0, which follow from the flexible distribution."""
    temperature, pressure = 60.0, 0.1
    state, potential = argon_crystal(12, pressure, temperature)
    integrator = StochasticCellRescaling(
        4.0 * FS, 0.01 / FS, relaxation_time=200 * FS, compressibility=0.35 / units.GPa, flexible=True
    )
    state = simulate(state, integrator, PotentialForces(potential, stress=True), 400)
    samples = []
    for _ in range(40):
        state = simulate(state, integrator, PotentialForces(potential, stress=True), 10)
        p, volume = state.momenta, volumes(state)
        kinetic = state.batch.sum_over_atoms(p[:, :, None] * p[:, None, :] / state.batch.masses[:, None, None])
        inner = kinetic - volume[:, None, None] * state.stress
        outer = (pressure * units.GPa * volume - units.kB * temperature)[:, None, None] * torch.eye(3)
        samples.append(inner - outer)
    own = torch.stack(samples).mean(dim=0)  # one mean a replica
    mean, error = own.mean(dim=0), own.std(dim=0) / own.shape[0] ** 0.5
    assert (mean.abs() < 4.5 * error).all(), (mean, error)
    assert (error < 0.1 * pressure * units.GPa * volumes(state).mean()).all()


@pytest.mark.parametrize("flexible", [False, True])
def test_replica_alone_is_replica_in_a_batch_at_constant_pressure(flexible):
    state, potential = argon_crystal(3)
    integrator = StochasticCellRescaling(2.0 * FS, 0.01 / FS, relaxation_time=100 * FS, flexible=flexible)
    together = simulate(state, integrator, PotentialForces(potential, stress=True), 40)
    alone = simulate(state.select([1]), integrator, PotentialForces(potential, stress=True), 40)
    assert not torch.equal(together.batch.cells, state.batch.cells)
    for name, x in alone.tensors().items():
        torch.testing.assert_close(x, together.select([1]).tensors()[name], rtol=1e-9, atol=1e-9)


def test_frames_at_constant_pressure_have_the_cells_of_their_time():
    """As taken step by step; positions in a cell of the start would be at another density."""
    state, potential = argon_crystal(2)
    integrator = StochasticCellRescaling(2.0 * FS, 0.01 / FS, relaxation_time=20 * FS)
    _, trajectory, _ = watched(state, integrator, PotentialForces(potential, stress=True), 30, sample_every=10, record_momenta=True)
    frames, frame, replica = trajectory.frames()
    for k in range(3):
        state = simulate(state, integrator, PotentialForces(potential, stress=True), 10)
        own = frames.select((frame == k).nonzero()[:, 0])
        torch.testing.assert_close(own.cells, state.batch.cells)
        torch.testing.assert_close(own.positions, state.batch.positions)
        torch.testing.assert_close(trajectory.momenta[k], state.momenta)
    assert len({round(float(v), 6) for v in torch.linalg.det(frames.cells)}) == 6


class Everything(OneFrame):
    """A criterion that calls a replica unstable once its cell has changed."""

    name, unit = "volume", "Å³"

    def __init__(self, state):
        self.volumes = volumes(state)

    def judge(self, state):
        value = (volumes(state) - self.volumes).abs()
        return Verdict(value * 1e9, value, torch.zeros((state.n_systems, 0), dtype=torch.int64))


def test_unstable_frames_at_constant_pressure_have_the_cells_of_their_time():
    state, potential = argon_crystal(2)
    integrator = StochasticCellRescaling(2.0 * FS, 0.01 / FS, relaxation_time=20 * FS)
    end, _, failures = watched(state, integrator, PotentialForces(potential, stress=True), 10, [Everything(state)], check_every=5)
    assert failures.step.tolist() == [5, 5] and not torch.equal(end.batch.cells, state.batch.cells)
    for atoms, cell, momenta in zip(failures.to_atoms(), end.batch.cells, end.momenta.split(end.batch.sizes)):
        np.testing.assert_allclose(atoms.cell.array, cell)
        np.testing.assert_allclose(atoms.get_momenta(), momenta)


def test_constant_pressure_refuses_what_it_cannot_do():
    integrator = StochasticCellRescaling(1.0 * FS, 0.01 / FS)
    molecule = initial_state(AtomsBatch.from_atoms(TRIANGLE), PotentialForces(BONDS), 300.0, fix_com=False)
    with pytest.raises(ValueError, match="periodic in all three directions"):
        simulate(molecule, integrator, PotentialForces(BONDS), 1)
    state, potential = argon_crystal(1)
    with pytest.raises(ValueError, match="stress at the start"):
        simulate(state.replace(stress=None), integrator, PotentialForces(potential, stress=True), 1)
    held = state.mobile.clone()
    held[0] = False
    with pytest.raises(ValueError, match="FixAtoms"):
        simulate(state.replace(mobile=held), integrator, PotentialForces(potential, stress=True), 1)


def test_a_list_outlives_small_strains_and_misses_no_pair():
    rng = np.random.default_rng(3)
    cutoff, verlet = 3.0, VerletList(3.0, skin=1.0)
    batch = AtomsBatch.from_atoms([crystal(5, seed=1), crystal(3, seed=2)])
    for _ in range(60):
        strain = torch.as_tensor(rng.normal(0.0, 0.006, (2, 3, 3)))
        stretch = torch.eye(3).double() + 0.5 * (strain + strain.mT)
        positions = torch.einsum("nx,nxy->ny", batch.positions, stretch[batch.system])
        positions = positions + torch.as_tensor(rng.normal(0.0, 0.03, positions.shape))
        batch = batch.replace(positions=positions, cells=batch.cells @ stretch)
        kept = verlet(batch).within(batch, cutoff)
        fresh = neighbor_list(batch, cutoff).within(batch, cutoff)
        columns = [set(map(tuple, torch.cat([x.pairs.T, x.shifts], dim=1).tolist())) for x in (kept, fresh)]
        assert columns[0] == columns[1]
    assert 2 <= verlet.n_builds <= 30


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nve", VelocityVerlet(0.5 * FS)),
        ("nvt", Langevin(0.5 * FS, 0.01 / FS, True)),
        ("nvt-nose-hoover", NoseHooverChain(0.5 * FS, 20.0 * FS)),
        ("nvt-rescaling", StochasticVelocityRescaling(0.5 * FS, 20.0 * FS)),
        ("npt-flexible", StochasticCellRescaling(
            0.5 * FS, 0.01 / FS, True, relaxation_time=300.0 * FS, compressibility=0.5 / units.GPa, flexible=True
        )),
    ],
)  # fmt: skip
def test_ensembles_by_name(name, expected):
    """In everyday units: fs, 1/fs, 1/GPa."""
    found = integrator_for(name, 0.5, 0.01, 20.0, fix_com=True, pressure_relaxation_time_fs=300.0, compressibility_per_GPa=0.5)
    assert type(found) is type(expected) and vars(found) == pytest.approx(vars(expected))
    with pytest.raises(ValueError, match="unknown ensemble 'nvtt'"):
        integrator_for("nvtt", 0.5)
