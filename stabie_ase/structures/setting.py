"""What observables and criteria are laid out for: a system, as its reference shows it, and a thermodynamic state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ase import Atoms

from stabie_ase.structures.topology import Topology


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
    """

    frames: Sequence[Atoms]
    temperature_K: float
    reference_temperature_K: float | None = None

    @cached_property
    def topology(self) -> Topology:
        """Bonds, worked out when first asked for; ValueError where there is no one set of them (`Topology.from_frames`)."""
        return Topology.from_frames(self.frames)
