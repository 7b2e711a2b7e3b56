"""Looks at running replicas: how bad each is, and the first failure of each with its cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.stability.criteria.base import Criterion, Verdict
from stabie_ase.structures.batch import AtomsBatch

if TYPE_CHECKING:
    from stabie_ase.dynamics.state import MDState

NOT_FINITE = "not finite"
"""The cause of a failure that no criterion has to look for."""


class Look(NamedTuple):
    """What all criteria say of some replicas at one time.

    Attributes
    ----------
    severity : Tensor of float64, shape (n_running,)
        Of the criterion by which a replica is worst; infinite where a number is not finite.
    worst : Tensor of int64, shape (n_running,)
        Which criterion that is; 0 stands for numbers that are not finite, k + 1 for criterion k.
    verdicts : list of Verdict
        In that order.
    """

    severity: Tensor
    worst: Tensor
    verdicts: list[Verdict]

    @property
    def unstable(self) -> Tensor:
        """Shape (n_running,), bool."""
        return ~(self.severity <= 1.0)


def look(state: MDState, criteria: Sequence[Criterion]) -> Look:
    """Judge the present state of replicas by several criteria at once."""
    severity = torch.zeros_like(state.potential_energy).masked_fill(~state.alive, torch.inf)
    verdicts = [Verdict(severity, severity, state.step.new_zeros((state.n_systems, 0)))]
    verdicts += [criterion.judge(state) for criterion in criteria]
    severities = torch.stack([_worst_if_unknown(v.severity) for v in verdicts])
    return Look(*severities.max(dim=0), verdicts)


def _worst_if_unknown(x: Tensor) -> Tensor:
    """Float64, with infinity for what is not a number."""
    return torch.where(torch.isnan(x), torch.inf, x.double())


@dataclass(frozen=True)
class Failures:
    """First failure of each replica in one run.

    Attributes
    ----------
    step : Tensor of int64, shape (n_systems,)
        Steps into the run at which it was seen; -1 for none.
    value : Tensor of float64, shape (n_systems,)
        What the criterion measured; infinite for numbers that are not finite.
    criterion : list of str or None
    atoms : list of list of int
        Atoms to blame, numbered within their system.
    frames : AtomsBatch
        Positions and cells at the failure; at the start for the others.
    momenta : Tensor, shape (n_atoms, 3)
        At the failure, in amu Å / ASE time; zero for the others.
    """

    step: Tensor
    value: Tensor
    criterion: list[str | None]
    atoms: list[list[int]]
    frames: AtomsBatch
    momenta: Tensor

    @classmethod
    def none(cls, batch: AtomsBatch) -> Failures:
        """Nothing has failed yet."""
        n = batch.n_systems
        value = torch.zeros(n, dtype=torch.float64, device=batch.device)
        step, momenta = torch.full((n,), -1, device=batch.device), torch.zeros_like(batch.positions)
        return cls(step, value, [None] * n, [[] for _ in range(n)], batch, momenta)

    @property
    def failed(self) -> Tensor:
        """Shape (n_systems,), bool."""
        return self.step >= 0

    @property
    def share(self) -> float:
        """Part of the replicas that have failed."""
        return float(self.failed.double().mean())

    @property
    def causes(self) -> Counter[str]:
        """Failures by criterion."""
        return Counter(name for name in self.criterion if name is not None)

    def examine(self, state: MDState, active: Tensor, criteria: Sequence[Criterion], looked: Look, step: int) -> Failures:
        """Take down which of the replicas `active`, whose present state is `state`, have failed now."""
        new = (looked.unstable & ~self.failed[active]).nonzero()[:, 0]
        if not len(new):
            return self
        names = [NOT_FINITE, *(criterion.name for criterion in criteria)]
        replicas = active[new]
        criterion, atoms, value = list(self.criterion), list(self.atoms), self.value.clone()
        for k, replica, worst in zip(new.tolist(), replicas.tolist(), looked.worst[new].tolist()):
            verdict = looked.verdicts[worst]
            criterion[replica], atoms[replica] = names[worst], verdict.atoms[k].tolist()
            value[replica] = _worst_if_unknown(verdict.value[k])
        where, there = self.frames.atom_index(replicas), state.batch.atom_index(new)
        frames = self.frames.replace(
            positions=self.frames.positions.index_copy(0, where, state.batch.positions[there]),
            cells=self.frames.cells.index_copy(0, replicas, state.batch.cells[new]),
        )
        return replace(
            self,
            step=self.step.index_fill(0, replicas, step),
            value=value,
            criterion=criterion,
            atoms=atoms,
            frames=frames,
            momenta=self.momenta.index_copy(0, where, state.momenta[there].to(self.momenta)),
        )

    def to_atoms(self, info: Mapping[int, dict] | None = None) -> list[Atoms]:
        """Each frame at a failure with its momenta; atoms to blame are tagged 1, `info` tells more of a replica.

        The frame's own info tells `replica`, `criterion` and `value`.
        """
        chosen = self.failed.nonzero()[:, 0]
        images = self.frames.select(chosen).to_atoms() if len(chosen) else []
        momenta = self.momenta.cpu().double().numpy()
        for k, atoms in zip(chosen.tolist(), images):
            atoms.set_momenta(momenta[self.frames.atom_index(chosen.new_tensor([k])).cpu().numpy()])
            atoms.set_tags([int(a in self.atoms[k]) for a in range(len(atoms))])
            atoms.info |= {"replica": k, "criterion": self.criterion[k], "value": float(self.value[k])} | (info or {}).get(k, {})
        return images
