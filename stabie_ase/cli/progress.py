"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

import click
from tqdm import tqdm


class Progress:
    """Shows how much of the budget is used, the rate and a note.

    Parameters
    ----------
    total : float
        The budget in units of `unit`.
    title, unit : str
    quiet : bool
        Show nothing.
    every : float
        Seconds between two plain lines where there is no terminal.
    """

    def __init__(self, total: float, title: str, unit: str = "s", quiet: bool = False, every: float = 30.0):
        self.total, self.title, self.unit, self.every = max(total, 1e-9), title, unit, every
        self.done, self.note, self.quiet = 0.0, "", quiet
        self.began = self.last_line = time.monotonic()
        self.last_rate_time, self.replica_steps, self.counted = self.began, 0, 0
        self.bar = None
        if not quiet and sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} left {remaining}{postfix}"
            self.bar = tqdm(total=self.total, desc=title, bar_format=layout, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.close()
        elif not self.quiet and exception[0] is None:
            self._line()

    def show(self, done: float, note: str) -> None:
        """Set the part of the budget that is used, and what to say."""
        self.done, self.note = min(done, self.total), note
        if self.bar:
            self.bar.n = self.done
            self.bar.set_postfix_str(note)
        elif not self.quiet and time.monotonic() - self.last_line > self.every:
            self._line()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        elapsed = self.last_line - self.began
        share = self.done / self.total
        left = f"{elapsed * (1 - share) / share:.0f} s left" if share > 0 else "time left unknown"
        click.echo(f"{self.title} {100 * share:3.0f} % after {elapsed:.0f} s, {left}, {self.note}", err=True)


class Rate:
    """Replica-steps per second over the last looks."""

    def __init__(self):
        self.before, self.when, self.value = 0, time.monotonic(), 0.0

    def update(self, replica_steps: int) -> str:
        """Tell the total so far; returns the rate in words."""
        now = time.monotonic()
        if now - self.when > 0.5:
            self.value, self.before, self.when = (replica_steps - self.before) / (now - self.when), replica_steps, now
        return f"{self.value:.0f} replica-steps/s"
