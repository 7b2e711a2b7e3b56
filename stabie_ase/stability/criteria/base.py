"""The contract of a criterion, and what it says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from stabie_ase.potentials.base import Potential

if TYPE_CHECKING:
    from stabie_ase.dynamics.state import MDState


class Verdict(NamedTuple):
    """What a criterion says of each system.

    Attributes
    ----------
    severity : Tensor of float64, shape (n_systems,)
        1 at the tolerance, larger is worse; not a number, or infinite, where that cannot be told.
    value : Tensor of float64, shape (n_systems,)
        The quantity behind it, in the criterion's unit.
    atoms : Tensor of int64, shape (n_systems, k)
        The atoms to blame, numbered within their system; k is 0 where all are.
    """

    severity: Tensor
    value: Tensor
    atoms: Tensor

    @property
    def unstable(self) -> Tensor:
        """Shape (n_systems,), bool; what is not a number is unstable."""
        return ~(self.severity <= 1.0)


class Criterion(Protocol):
    """Judges the present state of replicas; `name` goes into reports and `describe()` says it with its numbers."""

    name: str
    unit: str

    def judge(self, state: MDState) -> Verdict: ...

    def for_model(self, potential: Potential) -> Criterion:
        """The same for another model, or for the same one with other weights; most do not depend on it."""
        ...

    def describe(self) -> str: ...


class ModelFree:
    """A criterion that is the same for all models."""

    def for_model(self, potential: Potential):
        """Itself."""
        return self


def check_tolerance(tolerance: float, what: str) -> None:
    """Raise ValueError, with what it is of, for a tolerance that is no positive length in Å."""
    if not 0 < tolerance < math.inf:
        raise ValueError(f"{what} must be a positive length, got {tolerance} Å")


def one_molecule(state: MDState, what: str) -> Tensor:
    """Positions of replicas of one molecule, float64, shape (n_systems, n_atoms, 3); ValueError for different sizes."""
    batch = state.batch
    if len(set(batch.sizes)) > 1:
        raise ValueError(f"{what} is for one molecule, got systems of {sorted(set(batch.sizes))} atoms")
    return batch.positions.double().view(batch.n_systems, -1, 3)
