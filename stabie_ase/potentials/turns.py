"""Threads take turns: many evaluate networks at once, or a single one does what concerns the whole process.

Torch and e3nn change every module's call while they trace one, and torch's default precision is there once: a network
that another thread evaluates meanwhile fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, RLock, local

_door = RLock()
_left = Condition()
_inside = 0
_this_thread = local()


@contextmanager
def together() -> Iterator[None]:
    """Where networks are evaluated: at the same time as other threads that do so, and while none is `alone`."""
    if getattr(_this_thread, "inside", False):
        yield
        return
    with _door:
        _enter()
    try:
        yield
    finally:
        _leave()


@contextmanager
def alone() -> Iterator[None]:
    """Where networks are made or compiled code is called: once no other thread is `together` or `alone`."""
    was_inside = getattr(_this_thread, "inside", False)
    if was_inside:  # else two that wait for each other would wait for ever
        _leave()
    with _door:
        with _left:
            _left.wait_for(lambda: _inside == 0)
        try:
            yield
        finally:
            if was_inside:
                _enter()


def _enter() -> None:
    global _inside
    with _left:
        _inside += 1
    _this_thread.inside = True


def _leave() -> None:
    global _inside
    _this_thread.inside = False
    with _left:
        _inside -= 1
        _left.notify_all()
