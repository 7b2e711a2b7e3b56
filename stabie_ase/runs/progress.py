"""How far long work has come, as a monitor is told of it."""

from __future__ import annotations

import time

from stabie_ase.dynamics import MDState
from stabie_ase.runs.evaluation import StabilityTest
from stabie_ase.runs.monitor import Monitor, Rate
from stabie_ase.stability import Failures
from stabie_ase.training.loop import SIMULATION, TrainingLoop


class LoopProgress:
    """Of the loop, in seconds of its budget, or their equal in cycles or updates where those run out first.

    Parameters
    ----------
    training : TrainingLoop
        Tells of every look and every step on labels from here on.
    monitor : Monitor
    """

    TASK = "stabie"

    def __init__(self, training: TrainingLoop, monitor: Monitor):
        self.training, self.monitor, self.rate = training, monitor, Rate()
        self.total = 60.0 * training.config.max_time_min
        training.on_look(self._on_look)
        training.work.on_label_step = self._on_label_step
        self._tell("")

    def end(self) -> None:
        """The loop is at its end, however much of its budget is left."""
        self.monitor.progress(self.TASK, self.total, self.total, "")

    def _on_look(self, steps: int, state: MDState, failures: Failures) -> None:
        training, live, unstable = self.training, self.training.progress, failures.fraction
        if live.phase == SIMULATION:  # those that failed in earlier windows are not in this one
            unstable = training.unstable_fraction + int(failures.failed.sum()) / training.n_replicas
        speed = self.rate.update(training.md_steps + steps * len(failures.step))
        self._tell(f"cycle {live.cycle + 1} {live.phase}, unstable {100 * unstable:.0f} %, {speed}")

    def _on_label_step(self, k: int, steps: int) -> None:
        live = self.training.progress
        self._tell(f"cycle {live.cycle + 1}, update {live.updates + 1}, energies and forces {k} of {steps}")

    def _tell(self, note: str) -> None:
        self.monitor.progress(self.TASK, self._used(), self.total, note)

    def _used(self) -> float:
        config, live = self.training.config, self.training.progress
        fractions = [self.training.seconds / self.total] if self.total else [1.0]
        if config.max_cycles:
            fractions.append(live.cycle / config.max_cycles)
        if config.max_updates:
            fractions.append(live.updates / config.max_updates)
        return max(fractions) * self.total


class CheckProgress:
    """Of the final comparison, in seconds of its budget."""

    TASK = "comparison"

    def __init__(self, test: StabilityTest, rounds: int, seconds: float, monitor: Monitor):
        self.test, self.rounds, self.seconds, self.monitor = test, rounds, seconds, monitor
        self.began = time.monotonic()

    def on_check(self, model: str, k: int, steps: int, state: MDState, failures: Failures) -> None:
        """Told model, round, steps done, replicas and failures while a model is tested."""
        which = f"{model}, heat" if k >= self.rounds else f"{model}, round {k + 1}"
        unstable = f"{100 * steps / self.test.n_steps:.0f} % of the time, unstable {100 * failures.fraction:.0f} %"
        self.monitor.progress(self.TASK, time.monotonic() - self.began, self.seconds, f"{which}, {unstable}")

    def end(self) -> None:
        """The answer is known, or the budget is spent."""
        self.monitor.progress(self.TASK, self.seconds, self.seconds, "")
