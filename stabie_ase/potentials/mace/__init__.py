"""MACE (Batatia et al., NeurIPS 2022), from mace-torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from stabie_ase.potentials.family import Family
from stabie_ase.potentials.mace.potential import MACEPotential
from stabie_ase.potentials.mace.rebuild import MODELS, PICKLED_NAMES, load_default_kept, rebuild
from stabie_ase.potentials.turns import alone
from stabie_ase.potentials.unpickle import Recorded
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.reference import Reference, interaction_energy, reference_energies
from stabie_ase.system.files import write_atomically

__all__ = ["FAMILY", "MACEPotential", "load_default_kept"]


def recognises(data: Any) -> bool:
    """Whether this is a MACE model: the module itself, or what `unpickle` recorded of it."""
    return type(data).__module__ == "mace.modules.models" and type(data).__name__ in MODELS


def from_data(data: nn.Module | Recorded) -> MACEPotential:
    """Make a potential around a module, or of what was recorded of a pickled one."""
    return MACEPotential(data if isinstance(data, nn.Module) else rebuild(data))


def save(potential: MACEPotential, path: str | Path) -> None:
    """Write what MACE itself saves: the module, on the CPU and trainable; whole or not at all."""
    with alone():
        write_atomically(copy.deepcopy(potential.network).cpu().requires_grad_(True), path)


def build(reference: Reference) -> MACEPotential:
    """A small MACE with random weights, scaled to the reference's forces and coordination."""
    batch, cutoff = AtomsBatch.from_atoms(reference.frames), 5.0
    energies = reference_energies(reference)
    return MACEPotential.build(
        energies,
        avg_num_neighbors=neighbor_list(batch, cutoff).within(batch, cutoff).n_pairs / batch.n_atoms,
        scale=float(np.sqrt(np.mean(np.concatenate(reference.forces) ** 2))),
        shift=interaction_energy(reference, energies),
        cutoff=cutoff,
    )


FAMILY = Family(
    "mace",
    "MACE (the .model file that mace-torch writes, of class MACE or ScaleShiftMACE)",
    PICKLED_NAMES,
    recognises,
    from_data,
    save,
    suffix=".model",
    build=build,
    pretraining={"learning_rate": 1e-2},
)
