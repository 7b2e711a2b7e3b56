"""MACE (Batatia et al., NeurIPS 2022), from mace-torch."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from stabie_ase.potentials.mace.potential import MACEPotential
from stabie_ase.potentials.mace.rebuild import MODELS, PICKLED_CLASSES, load_default_kept, rebuild
from stabie_ase.potentials.unpickle import Recorded

__all__ = ["CHECKPOINTS", "CLASS", "PICKLED_CLASSES", "MACEPotential", "from_data", "load_default_kept", "recognises", "to_data"]

CHECKPOINTS = "MACE (the .model file that mace-torch writes, of class MACE or ScaleShiftMACE)"
CLASS = MACEPotential

def recognises(data: Any) -> bool:
    """Whether this is a MACE model: the module itself, or what `unpickle` recorded of it."""
    return type(data).__module__ == "mace.modules.models" and type(data).__name__ in MODELS


def from_data(data: nn.Module | Recorded) -> MACEPotential:
    """Make a potential around a module, or of what was recorded of a pickled one."""
    return MACEPotential(data if isinstance(data, nn.Module) else rebuild(data))


def to_data(potential: MACEPotential) -> nn.Module:
    """What MACE itself saves: the module, on the CPU and trainable."""
    return copy.deepcopy(potential.network).cpu().requires_grad_(True)
