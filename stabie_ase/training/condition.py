"""The conditions under which replicas run and observables are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase import Atoms

from stabie_ase.boltzmann import WHOLE, Grouping, StatePoint, choose_grouping, targets_at
from stabie_ase.dynamics import Integrator
from stabie_ase.observables import Observable, Target
from stabie_ase.potentials.base import Potential
from stabie_ase.stability import Criterion
from stabie_ase.structures.reference import Reference
from stabie_ase.structures.setting import Setting
from stabie_ase.training.options import DynamicsOptions, FinetuneOptions


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

    @classmethod
    def from_reference(
        cls,
        potential: Potential,
        reference: Reference,
        observables: Sequence[Observable],
        criteria: Sequence[Criterion],
        config: FinetuneOptions,
        grouping: Grouping | None = None,
    ) -> Condition:
        """The one that options ask for, its starts and targets the frames of a reference.

        Without a grouping it is the one that the options name, or that suits (`choose_grouping`).
        """
        setting = Setting(reference.frames, config.dynamics.temperature_K, reference.temperature_K)
        grouping = grouping or choose_grouping(config.estimator.groups, setting, observables, potential)
        targets = targets_at(observables, reference, setting.temperature_K, config.reweight, config.reweight, grouping)
        return cls.of(reference.frames, targets, criteria, config.dynamics, potential.device, grouping)
