"""Torsions about bonds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabie_ase.observables.base import Axis
from stabie_ase.observables.kinds import in_one_order, name_of_kind, refuse_none
from stabie_ase.observables.local import LocalDensity, Terms, check_size, terms_of_topology
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.chains import bonded_chains
from stabie_ase.structures.elements import element_chain
from stabie_ase.structures.geometry import pair_vectors
from stabie_ase.structures.radial import MAX_BINS
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology
from stabie_ase.system.spec import Spec


@dataclass(frozen=True)
class DihedralDistribution(LocalDensity):
    """Distribution of the dihedral angles of bonded atoms i-j-k-l, all of them or those of four elements, over (-180°, 180°].

    p(φ) = 1/n Σ_t δ(φ - φ_t) in 1/degree, periodic, with integral one: the mean over the n torsions of a frame. The sign is
    IUPAC's (Compendium of Chemical Terminology, "torsion angle"): seen along j-k, φ is positive if the far bond is turned clockwise
    from the near one; 0° is cis, 180° trans, which is the end of the last bin and the start of the first. It is that of
    `ase.Atoms.get_dihedral` less full turns; tan φ as in Blondel & Karplus, J. Comput. Chem. 17, 1132 (1996). A torsion
    belongs to its two inner atoms. Where three atoms of it are in line it has no meaning. A mirror image has the opposite
    signs: reference and dynamics have to be of one handedness, or both of either in equal parts.

    Parameters
    ----------
    topology : Topology
    elements : tuple of int
        Atomic numbers of i, j, k and l; all torsions if none are given.
    bin_width : float
        In degrees; a fraction 1/n of 360.
    """

    internal = True

    topology: Topology
    elements: tuple[int, int, int, int] | None = None
    bin_width: float = 5.0
    label = "p(φ) (1/°)"

    def __post_init__(self):
        bins_of(360.0, self.bin_width, self.name)
        refuse_none(self.dihedrals, "dihedral angles", self.elements)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> DihedralDistribution:
        """`dihedral`, or `dihedral:C-C-C-C` for those of four elements; `bin_width` in degrees."""
        return cls(setting.topology, **spec.read({"elements": element_chain(4), "bin_width": float}, "elements"))

    @property
    def name(self) -> str:
        """"dihedral", or with its four elements."""
        return name_of_kind("dihedral", self.elements)

    @property
    def subject(self) -> str:
        """Of four elements from either end."""
        return name_of_kind("dihedral", self.elements and in_one_order(self.elements))

    @cached_property
    def dihedrals(self) -> Tensor:
        """Atoms i, j, k, l of each, shape (4, n_dihedrals)."""
        return bonded_chains(self.topology, 4, self.elements)

    @cached_property
    def axis(self) -> Axis:
        """Centres of the bins, in degrees."""
        n = bins_of(360.0, self.bin_width, self.name)
        return Axis((torch.arange(n, dtype=torch.float64) + 0.5) * self.bin_width - 180.0, "φ (°)")

    def bins(self, x: Tensor) -> Tensor:
        """The bin of each angle in degrees, int64, shape (n_terms,); 180° is -180°."""
        return torch.floor((x + 180.0) / self.bin_width).long() % len(self.axis.values)

    def angles(self, batch: AtomsBatch) -> Tensor:
        """φ of every torsion of every system, float64, shape (n_systems, n_dihedrals), in degrees."""
        i, j, k, m = self.dihedrals
        return torsion(*(pair_vectors(batch, torch.stack(bond)) for bond in ((i, j), (j, k), (k, m))))

    def terms(self, frames: AtomsBatch) -> Iterator[Terms]:
        """φ, of the two inner atoms each."""
        check_size(frames, self.topology, self.name)
        return terms_of_topology(frames, self.topology, self.dihedrals[1:3], self.angles, 3 * self.dihedrals.shape[1])


def torsion(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Dihedral angle of three bonds in a row, of vectors of shape (..., 3), in degrees, shape (...)."""
    normal = torch.linalg.cross(b, c)
    sine = (a * normal).sum(dim=-1) * b.norm(dim=-1)
    return torch.atan2(sine, (torch.linalg.cross(a, b) * normal).sum(dim=-1)) * (180.0 / math.pi)


def bins_of(whole: float, bin_width: float, name: str) -> int:
    """How many bins, in degrees, make up a range of angles; ValueError if no whole number of them does."""
    n = round(whole / bin_width) if 0.0 < bin_width <= whole else 0
    if not 0 < n <= MAX_BINS or abs(n * bin_width - whole) > 1e-9 * whole:
        works = whole / min(max(n, 36), MAX_BINS)
        raise ValueError(f"{name} needs bins that divide {whole:g} degrees, got bin_width={bin_width:g}; try {works:g}")
    return n
