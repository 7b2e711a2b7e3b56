"""Radial distribution functions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from ase.data import chemical_symbols
from torch import Tensor

from stabie_ase.observables.base import Axis, Observable
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.elements import check_known, element_pair, pair_name
from stabie_ase.structures.radial import Shells, count_bins, partner_density
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups
from stabie_ase.system.spec import Spec

MIN_DEFAULT_RANGE, MAX_DEFAULT_RANGE = 5.0, 8.0
"""Å; between them a function that nobody has asked to be longer reaches half the width of the smallest reference cell.

In a narrower cell some of its neighbours are images, in the model's dynamics as in the reference; half of its width may end before the
first of them.
"""


@dataclass(frozen=True)
class RadialDistribution(Observable):
    """Radial distribution function g_ab(r) of two elements under periodic boundary conditions.

    g_ab(r) = V / (N_a N_b) Σ_{i∈a} Σ_{j∈b, j≠i} δ(r - r_ij) / (4π r²), over all images (Allen & Tildesley, Computer
    Simulation of Liquids, 2nd ed., section 2.6), with N_b the possible partners of one atom: N_a - 1 where a = b, so
    that g = 1 in an ideal gas. A bin holds the mean over its shell; each frame counts with its own volume V.

    Parameters
    ----------
    elements : tuple of int
        Atomic numbers of a and b.
    r_max : float
        In Å.
    bin_width : float
        In Å.
    """

    elements: tuple[int, int]
    r_max: float
    bin_width: float = 0.05

    def __post_init__(self):
        count_bins(self.r_max, self.bin_width, self.name)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> RadialDistribution:
        """`rdf:O-O`, with `r_max` and `bin_width` in Å."""
        given = spec.read({"elements": element_pair, "r_max": float, "bin_width": float}, "elements")
        batch = AtomsBatch.from_atoms(setting.frames)
        if not batch.pbc.all():
            raise ValueError("a radial distribution function needs a reference that is periodic in all directions; hr is for molecules")
        numbers = sorted(set(batch.numbers.tolist()))
        elements = given.pop("elements", None) or (numbers * 2 if len(numbers) == 1 else None)
        if elements is None:
            symbols = ", ".join(chemical_symbols[z] for z in numbers)
            raise ValueError(f"{str(spec)!r} names no elements, and the reference has {symbols}; write rdf:A-B")
        check_known(elements, batch.numbers, spec)
        half_width = 0.5 / float(torch.linalg.inv(batch.cells.double()).norm(dim=1).max())
        return cls(tuple(elements), **({"r_max": min(MAX_DEFAULT_RANGE, max(MIN_DEFAULT_RANGE, half_width))} | given))

    @property
    def name(self) -> str:
        """"rdf:" and the two elements."""
        return f"rdf:{pair_name(self.elements)}"

    @property
    def subject(self) -> str:
        """Of two elements in any order: g_ab = g_ba."""
        return f"rdf:{pair_name(sorted(self.elements))}"

    @property
    def label(self) -> str:
        """Of the values, which have no unit."""
        return f"g(r), {pair_name(self.elements)}"

    @property
    def n_bins(self) -> int:
        """Bins up to `r_max`."""
        return count_bins(self.r_max, self.bin_width, self.name)

    @cached_property
    def axis(self) -> Axis:
        """Centres of the bins, in Å."""
        return Axis.of_distances(self.n_bins, self.bin_width, shells=True)

    @property
    def measure(self) -> Tensor:
        """The bin width over the range, shape (n_bins,): an error is a mean over r."""
        return torch.full((self.n_bins,), 1.0 / self.n_bins, dtype=torch.float64)

    def __call__(self, frames: AtomsBatch, groups: Groups | None = None) -> Tensor:
        """g(r) around the atoms a of every group, float64, shape (n_groups, n_bins).

        Weighted by its number of atoms a, the mean over the groups of a frame is that of the whole frame. A group without any has
        none: zero.
        """
        groups = groups or Groups.systems(frames)
        if not bool(frames.pbc.all()):
            raise ValueError(f"{self.name} needs frames that are periodic in all directions")
        shells = Shells(self.n_bins, self.bin_width)
        each = torch.arange(frames.n_atoms, device=frames.device)
        counts = shells.count(frames, shells.neighbors(frames), self.elements, each, frames.n_atoms)
        a = (frames.numbers == self.elements[0]).double()
        density = partner_density(frames, self.elements)[groups.system]
        members = a.new_zeros(groups.n_groups).index_add(0, groups.group, a[groups.atoms])
        summed = counts.new_zeros((groups.n_groups, self.n_bins)).index_add(0, groups.group, counts[groups.atoms])
        ideal = (members * density)[:, None] * shells.volumes.to(frames.device)
        return torch.where(ideal > 0, summed / ideal.clamp(min=1e-300), 0.0)
