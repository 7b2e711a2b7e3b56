"""What observables and criteria are laid out for: a system, as its reference shows it, and a thermodynamic state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ase import Atoms

from stabie_ase.structures.kind import SystemKind, kind_of
from stabie_ase.structures.topology import Topology

SAME_TEMPERATURE = 0.05
"""Fraction by which the temperature of the dynamics may be off that of the reference: distances do not tell them apart."""


def same_temperature(told_K: float | None, temperature_K: float) -> bool:
    """Whether data of one temperature serve for dynamics of another, both in K; of data that tell none that is assumed."""
    return told_K is None or abs(temperature_K - told_K) <= SAME_TEMPERATURE * told_K


@dataclass(frozen=True)
class Setting:
    """Reference frames of one system and the state at which replicas of it run.

    Attributes
    ----------
    frames : sequence of Atoms
    temperature_K : float
        Of the dynamics.
    reference_temperature_K : float or None
        Of the frames, where it is known.
    timestep_fs : float or None
        Of the dynamics, which who judges windows of time has to know.
    check_every_fs : float or None
        Between two looks at the criteria, where that is known.
    """

    frames: Sequence[Atoms]
    temperature_K: float
    reference_temperature_K: float | None = None
    timestep_fs: float | None = None
    check_every_fs: float | None = None

    @property
    def one_temperature(self) -> bool:
        """Whether the reference is of the temperature of the dynamics, as far as it tells."""
        return same_temperature(self.reference_temperature_K, self.temperature_K)

    @cached_property
    def topology(self) -> Topology:
        """Bonds, worked out when first asked for; ValueError where there is no one set of them (`Topology.from_frames`)."""
        return Topology.from_frames(self.frames)

    @cached_property
    def molecules(self) -> Topology:
        """Bonds of the molecules beside a network, where there are such (`SystemKind.beside`); else all bonds, as `topology`."""
        return Topology.of_atoms(self.frames, self.kind.beside) if self.kind.beside else self.topology

    @cached_property
    def bonds_last(self) -> bool:
        """Whether the reference has one set of these bonds, as frames in which some form or break have not."""
        try:
            return self.molecules is not None
        except ValueError:
            return False

    @cached_property
    def kind(self) -> SystemKind:
        """What kind of system it is, worked out when first asked for."""
        return kind_of(self.frames)
