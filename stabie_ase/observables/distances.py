"""Distributions of interatomic distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.observables.grid import SmearedDensity
from stabie_ase.observables.kinds import in_one_order, name_of_kind, refuse_none
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.elements import check_known, element_pair
from stabie_ase.structures.geometry import in_parts, pair_distances
from stabie_ase.structures.kind import MOLECULAR_LIQUID
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import Spec


@dataclass(frozen=True)
class DistanceDistribution(SmearedDensity):
    """Distribution of all interatomic distances of a molecule, h(r), or of those between two elements, normalised to one.

    h(r) = 1/(N(N-1)) Σ_{i≠j} δ(r - r_ij) (Raja et al., arXiv 2402.13984), every distance smeared by a normalised
    Gaussian; a bin holds the mean of the smeared density over its width. A distance beyond the last bin is missing
    from the integral. Of a liquid of molecules it is the distribution of the distances within molecules, by the nearest image.
    That of two elements knows less of the molecule and more of what breaks: a C-C bond that is too long has a distance that no other
    C and C have, but two H of a methyl group do.

    Parameters
    ----------
    molecule : Tensor of int64, shape (n_atoms,), or None
        Of each atom of a liquid of molecules; None of one molecule.
    r_max : float
        End of the grid in Å.
    bin_width : float
        In Å.
    smearing : float
        Standard deviation of the Gaussian in Å.
    elements : tuple of int, or None
        Atomic numbers of the two elements; None for all distances.
    """

    internal = True

    r_max: float
    bin_width: float = 0.02
    smearing: float = 0.02
    molecule: Tensor | None = None
    elements: tuple[int, int] | None = None

    @classmethod
    def from_reference(
        cls, frames: Sequence[Atoms], margin: float = 2.0, molecule: Tensor | None = None, **settings
    ) -> DistanceDistribution:
        """A grid that reaches beyond the longest distance of the reference.

        Parameters
        ----------
        frames : sequence of Atoms
            The reference.
        margin : float
            How far the grid goes beyond, in Å.
        molecule : Tensor of int64, shape (n_atoms,), optional
            Of each atom, if the reference is a liquid of molecules.
        **settings
            The other fields of the class.

        Returns
        -------
        DistanceDistribution

        Raises
        ------
        ValueError
            Periodic frames without molecules, or several compositions: h(r) has no meaning there. No two atoms of these elements in a
            molecule.
        """
        batch = AtomsBatch.from_atoms(frames)
        if molecule is None and batch.pbc.any():
            raise ValueError("h(r) is for molecules, alone or in a liquid, but the reference is periodic and no liquid of molecules")
        if not batch.same_composition or batch.sizes[0] < 2:
            raise ValueError("h(r) needs reference frames of one molecule of two atoms or more, in one atom order")
        pairs = _pairs(batch, molecule, settings.get("elements"))
        longest = max(float(pair_distances(part, pairs).max()) for part in in_parts(batch, pairs.shape[1]))
        return cls(r_max=math.ceil(longest + margin), molecule=molecule, **settings)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> DistanceDistribution:
        """`hr`, or `hr:C-O` for two elements, with `r_max`, `bin_width` and `smearing` in Å."""
        given = spec.read({"elements": element_pair, "r_max": float, "bin_width": float, "smearing": float}, "elements")
        molecule = setting.molecules.molecule if setting.kind.name == MOLECULAR_LIQUID or setting.kind.beside else None
        elements = given.get("elements")
        if elements:
            check_known(elements, torch.as_tensor(setting.frames[0].numbers), spec)
        laid_out = cls.from_reference(setting.frames, molecule=molecule, elements=elements)  # refuses what has no h(r)
        return replace(laid_out, **given)

    @property
    def name(self) -> str:
        """"hr", or with its two elements."""
        return name_of_kind("hr", self.elements)

    @property
    def subject(self) -> str:
        """Of two elements in any order."""
        return name_of_kind("hr", self.elements and in_one_order(self.elements))

    @property
    def label(self) -> str:
        """Of the values."""
        return name_of_kind("h(r)", self.elements).replace(":", ", ") + " (1/Å)"

    def values(self, batch: AtomsBatch) -> Tensor:
        """h(r) of every molecule, or of all those of each frame of a liquid together, float64, shape (n_systems, n_bins), in 1/Å."""
        if len(set(batch.sizes)) > 1:
            raise ValueError(f"h(r) is for frames of one molecule, got systems of {sorted(set(batch.sizes))} atoms")
        whole = self.molecule is not None and len(self.molecule) == batch.sizes[0]
        pairs = _pairs(batch, self.molecule if whole else None, self.elements)
        parts = in_parts(batch, pairs.shape[1], 2**21 // (2 * self._reach + 1))
        return torch.cat([self._histogram(pair_distances(part, pairs)) for part in parts])

    @property
    def _reach(self) -> int:
        """Bins on either side that a smeared distance touches."""
        return math.ceil(5.0 * self.smearing / self.bin_width) + 1

    def _histogram(self, distances: Tensor) -> Tensor:
        n_systems, n_distances = distances.shape
        reach = self._reach
        distances = torch.nan_to_num(distances, nan=torch.inf).clamp(max=self.r_max + 2 * reach * self.bin_width)
        centre = torch.floor(distances / self.bin_width).long()
        bins = centre[..., None] + torch.arange(-reach, reach + 1, device=distances.device)
        edges = torch.cat([bins, bins[..., -1:] + 1], dim=-1).to(distances.dtype) * self.bin_width
        cumulative = 0.5 * torch.erf((edges - distances[..., None]) / (math.sqrt(2.0) * self.smearing))
        fraction = cumulative.diff(dim=-1) / (n_distances * self.bin_width)
        fraction = torch.where((bins >= 0) & (bins < self.n_bins), fraction, 0.0)
        histogram = fraction.new_zeros((n_systems, self.n_bins))
        return histogram.scatter_add_(1, bins.clamp(0, self.n_bins - 1).view(n_systems, -1), fraction.view(n_systems, -1))


def _pairs(batch: AtomsBatch, molecule: Tensor | None, elements: tuple[int, int] | None) -> Tensor:
    """All pairs i < j of atoms of one molecule, or those of two elements, shape (2, n_pairs); the system is one without molecules."""
    n = batch.n_atoms // batch.n_systems
    molecule = torch.zeros(n, dtype=torch.int64) if molecule is None else molecule
    molecule = molecule.to(batch.device)
    chosen = torch.triu(molecule[:, None] == molecule, diagonal=1)
    if elements:
        a, b = (batch.numbers[:n] == z for z in elements)
        chosen &= (a[:, None] & b) | (b[:, None] & a)
    pairs = chosen.nonzero().T
    refuse_none(pairs, "pairs of atoms in a molecule", elements)
    return pairs
