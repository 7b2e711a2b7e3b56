"""Dynamics: laws of the integrators, agreement with ASE, and batch members that are strangers to each other."""

import importlib
import itertools
from dataclasses import fields

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.lj import LennardJones as ASELennardJones
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.verlet import VelocityVerlet as ASEVelocityVerlet
from scipy import stats

from stabie_ase.dynamics import (
    Langevin,
    NoseHooverChain,
    PotentialForces,
    StochasticVelocityRescaling,
    VelocityVerlet,
    initial_state,
    kinetic_energy,
)
from stabie_ase.dynamics.random import MOMENTA, NOISE, normals, normals_ahead, philox, replica_keys, uniforms
from stabie_ase.dynamics.steps import advance
from stabie_ase.potentials.analytic import Harmonic, LennardJones, Morse
from stabie_ase.potentials.base import Prediction
from stabie_ase.potentials.calculator import StABIECalculator
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.stability import BondLengthDeviation, watched
from stabie_ase.structures.batch import AtomsBatch

observers_module = importlib.import_module("stabie_ase.dynamics.observers")
FS = units.fs
P_MIN = 1e-3
"""Of the Kolmogorov-Smirnov tests: one seed in a thousand would fail."""

INTEGRATORS = {
    "nve": VelocityVerlet(0.5 * FS),
    "langevin": Langevin(0.5 * FS, friction=0.01 / FS),
    "nose-hoover": NoseHooverChain(0.5 * FS, relaxation_time=20 * FS),
    "rescaling": StochasticVelocityRescaling(0.5 * FS, relaxation_time=20 * FS),
}
each_integrator = pytest.mark.parametrize("integrator", INTEGRATORS.values(), ids=INTEGRATORS)


def polygon(n):
    """A molecule of n atoms on a circle, a little out of plane, its neighbours about 1.15 Å apart."""
    angle, radius = 2 * np.pi * np.arange(n) / n, 0.55 / np.sin(np.pi / n)
    return Atoms(f"N{n}", np.stack([radius * np.cos(angle), radius * np.sin(angle), 0.1 * (-1.0) ** np.arange(n)], 1))


def morse_forces():
    """Stiff bonds between all atoms: a diatomic N2 has a period of 30 fs."""
    return PotentialForces(Morse(depth=4.5, a=1.9, r0=1.1))


def morse_state(*sizes, temperature_K=500.0, seed=0, **options):
    batch = AtomsBatch.from_atoms([polygon(n) for n in sizes])
    return initial_state(batch, morse_forces(), temperature_K, seed=seed, **options)


def wells(k):
    """Forces of independent harmonic wells at the origin; k broadcasts with the positions."""

    def force_function(batch):
        x = batch.positions
        return Prediction(batch.sum_over_atoms((0.5 * k * x.square()).sum(dim=1)), -k * x, None)

    return force_function


def path(state, integrator, force_function, n_steps):
    """The states after each step, without anything that the engine adds to a plain loop."""
    for _ in range(n_steps):
        state = integrator.step(state, force_function)
        yield state


def assert_same_states(a, b):
    """Bit by bit."""
    for name, x in a.tensors().items():
        torch.testing.assert_close(x, b.tensors()[name], rtol=0, atol=0, equal_nan=True, msg=name)


def mean_and_error(samples):
    """Mean over frames and replicas, shape (n_frames, n_replicas), and its standard error.

    Replicas are independent, frames of one replica are not: the scatter of the replicas' own means knows that.
    """
    own = samples.double().mean(dim=0)
    return float(own.mean()), float(own.std() / len(own) ** 0.5)


# -- random numbers


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Those of the Random123 distribution."""

    def words(text):
        return torch.tensor([int(word, 16) for word in text.split()])

    assert torch.equal(philox(words(counter), words(key)), words(expected))


def noise(n_systems=8, n_atoms=25, n_steps=100, seed=0):
    """Shape (n_steps, n_systems, n_atoms, 3)."""
    batch = AtomsBatch.from_atoms([polygon(n_atoms)]).repeat(n_systems)
    keys = replica_keys(seed, n_systems)
    drawn = normals(batch, keys, torch.arange(n_steps)[:, None].expand(-1, n_systems), NOISE)
    return drawn.view(n_steps, n_systems, n_atoms, 3)


def test_noise_is_standard_normal():
    x = noise().flatten().numpy()  # 60 000 numbers
    assert stats.kstest(x, "norm").pvalue > P_MIN
    assert abs(stats.kurtosis(x)) < 4 * (24 / len(x)) ** 0.5


@pytest.mark.parametrize("axis", range(4), ids=["steps", "replicas", "atoms", "components"])
def test_noise_is_independent(axis):
    """Neither values nor squares are correlated along any axis; Box and Muller's pairs share a radius."""
    x = noise().transpose(0, axis)
    for values in (x, x.square()):
        a, b = values[:-1].flatten(), values[1:].flatten()
        r = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(r) < 4 / len(a) ** 0.5


def test_streams_differ_by_seed_purpose_step_and_replica():
    batch, step = AtomsBatch.from_atoms([polygon(2)] * 3), torch.zeros(3, dtype=torch.int64)
    draws = [
        normals(batch, replica_keys(seed, 3, first), step + shift, purpose).flatten()
        for seed, first, shift, purpose in itertools.product((0, 1), (0, 3), (0, 1, 2**32), (MOMENTA, NOISE))
    ]
    everything = torch.cat(draws)
    assert len(everything.unique()) == len(everything)


def test_keys_do_not_depend_on_how_many_are_made():
    assert torch.equal(replica_keys(7, 10)[4:6], replica_keys(7, 2, first=4))


def test_noise_drawn_ahead_is_the_same():
    batch = AtomsBatch.from_atoms([polygon(3), polygon(5)])
    keys, step = replica_keys(0, 2), torch.tensor([4, 900])
    ahead = list(normals_ahead(batch, keys, step, NOISE, n_steps=7, at_once=24))
    assert len(ahead) == 7
    for k, x in enumerate(ahead):
        assert torch.equal(x, normals(batch, keys, step + k, NOISE))


def test_uniforms():
    x = uniforms(replica_keys(0, 5000), torch.zeros(5000, dtype=torch.int64), 3)
    assert stats.kstest(x.numpy(), "uniform").pvalue > P_MIN


# -- initial momenta


@pytest.mark.parametrize("fix_com", [True, False])
def test_initial_momenta_are_maxwell_boltzmann(fix_com):
    """2K/kT is χ² distributed with 3N - 3 or 3N degrees of freedom, for every replica at its own temperature."""
    n = 2000
    atoms = Atoms("HCO", polygon(3).positions)
    temperature = torch.linspace(100.0, 900.0, n, dtype=torch.float64)
    batch = AtomsBatch.from_atoms([atoms]).repeat(n)
    state = initial_state(batch, wells(1.0), temperature, fix_com=fix_com)
    reduced = 2 * kinetic_energy(state) / (units.kB * temperature)
    assert stats.kstest(reduced.numpy(), stats.chi2(9 - 3 * fix_com).cdf).pvalue > P_MIN
    total = batch.sum_over_atoms(state.momenta)
    if fix_com:
        assert total.abs().max() < 1e-12
    else:
        scaled = state.momenta / torch.sqrt(batch.masses * units.kB * temperature[batch.system])[:, None]
        assert stats.kstest(scaled.flatten().numpy(), "norm").pvalue > P_MIN


# -- constant energy


def energies_along(state, integrator, force_function, n_steps, energy):
    return torch.stack([energy(s) for s in path(state, integrator, force_function, n_steps)])


def total_energy(state):
    return state.potential_energy + kinetic_energy(state)


def assert_conserved(energies):
    """To 1 % of kT (500 K) at all times, and from the first to the last quarter to 0.2 %.

    The oscillation is a Δt² error, which under a thermostat wanders with the energy of the molecule.
    """
    kT, quarter = units.kB * 500.0, len(energies) // 4
    drift = energies[-quarter:].mean(dim=0) - energies[:quarter].mean(dim=0)
    assert drift.abs().max() < 0.002 * kT
    assert (energies - energies[0]).abs().max() < 0.01 * kT


def assert_second_order(state, integrator_of, energy, time):
    """The oscillation of a conserved energy goes as Δt²."""
    widths = [
        energies_along(state, integrator_of(dt), morse_forces(), round(time / dt), energy).std(dim=0)
        for dt in (0.8 * FS, 0.4 * FS)
    ]
    exponent = torch.log2(widths[0] / widths[1])
    assert (exponent - 2.0).abs().max() < 0.1


def test_nve_conserves_energy_over_picoseconds():
    energies = energies_along(morse_state(2, 3), VelocityVerlet(0.5 * FS), morse_forces(), 4000, total_energy)  # 2 ps
    assert_conserved(energies)


def test_nve_error_is_second_order():
    assert_second_order(morse_state(2, 3, 4), VelocityVerlet, total_energy, 200 * FS)


def test_nve_is_reversible():
    """200 fs and back; round-off of 1e-16 has grown by a few powers of ten."""
    start, integrator, forces = morse_state(2, 3, 4), VelocityVerlet(0.5 * FS), morse_forces()
    turned = advance(start, integrator, forces, 400)
    back = advance(turned.replace(momenta=-turned.momenta), integrator, forces, 400)
    assert (turned.batch.positions - start.batch.positions).abs().max() > 0.1
    assert (back.batch.positions - start.batch.positions).abs().max() < 1e-10


# -- constant temperature


def assert_variance(samples, expected):
    """Squares of samples, shape (n_frames, n_replicas), against their mean within four standard errors."""
    mean, error = mean_and_error(samples.square())
    assert error < 0.03 * expected  # a test that could not fail would be no test
    assert abs(mean - expected) < 4 * error


def test_langevin_samples_the_harmonic_oscillator():
    """BAOAB's positions are exact for harmonic wells at any timestep; its momenta are colder by 1 - (ωΔt)²/4.

    With ωΔt = 0.5 that is 6 %, and the standard error of a variance from 300 replicas x 40 frames x 3 directions,
    five relaxation times apart, is 0.75 %.
    """
    n, temperature, dt = 300, 300.0, 0.5
    batch = AtomsBatch.from_atoms([Atoms("HCO", np.zeros((3, 3)))]).repeat(n)
    forces = wells(batch.masses[:, None])  # ω = 1 for every atom
    kT = units.kB * temperature
    integrator = Langevin(dt, friction=2.0)
    states = list(path(initial_state(batch, forces, temperature, fix_com=False), integrator, forces, 440))[40::10]
    masses = batch.masses[:, None]
    x = torch.stack([s.batch.positions * torch.sqrt(masses / kT) for s in states]).view(-1, n, 3, 3)
    p = torch.stack([s.momenta / torch.sqrt(masses * kT) for s in states]).view(-1, n, 3, 3)
    for atom in range(3):
        assert_variance(x[:, :, atom].flatten(1), 1.0)
        assert_variance(p[:, :, atom].flatten(1), 1.0 - dt**2 / 4)
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > P_MIN
    assert stats.kstest(p.flatten().numpy() / (1.0 - dt**2 / 4) ** 0.5, "norm").pvalue > P_MIN
    assert abs(torch.corrcoef(torch.stack([x.flatten(), p.flatten()]))[0, 1]) < 4 / x.numel() ** 0.5


def test_nose_hoover_chain_samples_the_harmonic_oscillator():
    """One atom in a well with three frequencies, from the bottom of the well, 500 replicas.

    An isotropic well would not do: its angular momentum L obeys d(L e^η)/dt = 0, so that L e^η is conserved, the
    motion stays in one plane, and the chain samples another distribution. A chain much slower than the oscillations
    samples another one too.
    """
    n, temperature, dt = 500, 300.0, 0.1
    kT, k = units.kB * temperature, torch.tensor([1.0, 1.3, 1.7], dtype=torch.float64)
    batch = AtomsBatch.from_atoms([Atoms("H", np.zeros((1, 3)), masses=[1.0])]).repeat(n)
    forces, integrator = wells(k), NoseHooverChain(dt, relaxation_time=0.5, fix_com=False)
    states = list(path(initial_state(batch, forces, temperature, fix_com=False), integrator, forces, 3000))[600::25]
    x = torch.stack([s.batch.positions * torch.sqrt(k / kT) for s in states])
    p = torch.stack([s.momenta / kT**0.5 for s in states])
    for component in range(3):
        assert_variance(x[:, :, component], 1.0)
        assert_variance(p[:, :, component], 1.0)
    for last in (x[-1], p[-1]):  # 1500 independent numbers
        assert stats.kstest(last.flatten().numpy(), "norm").pvalue > P_MIN


@pytest.mark.parametrize("fix_com, n_f", [(True, 3), (False, 6)])
def test_nose_hoover_chain_counts_degrees_of_freedom(fix_com, n_f):
    """⟨2K⟩ = N_f kT, each replica at its own temperature; a diatomic, where the three of the centre of mass matter."""
    temperature = torch.tensor([200.0, 400.0, 800.0], dtype=torch.float64).repeat(20)
    state = morse_state(*[2] * 60, temperature_K=temperature, fix_com=fix_com)
    integrator = NoseHooverChain(1.0 * FS, relaxation_time=20 * FS, fix_com=fix_com)
    states = list(path(state, integrator, morse_forces(), 1000))[300::10]
    reduced = torch.stack([2 * kinetic_energy(s) / (units.kB * temperature) for s in states])
    for bath in range(3):
        mean, error = mean_and_error(reduced[:, bath::3])
        assert abs(mean - n_f) < 4 * error + 0.01 * n_f  # a timestep of 1/30 of the period leaves up to 1 %
    if fix_com:
        assert states[-1].batch.sum_over_atoms(states[-1].momenta).abs().max() < 1e-10


def test_nose_hoover_chain_conserves_its_energy():
    """While the molecules' own energies wander."""
    integrator, state = NoseHooverChain(0.5 * FS, relaxation_time=20 * FS), morse_state(2, 3)
    both = [integrator.conserved_energy, total_energy]
    energies = energies_along(
        state, integrator, morse_forces(), 2000, lambda s: torch.stack([energy(s) for energy in both])
    )  # 1 ps
    assert_conserved(energies[:, 0])
    assert (energies[:, 1].std(dim=0) > 0.5 * units.kB * 500.0).all()


def test_nose_hoover_chain_error_is_second_order():
    def integrator_of(dt):
        return NoseHooverChain(dt, relaxation_time=20 * FS)

    assert_second_order(morse_state(2, 3, 4), integrator_of, integrator_of(FS).conserved_energy, 200 * FS)


def test_langevin_has_one_temperature_a_replica():
    """Groups of 200 replicas from 100 to 900 K; the standard error of a group's variance is 1 to 2 %."""
    temperature = torch.tensor([100.0, 300.0, 900.0], dtype=torch.float64).repeat(200)
    batch = AtomsBatch.from_atoms([Atoms("H", np.zeros((1, 3)), masses=[1.0])]).repeat(600)
    forces, integrator = wells(1.0), Langevin(0.1, friction=2.0)
    state = initial_state(batch, forces, temperature, fix_com=False)
    states = list(path(state, integrator, forces, 1000))[200::50]
    x = torch.stack([s.batch.positions for s in states]) / torch.sqrt(units.kB * temperature)[:, None]
    for group in range(3):
        assert_variance(x[:, group::3].flatten(1), 1.0)


# -- agreement with ASE


def cluster(n=7, spacing=3.9):
    """A bit of argon."""
    grid = np.array(list(itertools.product(range(2), repeat=3)), dtype=float)[:n]
    return Atoms(f"Ar{n}", spacing * grid)


def with_momenta(atoms, state, calculator):
    atoms = atoms.copy()
    atoms.set_momenta(state.momenta.numpy())
    atoms.calc = calculator
    return atoms


def argon():
    settings = {"epsilon": 0.0104, "sigma": 3.4}
    return LennardJones(cutoff=12.0, **settings), ASELennardJones(rc=12.0, **settings)


def small_schnet(seed=0):
    torch.manual_seed(seed)
    return SchNetPotential.build(
        {7: -3.0, 18: -1.0}, hidden_channels=8, num_filters=8, num_interactions=2, num_gaussians=8, cutoff=5.0
    ).double()


def schnet_and_its_calculator():
    potential = small_schnet()
    return potential, StABIECalculator(potential)


@pytest.mark.parametrize("make", [argon, schnet_and_its_calculator])
def test_nve_follows_ase(make):
    """The same path to round-off, 300 steps."""
    potential, calculator = make()
    forces, dt = PotentialForces(potential), 2.0 * FS
    state = initial_state(AtomsBatch.from_atoms(cluster()), forces, 40.0)
    atoms = with_momenta(cluster(), state, calculator)
    ASEVelocityVerlet(atoms, dt).run(300)
    state = advance(state, VelocityVerlet(dt), forces, 300)
    np.testing.assert_allclose(state.batch.positions.numpy(), atoms.positions, atol=1e-10)
    np.testing.assert_allclose(state.momenta.numpy(), atoms.get_momenta(), atol=1e-10)
    assert np.abs(atoms.positions - cluster().positions).max() > 0.1


class Replay(np.random.Generator):
    """A numpy generator that hands out numbers we already have."""

    def __init__(self, numbers):
        super().__init__(np.random.PCG64(0))
        self.numbers = iter(numbers)

    def normal(self, size):
        drawn = next(self.numbers)
        assert drawn.shape == tuple(size)
        return drawn


def test_langevin_follows_ase_with_the_same_noise():
    potential, calculator = argon()
    forces, dt, friction = PotentialForces(potential), 2.0 * FS, 0.01 / FS
    batch = AtomsBatch.from_atoms(cluster())
    state = initial_state(batch, forces, 40.0, fix_com=False)
    atoms = with_momenta(cluster(), state, calculator)
    replay = Replay(x.numpy() for x in normals_ahead(batch, state.key, state.step, NOISE, 300))
    LangevinBAOAB(atoms, dt, temperature_K=40.0, T_tau=1 / friction, rng=replay).run(300)
    state = advance(state, Langevin(dt, friction), forces, 300)
    np.testing.assert_allclose(state.batch.positions.numpy(), atoms.positions, atol=1e-10)
    np.testing.assert_allclose(state.momenta.numpy(), atoms.get_momenta(), atol=1e-10)


# -- batch members are strangers


@each_integrator
def test_replica_alone_is_replica_in_a_batch(integrator):
    """Ragged, each at its own temperature; noise included, bit by bit."""
    state = morse_state(4, 2, 5, 3, temperature_K=[300.0, 500.0, 700.0, 900.0], fix_com=integrator.fix_com)
    together = advance(state, integrator, morse_forces(), 100)
    assert not torch.equal(together.batch.positions, state.batch.positions)
    for k in range(state.n_systems):
        alone = advance(state.select([k]), integrator, morse_forces(), 100)
        assert_same_states(alone, together.select([k]))


@each_integrator
def test_replica_alone_is_replica_in_a_batch_of_a_neural_network(integrator):
    """Matrix products of another size round differently."""
    forces = PotentialForces(small_schnet())
    batch = AtomsBatch.from_atoms([polygon(4), polygon(2), polygon(5)])
    state = initial_state(batch, forces, 300.0)
    together = advance(state, integrator, forces, 50)
    for k in range(3):
        alone = advance(state.select([k]), integrator, PotentialForces(forces.potential), 50)
        for name, x in alone.tensors().items():
            torch.testing.assert_close(x, together.select([k]).tensors()[name], rtol=1e-9, atol=1e-9)


@each_integrator
def test_overlapping_atoms_disturb_nobody_else(integrator):
    """Of 64 replicas one starts with two atoms in one place and stays there; the others do not change by a bit."""
    potential, _ = argon()
    frames = [cluster(5 + k % 3) for k in range(64)]
    frames[21].positions[0] = frames[21].positions[3]
    others = [k for k in range(64) if k != 21]
    state = initial_state(AtomsBatch.from_atoms(frames), PotentialForces(potential), 40.0)
    after = advance(state, integrator, PotentialForces(potential), 30)
    for alive in (state.alive, after.alive):
        assert alive.nonzero()[:, 0].tolist() == others
    assert_same_states(after.select([21]), integrator.prepare(state).select([21]))
    healthy = advance(state.select(others), integrator, PotentialForces(potential), 30)
    assert_same_states(after.select(others), healthy)


class Cliff(Harmonic):
    """A well without energy beyond a radius, as a network that overflows."""

    def __init__(self, radius, k=1.0):
        super().__init__(k)
        self.radius = radius

    def atomic_energies(self, batch, neighbors):
        inside = batch.positions.norm(dim=1) < self.radius
        return torch.where(inside, super().atomic_energies(batch, neighbors), torch.nan)


@pytest.mark.parametrize("nothing", [float("inf"), float("nan")])
def test_a_cell_that_is_not_finite(nothing):
    """No matter where nothing is periodic, no start where something is, and a flag on the replica to which it happens."""
    open_cell = torch.diag(torch.tensor([20.0, 20.0, nothing]).double())[None]
    integrator, forces = INTEGRATORS["langevin"], PotentialForces(argon()[0])
    batch = AtomsBatch.from_atoms([Atoms("Ar4", cluster(4).positions, cell=[20.0, 20.0, 0.0], pbc=(1, 1, 0))] * 2)
    odd = batch.replace(cells=open_cell.repeat(2, 1, 1))
    ends = [advance(initial_state(b, forces, 40.0), integrator, forces, 10) for b in (batch, odd)]
    assert torch.equal(ends[0].batch.positions, ends[1].batch.positions)
    with pytest.raises(ValueError, match=f"system 0 has pbc=.*and the cell .*{nothing}.*finite lattice vector"):
        initial_state(odd.replace(pbc=torch.ones_like(odd.pbc)), forces, 40.0)
    state = initial_state(batch, forces, 40.0)
    cells = batch.cells.clone()
    cells[1, 0, 0] = nothing
    after = advance(state.replace(batch=state.batch.replace(cells=cells)), integrator, forces, 10)
    assert after.alive.tolist() == [True, False]
    assert torch.equal(after.batch.positions[:4], ends[0].batch.positions[:4])


def thrown(*speeds, mass=1.0):
    """One atom a replica at the origin with these speeds in Å per ASE time unit."""
    batch = AtomsBatch.from_atoms([Atoms("H", np.zeros((1, 3)), masses=[mass])]).repeat(len(speeds))
    state = initial_state(batch, wells(1.0), 300.0, fix_com=False)
    momenta = torch.zeros((len(speeds), 3), dtype=torch.float64)
    momenta[:, 0] = mass * torch.tensor(speeds)
    return state.replace(momenta=momenta)


def test_replica_stays_at_its_last_finite_frame():
    """In the well x = v sin(t) with Δt = 0.1; speed 2 passes the cliff at x = 1 after 5 steps."""
    state, integrator, forces = thrown(0.5, 2.0, 0.7), VelocityVerlet(0.1), PotentialForces(Cliff(1.0))
    before = advance(state, integrator, forces, 5)
    assert before.alive.all()
    after = advance(before, integrator, forces, 20)
    assert after.alive.tolist() == [True, False, True]
    assert_same_states(after.select([1]).replace(alive=torch.tensor([True])), before.select([1]))
    assert_same_states(after.select([0, 2]), advance(before.select([0, 2]), integrator, forces, 20))


@each_integrator
def test_a_step_keeps_the_precision(integrator):
    batch = AtomsBatch.from_atoms([polygon(2), polygon(3)], dtype=torch.float32)
    forces = PotentialForces(Morse(depth=4.5, a=1.9, r0=1.1, dtype=torch.float32))
    state = initial_state(batch, forces, 500.0)
    after = advance(state, integrator, forces, 2)
    before = integrator.prepare(state).tensors()
    assert {name: x.dtype for name, x in after.tensors().items()} == {name: x.dtype for name, x in before.items()}
    assert after.momenta.dtype == torch.float32


# -- the state


def test_select_and_put():
    state = advance(morse_state(2, 3, 4), INTEGRATORS["nose-hoover"], morse_forces(), 5)
    later = advance(state, INTEGRATORS["nose-hoover"], morse_forces(), 5)
    mixed = state.put([2, 0], later.select([2, 0]))
    assert_same_states(mixed.select([0, 2]), later.select([0, 2]))
    assert_same_states(mixed.select([1]), state.select([1]))
    assert_same_states(state.select([0, 1, 2]), state)
    assert state.put([], state.select([])).n_systems == 3


def test_where_chooses_replicas():
    state = morse_state(2, 3, 4)
    later = advance(state, INTEGRATORS["langevin"], morse_forces(), 5)
    mixed = later.where(torch.tensor([True, False, True]), state)
    assert_same_states(mixed, state.put([0, 2], later.select([0, 2])))


def test_tensors_and_restore(tmp_path):
    """All fields make the round trip through a file that holds nothing but tensors."""
    start = morse_state(2, 3)
    state = advance(start, INTEGRATORS["nose-hoover"], morse_forces(), 5)
    torch.save(state.tensors(), tmp_path / "state.pt")
    restored = start.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_states(restored, state)
    assert {f.name for f in fields(state)} - {"batch", "stress", "extra"} | {"extra:nose-hoover"} <= state.tensors().keys()


@each_integrator
def test_rewinding_replays_the_same_path(integrator):
    """Noise and thermostat are part of the state: from the same state, the same bits, in steps of any grouping."""
    forces = morse_forces()
    state = advance(morse_state(2, 3), integrator, forces, 20)
    kept = {name: x.clone() for name, x in state.tensors().items()}
    first = advance(state, integrator, forces, 30)
    rewound = state.restore(kept)
    assert_same_states(advance(advance(rewound, integrator, forces, 7), integrator, forces, 23), first)
    *_, plain = path(rewound, integrator, forces, 30)
    assert_same_states(plain, first)


# -- the simulation loop


def test_recorded_frames_are_those_of_a_plain_loop():
    potential, integrator = Harmonic(2.0), Langevin(0.1, friction=0.5)
    batch = AtomsBatch.from_atoms([polygon(2), polygon(3)])
    start = initial_state(batch, PotentialForces(potential), 300.0)
    end, trajectory, failures = watched(start, integrator, PotentialForces(potential), 27, check_every=10, sample_every=4)
    states = list(path(start, integrator, PotentialForces(potential), 27))
    assert_same_states(end, states[-1])
    assert trajectory.steps.tolist() == [4, 8, 12, 16, 20, 24]
    assert trajectory.valid.all() and not failures.failed.any() and failures.fraction == 0.0
    for k, step in enumerate(trajectory.steps.tolist()):
        assert torch.equal(trajectory.positions[k], states[step - 1].batch.positions)
        assert torch.equal(trajectory.potential_energy[k], states[step - 1].potential_energy)
    frames, frame, replica = trajectory.frames()
    assert frames.sizes == [2, 3] * 6
    for k in range(frames.n_systems):
        expected = states[4 * int(frame[k]) + 3].batch.select([int(replica[k])])
        assert torch.equal(frames.select([k]).positions, expected.positions)


def test_long_recordings_go_through_a_file(monkeypatch):
    """The same frames, and memory that belongs to a file instead of the process."""
    state, potential = morse_state(3, 2), Morse(depth=4.5, a=1.9, r0=1.1)
    run = lambda: watched(state, INTEGRATORS["langevin"], PotentialForces(potential), 40, sample_every=2)[1]
    inside = run()
    monkeypatch.setattr(observers_module, "MAX_BYTES_IN_MEMORY", 100)
    mapped = []
    real = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, **s: mapped.append(real(*a, **s)) or mapped[-1])
    outside = run()
    assert torch.equal(inside.positions, outside.positions) and torch.equal(inside.valid, outside.valid)
    assert len(mapped) == 1 and np.shares_memory(mapped[0], outside.positions.numpy())
    assert torch.equal(inside.frames()[0].positions, outside.frames()[0].positions)


def flying_apart(*speeds):
    """Diatomics without forces whose bond of 1 Å grows by these speeds in Å per ASE time unit."""
    potential = Morse(depth=0.0)
    atoms = Atoms("H2", [[0, 0, 0], [1, 0, 0]], masses=[1.0, 1.0])
    batch = AtomsBatch.from_atoms([atoms]).repeat(len(speeds))
    state = initial_state(batch, PotentialForces(potential), 300.0)
    momenta = torch.zeros((len(speeds), 2, 3), dtype=torch.float64)
    momenta[:, 1, 0] = torch.tensor(speeds)
    criterion = BondLengthDeviation(torch.tensor([[0], [1]]), torch.tensor([1.0], dtype=torch.float64), tolerance=0.5)
    return state.replace(momenta=momenta.view(-1, 3)), potential, criterion


def test_failures_say_when_what_and_where():
    """With Δt = 0.1 and a look every 5 steps, a bond growing by v passes 1.5 Å after 5/v steps."""
    state, potential, criterion = flying_apart(0.09, 0.3, 0.0, 1.2)
    looks = []
    end, _, failures = watched(
        state,
        VelocityVerlet(0.1),
        PotentialForces(potential),
        40,
        [criterion],
        check_every=5,
        on_look=lambda steps, running, failures: looks.append((steps, running.n_systems, failures.fraction)),
    )
    assert failures.step.tolist() == [-1, 20, -1, 5]
    assert failures.failed.tolist() == [False, True, False, True]
    torch.testing.assert_close(failures.value, torch.tensor([0.0, 0.6, 0.0, 0.6], dtype=torch.float64))
    assert failures.criterion == [None, "bonds", None, "bonds"]
    assert failures.atoms == [[], [0, 1], [], [0, 1]]
    lengths = (failures.frames.positions[1::2] - failures.frames.positions[::2]).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.6, 1.0, 1.6], dtype=torch.float64))
    assert end.step.tolist() == [40, 20, 40, 5]  # the stopped ones stay at the frame of their failure
    assert looks[0] == (5, 4, 0.25) and looks[3:5] == [(20, 3, 0.5), (25, 2, 0.5)] and looks[-1] == (40, 2, 0.5) and len(looks) == 8


def test_unstable_replicas_run_on_if_asked():
    state, potential, criterion = flying_apart(0.3, 0.0)
    end, trajectory, failures = watched(
        state, VelocityVerlet(0.1), PotentialForces(potential), 40, [criterion], check_every=5, sample_every=10, stop_unstable=False
    )
    assert failures.step.tolist() == [20, -1]
    assert end.step.tolist() == [40, 40] and trajectory.valid.all()
    torch.testing.assert_close(trajectory.positions[-1, 1, 0], torch.tensor(2.2, dtype=torch.float64))


def test_escaped_replicas_stop_though_unstable_ones_run_on():
    state, potential, criterion = flying_apart(0.3, 0.0)
    end, _, failures = watched(
        state, VelocityVerlet(0.1), PotentialForces(potential), 40, [criterion], check_every=5, stop_unstable=False, escape=2.0
    )
    assert failures.step.tolist() == [20, -1]  # at 0.6 Å of 0.5
    assert end.step.tolist() == [35, 40]  # at 1.05 Å


def test_valid_marks_frames_up_to_the_stop():
    """Whoever runs on is recorded in its own place."""
    state, potential, criterion = flying_apart(1.2, 0.3, 0.1)
    _, trajectory, _ = watched(
        state, VelocityVerlet(0.1), PotentialForces(potential), 40, [criterion], check_every=5, sample_every=10
    )
    assert trajectory.valid.tolist() == [[False, True, True], [False, True, True], [False, False, True], [False, False, True]]
    frames, frame, replica = trajectory.frames()
    assert list(zip(frame.tolist(), replica.tolist())) == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 2), (3, 2)]
    lengths = frames.positions[1::2, 0] - frames.positions[::2, 0]
    torch.testing.assert_close(lengths, torch.tensor([1.3, 1.1, 1.6, 1.2, 1.3, 1.4], dtype=torch.float64))


def test_the_loop_ends_when_nobody_is_left():
    state, potential, criterion = flying_apart(0.9, 1.2)
    looks = []
    end, trajectory, failures = watched(
        state, VelocityVerlet(0.1), PotentialForces(potential), 10**9 // 10**6, [criterion], check_every=10, sample_every=10,
        on_look=lambda steps, *_: looks.append(steps),
    )  # fmt: skip
    assert failures.fraction == 1.0 and looks == [10]
    assert trajectory.valid.sum() == 2 and end.step.tolist() == [10, 10]


@each_integrator
def test_stopping_some_leaves_the_others_on_their_path(integrator):
    """Whoever is left moves closer together in memory and meets the same noise as before."""
    forces = morse_forces()
    start = morse_state(*[2] * 12, temperature_K=4000.0)
    criterion = BondLengthDeviation(torch.tensor([[0], [1]]), torch.tensor([1.1], dtype=torch.float64), tolerance=0.1)
    end, _, failures = watched(start, integrator, forces, 60, [criterion], check_every=4)
    assert 2 < failures.failed.sum() < 12 and len(set(failures.step.tolist())) > 2
    undisturbed = [start, *path(start, integrator, forces, 60)]
    for k, step in enumerate(failures.step.tolist()):
        assert_same_states(end.select([k]), undisturbed[step if step >= 0 else 60].select([k]))


@pytest.mark.parametrize("stop_unstable", [True, False])
@pytest.mark.parametrize("sample_every", [None, 2, 5])
def test_what_is_not_finite_is_a_failure_even_between_looks(stop_unstable, sample_every):
    """The replica meets the cliff at step 6; frames that are sampled are looked at too."""
    _, trajectory, failures = watched(
        thrown(0.5, 2.0),
        VelocityVerlet(0.1),
        PotentialForces(Cliff(1.0)),
        20,
        check_every=10,
        sample_every=sample_every,
        stop_unstable=stop_unstable,
    )
    assert failures.step.tolist() == [-1, 6 if sample_every == 2 else 10]
    assert failures.criterion == [None, "not finite"] and failures.value[1] == torch.inf
    assert failures.frames.positions[1].norm() < 1.0
    if trajectory:
        assert trajectory.valid[:, 1].tolist() == [step < 6 for step in trajectory.steps.tolist()]
        assert trajectory.valid[:, 0].all() and torch.isfinite(trajectory.positions).all()


def test_simulation_leaves_the_potential_as_it_was():
    state, potential, _ = flying_apart(0.0)
    potential.a.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in potential.named_parameters()}
    end, trajectory, _ = watched(state, VelocityVerlet(0.1), PotentialForces(potential), 4, sample_every=2)
    assert {name: p.requires_grad for name, p in potential.named_parameters()} == wanted
    assert all(p.grad is None for p in potential.parameters())
    assert not any(x.requires_grad for x in (*end.tensors().values(), trajectory.positions, trajectory.potential_energy))


def test_copies_with_changes():
    batch = AtomsBatch.from_atoms([Atoms("CO2", np.eye(3)), Atoms("H2", np.eye(3)[:2])])
    assert batch.sizes == [3, 2]
    moved = batch.replace(positions=batch.positions + 1.0)
    assert moved.numbers is batch.numbers and moved.sizes is batch.sizes and float(moved.positions[0, 1]) == 1.0
    assert batch.replace(system=torch.zeros(5, dtype=torch.int64), n_systems=1).sizes == [5]
    with pytest.raises(TypeError, match="AtomsBatch has no field position$"):
        batch.replace(position=batch.positions)
