"""Neighbour lists by NVIDIA's nvalchemi-toolkit-ops, for GPUs where that package is installed (the extra `gpu`)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors.cell_list import in_order, made_finite


@cache
def available() -> bool:
    """Whether the package can be imported."""
    try:
        import warp

        warp.config.quiet = True  # type: ignore[attr-defined]  # it would greet on standard output
        import nvalchemiops.torch.neighbors  # noqa: F401
    except ImportError:
        return False
    return True


def half_list(batch: AtomsBatch, cutoff: float) -> tuple[Tensor, Tensor]:
    """What `cell_list.half_list` returns; the cutoff is in Å."""
    from nvalchemiops.torch.neighbors import NeighborOverflowError, neighbor_list

    positions, cells, finite = made_finite(batch)
    ends = torch.cumsum(batch.counts, 0, dtype=torch.int32)
    options = {
        "batch_idx": batch.system.int(),
        "batch_ptr": torch.cat([ends.new_zeros(1), ends]),
        "half_fill": True,
        "return_neighbor_list": True,
    }
    while True:
        try:
            pairs, _, shifts = neighbor_list(positions, cutoff, cell=cells, pbc=batch.pbc, **options)
            break
        except NeighborOverflowError as error:  # its first guess is for ordinary densities
            options["max_neighbors"] = 2 * error.num_neighbors
    kept = finite[batch.system[pairs[0].long()]]
    return in_order(pairs[:, kept].long(), shifts[kept].long())
