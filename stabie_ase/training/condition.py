"""The conditions under which replicas run and observables are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ase import Atoms

from stabie_ase.boltzmann import StatePoint
from stabie_ase.dynamics import Integrator
from stabie_ase.observables import Target
from stabie_ase.stability import Criterion


@dataclass(frozen=True)
class Condition:
    """One state point at which replicas run and targets are known; a run has one or more.

    Attributes
    ----------
    point : StatePoint
    starts : sequence of Atoms
        Frames that replicas start from.
    targets : sequence of Target
    criteria : sequence of Criterion
        All of them decide what is stable; near and far are measured by whichever is worst.
    integrator : Integrator
    replicas : int
    """

    point: StatePoint
    starts: Sequence[Atoms]
    targets: Sequence[Target]
    criteria: Sequence[Criterion]
    integrator: Integrator
    replicas: int
