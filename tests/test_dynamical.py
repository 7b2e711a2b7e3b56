"""Dynamical observables against closed forms and other implementations, their errors against repeated experiments."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from scipy import fft, signal, stats

from stabie_ase.dynamics import Langevin, PotentialForces, Recorder, initial_state, simulate
from stabie_ase.observables.diffusion import GreenKuboDiffusion, SelfDiffusion
from stabie_ase.observables.dynamical import MeanSquaredDisplacement, VelocityAutocorrelation
from stabie_ase.observables.errors import blocking_errors, jackknife_errors
from stabie_ase.observables.series import TimeSeries
from stabie_ase.observables.vibrations import PER_CM_IN_THZ, VibrationalDensityOfStates
from stabie_ase.potentials.analytic import Harmonic
from stabie_ase.structures.batch import AtomsBatch

FS = units.fs


def series_of(positions, momenta=None, interval_fs=10.0, symbols=None, cell=None, cells=None):
    """From arrays of shape (n_frames, n_atoms, 3)."""
    images = []
    for k, r in enumerate(positions):
        lattice = cell if cells is None else cells[k]
        images.append(Atoms(symbols or ["Ar"] * len(r), r, cell=lattice, pbc=lattice is not None))
        if momenta is not None:
            images[-1].set_momenta(momenta[k])
    return TimeSeries.from_atoms(images, interval_fs)


def brownian(rng, n_frames, n_atoms, step, cell=None):
    return series_of(np.cumsum(rng.normal(scale=step, size=(n_frames, n_atoms, 3)), axis=0), interval_fs=1000.0, cell=cell)


def ornstein_uhlenbeck(rng, n_frames, n_atoms, gamma_per_fs, kT, interval_fs):
    """Positions and momenta of free Langevin particles at equal times, exactly (Gillespie, Phys. Rev. E 54, 2084, 1996)."""
    mass, gamma, dt = Atoms("Ar").get_masses()[0], gamma_per_fs / FS, interval_fs * FS
    decay = np.exp(-gamma * dt)
    var_v = kT / mass * (1 - decay**2)
    var_r = kT / mass / gamma**2 * (2 * gamma * dt - 3 + 4 * decay - decay**2)
    cov = kT / mass / gamma * (1 - decay) ** 2
    root = np.linalg.cholesky([[var_v, cov], [cov, var_r]])
    v, r = np.empty((2, n_frames, n_atoms, 3))
    v[0], r[0] = rng.normal(scale=np.sqrt(kT / mass), size=(n_atoms, 3)), 0.0
    for k in range(1, n_frames):
        noise = np.einsum("ij,j...->i...", root, rng.normal(size=(2, n_atoms, 3)))
        v[k] = decay * v[k - 1] + noise[0]
        r[k] = r[k - 1] + (1 - decay) / gamma * v[k - 1] + noise[1]
    return r, mass * v


# -- correlations by hand and by scipy


@pytest.mark.parametrize("n_frames, n_lags", [(23, 9), (16, 15)])
def test_correlations_are_the_sums_over_all_origins(n_frames, n_lags):
    rng = np.random.default_rng(0)
    r, p = rng.normal(size=(2, n_frames, 4, 3)) + 50.0
    series = series_of(r, p, symbols=["O", "H", "H", "C"])
    options = {"t_max": 0.01 * n_lags, "remove_drift": False}
    msd = MeanSquaredDisplacement(**options)(series).value
    vacf = VelocityAutocorrelation(**options, normalised=False)(series).value
    v = p / series.masses.numpy()[:, None] * 1000 * FS
    for lag in range(n_lags + 1):
        origins = slice(0, n_frames - lag)
        assert float(msd[lag]) == pytest.approx(((r[lag:] - r[origins]) ** 2).sum(axis=2).mean(), rel=1e-10, abs=1e-10)
        assert float(vacf[lag]) == pytest.approx((v[lag:] * v[origins]).sum(axis=2).mean(), rel=1e-10, abs=1e-10)


def test_vacf_is_scipys_correlation_of_the_chosen_element_with_masses():
    rng = np.random.default_rng(1)
    r, p = rng.normal(size=(2, 40, 5, 3))
    series = series_of(r, p, symbols=["O", "H", "O", "H", "C"])
    masses = series.masses.numpy()
    v = p / masses[:, None]
    v = v - np.einsum("a,fax->fx", masses / masses.sum(), v)[:, None]
    found = VelocityAutocorrelation(8, t_max=0.2, mass_weighted=True, normalised=False)(series)
    full = sum(masses[a] * signal.correlate(v[:, a, x], v[:, a, x])[39:60] for a in (0, 2) for x in range(3))
    np.testing.assert_allclose(found.value, full / 2 / (40 - np.arange(21)), rtol=1e-9, atol=1e-12)
    assert found.label == "VACF (eV)" and found.n_frames == 40 and found.n_replicas == 1
    np.testing.assert_allclose(found.axis.values, 0.01 * np.arange(21))


def test_vdos_is_scipys_cosine_transform():
    rng = np.random.default_rng(2)
    series = series_of(*rng.normal(size=(2, 64, 3, 3)), symbols=["O", "H", "H"])
    c = VelocityAutocorrelation(t_max=0.2, mass_weighted=True)(series).value.numpy()
    for window, w in [("none", np.ones(21)), ("hann", signal.windows.hann(41)[20:]), ("blackman", signal.windows.blackman(41)[20:])]:
        found = VibrationalDensityOfStates(t_max=0.2, window=window, unit="THz")(series)
        np.testing.assert_allclose(found.value, 2 * 0.01 * fft.dct(w * c, type=1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.axis.values, fft.rfftfreq(40, 0.01))
        assert float(torch.trapezoid(found.value, found.axis.values)) == pytest.approx(1.0, rel=1e-9)


# -- closed forms


@pytest.mark.parametrize("wavenumber", [200.0, 1595.0, 3700.0])
def test_vdos_of_a_vibration_is_a_line_at_its_frequency(wavenumber):
    """Two atoms against each other; the line is at the nearest of the frequencies, and all of its weight is near."""
    omega = 2 * np.pi * wavenumber * PER_CM_IN_THZ / 1000.0
    t = np.arange(4000)[:, None, None]
    r = 0.1 * np.sin(omega * t) * np.array([[1.0, 0, 0], [-1.0, 0, 0]])
    p = 0.1 * omega / FS * np.cos(omega * t) * np.array([[1.0, 0, 0], [-1.0, 0, 0]])
    found = VibrationalDensityOfStates(t_max=1.0)(series_of(r, p, 1.0, ["H", "H"]))
    nu, spacing = found.axis.values, float(found.axis.values[1])
    assert abs(float(nu[found.value.argmax()]) - wavenumber) <= 0.5 * spacing * 1.01
    near = (nu - wavenumber).abs() < 4 * spacing
    assert float((found.value * near).sum() * spacing) == pytest.approx(1.0, abs=0.01)
    assert float(nu[-1]) == pytest.approx(0.5 / 1e-3 / PER_CM_IN_THZ)
    in_thz = VibrationalDensityOfStates(t_max=1.0, unit="THz")(series_of(r, p, 1.0, ["H", "H"]))
    assert float(in_thz.axis.values[in_thz.value.argmax()]) == pytest.approx(float(nu[found.value.argmax()]) * 0.0299792458)


KT, GAMMA = units.kB * 300.0, 0.02
"""eV and 1/fs: correlations decay in 50 fs."""


@pytest.fixture(scope="module")
def langevin():
    """24 replicas of 40 free particles over 8 ps, every 10 fs: an error from six would be known to 30 % only."""
    rng = np.random.default_rng(3)
    return [series_of(*ornstein_uhlenbeck(rng, 800, 40, GAMMA, KT, 10.0)) for _ in range(24)]


@pytest.mark.parametrize("n_replicas", [1, 24])
def test_vacf_of_langevin_particles_decays_exponentially(langevin, n_replicas):
    found = VelocityAutocorrelation(t_max=0.2, normalised=False)(langevin[:n_replicas])
    mass = float(langevin[0].masses[0])
    expected = 3 * KT / mass * (1000 * FS) ** 2 * np.exp(-GAMMA * 1000 * found.axis.values.numpy()) * (1 - 1 / 40)
    assert (np.abs(found.value.numpy() - expected) < 3.5 * found.error.numpy()).all()
    assert (found.error.numpy() < 0.03 * expected[0]).all()
    normalised = VelocityAutocorrelation(t_max=0.2)(langevin[:n_replicas])
    assert float(normalised.value[0]) == 1.0 and float(normalised.error[0]) == 0.0
    np.testing.assert_allclose(normalised.value, found.value / found.value[0], rtol=1e-12)


@pytest.mark.parametrize("n_replicas", [1, 24])
@pytest.mark.parametrize("observable, bias", [
    (SelfDiffusion(t_max=0.6, fit_from=0.3), 1.0),
    (GreenKuboDiffusion(t_max=0.4), 1.0 + (GAMMA * 10) ** 2 / 12 - np.exp(-GAMMA * 400)),  # trapezoids, and the end of the integral
], ids=["msd", "green-kubo"])  # fmt: skip
def test_diffusion_of_langevin_particles(langevin, observable, bias, n_replicas):
    """D = kT/(mγ), of which the centre of mass takes 1/40. Over 600 replicas both are less than an error of 0.17 % from it (measured)."""
    found = observable(langevin[:n_replicas])
    expected = KT / float(langevin[0].masses[0]) / (GAMMA / FS) * (1 - 1 / 40) * 1000 * FS * 10.0 * bias
    assert abs(float(found.value) - expected) < 3 * float(found.error)
    assert float(found.error) < 0.15 * expected
    assert found.axis.names == ("D",) and "10⁻⁹ m²/s" in found.label


def test_msd_of_brownian_particles_is_a_line():
    found = MeanSquaredDisplacement(t_max=8.0)([brownian(np.random.default_rng(k), 100, 50, 0.2) for k in range(5)])
    expected = 3 * 0.04 * np.arange(9) * (1 - 1 / 50)
    assert (np.abs(found.value.numpy() - expected) <= 3.5 * found.error.numpy()).all()
    assert float(found.value[0]) == 0.0


def test_vacf_of_a_harmonic_oscillator_from_the_engines_own_trajectory():
    """cos ωt at constant energy; `TimeSeries.from_trajectory` knows the interval, momenta and valid frames."""
    potential = Harmonic(k=4.0)
    forces = PotentialForces(potential)
    batch = AtomsBatch.from_atoms([Atoms("C")] * 5)
    state = initial_state(batch, forces, 300.0, fix_com=False)
    recorder = Recorder(state, 400, 4, momenta=True)
    simulate(state, Langevin(0.5 * FS, 0.0), forces, 400, [recorder])
    recorder.trajectory.valid[60:, 2] = False
    recorder.trajectory.valid[:, 4] = False
    found = TimeSeries.from_trajectory(recorder.trajectory, 0.5 * FS)
    assert [len(series) for series in found] == [100, 100, 60, 100] and found[0].interval_fs == pytest.approx(2.0)
    # Over two whole periods of all origins sine and cosine average out; what is left is of the order of 1/(2 ω T).
    omega = np.sqrt(4.0 / Atoms("C").get_masses()[0]) * FS
    vacf = VelocityAutocorrelation(t_max=0.06, remove_drift=False)(found)
    np.testing.assert_allclose(vacf.value, np.cos(omega * 1000 * vacf.axis.values.numpy()), atol=0.1)


# -- what it does not depend on


def test_wrapping_and_unwrapping_change_nothing():
    """In a skewed cell; wrapped as ASE does it, and shifted by whole cells at random."""
    rng = np.random.default_rng(4)
    cell = np.array([[6.0, 0, 0], [2.0, 7.0, 0], [-1.0, 1.0, 8.0]])
    r = np.cumsum(rng.normal(scale=0.25, size=(120, 7, 3)), axis=0)
    expected = MeanSquaredDisplacement(t_max=1.0)(series_of(r)).value
    images = [Atoms("Ar7", x, cell=cell, pbc=True) for x in r]
    for atoms in images:
        atoms.wrap()
    wrapped = np.array([atoms.positions for atoms in images])
    shifted = r + rng.integers(-3, 4, r.shape) @ cell
    assert np.abs(wrapped - r).max() > 3.0
    for positions in (r, wrapped, shifted):
        torch.testing.assert_close(MeanSquaredDisplacement(t_max=1.0)(series_of(positions, cell=cell)).value, expected)


def test_drift_of_the_whole_does_not_count():
    rng = np.random.default_rng(5)
    r = np.cumsum(rng.normal(scale=0.2, size=(60, 4, 3)), axis=0)
    p = rng.normal(size=(60, 4, 3))
    symbols, masses = ["O", "H", "H", "C"], Atoms("OH2C").get_masses()[:, None]
    still = series_of(r, p, symbols=symbols)
    moving = series_of(r + 0.3 * np.arange(60)[:, None, None], p + 0.02 * masses, symbols=symbols)
    for observable in (MeanSquaredDisplacement(), SelfDiffusion(1), VelocityAutocorrelation(), GreenKuboDiffusion(8)):
        torch.testing.assert_close(observable(moving).value, observable(still).value)
    kept = MeanSquaredDisplacement(remove_drift=False)
    assert float(kept(moving).value[-1]) > float(kept(still).value[-1]) + 1.0


def test_a_cell_that_breathes_moves_no_atom_far_from_the_origin():
    """Atoms at rest in fractions of a cell, in the images that unwrapped positions have: no displacement but the cell's own."""
    rng = np.random.default_rng(6)
    fractions = rng.random((5, 3)) + rng.integers(-20, 20, (5, 3))
    widths = 10.0 + 0.02 * rng.normal(size=80)
    series = series_of(np.array([w * fractions for w in widths]), cells=[w * np.eye(3) for w in widths])
    assert float((series.unwrapped - series.unwrapped[0]).abs().max()) < 0.3


def test_replicas_of_different_lengths_count_by_their_frames():
    rng = np.random.default_rng(7)
    long, short = brownian(rng, 60, 3, 0.2), brownian(rng, 4, 3, 0.2)
    both = MeanSquaredDisplacement(t_max=6.0)([long, short]).value
    alone = [MeanSquaredDisplacement(t_max=t)(s).value for t, s in ((6.0, long), (3.0, short))]
    assert float(both[2]) == pytest.approx(float(58 * alone[0][2] + 2 * alone[1][2]) / 60)
    torch.testing.assert_close(both[4:], alone[0][4:])


# -- errors


def test_blocking_finds_the_error_of_a_correlated_mean():
    """An autoregressive process: Var of the mean of n is σ² (1 + a) / (1 - a) / n. 60 experiments know it to 9 %."""
    rng, a, n = np.random.default_rng(8), 0.8, 4096
    noise = rng.normal(size=(60, n + 200))
    values = torch.from_numpy(signal.lfilter([1.0], [1.0, -a], noise, axis=1)[:, 200:].copy())
    errors, lengths = blocking_errors(values.T[None].contiguous())
    expected = np.sqrt(1.0 / (1 - a**2) * (1 + a) / (1 - a) / n)
    assert float(errors.mean()) == pytest.approx(expected, rel=0.1)
    assert float(values.mean(dim=1).std()) == pytest.approx(expected, rel=0.3)
    assert int(lengths.min()) >= 16 and int(lengths.max()) <= 512


def test_blocking_of_independent_samples_is_the_textbooks_error_and_few_correlated_ones_tell_none():
    values = torch.randn(3, 2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[2, 1500:] = torch.nan
    errors, _ = blocking_errors(values)
    torch.testing.assert_close(errors, torch.full((2,), 5500**-0.5).double(), rtol=0.2, atol=0)
    slow = torch.linspace(0, 1, 50, dtype=torch.float64)[None, :, None]
    assert torch.isnan(blocking_errors(slow)[0]).all()
    assert torch.isnan(blocking_errors(values[:1, :3])[0]).all()


def test_jackknife_of_each_component_is_its_textbook_error():
    means = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(jackknife_errors(4 * means, torch.full((9, 1), 4)), means.std(dim=0) / 3.0)
    assert jackknife_errors(means[:3], torch.ones(3, 1)) is None


def test_errors_of_diffusion_are_those_of_repeated_experiments():
    """80 experiments: their spread is known to 8 %, an error from five blocks to 35 %, the mean of 80 of them to 4 %."""
    one, several = SelfDiffusion(t_max=5.0), SelfDiffusion(t_max=5.0, fit_from=1.0)
    for observable, make in (
        (one, lambda rng: brownian(rng, 100, 10, 0.2)),
        (several, lambda rng: [brownian(rng, 30, 4, 0.2) for _ in range(6)]),
    ):
        found = [observable(make(np.random.default_rng(100 + k))) for k in range(80)]
        spread = np.std([float(x.value) for x in found])
        error = np.sqrt(np.mean([float(x.error) ** 2 for x in found if x.error is not None]))
        assert sum(x.error is None for x in found) < 8
        assert 0.75 < error / spread < 1.4


def test_too_short_a_trajectory_has_a_value_and_no_error():
    found = MeanSquaredDisplacement(t_max=20.0)(brownian(np.random.default_rng(9), 60, 5, 0.2))
    assert found.error is None and torch.isfinite(found.value).all()
    assert found.as_dict()["error"] is None and "too few" in found.as_dict()["note"]


# -- sizes


def test_correction_for_the_size_of_the_cell():
    """Yeh and Hummer's figures for water, 298 K and 0.89 mPa s in 18.6 Å: k_B T ξ / (6 π η L) = 0.374e-9 m²/s."""
    series = brownian(np.random.default_rng(10), 60, 5, 0.2, cell=18.6 * np.eye(3))
    plain = SelfDiffusion(t_max=5.0)(series)
    corrected = SelfDiffusion(t_max=5.0, viscosity=0.89, temperature_K=298.0)(series)
    expected = 2.837297 * 1.380649e-23 * 298 / (6 * np.pi * 0.89e-3 * 18.6e-10) * 1e9
    assert float(corrected.value - plain.value) == pytest.approx(expected, rel=1e-6) and "size" in corrected.note
    torch.testing.assert_close(corrected.error, plain.error)


# -- what is refused


def still(n_frames=20, n_atoms=3, **settings):
    return series_of(np.zeros((n_frames, n_atoms, 3)), **settings)


@pytest.mark.parametrize("call, words", [
    (lambda: VelocityAutocorrelation()(still()), "the frames have no momenta; keep them"),
    (lambda: GreenKuboDiffusion()(still(momenta=np.zeros((20, 3, 3)))), "the frames have no momenta"),
    (lambda: MeanSquaredDisplacement()(still(1)), "msd needs 1 intervals of 0.01 ps or more, and there are 0 in the longest replica"),
    (lambda: MeanSquaredDisplacement(t_max=1.0)(still()), "there are 19 in the longest replica, t_max=1 ps asks for 100"),
    (lambda: SelfDiffusion(fit_from=5.0)(still()), "a line needs two points between fit_from=5 ps and 0.1 ps"),
    (lambda: MeanSquaredDisplacement()([still(), still(interval_fs=20.0)]), "one interval between frames, got 10, 20 fs"),
    (lambda: MeanSquaredDisplacement()([still(), still(n_atoms=4)]), "replicas of one system"),
    (lambda: MeanSquaredDisplacement(8)(still()), "msd:O: there are no atoms of this element"),
    (lambda: MeanSquaredDisplacement()(still(n_atoms=1)), "write remove_drift=no"),
    (lambda: MeanSquaredDisplacement()([]), "one replica or more"),
    (lambda: SelfDiffusion(viscosity=0.0), "expected a positive viscosity"),
    (lambda: SelfDiffusion(viscosity=1.0)(still(cell=5 * np.eye(3))), "needs a temperature_K"),
    (lambda: SelfDiffusion(viscosity=1.0, temperature_K=1.0)(still()), "cubic cells, periodic in all directions"),
    (lambda: SelfDiffusion(viscosity=1.0, temperature_K=1.0)(still(cell=np.diag([5, 5, 6.0]))), "cubic cells"),
    (lambda: VibrationalDensityOfStates(window="gauss"), "expected a window of hann"),
    (lambda: still(interval_fs=-1.0), "expected a positive one"),
])  # fmt: skip
def test_refused(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_jumps_of_half_a_cell_are_refused():
    """Steps of 0.45 cells, of which nobody knows the direction; of 0.3 are fine. The first one that is too long is named."""
    steps = np.zeros((20, 3, 3))
    steps[7:, 1, 2] = 0.3 * 6.0
    series = series_of(steps, cell=6.0 * np.eye(3))
    assert float(MeanSquaredDisplacement(t_max=0.15)(series).value.max()) > 0
    steps[7:, 1, 2] = 0.45 * 6.0
    with pytest.raises(ValueError, match="atom 1 moves by 2.7 Å or more between frames 6 and 7, about half a cell.*more often"):
        MeanSquaredDisplacement()(series_of(steps, cell=6.0 * np.eye(3)))


def timed(times, key="time_ps"):
    images = [Atoms("Ar2", np.eye(2, 3) * 3) for _ in times]
    for atoms, t in zip(images, times):
        atoms.info[key] = t
    return images


def test_intervals_are_those_that_frames_tell():
    assert TimeSeries.from_atoms(timed([0.0, 0.05, 0.1])).interval_fs == pytest.approx(50.0)
    assert TimeSeries.from_atoms(timed([5, 7, 9], "time_fs")).interval_fs == pytest.approx(2.0)
    assert TimeSeries.from_atoms(timed([5, 7, 9], "time_fs"), 2.0).interval_fs == 2.0
    for images, given, words in [
        (timed([0.0, 0.05, 0.1, 0.2]), None, "frame 3 comes 100 fs after the one before, most 50 fs"),
        (timed([0.0, 0.05, 0.1]), 10.0, "given as 10 fs, but the frames tell 50 fs"),
        ([Atoms("Ar2")] * 3, None, "do not tell the time between them .*give --interval in fs"),
        (timed([0.1, 0.05, 0.0]), None, "not at equal intervals"),
        ([Atoms("Ar2"), Atoms("ArNe")], 1.0, "the same atoms in one order"),
    ]:
        with pytest.raises(ValueError, match=words):
            TimeSeries.from_atoms(images, given)


def test_errors_have_the_distribution_of_students_t():
    """Deviations from the truth over errors of five blocks or so: 80 of them agree with it (Kolmogorov-Smirnov)."""
    truth = 0.2**2 / 2 * (1 - 1 / 10) * 10.0
    found = [SelfDiffusion(t_max=5.0)(brownian(np.random.default_rng(500 + k), 100, 10, 0.2)) for k in range(80)]
    deviations = [(float(x.value) - truth) / float(x.error) for x in found if x.error is not None]
    assert stats.kstest(deviations, stats.t(9).cdf).pvalue > 1e-3


def test_what_frames_are_too_rare_for_is_said():
    """Frames 10 fs apart show vibrations up to 1/(2 · 10 fs) = 50 THz = 1668 cm⁻¹."""
    assert "beyond 50 THz, which are folded back" in VibrationalDensityOfStates(unit="THz").note(51, 0.01)
    assert "beyond 1668 cm⁻¹" in VibrationalDensityOfStates().note(51, 0.01)
