"""ctrl-C, and SIGTERM as batch systems send it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """A SIGTERM, as `kill` and batch systems send it before they kill."""


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """In this block the first SIGTERM ends the work as a ctrl-C does, a second one ends the process at once."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def end(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def word_and_status(interrupt: KeyboardInterrupt) -> tuple[str, int]:
    """What to call an interrupt, and the exit status that shells give it."""
    number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
    return "terminated" if number == signal.SIGTERM else "interrupted", 128 + number
