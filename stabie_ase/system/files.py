"""Writing files so that neither a crash nor a ctrl-C leaves half of one."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within this block a ctrl-C, and a SIGTERM where there is a handler for it, waits for its end; a second SIGTERM does not.

    Libraries that write files lose it otherwise: torch's C++ zip writer and ASE turn it into errors of their own.
    """
    if threading.current_thread() is not threading.main_thread():  # others are not interrupted, and may not ask
        yield
        return
    arrived = []

    def wait(number, frame):
        arrived.append((number, frame))
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)

    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            handlers[arrived[0][0]](*arrived[0])


def check_new_file(path: str | os.PathLike) -> None:
    """Raise ValueError unless a file can be made there that does not exist yet."""
    path = Path(path)
    folder = path.absolute().parent
    if path.exists():
        raise ValueError(f"{path} exists and is not overwritten; remove it or choose another --output")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; make it or choose another --output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written to; choose another --output")


@contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name in the same folder to write to; renamed to `path` at the end, so a crash leaves the old file or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with uninterrupted():
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def as_json(data: Any, indent: int | None = None) -> str:
    """JSON text of plain values; null for numbers that are not finite, which JSON has no words for."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, to tell later whether it is still the same."""
    import hashlib  # late, as torch below: the command line's help waits for neither

    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_atomically(data: Any, path: str | os.PathLike) -> None:
    """`torch.save`, whole or not at all."""
    import torch  # the report and the command line write other files without it

    # An open file, not its name: with a name torch's writer cannot tell what the file system said.
    with replaced(path) as temporary, open(temporary, "wb") as file:
        torch.save(data, file)
