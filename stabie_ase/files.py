"""Writing files so that neither a crash nor a ctrl-C leaves half of one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within this block a ctrl-C waits for its end.

    Libraries that write files lose it otherwise: torch's C++ zip writer and ASE turn it into errors of their own.
    """
    if threading.current_thread() is not threading.main_thread():  # others are not interrupted, and may not ask
        yield
        return
    arrived = []
    before = signal.signal(signal.SIGINT, lambda *signal_and_frame: arrived.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived and callable(before):
            before(*arrived[0])


def write_atomically(data: Any, path: str | os.PathLike) -> None:
    """`torch.save` under a temporary name in the same folder, then rename: a crash leaves the old file or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with uninterrupted():
        try:
            with open(temporary, "wb") as file:
                torch.save(data, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
