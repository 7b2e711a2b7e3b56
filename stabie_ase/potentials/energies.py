"""Energies of many frames."""

from __future__ import annotations

import torch
from torch import Tensor

from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list


def potential_energies(potential: Potential, frames: AtomsBatch, chunk_size: int | None = None) -> Tensor:
    """U_θ of every frame without a graph, float64, shape (n_systems,), in eV."""
    parts = []
    with torch.no_grad():
        for systems in frames.chunks(chunk_size):
            part = frames.select(systems)
            parts.append(potential(part, neighbor_list(part, potential.cutoff)))
    return torch.cat(parts)
