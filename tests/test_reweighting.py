"""Frames of one temperature told at another: harmonic oscillators in closed form, the noise of weighted means, what is refused."""

import re

import numpy as np
import pytest
import torch
from ase import Atoms, units

from stabie_ase.boltzmann import PoorOverlap, temperature_weights
from stabie_ase.boltzmann.reweighting import nearest_temperature
from stabie_ase.observables import DistanceDistribution, Target
from stabie_ase.observables.averages import noise_floor

K = 2.0
"""Spring constant in eV/Å²: ⟨x²⟩ = k_B T / K of every coordinate."""


def oscillators(n_frames, d, temperature_K, seed=0):
    """Coordinates in Å of d oscillators at a temperature, and their energies ½ K x² in eV."""
    x = np.random.default_rng(seed).normal(scale=(units.kB * temperature_K / K) ** 0.5, size=(n_frames, d))
    return x, 0.5 * K * (x**2).sum(axis=1)


def effective_fraction(d, from_K, to_K):
    """⟨w⟩²/⟨w²⟩ of d oscillators with w = exp(-(β' - β) U), r = β'/β = T/T': each has ⟨wⁿ⟩ = (1 + n (r - 1))^-½."""
    r = from_K / to_K
    return ((2.0 * r - 1.0) ** 0.5 / r) ** d


@pytest.mark.parametrize("to_K", [240.0, 390.0])
@pytest.mark.parametrize("n_frames", [100, 1000, 10000])
def test_oscillators_at_another_temperature(n_frames, to_K):
    """⟨x²⟩ at T' from frames at T, within 3 standard errors of a weighted mean; without weights it is far off."""
    x, energies = oscillators(n_frames, 3, 300.0, seed=n_frames)
    weights, effective = temperature_weights(energies, 300.0, to_K)
    g = (x**2).mean(axis=1)
    mean, expected = float(weights @ torch.as_tensor(g)), units.kB * to_K / K
    error = float(np.sqrt(np.sum((weights.numpy() * (g - mean)) ** 2)))
    assert abs(mean - expected) < 3 * error < 0.5 * expected
    assert n_frames < 1000 or abs(g.mean() - expected) > 5 * error
    assert float(weights.sum()) == pytest.approx(1.0) and effective == pytest.approx(1.0 / float(weights.square().sum()))


@pytest.mark.parametrize(("d", "to_K"), [(1, 200.0), (6, 360.0), (30, 330.0)])
def test_the_effective_number_in_closed_form(d, to_K):
    """Of 40000 frames, within 5 %."""
    _, energies = oscillators(40000, d, 300.0)
    assert temperature_weights(energies, 300.0, to_K)[1] / 40000 == pytest.approx(effective_fraction(d, 300.0, to_K), rel=0.05)


def test_an_offset_of_energies_plays_no_part_and_the_same_temperature_changes_nothing():
    _, energies = oscillators(50, 6, 300.0)
    weights, _ = temperature_weights(energies, 300.0, 350.0)
    torch.testing.assert_close(temperature_weights(torch.as_tensor(energies) - 17637.8, 300.0, 350.0)[0], weights, rtol=1e-9, atol=0)
    same, effective = temperature_weights(energies, 300.0, 300.0)
    torch.testing.assert_close(same, torch.full((50,), 0.02, dtype=torch.float64))
    assert effective == pytest.approx(50)


@pytest.mark.parametrize("to_K", [150.0, 900.0])
def test_frames_that_tell_too_little_are_refused_with_the_nearest_temperature(to_K):
    """At the temperature that is named they tell enough, one degree further they do not."""
    _, energies = oscillators(500, 60, 300.0)
    with pytest.raises(PoorOverlap, match=f"of 500 frames of 300 K only .* count effectively at {to_K:g} K, at least 50") as refused:
        temperature_weights(energies, 300.0, to_K)
    nearest = float(re.search(r"the nearest temperature that they tell of is (\d+) K", str(refused.value))[1])
    assert nearest == nearest_temperature(torch.as_tensor(energies), 300.0, to_K) and "\n" not in str(refused.value)
    assert temperature_weights(energies, 300.0, nearest)[1] >= 50
    with pytest.raises(PoorOverlap):
        temperature_weights(energies, 300.0, nearest + np.sign(to_K - 300.0))
    fraction = effective_fraction(60, 300.0, nearest)
    assert 0.03 < fraction < 0.15  # of all frames there are, not of these 500


def test_a_few_frames_are_too_few():
    with pytest.raises(PoorOverlap, match="19 frames are too few to be reweighted from 300 to 310 K; at least 20"):
        temperature_weights(np.zeros(19), 300.0, 310.0)
    with pytest.raises(PoorOverlap, match="at least 20 are needed"):  # more than a tenth, and yet no 20
        temperature_weights(oscillators(40, 40, 300.0)[1], 300.0, 400.0)


# -- the floor of weighted means


@pytest.mark.parametrize(("n_frames", "to_K"), [(60, 230.0), (61, 370.0), (200, 400.0)])
def test_the_floor_is_the_error_of_the_weighted_mean(n_frames, to_K):
    """E|ḡ - μ| over 400 references, each with its own floor: known to 3 %, and the floor's own bias is of order 1/N_eff."""
    floors, distances, c = [], [], torch.tensor([0.3, 0.7], dtype=torch.float64)
    exact = units.kB * to_K / K
    for seed in range(400):
        x, energies = oscillators(n_frames, 4, 300.0, seed)
        weights, _ = temperature_weights(energies, 300.0, to_K)
        g = torch.as_tensor(np.stack([(x[:, :1] ** 2).mean(axis=1), (x[:, 1:] ** 2).mean(axis=1)], axis=1))
        distances.append(float((c * (weights @ g - exact).abs()).sum()))
        floors.append(noise_floor(g, c, 20, weights))
    assert np.mean(floors) == pytest.approx(np.mean(distances), rel=0.12)


@pytest.mark.parametrize("n_frames", [4, 7, 40])
def test_equal_weights_are_the_mean_distance_of_two_halves(n_frames):
    """Half of it, worked out as the means of random halves; of an odd number one frame is left out."""
    values, c = torch.randn(n_frames, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5])
    generator, n, total = torch.Generator().manual_seed(0), n_frames // 2, 0.0
    for _ in range(100):
        order = torch.randperm(n_frames, generator=generator)
        difference = values[order[:n]].mean(dim=0) - values[order[n : 2 * n]].mean(dim=0)
        total += 0.5 * float((c * difference.abs()).sum())
    expected = total / 100 * (2 * n / n_frames) ** 0.5
    assert noise_floor(values, c) == pytest.approx(expected, rel=1e-6)
    assert noise_floor(values, c, probabilities=torch.full((n_frames,), 1.0 / n_frames)) == pytest.approx(expected, rel=1e-6)


# -- targets


def test_a_target_from_weighted_frames():
    rng = np.random.default_rng(0)
    frames = [Atoms("N2", [[0, 0, 0], [0, 0, r]]) for r in rng.normal(1.2, 0.05, 40)]
    hr, weights = DistanceDistribution(2.0), torch.as_tensor(rng.random(40))
    target = Target.from_frames(hr, frames, weights=weights, source="somewhere")
    p = weights / weights.sum()
    torch.testing.assert_close(target.value, p @ target.samples)
    assert target.n_frames == pytest.approx(1.0 / float(p.square().sum())) and target.source == "somewhere"
    assert target.floor == noise_floor(target.samples, hr.measure, probabilities=p)
    same = Target.from_frames(hr, frames, weights=torch.ones(40))
    torch.testing.assert_close(same.value, Target.from_frames(hr, frames).value)
    for bad in (torch.ones(39), -torch.ones(40), torch.zeros(40), torch.full((40,), torch.nan)):
        with pytest.raises(ValueError, match="one for each of 40"):
            Target.from_frames(hr, frames, weights=bad)
