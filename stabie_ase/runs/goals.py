"""What a run is for, and how its result is judged: a model that fails less often, or one whose observables are nearer to their targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import norm

from stabie_ase.runs.comparison import WORSE_STANDARD_ERRORS, Goal, Outcome, Results, Trial, together, verdict
from stabie_ase.runs.evaluation import failures_p_value
from stabie_ase.stability.sequential import ERROR_RATE, HazardComparison
from stabie_ase.training.schedule import OBSERVABLES, STABILITY


@dataclass(frozen=True)
class Stability:
    """Fewer failures, and no observable worse."""

    trials: Sequence[Trial]

    def score(self, results: Results) -> float:
        """Failures per replica-ps."""
        return together(results)[0].hazard_per_ps

    def decided(self, start: Results, end: Results, evidence: HazardComparison) -> bool:
        """By the evidence of the failures, which may be asked after every round."""
        return evidence.decided

    def p_value(self, outcome: Outcome) -> float:
        """Of no fewer failures, a fraction."""
        return outcome.evidence.p_value

    def verdict(self, outcome: Outcome, listened: Iterable[str]) -> tuple[bool, str]:
        """See `comparison.verdict`."""
        return verdict(outcome, self.trials, listened)


DECIDED_STANDARD_ERRORS = 3.0
"""By which observables are nearer, or farther, for further rounds to be needless: as often as one asks, that costs little of the error
rate of the last answer (Haybittle, Br. J. Radiol. 44, 793, 1971; Peto et al., Br. J. Cancer 34, 585, 1976)."""


@dataclass(frozen=True)
class Observables:
    """Observables nearer to their targets, none of them farther, and failures no more frequent.

    The gain is Σ ln(e_start/e_end) over the targets, with the distances e = Σ_k c_k |g_k - g_k^ref|, whose standard errors are over
    replicas.
    """

    trials: Sequence[Trial]

    def _errors(self, results: Results) -> list[tuple[str, float, float]]:
        """Name, distance and standard error of each target; infinite where there are no frames, or too few for an error."""
        found = []
        for trial in self.trials:
            for target in trial.yardstick.targets:
                error, spread = target.distance(results[trial.name].observed[target.observable.name])
                at = f" at {trial.name}" if len(self.trials) > 1 else ""
                if error is None or spread is None or not math.isfinite(error):
                    error = spread = math.inf
                found.append((target.observable.name + at, error, spread))
        return found

    def score(self, results: Results) -> float:
        """Sum over targets of the logarithms of their distances, whose units then play no part."""
        return sum(math.log(max(error, 1e-300)) for _, error, _ in self._errors(results))

    def _gain(self, start: Results, end: Results) -> float:
        """In its standard errors; zero where it cannot be told."""
        pairs = [(a, b) for a, b in zip(self._errors(start), self._errors(end)) if 0 < a[1] < math.inf]
        if not pairs or any(not math.isfinite(b[1]) for _, b in pairs):
            return 0.0
        gain = sum(math.log(a[1] / max(b[1], 1e-300)) for a, b in pairs)
        variance = sum((x[2] / max(x[1], 1e-300)) ** 2 for pair in pairs for x in pair)
        return gain / math.sqrt(variance) if variance > 0 else 0.0

    def decided(self, start: Results, end: Results, evidence: HazardComparison) -> bool:
        """By far nearer or farther."""
        return abs(self._gain(start, end)) > DECIDED_STANDARD_ERRORS

    def p_value(self, outcome: Outcome) -> float:
        """Of a distance that is no smaller, a fraction."""
        return float(norm.sf(self._gain(outcome.start, outcome.end)))

    def verdict(self, outcome: Outcome, listened: Iterable[str]) -> tuple[bool, str]:
        """Whether there is a gain, and why, in words."""
        pairs = list(zip(self._errors(outcome.start), self._errors(outcome.end)))
        changes = ", ".join(f"{a[0]} {a[1]:.3g} -> {b[1]:.3g} ± {b[2]:.2g}" for a, b in pairs)
        p = self.p_value(outcome)
        if p > ERROR_RATE / 2:
            return False, f"No observable nearer to its target that can be told from chance: {changes}; the starting model is kept."
        for a, b in pairs:
            if b[1] - a[1] > WORSE_STANDARD_ERRORS * math.hypot(a[2], b[2]):
                return False, f"Nearer to the targets on the whole, but not by {a[0]}: {changes}; the starting model is kept."
        (before, _), (after, _) = together(outcome.start), together(outcome.end)
        rates = f"{before.hazard_per_ps:.3g} -> {after.hazard_per_ps:.3g} failures per replica-ps"
        for trial in self.trials:
            if failures_p_value(outcome.end[trial.name], outcome.start[trial.name]) <= ERROR_RATE:
                return False, f"Nearer to the targets, {changes}, but failures became more frequent, {rates}; the starting model is kept."
        return True, f"Observables came nearer to their targets: {changes} (p = {p:.1g}); {rates}."


GOALS: dict[str, Callable[[Sequence[Trial]], Goal]] = {STABILITY: Stability, OBSERVABLES: Observables}
"""By the names of the option."""
