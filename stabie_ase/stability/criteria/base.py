"""The contract of a criterion, and what it says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import pair_distances
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import BadSpec, Spec


class Verdict(NamedTuple):
    """What a criterion says of each system.

    Attributes
    ----------
    severity : Tensor of float64, shape (n_systems,)
        1 at the tolerance, larger is worse; not a number, or infinite, where that cannot be told.
    value : Tensor of float64, shape (n_systems,)
        The quantity behind it, in the criterion's unit.
    atoms : Tensor of int64, shape (n_systems, k)
        The atoms to blame, numbered within their system, -1 for none; k is 0 where all are.
    memory : mapping of str to Tensor, shape (n_systems, ...)
        What to remember of each system until the next look, under the names that the criterion's `memory` gave.
    """

    severity: Tensor
    value: Tensor
    atoms: Tensor
    memory: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def unstable(self) -> Tensor:
        """Shape (n_systems,), bool; what is not a number is unstable."""
        return ~(self.severity <= 1.0)


class Criterion(Protocol):
    """Judges the present state of replicas.

    Attributes
    ----------
    name, unit : str
        For reports: the cause of a failure, and what its value is in.
    """

    name: str
    unit: str

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Criterion:
        """The criterion for a system like the reference; BadSpec or ValueError for what cannot be made."""
        ...

    def memory(self, batch: AtomsBatch) -> dict[str, Tensor]:
        """What is known of systems before the first look, shape (n_systems, ...) each; {} where one frame is enough."""
        ...

    def judge(self, state: MDState) -> Verdict:
        """What it says of each system, whose memory is in `state.extra`."""
        ...

    def for_model(self, potential: Potential) -> Criterion:
        """The same for another model, or for the same one with other weights; most do not depend on it."""
        ...

    def describe(self) -> str:
        """What makes a replica unstable, with its numbers, in words."""
        ...


def span_ps(criteria: Sequence[Criterion]) -> float:
    """The time in ps that replicas have to run until all criteria have judged something; zero where one frame is enough to all."""
    return max((getattr(criterion, "span_ps", 0.0) for criterion in criteria), default=0.0)


class OneFrame:
    """A criterion to which one frame is enough, and that is the same for all models."""

    def memory(self, batch: AtomsBatch) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def for_model(self, potential: Potential):
        """Itself."""
        return self


def check_tolerance(tolerance: float, what: str) -> None:
    """Raise ValueError, with what it is of, for a tolerance that is no positive length in Å."""
    if not 0 < tolerance < math.inf:
        raise ValueError(f"{what} must be a positive length, got {tolerance} Å")


def tolerance_of(spec: Spec, for_example: float = 0.25) -> float:
    """The one number that a criterion is given, as in bonds:0.25; BadSpec if there is none, or something else."""
    tolerance = spec.read({"tolerance": float}, "tolerance").get("tolerance")
    if tolerance is None:
        raise BadSpec(f"criterion {spec.name!r} has no tolerance; write it as in {spec.name}:{for_example:g}")
    return tolerance


def extreme_of_kind(values: Tensor, kinds: Tensor, which: str) -> Tensor:
    """For each value the extreme of those of its kind, "amin" or "amax", shape (n,); kinds of shape (k, n)."""
    found, kind = torch.unique(kinds, dim=1, return_inverse=True)
    return values.new_zeros(found.shape[1]).scatter_reduce(0, kind, values, which, include_self=False)[kind]


def distances_in(state: MDState, pairs: Tensor, what: str) -> Tensor:
    """Distances of pairs in replicas of one system, float64, shape (n_systems, n_pairs), in Å; ValueError for different sizes."""
    check_one_size(state, what)
    return pair_distances(state.batch, pairs)


def check_one_size(state: MDState, what: str) -> None:
    """Raise ValueError, with what it is of, for replicas of several sizes."""
    if len(set(state.batch.sizes)) > 1:
        raise ValueError(f"{what} is for one molecule, got systems of {sorted(set(state.batch.sizes))} atoms")
