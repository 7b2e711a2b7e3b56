"""Interatomic distances that, averaged over a stretch of time, are not those of the reference: what nobody has listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.topology import Topology

BIN_WIDTH = 0.05
"""Width in Å of the steps in which distances are counted."""

MAX_PATH_BONDS = 3
"""Bonds between two atoms from which on the path between them no longer makes a kind of its own."""

MARGIN_FACTOR = 1.25
"""Times the largest deviation of a single reference frame: a window has less noise than one frame, but is compared with a
mean that few frames know only so well."""


@dataclass(frozen=True)
class DistanceShift:
    """Unstable once the distances of one kind are farther from the reference's over a window than in any single reference frame.

    A kind is a pair of elements with one bond, two bonds, or more between them. The deviation of a kind is Wasserstein's:
    ∫ |F(r) - F_ref(r)| dr of the cumulative distributions, in Å, the distance by which the distances of that kind have
    moved on average. It is convex, so that a window that visits frames like those of the reference deviates less than the worst of
    them; atoms of one kind may change places without any effect.

    Nothing in training uses this criterion. It is not for a single state: `cumulative` is averaged over a window first.

    Parameters
    ----------
    pairs : Tensor of int64, shape (2, n_pairs)
    kind : Tensor of int64, shape (n_pairs,)
    labels : list of str
        Of the kinds.
    n_bins : int
    target : Tensor of float64, shape (n_kinds, n_bins)
        F_ref.
    tolerances : Tensor of float64, shape (n_kinds,)
        In Å.
    """

    pairs: Tensor
    kind: Tensor
    labels: list[str]
    n_bins: int
    target: Tensor
    tolerances: Tensor
    name, unit = "distribution", "Å"

    @classmethod
    def from_reference(cls, frames: Sequence[Atoms], topology: Topology) -> DistanceShift:
        """From frames of one molecule."""
        elements = topology.numbers[topology.pairs].sort(dim=0).values
        between = topology.separation.clamp(max=MAX_PATH_BONDS).long()
        kinds, kind = torch.unique(torch.cat([elements, between[None]]), dim=1, return_inverse=True)
        symbols = Atoms(numbers=topology.numbers).symbols
        name_of = dict(zip(topology.numbers.tolist(), symbols))
        labels = [f"{name_of[a]}-{name_of[b]}, {n}{' or more' if n == MAX_PATH_BONDS else ''} bonds apart" for a, b, n in kinds.T.tolist()]
        n_bins = int((2.0 * float(topology.mean.max()) + 2.0) / BIN_WIDTH)
        empty = torch.zeros((len(labels), n_bins), dtype=torch.float64)
        bare = cls(topology.pairs, kind, labels, n_bins, empty, empty[:, 0])
        values = bare.cumulative(AtomsBatch.from_atoms(frames)).view(len(frames), len(labels), -1)
        target = values.mean(dim=0)
        largest = (BIN_WIDTH * (values - target).abs().sum(dim=2)).amax(dim=0)
        return cls(topology.pairs, kind, labels, n_bins, target, (MARGIN_FACTOR * largest).clamp(min=BIN_WIDTH))

    def cumulative(self, batch: AtomsBatch) -> Tensor:
        """Fraction of the distances of each kind below each bin's end, per frame, float64, shape (n_systems, n_kinds * n_bins)."""
        positions = batch.positions.double().view(batch.n_systems, -1, 3)
        pairs, kind = self.pairs.to(batch.device), self.kind.to(batch.device)
        n_kinds = len(self.labels)
        at_once = max(1, 2**22 // max(1, pairs.shape[1]))
        parts = []
        for part in positions.split(at_once):
            distances = (part[:, pairs[1]] - part[:, pairs[0]]).norm(dim=2)
            bins = torch.nan_to_num(distances / BIN_WIDTH, nan=torch.inf).clamp(max=self.n_bins).long()
            counts = distances.new_zeros((len(part), n_kinds * (self.n_bins + 1)))
            counts.scatter_add_(1, kind * (self.n_bins + 1) + bins, torch.ones_like(distances))
            counts = counts.view(len(part), n_kinds, -1)
            below = counts.cumsum(dim=2) / counts.sum(dim=2, keepdim=True)
            parts.append(below[..., : self.n_bins].flatten(1))
        return torch.cat(parts)

    def severity(self, cumulative: Tensor) -> tuple[Tensor, Tensor]:
        """Of windows, from their mean `cumulative`, shape (..., n_kinds * n_bins): severity and the kind that is worst."""
        shift = BIN_WIDTH * (cumulative.unflatten(-1, self.target.shape) - self.target).abs().sum(dim=-1)
        return (shift / self.tolerances).max(dim=-1)

    def describe(self) -> str:
        return (
            f"distances of one kind (elements, bonds between) farther from the reference's over a window than {MARGIN_FACTOR:g} times "
            f"the worst reference frame ({len(self.labels)} kinds)"
        )
