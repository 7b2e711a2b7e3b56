"""MACE (Batatia et al., NeurIPS 2022), from mace-torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stabie_ase.potentials.base import Potential

CHECKPOINTS = "MACE (the .model file that mace-torch writes)"
PICKLED_CLASSES: tuple[str, ...] = ()


class MACEPotential(Potential):
    family = "mace"


CLASS = MACEPotential


def recognises(data: Any) -> bool:
    return False


@contextmanager
def load_default_kept() -> Iterator[None]:
    """Undo what `import mace` does to the process: it makes plain `torch.load` calls run the code in any file."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
