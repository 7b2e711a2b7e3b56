"""The contract of an observable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ase import Atoms
from torch import Tensor

from stabie_ase.structures.batch import AtomsBatch


class Observable(Protocol):
    """A vector g for every frame, comparable with a reference.

    Attributes
    ----------
    name : str
        As on the command line.
    grid : Tensor, shape (d,)
        Where the components belong, in units of `grid_label`.
    weights : Tensor, shape (d,)
        c_k of the loss Σ_k c_k (ḡ_k - g_k^ref)²: the bin width for a density, 1/d for a plain vector.
    grid_label, value_label : str
        Axis labels with units.
    """

    name: str
    grid: Tensor
    weights: Tensor
    grid_label: str
    value_label: str

    @classmethod
    def from_reference(cls, frames: Sequence[Atoms]) -> Observable:
        """The observable laid out for a system like the reference; ValueError where it has no meaning."""
        ...

    def __call__(self, batch: AtomsBatch) -> Tensor:
        """Per frame, shape (n_systems, d)."""
        ...
