"""Densities on a grid of distances."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from stabie_ase.observables.base import Axis, Observable
from stabie_ase.structures.radial import count_bins


class SmearedDensity(Observable):
    """A density of distances, in 1/Å, each of them smeared by a normalised Gaussian; a bin holds the mean over its width.

    Attributes
    ----------
    r_max : float
        End of the grid in Å.
    bin_width : float
        In Å.
    smearing : float
        Standard deviation of the Gaussian in Å.
    """

    r_max: float
    bin_width: float
    smearing: float

    def __post_init__(self):
        count_bins(self.r_max, self.bin_width, self.name)
        if not 0 < self.smearing < self.r_max:
            raise ValueError(f"{self.name} needs a smearing above 0 and below its range of {self.r_max:g} Å, got {self.smearing:g} Å")

    @property
    def n_bins(self) -> int:
        """Bins up to `r_max`."""
        return count_bins(self.r_max, self.bin_width, self.name)

    @cached_property
    def axis(self) -> Axis:
        """Centres of the bins, in Å."""
        return Axis.of_distances(self.n_bins, self.bin_width)

    @property
    def measure(self) -> Tensor:
        """The bin width each, in Å, shape (n_bins,): the loss does not depend on the number of bins."""
        return torch.full((self.n_bins,), self.bin_width, dtype=torch.float64)
