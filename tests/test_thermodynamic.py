"""Observables that contain θ: against partition functions that are integrals, finite differences, and what ASE says of a crystal."""

import numpy as np
import pytest
import tiny
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.integrate import simpson

import stabie_ase
from stabie_ase.boltzmann import Estimator, Samples, StatePoint, accumulate, choose_grouping, of_present, targets_at
from stabie_ase.boltzmann.gradient import energy_change
from stabie_ase.observables import HeatCapacity, PotentialEnergy, Pressure, Stress, Target, observables_from
from stabie_ase.observables.averages import linearised, noise_floor
from stabie_ase.observables.energetics import Energetics
from stabie_ase.potentials.analytic import LennardJones
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import TargetFrames
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups

T = 300.0
KT = units.kB * T


class Quartic(Potential):
    """U = Σ_a (½ k x² + q x⁴), x the first coordinate of each atom."""

    family, cutoff = "quartic", 1.0

    def __init__(self, k=0.7, q=4.0):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(k, dtype=torch.float64))
        self.q = torch.nn.Parameter(torch.tensor(q, dtype=torch.float64))

    def inputs(self, batch, neighbors):
        return {"positions": batch.positions}

    def evaluate(self, inputs):
        x2 = inputs["positions"][:, 0].square()
        return 0.5 * self.k * x2 + self.q * x2.square()


GRID = np.linspace(-2.0, 2.0, 20_001)
N_ATOMS = 3


def moments(k, q):
    """⟨u⟩ and Var(u) of one coordinate."""
    u = 0.5 * k * GRID**2 + q * GRID**4
    p = np.exp(-u / KT)
    p /= simpson(p, x=GRID)
    mean = simpson(p * u, x=GRID)
    return mean, simpson(p * (u - mean) ** 2, x=GRID)


def exact(name, k=0.7, q=4.0):
    mean, variance = moments(k, q)
    return mean if name == "potential-energy" else variance / KT**2


def drawn(n, seed):
    """Positions straight from their distribution."""
    p = np.exp(-(0.35 * GRID**2 + 4.0 * GRID**4) / KT)
    cumulative = np.cumsum(p) / p.sum()
    x = np.interp(np.random.default_rng(seed).random(n * N_ATOMS), cumulative, GRID)
    batch = AtomsBatch.from_atoms(Atoms(f"H{N_ATOMS}", np.zeros((N_ATOMS, 3)))).repeat(n)
    positions = torch.zeros((n * N_ATOMS, 3), dtype=torch.float64)
    positions[:, 0] = torch.as_tensor(x)
    return batch.replace(positions=positions)


def samples_of(potential, frames, observables, stress=False):
    found = Energetics.by(potential, frames, stress=stress)
    zeros, index = torch.zeros(frames.n_systems, dtype=torch.float64), torch.arange(frames.n_systems)
    values = {o.name: o.sample(frames, None, found) for o in observables}
    return Samples(frames, Groups.systems(frames), values, found.energies, zeros, 0 * index, index, energetics=found)


def gradient(potential, estimate):
    potential.zero_grad()
    accumulate(potential, estimate)
    return torch.stack([p.grad for p in potential.parameters()])


OBSERVABLES = {"potential-energy": PotentialEnergy(), "heat-capacity": HeatCapacity(T)}


@pytest.mark.parametrize("n", [300, 1000, 5000])
@pytest.mark.parametrize("name", OBSERVABLES)
def test_gradient_of_an_oscillator_s_energy_and_heat_capacity(name, n):
    """d/dk and d/dq of (s - s_ref)² within three standard errors of quadrature's, at three numbers of samples.

    Both terms are needed: in a pure power of x, ⟨U⟩ does not depend on the constant before it, and they cancel.
    """
    observable, h = OBSERVABLES[name], 1e-4
    reference = 0.5 * exact(name)
    slopes = np.array([(exact(name, 0.7 + h) - exact(name, 0.7 - h)) / (2 * h), (exact(name, q=4 + h) - exact(name, q=4 - h)) / (2 * h)])
    expected = 2.0 * (exact(name) - reference) * slopes
    found = []
    for seed in range(16):
        potential = Quartic()
        samples = samples_of(potential, drawn(n, seed), [observable])
        target = Target(observable, torch.tensor([reference], dtype=torch.float64))
        found.append(gradient(potential, Estimator(StatePoint(T), cross_fit=True)(samples, [target])).numpy())
    mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / 4.0
    bias = np.abs(expected) * (10.0 / n if name == "heat-capacity" else 0.0)  # its statistic is no mean
    assert (np.abs(mean - expected) < 3.5 * error + bias).all()
    assert n < 5000 or error.max() < 0.15 * np.abs(expected).max()


def test_energy_and_heat_capacity_of_a_harmonic_crystal():
    """½ k_B T a coordinate, ½ k_B each; the floor of a variance is that of what it is made of to first order."""
    generator = torch.Generator().manual_seed(0)
    energies = 0.5 * KT * torch.randn((20_000, 9), generator=generator, dtype=torch.float64).square().sum(dim=1) - 500.0
    images = [Atoms("H3", np.zeros((3, 3)))] * len(energies)
    targets = [Target.from_frames(o, images, energies=energies.numpy()) for o in OBSERVABLES.values()]
    assert float(targets[0].value) == pytest.approx(-500.0 / 3 + 1.5 * KT, abs=3 * KT * (1.5 / 3 / 20_000) ** 0.5)
    error = (1.5**2 * 2 / 20_000 * (1 + 4 / 3)) ** 0.5  # Var of a variance, kurtosis 3 + 12/9
    assert float(targets[1].value) == pytest.approx(1.5, abs=3 * error)
    assert targets[1].floor == pytest.approx((2 / np.pi) ** 0.5 * error, rel=0.2)
    samples = targets[1].samples
    assert targets[1].floor == noise_floor(linearised(HeatCapacity(T).statistic, samples.mean(dim=0), samples), torch.ones(1))


def argon(n=6, seed=0):
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = bulk("Ar", "fcc", 5.4, cubic=True) * 2
        atoms.set_cell(atoms.cell.array * (1 + rng.normal(0, 0.02)), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.15, atoms.positions.shape)
        frames.append(atoms)
    return frames


def lennard_jones():
    return LennardJones(0.0103, 3.4, 5.0)


def test_stress_and_pressure_are_ase_s():
    """Its own Lennard-Jones of rattled and strained crystals, with the ideal gas's part added; as a model's and as a reference's."""
    frames = argon()
    for atoms in frames:
        atoms.calc = AseLennardJones(sigma=3.4, epsilon=0.0103, rc=5.0)
    told = [atoms.get_stress() for atoms in frames]
    by_model = Energetics.by(lennard_jones(), AtomsBatch.from_atoms(frames), stress=True)
    for atoms, stress in zip(frames, told):
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, stress=stress)
    for found in (by_model, Energetics.of(frames, stress=True)):
        stress, pressure = Stress(T).of(found).numpy(), Pressure(T).of(found)[:, 0].numpy()
        ideal = np.array([len(atoms) * KT / atoms.get_volume() for atoms in frames])
        expected = np.array(told) - np.outer(ideal, [1, 1, 1, 0, 0, 0])
        np.testing.assert_allclose(stress, expected / units.GPa, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(pressure, (ideal - np.array(told)[:, :3].mean(axis=1)) / units.GPa, rtol=1e-6)
        np.testing.assert_allclose(pressure, -stress[:, :3].mean(axis=1), rtol=1e-12)


@pytest.mark.parametrize("cross_fit", [False, True])
def test_gradient_is_that_of_the_reweighted_loss(cross_fit):
    """Finite differences of Σ_k c_k (s_k - g_k)² on fixed frames, by Zwanzig's formula with everything worked out again."""
    T_hot, potential = 60.0, lennard_jones()
    observables = [PotentialEnergy(), HeatCapacity(T_hot), Pressure(T_hot), Stress(T_hot)]
    frames = AtomsBatch.from_atoms(argon(12))
    samples = samples_of(potential, frames, observables, stress=True)
    spread = {o.name: samples.values[o.name].std() for o in observables}
    targets = [Target(o, o.statistic(samples.values[o.name].mean(dim=0)) + 0.7 * float(spread[o.name]), weight=k + 1.0)
               for k, o in enumerate(observables)]  # fmt: skip
    # Equal log-weights: without Bessel's correction, which finite differences know nothing of.
    samples = samples.__class__(**{**vars(samples), "log_weights": torch.zeros(12, dtype=torch.float64)})
    estimator = Estimator(StatePoint(T_hot), cross_fit)
    found = gradient(potential, estimator(samples, targets))

    def loss():
        """Of both halves: the residual of one, the mean of the other; of all, the loss itself."""
        now = of_present(potential, samples, observables)
        p = torch.exp(-StatePoint(T_hot).beta * energy_change(potential, samples))
        total = 0.0
        for own, other in [(0, 1), (1, 0)] if cross_fit else [(None, None)]:
            for target in targets:
                o, q = target.observable, p * samples.half(other)
                mean = (q / q.sum()) @ now.values[o.name]
                if not cross_fit:
                    total += float(target.weight * (target.metric * (o.statistic(mean) - target.value) ** 2).sum())
                    continue
                at = samples.values[o.name][samples.half(own)].mean(dim=0)
                statistic, pull = torch.func.vjp(o.statistic, at)
                residual = pull(2.0 * target.weight * target.metric * (statistic - target.value))[0]
                total += 0.5 * float(residual @ mean)
        return total

    for parameter, derivative in zip(potential.parameters(), found.tolist()):
        before, step = parameter.detach().clone(), 1e-6 * float(parameter.detach())
        sides = []
        for change in (step, -step):
            with torch.no_grad():
                parameter.copy_(before + change)
            sides.append(loss())
        with torch.no_grad():
            parameter.copy_(before)
        assert derivative == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4)


def test_values_follow_the_potential_and_keep_their_averages():
    potential, observable = Quartic(), PotentialEnergy()
    samples = samples_of(potential, drawn(5, 0), [observable])
    averaged = samples.__class__(**{**vars(samples), "values": {observable.name: samples.values[observable.name] + 1.0}})
    with torch.no_grad():
        potential.k.mul_(2.0), potential.q.mul_(2.0)
    now = of_present(potential, averaged, [observable])
    torch.testing.assert_close(now.values[observable.name], 2.0 * samples.values[observable.name] + 1.0)
    torch.testing.assert_close(now.energies, samples.energies)  # those that drove the dynamics
    assert len(now.select(torch.tensor([1, 3])).energetics.energies) == 2


# -- through the front doors


def setting_of(frames, temperature_K=T):
    return Setting(frames, temperature_K, temperature_K)


def test_names_and_where_they_have_no_meaning():
    ethanol, crystal = molecule("CH3CH2OH"), argon(2)
    names = [o.name for o in observables_from("potential-energy,heat-capacity,pressure,stress", setting_of(crystal))]
    assert names == ["potential-energy", "heat-capacity", "pressure", "stress"]
    with pytest.raises(ValueError, match="pressure needs a reference that is periodic"):
        observables_from("pressure", setting_of([ethanol]))
    with pytest.raises(ValueError, match="one size"):
        observables_from("heat-capacity", setting_of([ethanol, molecule("CH4")]))
    with pytest.raises(ValueError, match="needs a temperature"):
        observables_from("heat-capacity", setting_of([ethanol], float("nan")))
    with pytest.raises(ValueError, match="does not tell"):
        PotentialEnergy()(AtomsBatch.from_atoms(ethanol))
    with pytest.raises(ValueError, match="pressure needs the stress of its frames, and frame 0 has none"):
        Target.from_frames(Pressure(T), crystal, energies=np.zeros(2))
    with pytest.raises(ValueError, match="potential-energy needs the energy"):
        Target.from_frames(PotentialEnergy(), crystal)
    grouping = choose_grouping(None, setting_of(crystal), [PotentialEnergy()], lennard_jones())
    assert grouping.name == "global" and "potential-energy is of whole systems" in grouping.reason
    with pytest.raises(ValueError, match="--estimator global"):
        PotentialEnergy().sample(AtomsBatch.from_atoms(crystal), Groups.systems(AtomsBatch.from_atoms(crystal[:1])))


def test_energies_of_the_reference_under_any_key():
    """As the reference has read them, not as ASE calls them."""
    frames = tiny.frames()
    energies = np.linspace(-1.0, 1.0, len(frames))
    (target,) = targets_at([PotentialEnergy()], TargetFrames(frames, energies, T), T)
    assert float(target.value) == pytest.approx(0.0, abs=1e-12)


def test_fine_tuning_and_observing(tmp_path):
    """A run with energies and their fluctuation beside bond lengths ends, reports and can be observed."""
    options = {name: value for name, value in tiny.FAST.items() if name != "max_time_min"}
    found = stabie_ase.finetune(
        tiny.model_path(), tiny.reference_path(), observables="bond-length,potential-energy,heat-capacity", output=tmp_path / "run",
        max_cycles=1, seed=3, **options,
    )  # fmt: skip
    for model in found.models.values():
        assert all(np.isfinite(model[f"{name}_error"]) for name in OBSERVABLES)
    energies = tiny.reference().energies
    observed = stabie_ase.observe(tiny.reference_path(), observables="potential-energy,heat-capacity", criteria=[])
    assert observed["potential-energy"]["value"] == pytest.approx([energies.mean() / 4])
    expected = energies.var() / (units.kB * tiny.TEMPERATURE) ** 2 / 4
    assert observed["heat-capacity"]["value"] == pytest.approx([expected], rel=1e-6) and observed["heat-capacity"]["error"][0] > 0
