"""Criteria for liquids, solids and hydrogens: radial distributions over windows, sites, neighbours, jumps of the energy."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list as ase_neighbor_list
from scipy import stats

from stabie_ase.boltzmann import StatePoint
from stabie_ase.dynamics import Langevin, PotentialForces, initial_state, simulate
from stabie_ase.potentials.analytic import Harmonic, LennardJones
from stabie_ase.stability import EnergySpike, KineticTemperature, criteria_from, look, watched, with_memory
from stabie_ase.stability.criteria.energy_spike import largest_difference
from stabie_ase.stability.criteria.rdf import RDFDeviation
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.radial import Shells, radial_distributions
from stabie_ase.structures.setting import Setting
from stabie_ase.testing import check_criterion
from stabie_ase.training.condition import Condition
from stabie_ase.training.pool import ReplicaPool, Window

A = 5.3
"""Lattice constant of argon, Å."""


def argon(n=3):
    return bulk("Ar", "fcc", a=A, cubic=True).repeat(n)


def rattled(atoms, n, width, seed=0):
    rng, frames = np.random.default_rng(seed), []
    for _ in range(n):
        frames.append(atoms.copy())
        frames[-1].positions += rng.normal(scale=width, size=atoms.positions.shape)
    return frames


def state_of(frames, temperature_K=90.0):
    return initial_state(AtomsBatch.from_atoms(frames), PotentialForces(Harmonic(k=1e-12)), temperature_K)


def made(spec, frames, temperature_K=90.0, **about):
    (criterion,) = criteria_from(spec, Setting(frames, temperature_K, **about))
    return criterion


# -- radial distributions over windows


def ideal_gas(n_frames, n=200, size=15.0, seed=0):
    rng = np.random.default_rng(seed)
    return [Atoms(f"Ar{n}", rng.random((n, 3)) * size, cell=[size] * 3, pbc=True) for _ in range(n_frames)]


def of_argon(shells, target, block_steps=1, n_blocks=1):
    return RDFDeviation([(18, 18)], shells, target[None].double(), torch.ones(1, dtype=torch.float64), block_steps, n_blocks, 1.0)


def shown(criterion, frames, every=1, state=None):
    """Verdicts of one replica that is seen at these frames, one after the other, and its state at the end."""
    state, verdicts = state or with_memory(state_of(frames[:1]), [criterion]), []
    for atoms in frames:
        state = state.move(positions=torch.as_tensor(atoms.positions)).replace(step=state.step + every)
        verdicts.append(criterion.judge(state))
        state = state.remember(**verdicts[-1].memory)
    return verdicts, state


def test_an_ideal_gas_against_a_hard_core():
    """g = 1 everywhere, held against 0 within 2 Å and 1 beyond: 2 Å off, and what is left of the noise of as many frames."""
    shells, n_frames = Shells(24, 0.25), 40
    target = (torch.arange(24) >= 8).double()
    verdicts, _ = shown(of_argon(shells, target, n_frames), ideal_gas(n_frames + 1))
    pairs = 0.5 * 200 * 199 / 15.0**3 * shells.volumes * (n_frames + 1)
    sigma = 0.25 / pairs.sqrt()
    bias, spread = float(sigma[8:].sum()) * (2 / np.pi) ** 0.5, float(sigma.square().sum().sqrt())
    assert [float(v.value) for v in verdicts[:-1]] == [0.0] * n_frames  # no window is full yet
    assert float(verdicts[-1].value) == pytest.approx(2.0 + bias, abs=4 * spread)
    assert verdicts[-1].unstable.tolist() == [True]


def crystals():
    """Argon as a crystal, and as one that was rattled."""
    return argon(2), rattled(argon(2), 1, 0.4)[0]


def functions(frames, shells):
    return radial_distributions(AtomsBatch.from_atoms(frames), [(18, 18)], shells)[:, 0]


def test_a_window_slides_by_blocks():
    """Four blocks of five steps, a look every step: from the end of the fourth on the value is that of the last four whole blocks."""
    shells, (sound, off) = Shells(120, 0.05), crystals()
    ours, theirs = functions([sound, off], shells)
    criterion = of_argon(shells, ours, 5, 4)
    frames = [sound] * 31 + [off] * 30
    verdicts, _ = shown(criterion, frames)
    whole = 0.05 * float((ours - theirs).abs().sum())
    for k, verdict in enumerate(verdicts):
        end = 5 * (k // 5)  # the last look of the last whole block; the first one holds a look more
        window = frames[0 if end == 20 else end - 19 : end + 1]
        expected = whole * sum(atoms is off for atoms in window) / len(window) if end >= 20 else 0.0
        assert float(verdict.value) == pytest.approx(expected, abs=1e-9), k
        assert float(verdict.severity) == pytest.approx(expected / float(criterion.tolerances[0]), abs=1e-9)


def test_what_is_remembered_does_not_grow_and_goes_through_a_restart_file():
    shells, (sound, off) = Shells(120, 0.05), crystals()
    criterion = of_argon(shells, functions([sound], shells)[0], 5, 4)
    _, state = shown(criterion, [sound, off] * 30)
    assert sum(x.numel() for x in state.extra.values()) == 5 * 120 + 5 + 2
    again = with_memory(state_of([sound]), [criterion]).restore(state.tensors())
    assert torch.equal(criterion.judge(again).value, criterion.judge(state).value) and float(criterion.judge(again).value) > 0
    # Few frames a block are counted, however often one looks.
    _, often = shown(of_argon(shells, functions([sound], shells)[0], 100, 1), [sound] * 101)
    assert int(often.extra["rdf counts"][0, 1]) <= 6


def test_one_frame_that_fails_spoils_no_window():
    shells, sound = Shells(120, 0.05), argon(2)
    criterion = of_argon(shells, functions([sound], shells)[0], 5, 2)
    _, state = shown(criterion, [sound] * 3)
    dead = state.move(positions=state.batch.positions * torch.nan).replace(alive=~state.alive, step=state.step + 1)
    after = dead.remember(**criterion.judge(dead).memory).replace(alive=state.alive)
    verdicts, _ = shown(criterion, [sound] * 20, state=after)
    assert float(verdicts[-1].value) == pytest.approx(0.0, abs=1e-9)
    collapsed = sound.copy()
    collapsed.positions[1] = collapsed.positions[0] + [0.1, 0, 0]
    verdicts, _ = shown(criterion, [sound] * 4 + [collapsed] + [sound] * 30)
    single = 0.05 * float((functions([collapsed], shells)[0] - functions([sound], shells)[0]).abs().sum())
    values = [float(v.value) for v in verdicts]
    assert max(values) <= single / 10 + 1e-9 and values[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_restarted_replica_has_no_past():
    """In a state, and in the pool of training."""
    shells, (sound, off) = Shells(120, 0.05), crystals()
    criterion = of_argon(shells, functions([sound], shells)[0], 5, 2)
    state = with_memory(state_of([sound, sound]), [criterion])
    for _ in range(12):
        state = state.move(positions=torch.as_tensor(np.concatenate([off.positions] * 2))).replace(step=state.step + 1)
        verdict = criterion.judge(state)
        state = state.remember(**verdict.memory)
    assert (verdict.value > 0).all()
    restarted = state.put([0], with_memory(state_of([sound]), [criterion]))
    first, other = criterion.judge(restarted).value.tolist()
    assert first == 0.0 and other == pytest.approx(float(verdict.value[1]))
    integrator = Langevin(5.0 * units.fs, 0.01 / units.fs)
    loose = replace(criterion, tolerances=torch.full((1,), 100.0, dtype=torch.float64))
    condition = Condition(StatePoint(40.0), rattled(argon(2), 4, 0.1), (), (loose,), integrator, 2)
    pool = ReplicaPool(condition, LennardJones(0.0103, 3.4, 5.2), Window(12, 1, 4, math.inf), seed=0)
    pool.simulate()
    assert (pool.replicas.extra["rdf counts"] >= 0).all()
    pool.reset_some(1.0)
    assert (pool.replicas.extra["rdf counts"][:, 1:] == -1).all() and (pool.replicas.extra["rdf steps"] == -1).all()


def test_the_reference_by_itself():
    """The target is the mean; the tolerance is the source's, more where single frames deviate; pairs, ranges and windows are as told."""
    frames = rattled(bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(2), 10, 0.15)
    about = {"timestep_fs": 2.0, "check_every_fs": 10.0}
    criterion = made("rdf", frames, **about)
    assert criterion.kinds == [(11, 11), (11, 17), (17, 17)] and criterion.shells.reach == pytest.approx(6.0)
    expected = radial_distributions(AtomsBatch.from_atoms(frames), criterion.kinds, criterion.shells).mean(dim=0)
    torch.testing.assert_close(criterion.target, expected)
    samples = radial_distributions(AtomsBatch.from_atoms(frames), criterion.kinds, criterion.shells)
    torch.testing.assert_close(criterion.tolerances, (1.25 * criterion.deviation(samples).amax(dim=0)).clamp(min=1.0))
    assert criterion.block_steps * criterion.n_blocks * 2.0 == 1000.0 and "1000 fs" in criterion.describe()
    few = made("rdf:2.5,window_fs=40,r_max=5,pairs=Na-Cl+Cl-Cl", frames, **about)
    assert (few.tolerances.tolist(), few.block_steps, few.n_blocks) == ([2.5, 2.5], 5, 4) and few.target.shape == (2, 100)
    assert few.kinds == [(11, 17), (17, 17)] and "Na-Cl, Cl-Cl by more than 2.5 Å" in few.describe()
    water = molecule("H2O")
    water.set_cell([4.0] * 3)
    water.pbc = True
    waters = rattled(water.repeat(2), 5, 0.03)
    assert (made("rdf:3.0", waters, **about).tolerances == 3.0).all() and (made("rdf", waters, **about).tolerances >= 3.0).all()


def test_few_ions_do_not_widen_what_is_asked_of_the_solvent():
    """One pair of ions, whose g(r) is a spike that wanders, among many neon atoms; both are judged by their own tolerance."""
    rng, frames = np.random.default_rng(0), []
    for _ in range(10):
        places = rng.uniform(0, 12, (200, 3))
        places[1] = places[0] + [rng.uniform(2, 5), 0, 0]
        frames.append(Atoms("NaCl" + 198 * "Ne", places, cell=[12] * 3, pbc=True))
    criterion = made("rdf:3.0", frames, timestep_fs=2.0, check_every_fs=10.0)
    own = made("rdf", frames, timestep_fs=2.0, check_every_fs=10.0)
    between = dict(zip(own.kinds, own.tolerances.tolist()))
    assert between[11, 17] > 10 and between[10, 10] < 3 and (criterion.tolerances == 3.0).all()
    assert f"Ne-Ne by more than {between[10, 10]:.3g} Å" in own.describe()
    functions = own.target.clone()[None]
    functions[0, own.kinds.index((10, 10))] += 1.0  # 6 Å in all: little of what ions may, too much for the solvent
    severities = own.deviation(functions)[0] / own.tolerances
    assert int(severities.argmax()) == own.kinds.index((10, 10)) and float(severities.max()) > 1.5
    # As judged, neon that clumps is worst by its own tolerance, though g(r) of the ions is off by more.
    clumped = frames[0].copy()
    clumped.positions[2:40] = 6.0 + rng.uniform(-1.5, 1.5, (38, 3))
    off = own.deviation(radial_distributions(AtomsBatch.from_atoms([clumped]), own.kinds, own.shells))[0]
    worst = own.kinds.index((10, 10))
    assert int((off / own.tolerances).argmax()) == worst != int(off.argmax())
    verdict = shown(replace(own, block_steps=1, n_blocks=1), [clumped] * 2)[0][-1]
    assert float(verdict.value) == pytest.approx(float(off[worst]))
    assert float(verdict.severity) == pytest.approx(float(off[worst] / own.tolerances[worst]))


ABOUT = {"timestep_fs": 1.0, "check_every_fs": 5.0}
LONE = [Atoms("ArNe2", [[0, 0, 0], [4, 0, 0], [0, 4, 0]], cell=[8] * 3, pbc=True)] * 2


@pytest.mark.parametrize(
    "spec, frames, about, message",
    [
        ("rdf:3.0", [molecule("CH4")] * 2, ABOUT, "rdf needs a reference that is periodic in all directions"),
        ("rdf:3.0", [argon(1)], ABOUT, "several reference frames for a mean, got 1"),
        ("rdf:3.0", [argon(1)] * 2, {}, r"Setting\(frames, temperature_K, timestep_fs=0.5\)"),
        ("rdf:3.0,pairs=O-O", [argon(1)] * 2, ABOUT, "the reference has no O, only Ar"),
        ("rdf:3.0,pairs=Ar-Ar", LONE, ABOUT, "one atom of Ar, which makes no pair Ar-Ar"),
        ("rdf:3.0,pairs=Ar", [argon(1)] * 2, ABOUT, "expected two elements, as O-H"),
        ("rdf:3.0,window_fs=4", [argon(1)] * 2, ABOUT, "window_fs=4, expected at least the 5 fs between two looks"),
        ("rdf:-3", [argon(1)] * 2, ABOUT, "the tolerance of rdf must be a positive length"),
        ("rdf:3.0,window=4", [argon(1)] * 2, ABOUT, "unknown option 'window'; did you mean 'window_fs'"),
        ("lindemann", [molecule("CH4")], {}, "lindemann is for a solid.*isolated molecule"),
        ("lindemann", [argon(2)[np.roll(np.arange(32), k)] for k in range(4)], {}, "lindemann is for a solid.*atomic liquid"),
        ("lindemann:0.05", rattled(argon(2), 5, 0.2), {}, "a limit of 0.05, expected more than the 0.0.* of the reference"),
        ("lindemann:nan", [argon(2)], {}, "expected more than"),
        ("coordination", [molecule("CH4")], {}, "coordination takes its first shell from a solid.*give r_max"),
        ("coordination:0", [argon(1)], {}, "positive number of neighbours, got 0"),
        ("coordination:1,r_max=0", [argon(1)], {}, "r_max of coordination must be a positive length"),
        ("lost-hydrogen", [molecule("CO2")], {}, "needs hydrogens that are bonded to heavier atoms, and the reference has none"),
        ("lost-hydrogen", [molecule("H2")], {}, "needs hydrogens that are bonded to heavier atoms"),
        ("lost-hydrogen:1.0", [molecule("CH4")], {}, "a distance of 1 Å, but a bond of the reference has 1.0"),
        ("energy-spike:3", [molecule("CH4")], {}, "takes no argument"),
        ("temperature:10000", [molecule("CH4")], {}, "with a plus, as temperature:.10000"),
        ("temperature:+hot", [molecule("CH4")], {}, "with a plus, as temperature:.10000"),
    ],
)
def test_criteria_that_mean_nothing(spec, frames, about, message):
    with pytest.raises(ValueError, match=message) as error:
        made(spec, frames, **about)
    assert "\n" not in str(error.value)


# -- sites and neighbours


@pytest.mark.parametrize("distance", [1.0, 6.0])
def test_lindemann_of_one_atom_that_was_moved(distance):
    """u √(N - 1) / (N d), wherever the whole crystal has been moved to."""
    crystal = argon()
    criterion = made("lindemann", [crystal])
    moved = crystal.copy()
    moved.positions[17] += distance * np.array([0.6, 0.0, 0.8])
    drifted = moved.copy()
    drifted.positions += [7.0, -5.0, 30.0]
    drifted.wrap()
    n, d = len(crystal), A / 2**0.5
    verdict = criterion.judge(state_of([crystal, moved, drifted]))
    expected = distance * (n - 1) ** 0.5 / n / d
    torch.testing.assert_close(verdict.value, torch.tensor([0.0, expected, expected], dtype=torch.float64), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(verdict.severity, verdict.value / 0.25)
    assert verdict.atoms[1:].tolist() == [[17], [17]]


def test_neighbours_are_those_that_ase_counts():
    """12 in the crystal; a displaced atom and its neighbours lose and gain some."""
    sound = rattled(argon(), 6, 0.1)
    criterion = made("coordination:1", sound)
    assert criterion.fewest.tolist() == criterion.most.tolist() == [12.0] * 108
    moved = sound[0].copy()
    moved.positions[5] += [A / 2, A / 4, A / 4]
    i, d = ase_neighbor_list("id", moved, float(criterion.reach.max()))
    counts = np.bincount(i[d < criterion.reach.numpy()[i]], minlength=108)
    verdict = criterion.judge(state_of([moved, sound[1]]))
    assert float(verdict.value[0]) == np.abs(counts - 12).max() > 1 and verdict.unstable.tolist() == [True, False]
    assert abs(counts[verdict.atoms[0, 0]] - 12) == float(verdict.value[0]) and verdict.atoms[1].tolist() == [-1]
    by_distance = made("coordination:1,r_max=4.5", sound)
    assert float(by_distance.most.max()) == 12 and by_distance.judge(state_of([moved])).unstable.all()


@pytest.mark.parametrize(
    "name, a, n", [("fcc", 5.3, 12), ("bcc", 3.0, 14), ("diamond", 5.4, 4), ("rocksalt", 5.6, 6), ("cesiumchloride", 4.1, 14)]
)
def test_first_shells(name, a, n):
    """Of the common lattices; in those with a body in the centre the second neighbours are 15 % farther and belong to it."""
    crystal = bulk("CsCl" if name in ("rocksalt", "cesiumchloride") else "Si", name, a=a, cubic=True).repeat(2)
    assert set(made("coordination", [crystal]).most.tolist()) == {float(n)}


# -- hydrogens


def test_a_hydrogen_that_was_pulled_off():
    ethanol = molecule("CH3CH2OH")
    criterion = made("lost-hydrogen", [ethanol] * 2)
    assert criterion.pairs.shape == (2, 6) and "2.5 Å" in criterion.describe()
    frames = []
    for distance in (1.0, 2.4, 2.6):
        frames.append(ethanol.copy())
        frames[-1].set_distance(2, 3, distance, fix=0)
    verdict = criterion.judge(state_of(frames))
    assert verdict.unstable.tolist() == [False, False, True]
    assert float(verdict.value[2]) == pytest.approx(2.6) and verdict.atoms[2].tolist() == [2, 3]
    torch.testing.assert_close(verdict.severity, verdict.value / 2.5)


def test_a_hydrogen_between_two_atoms_belongs_to_the_nearer():
    bridged = Atoms("OHO", [[0, 0, 0], [1.05, 0, 0], [2.2, 0, 0]])
    assert made("lost-hydrogen:1.5", [bridged]).pairs.tolist() == [[0], [1]]


# -- energies and temperatures


def test_the_largest_difference_of_two_energies():
    """No less than the exact tail, of Laplace's law for two modes and of Gauss's for many, and little more."""
    for chance in (1e-6, 1e-12):
        assert 1.0 < largest_difference(2, chance) / -math.log(chance) < 1.3
        exact = 1e4**0.5 * stats.norm.isf(0.5 * chance)
        assert 1.0 < largest_difference(10_000, chance) / exact < 1.15


def test_a_jump_of_the_energy():
    """Since the last look, of each replica; what is not finite is not remembered."""
    criterion = EnergySpike(0.5)
    state = with_memory(state_of([molecule("CH4")] * 3), [criterion])
    seen = []
    for energies in ([0.0, 5.0, 1.0], [0.4, 5.6, 1.0], [0.9, 5.6, math.nan], [0.9, 5.6, 1.2]):
        verdict = criterion.judge(state.replace(potential_energy=torch.tensor(energies, dtype=torch.float64)))
        state = state.remember(**verdict.memory)
        seen.append((verdict.value.tolist(), verdict.unstable.tolist()))
    assert seen[0] == ([0.0] * 3, [False] * 3)
    assert seen[1][0] == pytest.approx([0.4, 0.6, 0.0]) and seen[1][1] == [False, True, False]
    assert seen[2][0][:2] == pytest.approx([0.5, 0.0]) and seen[2][1] == [False, False, True]
    assert seen[3][0] == pytest.approx([0.0, 0.0, 0.2]) and not any(seen[3][1])


def test_a_limit_of_the_temperature_in_kelvin():
    """However many atoms there are; without it the limit is as it was."""
    criterion = made("temperature:+10000", [molecule("CH4")])
    assert "10000 K above" in criterion.describe()
    state = state_of([molecule("CH4")] * 2, 300.0)
    kinetic = state.batch.sum_over_atoms(0.5 * state.momenta.square().sum(dim=1) / state.batch.masses)
    wanted = torch.tensor([9_000.0, 11_000.0], dtype=torch.float64) + 300.0
    scale = (7.5 * units.kB * wanted / kinetic).sqrt()
    verdict = criterion.judge(state.replace(momenta=state.momenta * scale[state.batch.system][:, None]))
    torch.testing.assert_close(verdict.severity, torch.tensor([0.9, 1.1], dtype=torch.float64))
    assert made("temperature", [molecule("CH4")]) == KineticTemperature.for_atoms(5)


# -- dynamics

TEACHER, COLD_K = LennardJones(0.0103, 3.4, 5.2), 40.0


@pytest.fixture(scope="module")
def crystal():
    """Frames of a cold crystal, and the dynamics that they come from."""
    integrator, forces = Langevin(5.0 * units.fs, 0.01 / units.fs), PotentialForces(TEACHER)
    state = initial_state(AtomsBatch.from_atoms([argon(2)] * 12), forces, 2 * COLD_K, fix_com=False)
    state = state.replace(temperature=torch.full_like(state.temperature, COLD_K))
    state = simulate(state, integrator, forces, 200)
    return SimpleNamespace(frames=state.batch.to_atoms(), state=state, integrator=integrator, forces=forces)


ALL = "rdf,window_fs=500,lindemann,coordination,energy-spike,energy,temperature"


def test_no_false_alarms_in_a_crystal_and_alarms_in_a_hot_one(crystal):
    setting = Setting(crystal.frames, COLD_K, COLD_K, 5.0, 25.0)
    criteria = [criterion.for_model(TEACHER) for criterion in criteria_from(ALL, setting)]
    state = crystal.state.select([0, 1, 2, 3])
    _, _, failures = watched(state, crystal.integrator, crystal.forces, 200, criteria, check_every=5)
    assert not failures.failed.any(), failures.causes
    hot = state.replace(temperature=torch.full_like(state.temperature, 900.0))
    for criterion in criteria[:3]:
        _, _, failures = watched(hot, crystal.integrator, crystal.forces, 250, [criterion], check_every=5)
        assert failures.failed.all() and set(failures.criterion) == {criterion.name}
        assert criterion.name != "rdf" or (failures.step >= 100).all()  # the window of 100 steps has to be full


def test_none_of_them_breaks_the_contract(crystal):
    sound, hot = crystal.frames[:4], rattled(argon(2), 2, 1.2)
    setting = Setting(crystal.frames, COLD_K, COLD_K, 1.0, 1.0)
    for spec, looks in (("rdf:2.0,window_fs=4", 5), ("lindemann", 1), ("coordination", 1)):
        (criterion,) = criteria_from(spec, setting)
        check_criterion(criterion, sound, hot, TEACHER, COLD_K, looks=looks)
    (criterion,) = criteria_from("energy-spike", setting)
    check_criterion(criterion, sound, [], TEACHER, COLD_K, looks=2)
    ethanol = rattled(molecule("CH3CH2OH"), 3, 0.02)
    torn = ethanol[0].copy()
    torn.set_distance(2, 3, 3.0, fix=0)
    check_criterion(made("lost-hydrogen", ethanol), ethanol, [torn], Harmonic())


def test_no_false_alarms_of_springs():
    """32 replicas of six atoms in wells, 200 looks each, at intervals after which their energies are independent."""
    potential, integrator = Harmonic(k=2.0), Langevin(5 * units.fs, 0.02 / units.fs)
    state = initial_state(AtomsBatch.from_atoms([Atoms("Ar6", np.zeros((6, 3)))] * 32), PotentialForces(potential), 500.0, fix_com=False)
    criterion = EnergySpike.for_atoms(8, 500.0)  # as many modes, 18
    _, _, failures = watched(state, integrator, PotentialForces(potential), 2000, [criterion], check_every=10)
    assert not failures.failed.any()
    assert look(with_memory(state, [criterion]), [criterion]).severity.tolist() == [0.0] * 32
