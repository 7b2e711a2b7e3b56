"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from stabie_ase.cli.log import PRINTED, tell

REFRESH = 0.1
"""Seconds between two looks of a bar."""


class Progress:
    """Shows how much of the budget is used, the time left and a note; to be used in a `with` statement.

    Parameters
    ----------
    total : float
        The budget, in any unit.
    title : str
    quiet : bool
        Show nothing; what would be shown as lines is still logged.
    done : float
        Part of the budget that was used before, as by the run that is gone on with: it tells nothing of the speed from here.
    every : float
        Seconds between two plain lines: on the screen where there is no terminal, and in the log.
    """

    def __init__(self, total: float, title: str, quiet: bool = False, done: float = 0.0, every: float = 30.0):
        self.total, self.title, self.every, self.quiet = max(total, 1e-9), title, every, quiet
        self.start = self.done = min(done, self.total)
        self.note = ""
        self.began = self.last = self.drawn = time.monotonic()
        self.bar = None
        if not quiet and sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"
            self.bar = tqdm(
                total=self.total, initial=self.start, desc=title, bar_format=layout, file=sys.stderr, dynamic_ncols=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self._draw()
            self.bar.close()
        if self.note and exception[0] is None:
            self._line()

    def show(self, done: float, note: str) -> None:
        """Set the part of the budget that is used, and what to say."""
        self.done, self.note, now = min(done, self.total), note, time.monotonic()
        if self.bar is not None and now - self.drawn >= REFRESH:
            self.drawn = now
            self._draw()
        if now - self.last >= self.every:
            self.last = now
            self._line()

    def _draw(self) -> None:
        self.bar.n = self.done
        self.bar.set_postfix_str(self.note)

    def _line(self) -> None:
        elapsed = time.monotonic() - self.began
        left = ""
        if self.start < self.done < self.total:
            left = f", {elapsed * (self.total - self.done) / (self.done - self.start):.0f} s left"
        text = f"{self.title}: {100 * self.done / self.total:.0f} % after {elapsed:.0f} s{left}; {self.note}"
        if self.quiet or self.bar is not None:
            PRINTED.info("%s", text)
        else:
            tell(text, err=True)


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
