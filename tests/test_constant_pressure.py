"""The estimator at constant pressure, against a system whose partition function is known.

N atoms in a background that attracts them all alike, U = -θ N²/V, as in van der Waals' equation without its volume: at constant
pressure p(V) ∝ V^N exp(-β (P V - θ N²/V)), an integral of one variable.
"""

import numpy as np
import pytest
import torch
from ase import units
from scipy.integrate import simpson

from stabie_ase.boltzmann import Estimator, Samples, StatePoint, accumulate_gradient, targets_at
from stabie_ase.dynamics import PotentialForces, Recorder, integrator_for, simulate
from stabie_ase.dynamics.starts import start
from stabie_ase.observables import Observable, Target
from stabie_ase.observables.base import Axis
from stabie_ase.observables.density import Density
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.reference import TargetFrames
from stabie_ase.structures.topology import Groups

N, T, PRESSURE, THETA = 20, 300.0, 0.02, 0.5
KT, P = units.kB * T, PRESSURE * units.GPa


class Background(Potential):
    """U = -θ N²/V."""

    family, cutoff, evaluates_atoms = "background", 1.0, False

    def __init__(self, theta=THETA):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def inputs(self, batch, neighbors):
        return {"positions": batch.positions, "system": batch.system, "counts": batch.counts, "cells": batch.cells}

    def evaluate(self, inputs):
        volume = torch.linalg.det(inputs["cells"].double()).abs()
        nothing = volume.new_zeros(len(volume)).index_add(0, inputs["system"], 0.0 * inputs["positions"].double().sum(dim=1))
        return nothing - self.theta * inputs["counts"].double().square() / volume


class Volume(Observable):
    """V, in nm³."""

    name, label, axis = "volume", "V (nm³)", Axis.of_names("", ["V"])

    def values(self, batch):
        return torch.linalg.det(batch.cells.double()).abs()[:, None] / 1000.0


GRID = np.linspace(0.1, 4.0, 100_001) * N * KT / P


def density_of_states(theta):
    """p(V) on the grid, normalised."""
    log = N * np.log(GRID) - (P * GRID - theta * N**2 / GRID) / KT
    p = np.exp(log - log.max())
    return p / simpson(p, x=GRID)


def mean_volume(theta, power=1):
    return simpson(density_of_states(theta) * (GRID / 1000.0) ** power, x=GRID)


def boxes(volumes):
    """Atoms anywhere in cubes."""
    rng = np.random.default_rng(0)
    sides = torch.as_tensor(volumes) ** (1 / 3)
    n = len(volumes)
    positions = torch.as_tensor(rng.random((n, N, 3))) * sides[:, None, None]
    return AtomsBatch(
        positions.reshape(-1, 3),
        torch.full((n * N,), 18),
        torch.full((n * N,), 39.948, dtype=torch.float64),
        cells=torch.eye(3, dtype=torch.float64) * sides[:, None, None],
        pbc=torch.ones((n, 3), dtype=torch.bool),
        system=torch.arange(n).repeat_interleave(N),
        n_systems=n,
    )


def samples_of(volumes):
    frames = boxes(volumes)
    zeros, index = torch.zeros(len(volumes), dtype=torch.float64), torch.arange(len(volumes))
    return Samples(frames, Groups.systems(frames), {"volume": Volume()(frames)}, zeros, zeros, 0 * index, index)


def drawn(n, seed, theta=THETA):
    """Volumes straight from their distribution."""
    cumulative = np.cumsum(density_of_states(theta))
    return np.interp(np.random.default_rng(seed).random(n), cumulative / cumulative[-1], GRID)


def test_without_a_background_it_is_the_ideal_gas():
    """V follows a Gamma distribution: ⟨V⟩ = (N + 1) kT/P."""
    assert mean_volume(0.0) == pytest.approx((N + 1) * KT / P / 1000.0, rel=1e-6)
    assert mean_volume(THETA) < 0.9 * mean_volume(0.0)
    assert density_of_states(THETA)[[0, -1]].max() < 1e-4 * density_of_states(THETA).max()


@pytest.mark.parametrize("n", [100, 1000, 10_000])
def test_gradient_at_constant_pressure(n):
    """d/dθ of (⟨V⟩ - V_ref)² within three standard errors of the integral's, at three numbers of samples."""
    point, reference, h = StatePoint(T, PRESSURE), 1.2 * mean_volume(THETA), 1e-3
    exact_slope = (mean_volume(THETA + h) - mean_volume(THETA - h)) / (2 * h)
    exact = 2.0 * (mean_volume(THETA) - reference) * exact_slope
    found = []
    for seed in range(9):
        potential, samples = Background(), samples_of(drawn(n, seed))
        estimate = Estimator(point, cross_fit=False)(samples, [Target(Volume(), torch.tensor([reference], dtype=torch.float64))])
        accumulate_gradient(potential, estimate.samples.frames, estimate.weights, chunk_size=5000)
        found.append(float(potential.theta.grad))
    error = np.std(found, ddof=1) / 3.0
    bias = 2.0 * abs(exact) / n  # the residual and the covariance of the same samples
    assert abs(np.mean(found) - exact) < 3.0 * error + bias
    assert error < 0.3 * abs(exact)


def test_reweighted_to_another_background():
    """Volumes of θ serve for θ': the change of energy reweights them, P V cancels."""
    other, samples = 1.05 * THETA, samples_of(drawn(40_000, 1))
    with torch.no_grad():
        neighbors = neighbor_list(samples.frames, 1.0)
        change = Background(other)(samples.frames, neighbors) - Background()(samples.frames, neighbors)
    target = Target(Volume(), torch.zeros(1, dtype=torch.float64))
    estimate = Estimator(StatePoint(T, PRESSURE))(samples, [target], change.double())
    spread = (mean_volume(other, 2) - mean_volume(other) ** 2) ** 0.5
    assert float(estimate.means["volume"]) == pytest.approx(mean_volume(other), abs=4 * spread / estimate.effective_samples**0.5)


def test_dynamics_at_constant_pressure_sample_it():
    """The engine's own volumes, of atoms that feel nothing but the background, have that mean: Langevin and stochastic rescaling."""
    potential = Background()
    integrator = integrator_for("npt", 4.0, 0.05, pressure_relaxation_time_fs=200.0, compressibility_per_GPa=1.0 / PRESSURE)
    images = boxes(drawn(64, 3)).to_atoms()
    state = start(potential, images, 64, T, integrator, 0, PRESSURE)
    recorder = Recorder(state, 1000, 10)
    forces = PotentialForces.driving(potential, integrator)
    simulate(state, integrator, forces, 1000, [recorder])
    frames, _, replica = recorder.trajectory.frames()
    volumes = Volume()(frames)[:, 0]
    means = torch.zeros(64, dtype=torch.float64).index_add(0, replica, volumes) / replica.bincount()
    error = float(means.std()) / 8.0
    assert float(means.mean()) == pytest.approx(mean_volume(THETA), abs=3.0 * error)
    assert error < 0.05 * mean_volume(THETA)


def test_density_is_that_of_each_frame():
    """Of frames with volumes of their own, in g/cm³, the mean over frames of N m / V."""
    volumes = drawn(50, 5)
    expected = np.mean(N * 39.948 / units.mol * 1e24 / volumes)
    (target,) = targets_at([Density()], TargetFrames(boxes(volumes).to_atoms()), T)
    assert float(target.value) == pytest.approx(expected, rel=1e-6)
