"""Angular distribution functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabie_ase.observables.base import Axis
from stabie_ase.observables.dihedrals import bins_of
from stabie_ase.observables.kinds import in_one_order, yes_or_no
from stabie_ase.observables.local import LocalDensity, Terms, pairs_expected
from stabie_ase.observables.shells import first_shell
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.chains import Places
from stabie_ase.structures.elements import check_known, element_chain, pair_name
from stabie_ase.structures.geometry import VECTORS_AT_ONCE, angle_between, in_parts
from stabie_ase.structures.neighbors import NeighborList, neighbor_list
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import BadSpec, Spec


@dataclass(frozen=True)
class AngularDistribution(LocalDensity):
    """Distribution of the angles A-B-C between an atom B and its neighbours A and C, whether bonded or not.

    p(θ) = 1/n Σ_{j∈B} Σ_{i∈A, r_ij<r_A} Σ_{k∈C, k≠i, r_jk<r_C} δ(θ - θ_ijk) over the n angles of a frame, over all images and with
    two neighbours of one element as one pair: a density in 1/degree with integral one. In an ideal gas it is sin θ / 2 per
    radian. With `cone_correction` it is divided by that, as g(r) is by 4πr², and is one in an ideal gas (Brehm & Kirchner,
    J. Chem. Inf. Model. 51, 2007, 2011); the distance of two of them is that of the densities. Each frame is normalised by
    itself, and one without any angle has a density of zero. An angle belongs to its atom B. Cutoffs may be longer than half the cell.

    Parameters
    ----------
    elements : tuple of int
        Atomic numbers of A, B and C.
    cutoffs : tuple of float
        r_A and r_C in Å; the same where A = C.
    bin_width : float
        In degrees; a fraction 1/n of 180.
    cone_correction : bool
        Whether to divide by the distribution of an ideal gas.
    """

    elements: tuple[int, int, int]
    cutoffs: tuple[float, float]
    bin_width: float = 2.0
    cone_correction: bool = False

    def __post_init__(self):
        bins_of(180.0, self.bin_width, self.name)
        if not (min(self.cutoffs) > 0 and (self.elements[0] != self.elements[2] or self.cutoffs[0] == self.cutoffs[1])):
            raise ValueError(f"{self.name} needs positive cutoffs, one for one element, got {self.cutoffs[0]:g} and {self.cutoffs[1]:g} Å")

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> AngularDistribution:
        """`adf:A-B-C`, B at the centre, with `r_max` in Å for both neighbours, `bin_width` in degrees and `cone_correction`, yes or no.

        Without `r_max` A and C reach as far as the first shell around B that each of them has in the reference
        (`first_shell`), because angles between a first and a second shell blur what the distribution is looked at for.
        """
        readers = {"elements": element_chain(3), "r_max": float, "bin_width": float, "cone_correction": yes_or_no}
        given = spec.read(readers, "elements")
        if "elements" not in given:
            raise BadSpec(f"{str(spec)!r} names no elements; write adf:A-B-C, with B at the centre")
        a, b, c = given["elements"]
        check_known((a, b, c), AtomsBatch.from_atoms(setting.frames).numbers, spec)
        r_max = given.pop("r_max", None)
        cutoffs = (r_max, r_max) if r_max is not None else tuple(first_shell((b, end), setting, "r_max") for end in (a, c))
        return cls(cutoffs=cutoffs, **given)

    @property
    def name(self) -> str:
        """"adf:" and the three elements."""
        return f"adf:{pair_name(self.elements)}"

    @property
    def subject(self) -> str:
        """Of three elements from either end."""
        return f"adf:{pair_name(in_one_order(self.elements))}"

    @property
    def label(self) -> str:
        """Of the values, with their unit if they have one."""
        kind = pair_name(self.elements)
        return f"p(θ) / p of an ideal gas, {kind}" if self.cone_correction else f"p(θ), {kind} (1/°)"

    @cached_property
    def axis(self) -> Axis:
        """Centres of the bins, in degrees."""
        return Axis((torch.arange(bins_of(180.0, self.bin_width, self.name), dtype=torch.float64) + 0.5) * self.bin_width, "θ (°)")

    @property
    def measure(self) -> Tensor:
        """The bin width each, in degrees, shape (n_bins,); if corrected, the fraction of an ideal gas in each bin."""
        return self._ideal if self.cone_correction else super().measure

    @property
    def _ideal(self) -> Tensor:
        edges = torch.arange(len(self.axis.values) + 1, dtype=torch.float64) * self.bin_width
        return -0.5 * torch.deg2rad(edges).cos().diff()

    def bins(self, x: Tensor) -> Tensor:
        """The bin of each angle in degrees, int64, shape (n_terms,); 180° is in the last."""
        return super().bins(x).clamp(max=len(self.axis.values) - 1)

    def summed(self, x: Tensor, group: Tensor, n_groups: int) -> Tensor:
        """Angles by bin over the bin width or, if corrected, over what an ideal gas would have, float64, shape (n_groups, n_bins)."""
        density = super().summed(x, group, n_groups)
        return density * (self.bin_width / self._ideal).to(density.device) if self.cone_correction else density

    def terms(self, frames: AtomsBatch) -> Iterator[Terms]:
        """θ, of the atom B at the centre."""
        first, reach = 0, max(self.cutoffs)
        for part in in_parts(frames, pairs_expected(frames, reach)):
            near = neighbor_list(part, reach)
            for centre, angle in self._angles(part, near):
                yield first + centre, angle
            first += part.n_atoms

    def _angles(self, batch: AtomsBatch, near: NeighborList) -> Iterator[Terms]:
        """Of one neighbour A at a time with all C, so many that there are no more than `VECTORS_AT_ONCE` angles."""
        vectors = near.vectors(batch)
        centre, ends = near.pairs[0], [self._neighbors(batch, near, vectors, end) for end in (0, 1)]
        around = Places(centre[ends[1]], batch.n_atoms)
        most = int(around.count.max())
        for some in ends[0].split(max(1, VECTORS_AT_ONCE // max(1, most))):
            a, c = around.join(centre[some])
            a, c = some[a], ends[1][c]
            if self.elements[0] == self.elements[2]:
                a, c = a[a < c], c[a < c]
            yield centre[a], angle_between(vectors[a], vectors[c])

    def _neighbors(self, batch: AtomsBatch, near: NeighborList, vectors: Tensor, end: int) -> Tensor:
        """Pairs of the list that lead from an atom B to an A or a C within its cutoff, shape (n_found,)."""
        i, j = near.pairs
        wanted = (batch.numbers[i] == self.elements[1]) & (batch.numbers[j] == self.elements[2 * end])
        return (wanted & (vectors.norm(dim=1) < self.cutoffs[end])).nonzero()[:, 0]
