"""The two-phase loop: what is rewound comes back, what is learned is what was asked for, the best is kept."""

import copy
import logging
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from ase import units
from ase.calculators.singlepoint import SinglePointCalculator
from helpers import samples_of
from scipy.stats import sem
from scipy.stats import t as student_t

from stabie_ase.boltzmann import Samples, StatePoint, fluctuation_weights
from stabie_ase.boltzmann.samples import trajectory_averages
from stabie_ase.dynamics import PotentialForces, initial_state
from stabie_ase.observables import DistanceDistribution, Target, observables_from
from stabie_ase.potentials.analytic import Morse
from stabie_ase.potentials.energies import potential_energies
from stabie_ase.stability import BondLengthDeviation, criteria_from, look
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.setting import Setting
from stabie_ase.training.accuracy import Growth
from stabie_ase.training.condition import Condition
from stabie_ase.training.labels import LabelledFrames, force_errors_by_frame, minibatch
from stabie_ase.training.loop import MIN_DOUBTFUL_UPDATES, TrainingLoop
from stabie_ase.training.schedule import FINISHED, LEARNING, MATCHING, SIMULATION
from stabie_ase.training.updates import natural
from stabie_ase.training.updates.found import find
from stabie_ase.training.updates.natural import FIRST_STEP_FRACTION, MAX_BALANCE, MIN_BALANCE


def loop(potential=None, **changes):
    config, reference = tiny.config(**changes), tiny.reference()
    torch.manual_seed(0)
    return TrainingLoop.from_reference(
        potential or tiny.model(),
        reference,
        [DistanceDistribution.from_reference(reference.frames)],
        criteria_from(config.criterion, Setting(reference.frames, tiny.TEMPERATURE)),
        config,
    )


def until_learning(training):
    """Run the simulation phase; returns its records and unstable frames."""
    records, unstable = [], []
    while training.progress.phase == SIMULATION:
        record, frames = training.step()
        records.append(record)
        unstable += frames
    assert training.progress.phase == LEARNING, "the model of this test must fail"
    return records, unstable


def same_state(a, b, but=()):
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a if name not in but)


def weights(training):
    return {name: x.clone() for name, x in training.potential.state_dict().items()}


# -- the phases


THERMOSTATS = [{"thermostat": "langevin"}, {"thermostat": "nose-hoover"}]


@pytest.mark.parametrize("thermostat", THERMOSTATS, ids=lambda t: t["thermostat"])
def test_rewound_replicas_fail_again(thermostat, caplog):
    """Langevin's noise belongs to the replica's step, so it is replayed; Nosé-Hoover's dynamics has none."""
    training = loop(**thermostat)
    until_learning(training)
    failed = training.pools[0].failed.clone()
    assert failed.sum() > 0
    seen = []
    training.on_look(lambda steps, state, failures: seen.append(failures.failed))
    with caplog.at_level(logging.WARNING):
        record, _ = training.step()
    assert record["phase"] == LEARNING and record["window"] == 1
    assert seen[-1][failed].all(), "a rewound replica did not fail again"
    assert record["unstable_fraction"] >= float(failed.double().mean())
    assert not caplog.records


def start_elsewhere(training):
    """At rest, with other noise: few of those that had failed do so again."""
    pool = training.pools[0]
    pool.replicas = pool.replicas.replace(momenta=0.0 * pool.replicas.momenta, step=torch.full_like(pool.replicas.step, 10**6))


def test_fresh_noise_after_the_rewind_is_noticed(caplog):
    """The control of the test above: with other streams few failures come back, and the log says so."""
    training = loop(window_fs=10.0, upper_fraction=0.3, max_simulation_windows=40)
    until_learning(training)
    failed = training.pools[0].failed.clone()
    start_elsewhere(training)
    with caplog.at_level(logging.WARNING):
        record, _ = training.step()
    assert record["unstable_fraction"] < 0.5 * float(failed.double().mean())
    assert "did so again" in caplog.text


@pytest.mark.parametrize("thermostat", THERMOSTATS, ids=lambda t: t["thermostat"])
def test_failed_replicas_are_rewound_and_the_others_go_on(thermostat):
    training = loop(**thermostat, random_resets=0.0, upper_fraction=1.0)
    before = training.pools[0].replicas
    training.step()
    after, n = training.pools[0].replicas, training.config.dynamics.steps(training.config.phases.window_fs)
    failed = training.pools[0].failed.clone()
    assert 0 < failed.sum() < len(failed)
    assert same_state(after.select(failed.nonzero()[:, 0]), before.select(failed.nonzero()[:, 0]))
    assert (after.step[~failed] == before.step[~failed] + n).all()
    training.step()
    assert same_state(training.pools[0].replicas.select(failed.nonzero()[:, 0]), before.select(failed.nonzero()[:, 0]))


def test_learning_resets_every_replica_to_the_start_of_the_phase():
    training = loop(max_learning_windows=3, lower_fraction=0.0)
    until_learning(training)
    start = training.pools[0].replicas
    training.step()
    training.step()
    assert training.progress.phase == LEARNING and same_state(training.pools[0].replicas, start, but=("forces", "potential_energy"))
    fresh = PotentialForces(training.potential)(training.pools[0].replicas.batch)  # of the weights as they are now
    assert torch.equal(fresh[1], training.pools[0].replicas.forces) and not torch.equal(start.forces, training.pools[0].replicas.forces)
    seen = []
    training.on_look(lambda steps, state, failures: seen.append(failures.failed))
    training.step()
    assert training.progress.phase == SIMULATION
    n, failed = training.config.dynamics.steps(training.config.phases.window_fs), seen[-1]
    assert failed.any() and not failed.all()
    assert torch.equal(training.pools[0].replicas.step[~failed], start.step[~failed] + n)  # they go on from the end of the last window
    assert (training.pools[0].replicas.step[failed] == 0).all()  # those that failed in it begin afresh
    assert not torch.isin(training.pools[0].replicas.key[failed], start.key).any()
    assert not training.pools[0].failed.any()


def test_learning_lets_broken_replicas_run_on_and_simulation_does_not():
    training = loop(escape_factor=100.0)
    running = []
    training.on_look(lambda steps, state, failures: running.append((state.n_systems, int(failures.failed.sum()))))
    records, _ = until_learning(training)
    assert len(records) == 1 or running[0][0] == 12
    ran, failed = zip(*running)
    assert min(ran) < 12 and failed[-1] > 0
    running.clear()
    training.step()
    assert running[-1][1] > 0 and all(n == 12 for n, _ in running)


def test_learning_stops_replicas_that_escaped():
    training = loop(escape_factor=1.0)
    until_learning(training)
    running = []
    training.on_look(lambda steps, state, failures: running.append((state.n_systems, int(failures.failed.sum()))))
    training.step()
    assert all(12 - n <= n_failed for n, n_failed in running) and running[-1][1] > 0
    assert running[-1][0] < 12


def test_phases_end_at_their_shares():
    training = loop(upper_fraction=0.25)
    records, _ = until_learning(training)
    assert records[-1]["unstable_fraction"] >= 0.25 and all(r["unstable_fraction"] < 0.25 for r in records[:-1])
    training = loop(window_fs=10.0, lower_fraction=0.29, upper_fraction=0.3, max_simulation_windows=40)
    until_learning(training)
    start_elsewhere(training)
    record, _ = training.step()
    assert record["unstable_fraction"] <= 0.29 and "updates" not in record  # nothing to learn: no update
    assert training.progress.phase == SIMULATION and training.progress.cycle == 1


def test_a_stable_model_ends_the_loop():
    training = loop(potential=tiny.truth(), criterion="bonds:1.0", max_simulation_windows=2)
    training.step()
    record, _ = training.step()
    assert training.progress.phase == FINISHED and record["unstable_fraction"] == 0.0


def test_random_resets_use_streams_of_their_own():
    training = loop(random_resets=1.0)
    before = training.pools[0].replicas
    training.step()
    assert not torch.isin(training.pools[0].replicas.key, before.key).any()
    keys = training.pools[0].replicas.key
    assert len(keys.unique()) == len(keys)


def test_budgets():
    training = loop(max_time_min=0.0)
    assert not training.finished
    training.step()
    assert training.finished
    training = loop(max_updates=1, updates_per_window=1)
    until_learning(training)
    training.step()
    assert training.finished and training.progress.updates == 1


def test_time_runs_out_within_a_window_too(monkeypatch):
    training = loop(min_ess_fraction=0.0, updates_per_window=3)
    until_learning(training)
    seen = []
    training.on_look(lambda steps, state, failures: seen.append(training.seconds - training.progress.seconds))
    monkeypatch.setattr(training.work, "seconds_left", lambda: 0.0)
    monkeypatch.setattr(training, "_seconds_left", lambda: 0.0)
    training.step()
    assert training.finished and training.progress.updates == 1
    assert 0.0 < seen[0] < seen[-1]  # so that a bar moves while a long window runs


# -- learning


def learned(**changes):
    """A training after one update, and everything that went into the update."""
    training = loop(updates_per_window=1, min_ess_fraction=0.0, **changes)
    until_learning(training)
    before, captured = weights(training), {}
    real = training.pools[0].learn

    def spy(**settings):
        found = real(**settings)
        captured["trajectory"] = found[1]
        return found

    training.pools[0].learn = spy
    training.step()
    return training, before, captured["trajectory"]


def severities(training, frames):
    """Of frames, by all criteria of a training; they have no momenta."""
    return look(initial_state(frames, PotentialForces(tiny.truth()), 1e-3), training.pools[0].condition.criteria).severity


def qm_gradient(training, before):
    """∇L_QM on the first minibatch, by hand, at the weights before the update."""
    potential, config = tiny.model(), training.config
    potential.load_state_dict(before)
    chosen = minibatch(len(training.work.labelled), config.labels.qm_batch_size, config.seed, 0)
    training.work.loss(potential, training.work.labelled.select(chosen)).backward()
    return potential


def control(**changes):
    """A loop without the observable after one update of one step, and the weights before."""
    training = loop(qm_steps=1, update="labels-only", **changes)
    before = weights(training)
    training.step()
    return training, before


def test_without_the_observable_an_update_is_an_adam_step_on_energies_and_forces():
    training, before = control(learning_rate=2e-4, gradient_clip=1e-3)
    by_hand, config = qm_gradient(training, before), training.config
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), config.update.gradient_clip)
    assert norm > config.update.gradient_clip  # so that clipping is part of the test
    rate = 0.75 * config.labels.learning_rate  # a single step is in the middle of its run
    torch.optim.Adam(by_hand.parameters(), lr=rate, betas=(0.9, 0.99)).step()
    moved = 0.0
    for name, x in by_hand.state_dict().items():
        torch.testing.assert_close(training.potential.state_dict()[name], x, rtol=0, atol=1e-9)
        moved = max(moved, float((x - before[name]).abs().max()))
    assert moved == pytest.approx(rate, rel=1e-2)


def test_the_learning_rate_of_an_update_rises_and_falls_to_zero():
    """Linearly in the first quarter, as a cosine in the rest."""
    training, rates = loop(qm_steps=16, update="labels-only"), []
    training.rule.steps.calibrate()
    real = training.rule.steps.optimizer.step
    training.rule.steps.optimizer.step = lambda: (rates.append(training.rule.steps.optimizer.param_groups[0]["lr"]), real())
    training.step()
    expected = [*np.array([1, 3, 5, 7]) / 8, *(1 + np.cos(np.pi * (np.arange(12) + 0.5) / 12)) / 2]
    np.testing.assert_allclose(np.array(rates) / 1e-4, expected, rtol=1e-9)


def test_without_the_observable_no_dynamics_are_run():
    training = loop(update="labels-only", max_updates=3)
    while not training.finished:
        record, unstable = training.step()
        assert not unstable
    assert record["updates"] == training.progress.updates == 3 and training.md_steps == 0
    assert training.candidates().keys() <= {"start", "last"}


@pytest.mark.parametrize("rate, kept", [(1e-4, True), (0.3, False)])
def test_a_control_that_time_has_cut_short_is_no_worse_for_it(rate, kept, monkeypatch):
    """A run of a few steps at the rate of a long one spoils what the runs before have reached."""
    training = loop(qm_steps=4, update="labels-only")
    monkeypatch.setattr(training.work, "out_of_time", lambda: True)
    monkeypatch.setattr(training.rule.steps, "calibrate", lambda: None)
    training.rule.steps.rate = rate
    before, was = weights(training), training.accuracy.measure(training.potential).force_mae
    record, _ = training.step()
    same = all(torch.equal(x, before[name]) for name, x in weights(training).items())
    assert same is not kept and training.progress.taken_back == int(not kept)
    assert record["force_mae_eV_per_A"] == training.accuracy.measure(training.potential).force_mae <= was * (1.0 + 1e-12)


@pytest.mark.parametrize("within", [False, True])
def test_without_energies_and_forces_an_update_is_a_step_down_the_estimator(within, monkeypatch):
    """The change of the weights against -β Cov(g, ∂U/∂θ) contracted with ∂L/∂ḡ, sample by sample, of all or within trajectories."""
    monkeypatch.setattr(natural, "is_noise", lambda known: False)  # so few samples are
    changes = {"observable_weight": 1e-3, "natural_iterations": 0, "near_factor": 1.5, "within_trajectories": within, "winsorized": False}
    training, before, trajectory = learned(qm_steps=0, **changes)
    potential, config = tiny.model(), training.config
    potential.load_state_dict(before)
    frames, frame, replica = trajectory.frames()
    (target,) = training.pools[0].condition.targets
    values = target.observable(frames)
    severity = severities(training, frames)
    stable = (severity <= 1.0).nonzero()[:, 0]
    assert 0 < len(stable) < len(values)
    known = torch.cat([target.observable(AtomsBatch.from_atoms(training.pools[0].condition.starts)), values[stable]])
    loss_weights = fluctuation_weights(known, target.observable.measure, config.fluctuation_floor(whole=True))
    residual = 2.0 * loss_weights * (values.mean(dim=0) - target.value)
    near = (severity <= config.estimator.near_factor).nonzero()[:, 0]
    assert len(stable) < len(near) < len(values)
    averages = trajectory_averages(values, frame, replica, config.half_width(True))[near]
    mine = (replica[near] == replica[near][:, None]) | (not within)
    sizes = mine.sum(dim=1)
    scores = (averages - mine.double() @ averages / sizes[:, None]) @ residual * sizes / (sizes - 1)
    beta = 1.0 / (tiny.units.kB * config.dynamics.temperature_K)
    energies = potential(frames, neighbor_list(frames, potential.cutoff))
    torch.testing.assert_close(energies.detach(), trajectory.potential_energy[frame, replica], rtol=1e-5, atol=1e-4)
    (-beta / len(near) * (scores * energies[near]).sum()).backward()
    used = [(name, p) for name, p in potential.named_parameters() if p.grad is not None]
    after = weights(training)
    step, gradient = (
        torch.cat([x.detach().flatten().double() for x in tensors])
        for tensors in zip(*((after[name] - before[name], p.grad) for name, p in used))
    )
    assert float(-step @ gradient / step.norm() / gradient.norm()) == pytest.approx(1.0, abs=1e-4)


def test_a_step_changes_the_forces_by_a_share_of_their_error():
    """Over labelled and stable frames that took no part in the direction, as the loss of energies and forces counts it."""
    training, before, trajectory = learned(qm_steps=0, observable_weight=0.02, natural_iterations=5)
    potential, config = tiny.model(), training.config
    potential.load_state_dict(before)
    frames, _, _ = trajectory.frames()
    stable = (severities(training, frames) <= 1.0).nonzero()[:, 0]
    changes = []
    for batch, n in ((training.work.labelled.batch, len(training.work.labelled)), (frames.select(stable), len(stable))):
        batch = batch.select(minibatch(n, config.labels.qm_batch_size, config.seed, 1))
        old = potential.compute(batch, neighbor_list(batch, potential.cutoff))
        changes.append(training.work.loss(training.potential, LabelledFrames(batch, old.energies, old.forces.double())).item())
    assert np.mean(changes) ** 0.5 == pytest.approx(0.02 * FIRST_STEP_FRACTION * training.accuracy.start_rmse, rel=0.05)


def lesson(monkeypatch, max_raise_kT, updates_per_window):
    """What a window's updates have told, and by how many kT what the gradient wants rarer rose beside the rest, by hand."""
    monkeypatch.setattr(natural, "MAX_RAISE_KT", max_raise_kT)
    monkeypatch.setattr(natural, "TOLD_KT", 0.5 * max_raise_kT)
    training = loop(qm_steps=0, observable_weight=0.3, updates_per_window=updates_per_window, force_error_bound=100.0, min_ess_fraction=0.0)
    until_learning(training)
    pool = training.pools[0]
    samples = Samples.from_trajectory(pool.learn()[1], [target.observable for target in pool.condition.targets])
    estimate = find(training.work, pool.condition, samples)[0].estimate
    info = training.rule.apply_([(pool.condition, samples)])
    rise = (potential_energies(training.potential, estimate.samples.frames) - estimate.samples.energies).numpy()
    weights = estimate.weights.numpy()
    up, down = (np.average(rise[part], weights=weights[part] ** 2) for part in (weights < 0, weights > 0))
    return info, (up - down) / (units.kB * tiny.TEMPERATURE)


def test_a_step_lifts_failures_no_farther_than_samples_tell(monkeypatch):
    """And with that the window's updates end; where it does not bind, they go on."""
    far, by_hand = lesson(monkeypatch, 1e9, 1)
    assert far.figures["raised_kT"] == pytest.approx(by_hand, rel=1e-3) and by_hand > 0.2
    near, by_hand = lesson(monkeypatch, 0.1 * by_hand, 5)
    assert near.figures["raised_kT"] == pytest.approx(by_hand, rel=1e-3) == pytest.approx(natural.MAX_RAISE_KT, rel=0.2)
    assert near.updates == 1 and near.taken_back == 0
    assert lesson(monkeypatch, 1e9, 3)[0].updates == 3


def test_a_step_taken_back_is_half_as_long_as_it_was(monkeypatch):
    """Not half of the longest one, where it was shorter than that for what it lifts: it would be tried again as it was."""
    monkeypatch.setattr(natural, "MAX_RAISE_KT", 0.02)
    training = loop(force_error_bound=0.05, updates_per_window=3, observable_weight=0.3)
    until_learning(training)
    force_error_becomes(training, 1.2, monkeypatch)
    parts, shorten = [], training.rule._shorten
    monkeypatch.setattr(training.rule, "_shorten", lambda *given: parts.append(shorten(*given)) or parts[-1])
    training.step()
    assert len(parts) == training.progress.taken_back == 3 and parts[0] < 0.5 and parts[1:] == [1.0, 1.0]
    assert training.rule.balance == pytest.approx(max(0.125 * parts[0], MIN_BALANCE))


def test_parameters_get_gradients_in_learning_only():
    training = loop()
    parameters = list(training.potential.parameters())
    asked = []
    training.on_look(lambda steps, state, failures: asked.append(any(p.requires_grad for p in parameters)))
    until_learning(training)
    assert not any(asked) and asked
    assert all(p.grad is None and p.requires_grad for p in parameters)
    training.step()
    assert not any(asked)  # nor during the dynamics of the learning phase
    assert all(p.grad is not None and p.requires_grad for p in parameters if p.numel() and p.shape)
    assert not training.pools[0].replicas.batch.positions.requires_grad


def test_samples_left_behind_are_not_used_again():
    training = loop(min_ess_fraction=1.0, updates_per_window=3)
    until_learning(training)
    before = weights(training)
    record, _ = training.step()
    assert training.progress.updates == 1 and record["ess_fraction"] < 1.0
    assert any(not torch.equal(x, before[name]) for name, x in weights(training).items())


def test_samples_are_used_again_while_they_serve():
    training = loop(min_ess_fraction=0.0, updates_per_window=3)
    until_learning(training)
    training.step()
    assert training.progress.updates == 3


def force_error_becomes(training, fraction, monkeypatch):
    """Whatever happens, the force error is this many times the starting model's."""
    error = Growth(fraction * training.accuracy.start_mae, fraction - 1.0, 0.0, 0.0)
    monkeypatch.setattr(training.accuracy, "measure", lambda potential: error)


@pytest.mark.parametrize("fraction", [1.06, float("nan")])
def test_an_update_beyond_the_bound_of_the_force_error_is_taken_back(monkeypatch, fraction):
    """And tried again on the same samples, shorter each time."""
    training = loop(force_error_bound=0.05, updates_per_window=3)
    until_learning(training)
    before = weights(training)
    force_error_becomes(training, fraction, monkeypatch)
    training.step()
    assert training.progress.updates == training.progress.taken_back == 3 and training.rule.balance == 0.125
    assert all(torch.equal(x, before[name]) for name, x in weights(training).items())


@pytest.mark.parametrize(
    "fraction, balance",
    [(1.0, 0.6), (1.012, 0.6), (1.013, 0.5), (1.044, 0.5), (1.046, 0.35), (1.051, 0.25)],
    ids=["start", "cheap", "dear", "room", "no room", "beyond"],
)
def test_steps_grow_while_they_are_cheap_and_shrink_near_the_bound(monkeypatch, fraction, balance):
    training = loop(force_error_bound=0.05, updates_per_window=1)
    until_learning(training)
    training.rule.balance = 0.5
    force_error_becomes(training, fraction, monkeypatch)
    training.step()
    assert training.rule.balance == pytest.approx(balance)


def test_a_model_that_knows_the_frames_by_heart_is_told_early(monkeypatch, caplog):
    """Nothing is kept, so that there is nothing to compare with the start, and the remedy is named once."""
    training = loop(force_error_bound=0.05, updates_per_window=1, max_learning_windows=100)
    until_learning(training)
    force_error_becomes(training, 1.2, monkeypatch)
    for k in range(MIN_DOUBTFUL_UPDATES + 2):
        assert ("--valid FILE" in caplog.text) == (k >= MIN_DOUBTFUL_UPDATES)
        training.step()
    assert training.progress.taken_back == training.progress.updates == MIN_DOUBTFUL_UPDATES + 2
    assert caplog.text.count("--valid FILE") == 1
    assert training.unchanged and list(training.candidates()) == ["start"]


def test_growth_of_the_force_error_is_an_upper_limit():
    """The end of the central interval of 80 % of the mean difference frame by frame, by scipy."""
    training = loop(force_error_confidence=0.9)
    start = training.accuracy.measure(training.potential)
    assert start == (training.accuracy.start_mae, 0.0, float(training.accuracy.start_energies.mean()), 0.0)
    before = force_errors_by_frame(training.potential, training.accuracy.frames)
    with torch.no_grad():
        for p in training.potential.parameters():
            p.mul_(1.0 + 0.02 * torch.randn_like(p))
    after = force_errors_by_frame(training.potential, training.accuracy.frames)
    differences = (after - before).numpy()
    error, growth, _, _ = training.accuracy.measure(training.potential)
    assert error == pytest.approx(float(after.mean())) and len(after) == 8
    _, limit = student_t.interval(0.8, len(after) - 1, differences.mean(), sem(differences))
    assert growth == pytest.approx(limit / float(before.mean())) and growth > (after.mean() / before.mean() - 1.0)


def test_steps_have_a_longest_and_a_shortest_length(monkeypatch):
    training = loop(force_error_bound=0.05, updates_per_window=1)
    until_learning(training)
    for fraction, balance in ((1.0, MAX_BALANCE), (1.047, MIN_BALANCE), (1.06, MIN_BALANCE)):
        training.progress.phase, training.rule.balance = LEARNING, balance
        force_error_becomes(training, fraction, monkeypatch)
        training.step()
        assert training.rule.balance == balance


def test_a_window_without_frames_is_survived(caplog):
    """All replicas break before the first frame is kept: nothing to learn from, but no reason to stop for good."""
    training = loop(replicas=2, sample_every_fs=30.0, escape_factor=1.0, criterion="bonds:0.1", lower_fraction=0.0)
    training.pools[0].replicas = training.pools[0].replicas.replace(momenta=3.0 * training.pools[0].replicas.momenta)
    until_learning(training)
    before = weights(training)
    with caplog.at_level(logging.WARNING):
        record, _ = training.step()
    assert record["unstable_fraction"] == 1.0 and record["n_samples"] == 0 and "too few to learn from" in caplog.text
    assert all(torch.equal(x, before[name]) for name, x in weights(training).items())
    assert training.progress.phase == SIMULATION  # the same window again would tell as little


def test_a_window_without_a_sound_frame_is_learned_from():
    """A model so bad that all it visits is beyond the tolerance; the reference alone then tells what fluctuates."""
    training = loop()
    until_learning(training)
    pool = training.pools[0]
    samples = training._samples(pool.condition, pool.learn()[1])
    broken = replace(samples, severity=samples.severity.clamp(min=1.5))
    (found,) = find(training.rule.work, pool.condition, broken)
    weights = found.estimate.weights
    assert bool(torch.isfinite(weights).all()) and float(weights.abs().sum()) > 0.0



def test_an_observable_without_gradient_changes_nothing():
    """Steps on energies and forces alone would cost their time and tell nothing; the next simulation phase begins."""
    training = loop()
    until_learning(training)
    before, pool = weights(training), training.pools[0]
    same = torch.ones((4, len(pool.condition.targets[0].value)), dtype=torch.float64)
    info = training.rule.apply_([(pool.condition, samples_of({"hr": same}, frames=AtomsBatch.from_atoms(pool.condition.starts[:4])))])
    assert info.updates == 0 and all(torch.equal(x, before[name]) for name, x in weights(training).items())


def test_validation_frames_are_not_trained_on():
    training = loop()
    trained, held_out = (
        {tuple(a.positions.ravel()) for a in part.batch.to_atoms()} for part in (training.work.labelled, training.accuracy.frames)
    )
    assert (len(trained), len(held_out)) == (32, 8) and not trained & held_out


# -- the best state


def remembered(monkeypatch, hazards, force_maes, bound=0.05):
    """Cycles of the best state when simulation phases measure these hazards at these force errors."""
    training = loop(force_error_bound=bound)
    best = []
    for cycle, (hazard, error) in enumerate(zip(hazards, force_maes)):
        monkeypatch.setattr(training, "_hazard", lambda h=hazard: h)
        monkeypatch.setattr(training.accuracy, "measure", lambda potential, e=error: Growth(e, e - 1.0, 0.0, 0.0))
        training.progress.cycle = cycle
        with torch.no_grad():
            training.potential.network.lin1.weight.fill_(float(cycle))
        training._remember_if_best()
        best.append(training.best["cycle"])
        assert float(training.best["weights"]["network.lin1.weight"][0, 0]) == best[-1]
    return best


def test_the_best_is_the_lowest_hazard_within_the_force_bound(monkeypatch):
    assert remembered(monkeypatch, [2.0, 1.0, 1.5, 0.5], [1.0, 1.0, 1.0, 1.0]) == [0, 1, 1, 3]
    assert remembered(monkeypatch, [2.0, 1.0, 0.1, 0.5], [1.0, 1.04, 1.06, 1.049]) == [0, 1, 1, 3]
    assert remembered(monkeypatch, [2.0, 1.0, 0.1], [1.0, 1.04, 1.06], bound=0.1) == [0, 1, 2]


def test_candidates(monkeypatch):
    training = loop()
    assert set(training.candidates()) == {"start"}
    training.progress.updates = 3
    force_error_becomes(training, 1.04, monkeypatch)
    assert set(training.candidates()) == {"start", "last"}
    force_error_becomes(training, 1.06, monkeypatch)
    training.best["cycle"] = 2
    assert set(training.candidates()) == {"start", "best"}


# -- what it reports


def test_unstable_frames_tell_who_when_and_why():
    training = loop(check_every_fs=1.0)
    _, unstable = until_learning(training)
    assert len(unstable) == int(training.pools[0].failed.sum()) > 0
    frames = training.pools[0].condition.starts
    criterion = BondLengthDeviation.from_reference(frames, 0.3)
    lengths = {tuple(b): float(r) for b, r in zip(criterion.bonds.T.tolist(), criterion.lengths)}
    assert sorted(a.info["replica"] for a in unstable) == training.pools[0].failed.nonzero()[:, 0].tolist()
    for atoms in unstable:
        blamed = tuple(np.flatnonzero(atoms.get_tags() == 1))
        assert len(blamed) == 2 and set(atoms.get_tags()) == {0, 1}
        deviations = {bond: abs(atoms.get_distance(*bond) - r) for bond, r in lengths.items()}
        assert max(deviations, key=deviations.get) == blamed
        assert atoms.info["value"] == pytest.approx(deviations[blamed], abs=1e-9)
        assert atoms.info["value"] > 0.3 and atoms.info["criterion"] == "bonds" and atoms.info["cycle"] == 0
        assert atoms.info["time_ps"] > 0


def test_time_of_failure_counts_from_the_start_of_the_stream():
    training = loop(check_every_fs=1.0, random_resets=0.0, upper_fraction=1.0)
    unstable = [atoms for _ in range(3) for atoms in training.step()[1]]
    for atoms in unstable:
        whole = int(training.pools[0].replicas.step[atoms.info["replica"]])  # rewound to the start of that window
        assert whole * 1e-3 < atoms.info["time_ps"] <= (whole + 30) * 1e-3 + 1e-12
    assert max(a.info["time_ps"] for a in unstable) > 0.03


def test_a_replica_that_is_not_finite_is_reported_without_blame():
    training = loop(random_resets=0.0)
    momenta = training.pools[0].replicas.momenta.clone()
    momenta[:4] = torch.inf
    training.pools[0].replicas = training.pools[0].replicas.replace(momenta=momenta)
    _, unstable = training.step()
    lost = next(a for a in unstable if a.info["replica"] == 0)
    assert lost.info["criterion"] == "not finite" and not lost.get_tags().any()
    assert np.isfinite(lost.positions).all()


def test_hazard_of_a_phase():
    training = loop()
    records, unstable = until_learning(training)
    md_ps = records[-1]["md_replica_ps"]
    # Without resets, what was simulated is what was stable: replicas stop at their failure.
    assert records[-1]["hazard_per_ps"] == pytest.approx((len(unstable) + 0.5) / md_ps)
    assert md_ps <= len(records) * 12 * 0.03


# -- state


def test_state_is_plain_and_restores_exactly(tmp_path):
    one = loop()
    until_learning(one)
    one.step()
    torch.save(one.state(), tmp_path / "state.pt")
    other = loop()
    other.step()  # nothing of its own past may be left over
    other.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(4):
        a, b = one.step(), other.step()
        assert a[0] == b[0]
        assert [x.positions.tolist() for x in a[1]] == [x.positions.tolist() for x in b[1]]
    assert all(torch.equal(x, weights(other)[name]) for name, x in weights(one).items())
    assert same_state(one.pools[0].replicas, other.pools[0].replicas)


def test_reference_is_left_alone():
    reference = tiny.reference()
    before = copy.deepcopy(reference)
    training = loop()
    until_learning(training)
    training.step()
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(training.pools[0].condition.starts, before.frames))
    assert all(isinstance(a.calc, SinglePointCalculator) for a in training.pools[0].condition.starts)


# -- several conditions


def two_temperatures(update="natural", **changes):
    """The tetrahedron at 600 K and at 450 K, each with a target of its own, and one model."""
    config, reference = tiny.config(update=update, **changes), tiny.reference()
    torch.manual_seed(0)
    potential = tiny.model()
    hr = DistanceDistribution.from_reference(reference.frames)
    conditions = []
    for temperature, frames in ((600.0, reference.frames), (450.0, reference.frames[:20])):
        criteria = criteria_from(config.criterion, Setting(frames, temperature))
        targets = [Target.from_frames(hr, frames)]
        conditions.append(Condition(StatePoint(temperature), frames, targets, criteria, config.dynamics.integrator, 6))
    labels = [LabelledFrames.from_reference(part) for part in reference.split()]
    return TrainingLoop(potential, conditions, *labels, config)


def test_two_temperatures_are_trained_at_once():
    """Each pool has its bath, its streams and its failures; an update takes the samples of both."""
    training = two_temperatures()
    assert [float(pool.replicas.temperature[0]) for pool in training.pools] == [600.0, 450.0]
    assert not torch.isin(training.pools[0].replicas.key, training.pools[1].replicas.key).any()
    records, unstable = until_learning(training)
    failed = [int(pool.failed.sum()) for pool in training.pools]
    assert records[-1]["unstable_fraction"] == sum(failed) / 12 and min(failed) > 0
    assert {atoms.info["temperature_K"] for atoms in unstable} == {600.0, 450.0}
    seen, real = [], training.rule.apply_
    training.rule.apply_ = lambda windows: (seen.append(windows), real(windows))[1]
    record, _ = training.step()
    assert [condition.point.temperature_K for condition, _ in seen[0]] == [600.0, 450.0]
    assert record["n_samples"] == sum(len(samples) for _, samples in seen[0]) and record["updates"] > 0


def test_the_gradient_of_two_conditions_is_the_sum_of_both(monkeypatch):
    training, added = two_temperatures(updates_per_window=1), []
    until_learning(training)
    real = natural.natural_direction

    def spy(potential, *arguments, **named):
        added.append(torch.cat([p.grad.flatten().double() for p in potential.parameters()]))
        return real(potential, *arguments, **named)

    monkeypatch.setattr(natural, "natural_direction", spy)
    windows = []
    for pool in training.pools:
        windows.append((pool.condition, Samples.from_trajectory(pool.learn()[1], [pool.condition.targets[0].observable])))
    start = training._weights()
    for some in (windows, windows[:1], windows[1:]):
        training.potential.load_state_dict(start)
        training.rule.apply_(some)
    torch.testing.assert_close(added[0], added[1] + added[2], rtol=1e-5, atol=1e-8)


def test_two_temperatures_go_on_exactly():
    one = two_temperatures()
    until_learning(one)
    state = copy.deepcopy(one.state())
    other = two_temperatures()
    other.restore(state)
    for _ in range(2):
        one.step(), other.step()
    assert all(torch.equal(x, weights(other)[name]) for name, x in weights(one).items())
    assert all(same_state(a.replicas, b.replicas) for a, b in zip(one.pools, other.pools))


def test_observables_of_any_unit_count_alike():
    """A frame that is as it should be is as far off by one as by the other; in another unit the same observable changes nothing."""

    class Scaled(DistanceDistribution):
        name = "scaled"

        def values(self, batch):
            return 1e3 * super().values(batch)

    config, reference = tiny.config(), tiny.reference()
    hr = DistanceDistribution.from_reference(reference.frames)
    torch.manual_seed(0)
    observables = [hr, Scaled(hr.r_max)]
    criteria = criteria_from(config.criterion, Setting(reference.frames, tiny.TEMPERATURE))
    training = TrainingLoop.from_reference(tiny.model(), reference, observables, criteria, config)
    until_learning(training)
    pool = training.pools[0]
    samples = Samples.from_trajectory(pool.learn()[1], observables)
    (found,) = find(training.work, pool.condition, samples)
    assert found.estimate.losses["hr"] == pytest.approx(found.estimate.losses["scaled"], rel=1e-6)
    alone = found.estimator(samples, found.targets[:1])
    torch.testing.assert_close(found.estimate.weights, 2 * alone.weights, rtol=1e-6, atol=1e-12)


# -- the published recipe


def test_the_penalized_gradient_is_one_step_on_both_losses():
    """By hand: ∇(Σ L_obs + λ L_QM), clipped, times the learning rate."""
    training = loop(update="penalized:sgd,learning_rate=0.01,penalty=0.5", gradient_clip=1e9)
    until_learning(training)
    (target,), pool = training.pools[0].condition.targets, training.pools[0]
    samples = Samples.from_trajectory(pool.learn()[1], [target.observable])
    by_hand, before = copy.deepcopy(training.potential), weights(training)
    values, energies = samples.values["hr"], by_hand(samples.frames, neighbor_list(samples.frames, by_hand.cutoff))
    residual = 2.0 * target.metric * (values.mean(dim=0) - target.value)
    scores = (values - values.mean(dim=0)) @ residual
    beta = 1.0 / (tiny.units.kB * tiny.TEMPERATURE)
    labelled = training.work.labelled
    chosen = minibatch(len(labelled), training.config.labels.qm_batch_size, training.config.seed, 0)
    loss = -beta / (len(values) - 1) * (scores * energies).sum() + 0.5 * training.rule.loss(by_hand, labelled.select(chosen))
    loss.backward()
    info = training.rule.apply_([(pool.condition, samples)])
    assert info.updates == 1 and info.figures["observable_loss"] > 0
    for name, p in by_hand.named_parameters():
        torch.testing.assert_close(training.potential.get_parameter(name) - before[name], -0.01 * p.grad, rtol=2e-3, atol=1e-7)


def test_the_published_recipe_runs_and_its_steps_shrink_from_phase_to_phase():
    training = loop(update="penalized:adam,learning_rate=1e-4,decay=0.5", max_learning_windows=1)
    for _ in range(2):
        until_learning(training)
        training.step()
    assert training.progress.updates == 2 and training.progress.cycle == 2
    assert training.rule.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-4)
    other = loop(update="penalized:adam,learning_rate=1e-4,decay=0.5", max_learning_windows=1)
    other.restore(copy.deepcopy(training.state()))
    training.step(), other.step()
    assert all(torch.equal(x, weights(other)[name]) for name, x in weights(training).items())


@pytest.mark.parametrize(
    "update, message",
    [
        ("penalised", "did you mean 'penalized'"),
        ("penalized:lbfgs", "known: sgd, adam"),
        ("penalized,learning_rate=-1", "expected a positive number"),
        ("natural,step=2", "unknown option 'step'"),
        ("", "expected one update rule"),
        ("natural,labels-only", "expected one update rule"),
    ],
)
def test_update_rules_that_are_none(update, message):
    with pytest.raises(ValueError, match=message):
        loop(update=update)


# -- observables as the goal


def test_matching_moves_a_stable_model_to_its_targets():
    """Every replica teaches in each window and goes on from its end; without steps on labels only the observable can do that."""
    potential, reference = Morse(depth=3.0, a=1.8, r0=1.55), tiny.reference()
    config = tiny.config(goal="observables", qm_steps=0, max_updates=6, updates_per_window=1, observable_weight=0.6, criterion="bonds:0.6")
    setting = Setting(reference.frames, tiny.TEMPERATURE)
    observables, criteria = observables_from("bond-length", setting), criteria_from(config.criterion, setting)
    training = TrainingLoop.from_reference(potential, reference, observables, criteria, config)
    assert training.progress.phase == MATCHING and not training.finished
    records, steps = [], []
    while not training.finished:
        record, unstable = training.step()
        records.append(record)
        steps.append(training.pools[0].replicas.step.clone())
        assert not unstable
    assert {record["phase"] for record in records} == {MATCHING} and [record["cycle"] for record in records] == list(range(6))
    assert all(bool((b - a == 30).all()) for a, b in pairwise(steps))
    losses = [record["observable_loss"] for record in records]
    assert losses[-1] < 0.5 * losses[0] and abs(float(potential.r0.detach()) - tiny.BOND) < 0.04
    assert set(training.candidates()) == {"start", "best", "last"} and training.best["loss"] == min(losses)


def test_matching_is_resumed_to_the_same_bits():
    def fresh(**changes):
        config = tiny.config(goal="observables", max_updates=4, criterion="bonds:0.6", **changes)
        setting = Setting(tiny.reference().frames, tiny.TEMPERATURE)
        parts = observables_from("bond-length", setting), criteria_from(config.criterion, setting)
        return TrainingLoop.from_reference(tiny.model(), tiny.reference(), *parts, config)

    whole, begun, other = fresh(), fresh(), fresh()
    begun.step()
    other.restore(begun.state())
    for training in (whole, other):
        while not training.finished:
            training.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.potential.parameters(), other.potential.parameters()))
    assert other.best["loss"] == whole.best["loss"]


# -- the learning rate of steps on energies and forces


@pytest.mark.parametrize("rate, smaller", [(1e-5, False), (0.3, True)])
def test_a_learning_rate_that_spoils_the_model_by_itself_is_made_smaller_once(rate, smaller, caplog):
    """By thirds; weights and optimizer are as before, and what was found goes along with a saved state."""
    training = loop(learning_rate=rate, qm_steps=5)
    steps, before = training.rule.steps, weights(training)
    with caplog.at_level(logging.INFO):
        steps.calibrate()
    assert all(torch.equal(x, before[name]) for name, x in weights(training).items()) and not steps.optimizer.state_dict()["state"]
    assert any((square > 0).any() for square in steps.squares())  # what a try has told
    assert (steps.rate < rate) is smaller and ("larger ones alone spoil" in caplog.text) is smaller
    assert round(np.log(rate / steps.rate) / np.log(3), 6) in range(6)
    other = loop(learning_rate=rate, qm_steps=5)
    other.restore(training.state())
    assert other.rule.steps.rate == steps.rate
    error = training.accuracy.start_mae
    steps.run()
    assert not smaller or training.accuracy.measure(training.potential).force_mae <= 1.01 * error


def test_samples_that_are_all_alike_tell_nothing():
    """Weights are then errors of rounding, of no length but with a direction."""
    training = loop()
    (condition,) = (pool.condition for pool in training.pools)
    frames = AtomsBatch.from_atoms(condition.starts[:4])
    samples = samples_of(torch.zeros(4, 1).double(), frames=frames, severity=torch.tensor([0.5, 0.5, 0.5, 2.0]).double())
    observables = [target.observable for target in condition.targets]
    alike = {o.name: torch.linspace(0.1, 0.7, o.width).double().expand(4, -1) for o in observables}
    assert find(training.work, condition, replace(samples, values=alike)) == []
    other = {name: x + 0.01 * torch.arange(4).double()[:, None] for name, x in alike.items()}
    assert len(find(training.work, condition, replace(samples, values=other))) == 1
