"""The final comparison of a fine-tuned model with its start: as long as it takes to tell, and by what training did not see."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.observables import Target
from stabie_ase.potentials.base import Potential
from stabie_ase.runs.evaluation import StabilityResult, StabilityTest, Yardstick, failures_p_value, run_stability_test
from stabie_ase.stability import Failures
from stabie_ase.stability.sequential import ERROR_RATE, HazardComparison
from stabie_ase.structures.reference import Reference

Weights = Mapping[str, Tensor]

HEAT_SEED_OFFSET = 10_000
"""Added to the seed of runs that choose among candidates: the comparison itself has replicas of its own."""

TIME_STRETCHES = 4
"""Equal parts of the test's time in each of which an observable must not get worse."""

MIN_FAILURES = 10
"""Failures of two models that are too few to ask by which the fewer."""

WORSE_STANDARD_ERRORS = 1.645
"""By which an observable's error has to be larger to be worse: one-sided, 95 %."""


@dataclass(frozen=True)
class Outcome:
    """Of a comparison.

    Attributes
    ----------
    start, end : StabilityResult
        Of the starting model and of the candidate; the same object where there is no candidate.
    chosen : str
        Name of the candidate, or "start".
    evidence : HazardComparison
    rounds : int
    """

    start: StabilityResult
    end: StabilityResult
    chosen: str
    evidence: HazardComparison
    rounds: int


@dataclass(frozen=True)
class Comparison:
    """Runs models from equal fresh starts, round after round, until one is known to be more stable or the budget is spent.

    Parameters
    ----------
    potential : Potential
        Takes the weights of one model after the other.
    reference : Reference
        Frames to start from.
    yardstick : Yardstick
    test : StabilityTest
        One round.
    seconds : float
        Budget: no round is begun that would end beyond it.
    most_rounds : int
    on_look : callable, optional
        `on_look(model, round, steps_done, state, failures)`, while the dynamics run.
    """

    potential: Potential
    reference: Reference
    yardstick: Yardstick
    test: StabilityTest
    seconds: float
    most_rounds: int
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
            evidence.add(*(results[name][-1].statistics for name in results))
            spent = time.monotonic() - began
            if evidence.decided or spent * (k + 2) / (k + 1) > self.seconds:
                break
        start, end = (StabilityResult.pool(results[name]) for name in results)
        return Outcome(start, end, chosen, evidence, k + 1)

    def _choose(self, candidates: Mapping[str, Weights]) -> str:
        """The candidate with the lowest hazard in a heat of one round; the heat counts for nothing else."""
        names = [name for name in candidates if name != "start"]
        if len(names) < 2:
            return names[0] if names else "start"
        hazard = {name: self._round(name, candidates, HEAT_SEED_OFFSET).statistics.hazard_per_ps for name in names}
        return min(names, key=hazard.get)

    def _round(self, name: str, candidates: Mapping[str, Weights], k: int) -> StabilityResult:
        self.potential.load_state_dict(candidates[name])
        told = self.on_look
        on_look = None if told is None else (lambda *block: told(name, k, *block))
        test = replace(self.test, seed=self.test.seed + k)
        return run_stability_test(self.potential, self.reference.frames, self.yardstick, test, on_look)


def worse_stretch(outcome: Outcome, target: Target) -> str | None:
    """Where in time the observable's error has grown beyond the start's and the floor, in words; None if nowhere.

    Where nobody of the starting model is left, its error over all of its time stands for it. An error that is not finite has
    grown, unless the start's is not finite either.
    """
    name, value, measure = target.observable.name, target.value, target.observable.measure
    start_error, start_spread = outcome.start.observed[name].distance(value, measure)
    for part in range(TIME_STRETCHES):
        end, start = (result.observed[name].keep(result.stretch(part, TIME_STRETCHES)) for result in (outcome.end, outcome.start))
        (error, spread), (before, spread_before) = (observed.distance(value, measure) for observed in (end, start))
        if before is None or spread_before is None:
            before, spread_before = start_error, start_spread
        if error is None or spread is None:
            continue
        floor = target.floor_of(int((end.counts.sum(dim=1) > 0).sum()))
        allowed = max(before or 0.0, floor) + WORSE_STANDARD_ERRORS * (spread**2 + (spread_before or 0.0) ** 2) ** 0.5
        where = f"in part {part + 1} of {TIME_STRETCHES} of the time"
        if not math.isfinite(error) and math.isfinite(before or 0.0):
            return f"{where} it is not finite"
        if error > allowed:
            return f"{where} it is {error:.3g}, at most {allowed:.3g} can be chance"
    return None


def verdict(outcome: Outcome, yardstick: Yardstick, listened: Iterable[str]) -> tuple[bool, str]:
    """Whether the model became more stable.

    Parameters
    ----------
    outcome : Outcome
    yardstick : Yardstick
    listened : iterable of str
        Names of the criteria that training used.

    Returns
    -------
    gained : bool
    message : str
        The reason, in words.
    """
    a, b, evidence = outcome.start.statistics, outcome.end.statistics, outcome.evidence
    if a.n_failed == 0:
        return False, "The starting model did not fail once in the comparison; the starting model is kept."
    rates = f"{a.hazard_per_ps:.3g} -> {b.hazard_per_ps:.3g} failures per replica-ps by any criterion (p = {evidence.p_value:.1g})"
    if not evidence.gained:
        why = (
            "a gain by half or more is ruled out"
            if evidence.hopeless
            else "a longer --max-time may help, or a longer comparison (--check-max-time)"
        )
        return False, f"No gain that can be told from chance: {rates}; the starting model is kept: {why}."
    for target in yardstick.targets:
        worse = worse_stretch(outcome, target)
        if worse:
            return False, f"Fewer failures, {rates}, but the {target.observable.name} error grew: {worse}; the starting model is kept."
    return True, f"The model became more stable: {rates}.{_unheard(outcome, set(listened))}"


def _unheard(outcome: Outcome, listened: set[str]) -> str:
    """A word on the criteria that training did not use, where they say something else than the others."""
    others = sorted((set(outcome.start.causes) | set(outcome.end.causes)) - listened - {"not finite"})
    if not others or failures_p_value(outcome.start, outcome.end, others) <= ERROR_RATE:
        return ""
    start, end = (
        sum(r.causes[c] for c in others) / r.statistics.stable_replica_ps for r in (outcome.start, outcome.end)
    )
    names = ", ".join(others)
    n = sum(r.causes[c] for r in (outcome.start, outcome.end) for c in others)
    if failures_p_value(outcome.end, outcome.start, others) <= ERROR_RATE:
        return f" But failures by what training did not listen to ({names}) became more frequent: {start:.3g} -> {end:.3g} per replica-ps."
    if n < MIN_FAILURES:
        return ""
    return f" By what training did not listen to ({names}) no gain can be told from chance: {start:.3g} -> {end:.3g} per replica-ps."
