"""The conditions under which replicas run and observables are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase import Atoms

from stabie_ase.boltzmann import WHOLE, Grouping, StatePoint
from stabie_ase.dynamics import Integrator
from stabie_ase.observables import Target
from stabie_ase.stability import Criterion
from stabie_ase.training.options import DynamicsOptions


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
    grouping : Grouping
        The groups of atoms that are samples, which the targets are of as well.
    """

    point: StatePoint
    starts: Sequence[Atoms]
    targets: Sequence[Target]
    criteria: Sequence[Criterion]
    integrator: Integrator
    replicas: int
    grouping: Grouping = WHOLE

    @classmethod
    def of(
        cls,
        frames: Sequence[Atoms],
        targets: Sequence[Target],
        criteria: Sequence[Criterion],
        dynamics: DynamicsOptions,
        device: str | torch.device = "cpu",
        grouping: Grouping = WHOLE,
    ) -> Condition:
        """From frames and what is known, at the temperature and pressure of some options of dynamics, on a device."""
        point, here = StatePoint(dynamics.temperature_K, dynamics.pressure_GPa), [target.to(device) for target in targets]
        return cls(point, frames, here, list(criteria), dynamics.integrator, dynamics.replicas, grouping)
