"""What commands tell: on the screen and, with the time, in the log.txt of a run's directory."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
from tqdm import tqdm

ALL = logging.getLogger("stabie_ase")

PRINTED = logging.getLogger("stabie_ase.cli.printed")
"""What is on the screen anyway, on its way to the file."""

LOG = "log.txt"


class LogLines(logging.Handler):
    """Log records as lines on stderr that leave a bar in one piece."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != PRINTED.name:
            tqdm.write(self.format(record), file=sys.stderr)


class LogFile(logging.Handler):
    """Log records as lines with their time; those from before a file was opened are kept for it."""

    def __init__(self):
        super().__init__()
        self.waiting: deque[str] = deque(maxlen=1000)
        self.file = None

    def emit(self, record: logging.LogRecord) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        self.waiting.extend(f"{when} {line}\n" for line in self.format(record).splitlines() if line.strip())
        self._write()

    def open(self, path) -> None:
        """Append there from now on."""
        self.file = open(path, "a", encoding="utf-8")
        self._write()

    def _write(self) -> None:
        if self.file is None:
            return
        with suppress(OSError):  # what matters more cannot be written either, and that is told
            self.file.writelines(self.waiting)
            self.file.flush()
        self.waiting.clear()

    def close(self) -> None:
        with suppress(OSError):
            if self.file is not None:
                self.file.close()
        self.file = None
        super().close()


@contextmanager
def logging_of(arguments: str, level: int) -> Iterator[None]:
    """One command's logging: lines on stderr from this level on, and a log file to be; all as before in the end.

    Nothing goes on to the root logger, by whose handler, which libraries make in passing, all would be printed again.
    """
    before, file = (ALL.handlers, ALL.level, ALL.propagate), LogFile()
    ALL.handlers, ALL.propagate = [*ALL.handlers, LogLines(level), file], False
    ALL.setLevel(logging.INFO)
    PRINTED.info("stabie-ase %s", arguments)
    try:
        yield
    finally:
        ALL.handlers, ALL.propagate = before[0], before[2]
        ALL.setLevel(before[1])
        file.close()


def keep_log(path: Path) -> None:
    """Append what this command has told and will tell to the log.txt of a directory that it has claimed."""
    for handler in ALL.handlers:
        if isinstance(handler, LogFile):
            handler.open(path / LOG)


def tell(text: str, err: bool = False) -> None:
    """Print, and log."""
    click.echo(text, err=err)
    PRINTED.info("%s", text)
