"""The one way to say something while work goes on: words, and how far it has come."""

from __future__ import annotations

import time
from pathlib import Path


class Monitor:
    """Is told of long work and says nothing itself; a terminal, a notebook or a log overrides what it wants to know."""

    def message(self, text: str) -> None:
        """Something was found out, in words."""

    def began(self, path: Path, onwards: str) -> None:
        """A run has a directory from here on, as long as it is there it can be gone on with, and how is said in words."""

    def progress(self, task: str, done: float, total: float, note: str) -> None:
        """How much of a task is done, of how much, in any unit, and what goes on; a task ends with all of it or with the next one."""


class Rate:
    """Replica-steps per second over the last looks."""

    def __init__(self):
        self.before, self.when, self.value = None, time.monotonic(), 0.0

    def update(self, replica_steps: int) -> str:
        """Tell the total so far; returns the rate in words."""
        now = time.monotonic()
        if self.before is None:  # a resumed run does not begin at zero
            self.before, self.when = replica_steps, now
        elif now - self.when > 0.5:
            self.value = max(0.0, (replica_steps - self.before) / (now - self.when))
            self.before, self.when = replica_steps, now
        return f"{self.value:.0f} replica-steps/s"
