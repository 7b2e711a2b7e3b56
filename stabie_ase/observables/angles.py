"""Angles between bonds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ase.data import chemical_symbols
from torch import Tensor

from stabie_ase.observables.base import Axis, Observable
from stabie_ase.observables.kinds import in_one_order, name_of_kind, refuse_none
from stabie_ase.observables.local import check_size
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.chains import bonded_chains
from stabie_ase.structures.elements import element_chain
from stabie_ase.structures.geometry import bond_angles
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology
from stabie_ase.system.spec import Spec


@dataclass(frozen=True)
class BondAngles(Observable):
    """The angle between every two bonds of an atom, or those of three elements.

    cos θ_k = (r_i - r_j)·(r_l - r_j) / (|r_i - r_j| |r_l - r_j|) for the atoms i-j-l of angle k, bonds by the nearest image, in
    degrees from 0 to 180 (Allen & Tildesley, Computer Simulation of Liquids, 2nd ed., appendix C). An error is a mean over angles of
    deviations of mean angles. The distribution of the angles of a kind is `adf`.

    Parameters
    ----------
    topology : Topology
    elements : tuple of int
        Atomic numbers of i, j and l, j at the centre; all angles if none are given.
    """

    internal = True

    topology: Topology
    elements: tuple[int, int, int] | None = None
    label = "angle (°)"

    def __post_init__(self):
        refuse_none(self.angles, "angles between bonds", self.elements)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> BondAngles:
        """`angle`, or `angle:H-O-H` for those of three elements, the second at the centre."""
        return cls(setting.topology, spec.read({"elements": element_chain(3)}, "elements").get("elements"))

    @property
    def name(self) -> str:
        """"angle", or with its three elements."""
        return name_of_kind("angle", self.elements)

    @property
    def subject(self) -> str:
        """Of three elements from either end."""
        return name_of_kind("angle", self.elements and in_one_order(self.elements))

    @cached_property
    def angles(self) -> Tensor:
        """Atoms i, j, l of each, shape (3, n_angles)."""
        return bonded_chains(self.topology, 3, self.elements)

    @cached_property
    def axis(self) -> Axis:
        symbols = [chemical_symbols[z] for z in self.topology.numbers.tolist()]
        return Axis.of_names("angle", ["-".join(f"{symbols[a]}{a}" for a in atoms) for atoms in self.angles.T.tolist()])

    def values(self, batch: AtomsBatch) -> Tensor:
        """Angles in every system, float64, shape (n_systems, n_angles), in degrees."""
        check_size(batch, self.topology, self.name)
        return bond_angles(batch, self.angles)
