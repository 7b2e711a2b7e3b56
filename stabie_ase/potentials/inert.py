"""Pickled torch modules taken apart without running anything they name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

TRUST_HINT = "If you trust whoever made the file, run its code with --trust-checkpoint (trust=True)."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, with what to try."""


def load_inert(path: str | os.PathLike, allowed: Iterable[str]) -> Any:
    raise CheckpointError(f"{path}: holds a pickled module. {TRUST_HINT}")
