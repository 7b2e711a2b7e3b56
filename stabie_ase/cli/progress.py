"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from tqdm import tqdm

from stabie_ase.cli.interrupts import word_and_status
from stabie_ase.cli.log import PRINTED, keep_log, tell
from stabie_ase.runs.monitor import Monitor

REFRESH_SECONDS = 0.1
"""Seconds between two looks of a bar."""


class ProgressBar:
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

    def __enter__(self) -> ProgressBar:
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
        if self.bar is not None and now - self.drawn >= REFRESH_SECONDS:
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


class Terminal(Monitor):
    """What the person at the keyboard sees of long work; to be used in a `with` statement.

    A ctrl-C or a SIGTERM in it ends the program with what became of the work.

    Parameters
    ----------
    quiet : bool
        Errors and results only.
    """

    def __init__(self, quiet: bool):
        self.quiet, self.path, self.onwards, self.task, self.bar = quiet, None, "", "", None

    def message(self, text: str) -> None:
        """Print it."""
        if not self.quiet:
            tell(text)

    def began(self, path: Path, onwards: str) -> None:
        """Keep the log there from now on, and say how to go on."""
        self.path, self.onwards = path, onwards
        keep_log(path)
        self.message(f"Run directory: {path}\nctrl-C is safe; {onwards}")

    def progress(self, task: str, done: float, total: float, note: str) -> None:
        """A bar for each task."""
        if task != self.task:
            self._close()
            self.task, self.bar = task, ProgressBar(total, task, self.quiet, done)
        if self.bar is None:
            return
        if done >= total and not note:
            self.bar.done = self.bar.total
            self._close()
        else:
            self.bar.show(done, note)

    def _close(self, *exception) -> None:
        if self.bar is not None:
            bar, self.bar = self.bar, None
            bar.__exit__(*(exception or (None, None, None)))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._close(kind, error, traceback)
        if self.path is not None and isinstance(error, KeyboardInterrupt):
            word, status = word_and_status(error)
            tell(f"\n{word}; {self.onwards if self.path.exists() else 'nothing was saved yet'}", err=True)
            raise click.exceptions.Exit(status) from None
