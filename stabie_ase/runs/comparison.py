"""The final comparison of a fine-tuned model with its start: as long as it takes to tell, and by what training did not see."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ase import Atoms
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.observables import Target
from stabie_ase.potentials.base import Potential
from stabie_ase.runs.evaluation import StabilityResult, StabilityTest, Yardstick, failures_p_value, run_stability_test
from stabie_ase.stability import Failures, StabilityStatistics
from stabie_ase.stability.sequential import ERROR_RATE, HazardComparison
from stabie_ase.stability.survival import fewer_p_value

Weights = Mapping[str, Tensor]

Results = Mapping[str, StabilityResult]
"""Of one model, by trial."""

HEAT_SEED_OFFSET = 10_000
"""Added to the seed of runs that choose among candidates: the comparison itself has replicas of its own."""

TIME_STRETCHES = 4
"""Equal parts of the test's time in each of which an observable must not get worse."""

MIN_FAILURES = 10
"""Failures of two models that are too few to ask by which the fewer."""

WORSE_STANDARD_ERRORS = 1.645
"""By which an observable's error has to be larger to be worse: one-sided, 95 %."""


@dataclass(frozen=True)
class Trial:
    """One state point at which models are compared.

    Attributes
    ----------
    name : str
        "350 K" and the like; of no matter where there is only one.
    frames : sequence of Atoms
        To start from.
    yardstick : Yardstick
    test : StabilityTest
        One round.
    """

    name: str
    frames: Sequence[Atoms]
    yardstick: Yardstick
    test: StabilityTest


@dataclass(frozen=True)
class Outcome:
    """Of a comparison.

    Attributes
    ----------
    start, end : mapping of str to StabilityResult
        Of the starting model and of the candidate, by trial; the same object where there is no candidate.
    chosen : str
        Name of the candidate, or "start".
    evidence : HazardComparison
    rounds : int
    """

    start: Results
    end: Results
    chosen: str
    evidence: HazardComparison
    rounds: int


class Goal(Protocol):
    """By what candidates are chosen and the result is judged."""

    def score(self, results: Results) -> float:
        """How good a model is, smaller is better; without a unit, or in failures per replica-ps."""
        ...

    def decided(self, start: Results, end: Results, evidence: HazardComparison) -> bool:
        """Whether further rounds would change nothing."""
        ...

    def p_value(self, outcome: Outcome) -> float:
        """Of no gain, a fraction."""
        ...

    def verdict(self, outcome: Outcome, listened: Iterable[str]) -> tuple[bool, str]:
        """Whether there is a gain, and why, in words; `listened` are the criteria of training."""
        ...


@dataclass(frozen=True)
class Comparison:
    """Runs models from equal fresh starts, round after round, until one is known to be more stable or the budget is spent.

    Of several trials each is a stratum of the evidence: failures are compared within it alone.

    Parameters
    ----------
    potential : Potential
        Takes the weights of one model after the other.
    trials : sequence of Trial
    seconds : float
        Budget: no round is begun that would end beyond it.
    most_rounds : int
    goal : Goal
        Chooses among candidates, and knows when the answer is known (`runs.goals`).
    on_look : callable, optional
        `on_look(model, round, steps_done, state, failures)`, while the dynamics run.
    """

    potential: Potential
    trials: Sequence[Trial]
    seconds: float
    most_rounds: int
    goal: Goal
    on_look: Callable[[str, int, int, MDState, Failures], None] | None = None

    def run(self, candidates: Mapping[str, Weights]) -> Outcome:
        """Candidates by name, "start" among them; the best of the others is held against it."""
        began = time.monotonic()
        evidence = HazardComparison()
        chosen = self._choose(candidates)
        if chosen == "start":
            alone = self._round("start", candidates, 0)
            return Outcome(alone, alone, chosen, evidence, 1)
        results = {"start": [], chosen: []}
        for k in range(self.most_rounds):
            for name in results:
                results[name].append(self._round(name, candidates, k))
            for trial in self.trials:
                evidence.add(*(results[name][-1][trial.name].statistics for name in results))
            start, end = (
                {trial.name: StabilityResult.pool([r[trial.name] for r in results[name]]) for trial in self.trials} for name in results
            )
            spent = time.monotonic() - began
            if self.goal.decided(start, end, evidence) or spent * (k + 2) / (k + 1) > self.seconds:
                break
        return Outcome(start, end, chosen, evidence, k + 1)

    def _choose(self, candidates: Mapping[str, Weights]) -> str:
        """The candidate with the lowest score in a heat of one round; the heat counts for nothing else."""
        names = [name for name in candidates if name != "start"]
        if len(names) < 2:
            return names[0] if names else "start"
        score = {name: self.goal.score(self._round(name, candidates, HEAT_SEED_OFFSET)) for name in names}
        return min(names, key=score.get)

    def _round(self, name: str, candidates: Mapping[str, Weights], k: int) -> dict[str, StabilityResult]:
        self.potential.load_state_dict(candidates[name])
        told, results = self.on_look, {}
        on_look = None if told is None else (lambda *block: told(name, k, *block))
        for trial in self.trials:
            test = replace(trial.test, seed=trial.test.seed + k)
            results[trial.name] = run_stability_test(self.potential, trial.frames, trial.yardstick, test, on_look)
        return results


def together(results: Results) -> tuple[StabilityStatistics, Counter[str]]:
    """Times to failure and causes over all trials."""
    found = results.values()
    return StabilityStatistics.pool([r.statistics for r in found]), sum((r.causes for r in found), Counter())


def worse_stretch(start: StabilityResult, end: StabilityResult, target: Target) -> str | None:
    """Where in time the observable's error has grown beyond the start's and the floor, in words; None if nowhere.

    Where nobody of the starting model is left, its error over all of its time stands for it. An error that is not finite has
    grown, unless the start's is not finite either.
    """
    name = target.observable.name
    start_error, start_spread = target.distance(start.observed[name])
    for part in range(TIME_STRETCHES):
        after, earlier = (result.observed[name].keep(result.stretch(part, TIME_STRETCHES)) for result in (end, start))
        (error, spread), (before, spread_before) = map(target.distance, (after, earlier))
        if before is None or spread_before is None:
            before, spread_before = start_error, start_spread
        if error is None or spread is None:
            continue
        floor = target.floor_of(int((after.counts.sum(dim=1) > 0).sum()))
        allowed = max(before or 0.0, floor) + WORSE_STANDARD_ERRORS * (spread**2 + (spread_before or 0.0) ** 2) ** 0.5
        where = f"in part {part + 1} of {TIME_STRETCHES} of the time"
        if not math.isfinite(error) and math.isfinite(before or 0.0):
            return f"{where} it is not finite"
        if error > allowed:
            return f"{where} it is {error:.3g}, at most {allowed:.3g} can be chance"
    return None


def verdict(outcome: Outcome, trials: Sequence[Trial], listened: Iterable[str]) -> tuple[bool, str]:
    """Whether the model became more stable.

    Parameters
    ----------
    outcome : Outcome
    trials : sequence of Trial
    listened : iterable of str
        Names of the criteria that training used.

    Returns
    -------
    gained : bool
    message : str
        The reason, in words.
    """
    (a, _), (b, _), evidence = together(outcome.start), together(outcome.end), outcome.evidence
    if a.n_failed == 0:
        why = "the starting model is kept. If its observables are off, --goal observables matches them"
        return False, f"The starting model did not fail once in the comparison; {why}."
    rates = f"{a.hazard_per_ps:.3g} -> {b.hazard_per_ps:.3g} failures per replica-ps by any criterion (p = {evidence.p_value:.1g})"
    if not evidence.gained:
        why = (
            "a gain by half or more is ruled out"
            if evidence.hopeless
            else "a longer --max-time may help, or a longer comparison (--check-max-time)"
        )
        return False, f"No gain that can be told from chance: {rates}; the starting model is kept: {why}."
    for trial in trials:
        at = f" at {trial.name}" if len(trials) > 1 else ""
        start, end = outcome.start[trial.name], outcome.end[trial.name]
        if at and failures_p_value(end, start) <= ERROR_RATE:
            return False, f"Fewer failures, {rates}, but more of them{at}; the starting model is kept."
        for target in trial.yardstick.targets:
            worse = worse_stretch(start, end, target)
            if worse:
                name = target.observable.name
                return False, f"Fewer failures, {rates}, but the {name} error grew{at}: {worse}; the starting model is kept."
    return True, f"The model became more stable: {rates}.{_unheard(outcome, set(listened))}"


def _unheard(outcome: Outcome, listened: set[str]) -> str:
    """A word on the criteria that training did not use, where they say something else than the others."""
    (a, of_start), (b, of_end) = together(outcome.start), together(outcome.end)
    others = sorted((set(of_start) | set(of_end)) - listened - {"not finite"})
    n_start, n_end = (sum(causes[c] for c in others) for causes in (of_start, of_end))
    times = a.stable_replica_ps, b.stable_replica_ps
    if not others or fewer_p_value(n_start, n_end, *times) <= ERROR_RATE:
        return ""
    names, rates = ", ".join(others), f"{n_start / times[0]:.3g} -> {n_end / times[1]:.3g} per replica-ps"
    if fewer_p_value(n_end, n_start, *times[::-1]) <= ERROR_RATE:
        return f" But failures by what training did not listen to ({names}) became more frequent: {rates}."
    if n_start + n_end < MIN_FAILURES:
        return ""
    return f" By what training did not listen to ({names}) no gain can be told from chance: {rates}."
