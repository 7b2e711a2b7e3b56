"""The final comparison: the sequential test keeps its error rate, the verdict says what was seen, the budget holds."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Vector

import stabie_ase.runs.comparison as comparison_module
from stabie_ase.observables import Target
from stabie_ase.observables.averages import SlicedMeans
from stabie_ase.runs.comparison import TIME_STRETCHES, Comparison, Outcome, Trial, verdict, worse_stretch
from stabie_ase.runs.evaluation import StabilityResult, StabilityTest, Yardstick, failures_p_value
from stabie_ase.runs.goals import Observables, Stability
from stabie_ase.stability import StabilityStatistics
from stabie_ase.stability.sequential import ERROR_RATE, HazardComparison, replica_ps_to_tell

ROUNDS, REPLICAS, END = 12, 32, 2.0


def times(hazard, rng, power=1.0, n=REPLICAS, end=END):
    """Failures of a Weibull distribution, with a constant hazard for a power of one."""
    failures = rng.exponential(1.0, n) ** (1.0 / power) / hazard
    return StabilityStatistics(np.minimum(failures, end), failures <= end)


def decide(hazard_start, hazard_end, rng, power=1.0):
    """The evidence after as many rounds as it takes, and how many that were."""
    evidence = HazardComparison()
    for k in range(ROUNDS):  # noqa: B007 - looked at after the loop
        evidence.add(times(hazard_start, rng, power), times(hazard_end, rng, power))
        if evidence.decided:
            break
    return evidence, k + 1


@pytest.mark.parametrize("hazard, power", [(0.1, 1.0), (2.0, 1.0), (0.5, 3.0), (0.5, 0.5)])
def test_equal_models_are_told_apart_no_more_often_than_stated(hazard, power):
    """However often it is looked at, and whatever the hazard does in time: 400 runs, 5 % ± 3 standard errors of 1.1 %."""
    rng = np.random.default_rng(0)
    gained = np.mean([decide(hazard, hazard, rng, power)[0].gained for _ in range(400)])
    assert gained < ERROR_RATE + 3 * (ERROR_RATE / 400) ** 0.5


def test_a_gain_worth_having_is_ruled_out_no_more_often_than_stated():
    rng = np.random.default_rng(1)
    assert np.mean([decide(1.5, 1.0, rng)[0].hopeless for _ in range(400)]) < ERROR_RATE + 3 * (ERROR_RATE / 400) ** 0.5


def test_a_large_gain_is_seen_soon_and_none_is_given_up_on():
    rng = np.random.default_rng(2)
    runs = [decide(2.0, 0.5, rng) for _ in range(50)]
    assert all(evidence.gained for evidence, _ in runs) and np.mean([k for _, k in runs]) < 2
    assert np.mean([decide(2.0, 2.0, rng)[0].hopeless for _ in range(50)]) > 0.8


def test_evidence_by_hand():
    """Two failures among two and two at risk: the start's first, then one of the end's; ratios ρ = r against 1."""
    evidence = HazardComparison()
    evidence.add(
        StabilityStatistics(np.array([1.0, 4.0]), np.array([True, False])),
        StabilityStatistics(np.array([2.0, 4.0]), np.array([True, False])),
    )
    r = np.array([1.25, 1.5, 2.0, 3.0, 5.0, 8.0, 15.0, 30.0])
    np.testing.assert_allclose(np.exp(evidence.gain), (2 * r / (2 * r + 2) / 0.5) * (2 / (r + 2) / (2 / 3)))
    assert evidence.p_value == pytest.approx(min(1.0, 1.0 / np.exp(evidence.gain).mean()))


def test_time_to_tell():
    """By simulation: with the time it says, the exact test finds a fourfold gain in about four of five experiments."""
    time, rng = replica_ps_to_tell(0.3), np.random.default_rng(3)
    a, b = rng.poisson(0.3 * time, 2000), rng.poisson(0.075 * time, 2000)

    def result(n):
        statistics = StabilityStatistics(np.full(100, time / 100), np.arange(100) < n)
        return SimpleNamespace(statistics=statistics, causes=Counter(bonds=n))

    found = np.mean([failures_p_value(result(x), result(y)) < 0.05 for x, y in zip(a, b)])
    assert 0.65 < found < 0.9
    assert replica_ps_to_tell(0.003) == pytest.approx(100 * time) and replica_ps_to_tell(0.0) == np.inf


# -- the verdict


def result(n_failed, errors=(0.1,) * TIME_STRETCHES, n=64, causes=None, ps=128.0):
    """A test in which n_failed of n replicas failed and whose observable is off by so much in each stretch, ± 0.01 a replica."""
    rng = np.random.default_rng(n_failed)
    spread = torch.as_tensor(0.01 * rng.normal(size=(n, TIME_STRETCHES, 1)))
    observed = SlicedMeans(torch.tensor(errors, dtype=torch.float64)[:, None] + spread, torch.ones((n, TIME_STRETCHES), dtype=torch.int64))
    statistics = StabilityStatistics(np.full(n, ps / n), np.arange(n) < n_failed)
    whole = torch.ones((n, TIME_STRETCHES), dtype=torch.bool)
    return StabilityResult(statistics, Counter(causes or {"bonds": n_failed}), [], {"hr": observed}, whole)


TARGET = Target(Vector(1, "hr"), torch.zeros(1, dtype=torch.float64), floor=0.04, n_frames=36)  # of 64 replicas: 0.05
TRIALS = [Trial("500 K", [], Yardstick([], [TARGET]), StabilityTest(500.0, seed=7))]


def outcome(start, end):
    evidence = HazardComparison()
    evidence.add(start.statistics, end.statistics)
    return Outcome({"500 K": start}, {"500 K": end}, "last", evidence, 1)


@pytest.mark.parametrize(
    "start, end, gained, words",
    [
        (40, 5, True, "more stable: 0.312 -> 0.0391"),
        (40, 38, False, "No gain"),
        (5, 40, False, "ruled out"),
        (0, 0, False, "did not fail once"),
        (0, 10, False, "did not fail once"),
        (2, 0, False, "No gain"),  # chance
    ],
)
def test_verdict(start, end, gained, words):
    found, message = verdict(outcome(result(start), result(end)), TRIALS, ["bonds"])
    assert found is gained and words in message


@pytest.mark.parametrize(
    "errors, worse",
    [
        ((0.1, 0.1, 0.1, 0.1), None),
        ((0.1, 0.1, 0.2, 0.1), "part 3 of 4"),
        ((0.01, 0.04, 0.04, 0.04), None),
        ((0.1, np.nan, 0.1, 0.1), "part 2 of 4 of the time it is not finite"),
        ((0.1, 0.1, 0.1, np.inf), "part 4 of 4 of the time it is not finite"),
    ],
)
def test_an_observable_that_got_worse_in_any_stretch_of_time_is_no_gain(errors, worse):
    start, end = result(40), result(5, errors)
    assert (worse_stretch(start, end, TARGET) is None) is (worse is None)
    gained, message = verdict(outcome(start, end), TRIALS, ["bonds"])
    assert gained is (worse is None) and (worse is None or worse in message)


def test_an_observable_that_is_not_finite_in_either_model_tells_nothing():
    assert worse_stretch(result(40, (np.nan,) * 4), result(5, (np.nan,) * 4), TARGET) is None


def test_a_mean_over_few_replicas_has_a_floor_of_its_own():
    """Independent samples of n and m frames of one distribution differ by √(1 + n/m) times what n and infinitely many do."""
    generator, n, m = torch.Generator().manual_seed(0), 40, 10
    few, fewer = (torch.randn(4000, k, generator=generator).mean(dim=1) for k in (n, m))
    target = Target(Vector(1), torch.zeros(1), float(few.abs().mean()), n)
    assert target.floor_of(m) == pytest.approx(float((few - fewer).abs().mean()), rel=0.05)
    assert target.floor_of(10**9) == pytest.approx(target.floor)


def test_beneath_the_floor_nothing_is_worse():
    assert worse_stretch(result(40, (0.0,) * 4), result(5, (0.045,) * 4), TARGET) is None
    assert worse_stretch(result(40, (0.0,) * 4), result(5, (0.06,) * 4), TARGET)


def test_criteria_that_training_did_not_use_have_their_say():
    start, moved = result(50, causes={"bonds": 48, "distribution": 2}), result(15, causes={"distribution": 15})
    gained, message = verdict(outcome(start, moved), TRIALS, ["bonds"])
    assert gained and "(distribution) became more frequent: 0.0156 -> 0.117" in message
    few = result(12, causes={"bonds": 10, "distribution": 2})
    assert "distribution" not in verdict(outcome(start, few), TRIALS, ["bonds"])[1]
    start, same = result(50, causes={"bonds": 43, "distribution": 7}), result(12, causes={"bonds": 6, "distribution": 6})
    assert "no gain can be told from chance" in verdict(outcome(start, same), TRIALS, ["bonds"])[1]
    everywhere = result(3, causes={"bonds": 3})
    start = result(50, causes={"bonds": 30, "distribution": 20})
    assert "distribution" not in verdict(outcome(start, everywhere), TRIALS, ["bonds"])[1]


# -- several state points


TWO = [Trial(f"{temperature:g} K", [], Yardstick([], [TARGET]), StabilityTest(temperature)) for temperature in (350.0, 700.0)]


def over_both(start, end):
    """An outcome of two trials from pairs of results."""
    evidence = HazardComparison()
    for a, b in zip(start, end):
        evidence.add(a.statistics, b.statistics)
    return Outcome(dict(zip(("350 K", "700 K"), start)), dict(zip(("350 K", "700 K"), end)), "last", evidence, 1)


def test_several_state_points_count_together():
    gained, message = verdict(over_both((result(10), result(60)), (result(5), result(20))), TWO, ["bonds"])
    assert gained and "0.273 -> 0.0977" in message


def test_failures_that_moved_to_another_state_point_are_no_gain():
    gained, message = verdict(over_both((result(2), result(60)), (result(15), result(10))), TWO, ["bonds"])
    assert not gained and "more of them at 350 K" in message


def test_an_observable_that_got_worse_at_one_state_point_is_no_gain():
    bad = result(20, (0.1, 0.1, 0.2, 0.1))
    gained, message = verdict(over_both((result(10), result(60)), (result(5), bad)), TWO, ["bonds"])
    assert not gained and "hr error grew at 700 K: in part 3 of 4" in message


def test_state_points_are_strata():
    """A model that fails more often at one state point, and had more replicas there, is not taken for the worse one."""
    rng = np.random.default_rng(4)
    gained = []
    for _ in range(400):
        evidence = HazardComparison()
        for hazard, n_start, n_end in ((0.05, 16, 64), (2.0, 64, 16)):
            evidence.add(times(hazard, rng, n=n_start), times(hazard, rng, n=n_end))
        gained.append(evidence.gained)
    assert np.mean(gained) < ERROR_RATE + 3 * (ERROR_RATE / 400) ** 0.5


# -- rounds and budget


def compared(monkeypatch, failures, seconds=1e9, cost=0.0, most_rounds=10, errors=None, goal=None):
    """The outcome, and which model ran with which seed, if a model fails so many times in every round and is off by so much."""
    ran, clock = [], [0.0]

    def fake(potential, frames, yardstick, test, on_look):
        ran.append((potential.name, test.seed))
        clock[0] += cost
        return result(failures[potential.name], [(errors or {}).get(potential.name, 0.1)] * TIME_STRETCHES)

    potential = SimpleNamespace(name=None)
    potential.load_state_dict = lambda weights: setattr(potential, "name", weights["name"])
    monkeypatch.setattr(comparison_module, "run_stability_test", fake)
    monkeypatch.setattr(comparison_module.time, "monotonic", lambda: clock[0])
    comparison = Comparison(potential, TRIALS, seconds, most_rounds, goal or Stability(TRIALS))
    return comparison.run({name: {"name": name} for name in failures}), ran


def test_it_ends_when_the_answer_is_known(monkeypatch):
    found, ran = compared(monkeypatch, {"start": 60, "last": 5})
    assert found.rounds == 1 and ran == [("start", 7), ("last", 7)] and found.chosen == "last"


def test_it_goes_on_with_other_seeds_until_then(monkeypatch):
    found, ran = compared(monkeypatch, {"start": 6, "last": 2})
    assert 1 < found.rounds < 10 and found.evidence.gained
    assert ran == [(name, 7 + k) for k in range(found.rounds) for name in ("start", "last")]
    start, end = (results["500 K"].statistics for results in (found.start, found.end))
    assert start.n_failed == 6 * found.rounds and len(end.failed) == 64 * found.rounds


def test_no_round_is_begun_that_would_end_beyond_the_budget(monkeypatch):
    found, _ = compared(monkeypatch, {"start": 1, "last": 1}, seconds=700.0, cost=100.0)
    assert found.rounds == 3 and not found.evidence.decided
    assert compared(monkeypatch, {"start": 1, "last": 1}, most_rounds=4)[0].rounds == 4


def test_the_better_candidate_is_found_by_replicas_that_count_for_nothing_else(monkeypatch):
    found, ran = compared(monkeypatch, {"start": 60, "best": 20, "last": 5})
    assert found.chosen == "last" and [name for name, _ in ran] == ["best", "last", "start", "last"]
    seeds = [seed for _, seed in ran]
    assert seeds[0] == seeds[1] and seeds[2] == seeds[3] == 7 and seeds[0] != 7


def test_a_start_without_candidates_is_measured_once(monkeypatch):
    found, ran = compared(monkeypatch, {"start": 3})
    assert found.chosen == "start" and ran == [("start", 7)] and found.end is found.start


# -- observables as the goal


NEARNESS = Observables(TRIALS)


@pytest.mark.parametrize(
    "start, end, gained, words",
    [
        (result(0), result(1, (0.05,) * 4), True, "nearer to their targets: hr 0.1"),
        (result(0), result(0, (0.0999,) * 4), False, "No observable nearer"),
        (result(0), result(0, (0.15,) * 4), False, "No observable nearer"),
        (result(0), result(20, (0.05,) * 4), False, "failures became more frequent, 0 -> 0.156"),
        (result(0), result(0, (np.nan,) * 4), False, "No observable nearer"),
        (result(0, (np.nan,) * 4), result(0), False, "No observable nearer"),
    ],
)
def test_a_run_for_observables_is_judged_by_them(start, end, gained, words):
    found, message = NEARNESS.verdict(outcome(start, end), ["bonds"])
    assert found is gained and words in message
    assert (NEARNESS.p_value(outcome(start, end)) < 0.025) or not gained


def test_nearer_on_the_whole_and_farther_by_one_is_no_gain():
    other = Target(Vector(1, "rdf"), torch.zeros(1, dtype=torch.float64))
    trials = [replace(TRIALS[0], yardstick=Yardstick([], [TARGET, other]))]

    def both(hr, rdf):
        found = result(0, (hr,) * TIME_STRETCHES)
        return replace(found, observed=found.observed | {"rdf": result(1, (rdf,) * TIME_STRETCHES).observed["hr"]})

    gained, message = Observables(trials).verdict(outcome(both(0.1, 0.1), both(0.01, 0.12)), [])
    assert not gained and "but not by rdf" in message
    assert Observables(trials).verdict(outcome(both(0.1, 0.1), both(0.05, 0.1)), [])[0]


def test_a_chance_difference_of_observables_is_rarely_taken_for_a_gain():
    """One in forty at most, at a distance from the target that is large against its error."""
    rng, gains = np.random.default_rng(0), []
    for _ in range(1000):
        found = []
        for _ in range(2):
            cells = torch.as_tensor(0.1 + 0.05 * rng.normal(size=(16, 1, 1)))
            found.append(replace(result(0, n=16), observed={"hr": SlicedMeans(cells, torch.ones((16, 1), dtype=torch.int64))}))
        gains.append(NEARNESS.verdict(outcome(*found), [])[0])
    assert np.mean(gains) < 0.025 + 3 * (0.025 / 1000) ** 0.5


def test_rounds_and_the_heat_go_by_the_goal(monkeypatch):
    errors = {"start": 0.1, "best": 0.03, "last": 0.05}
    found, ran = compared(monkeypatch, dict.fromkeys(errors, 0), errors=errors, goal=NEARNESS)
    assert found.chosen == "best" and found.rounds == 1
    undecided, _ = compared(monkeypatch, {"start": 0, "last": 0}, errors={"start": 0.1, "last": 0.1}, goal=NEARNESS, most_rounds=3)
    assert undecided.rounds == 3
