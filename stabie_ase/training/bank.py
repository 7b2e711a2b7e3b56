"""States shortly before failures, kept so that later learning phases see them again."""

from __future__ import annotations

import torch
from torch import Tensor

from stabie_ase.dynamics import MDState


def joined(first: MDState, second: MDState) -> MDState:
    """The replicas of one state, then those of another of the same atoms."""
    n, m = first.n_systems, second.n_systems
    room = torch.cat([torch.arange(n), torch.zeros(m, dtype=torch.int64)])
    return first.select(room).put(torch.arange(n, n + m), second)


class Bank:
    """What was learned once must not be unlearned, and a rare failure is worth more than one look.

    Parameters
    ----------
    capacity : int
        States at most; of more the oldest that no longer fail go first, then the oldest.

    Attributes
    ----------
    states : MDState or None
        In the order in which they came; None before the first.
    failing : Tensor of bool, shape (n_states,)
        Whether each failed when it was run last.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.states: MDState | None = None
        self.failing = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.failing)

    def add(self, states: MDState, failing: Tensor) -> None:
        """States before failures, and whether each led to one when it was run last, shape (n,), bool."""
        if not self.capacity or not states.n_systems:
            return
        states = states if self.states is None else joined(self.states, states)
        failing = torch.cat([self.failing, failing.cpu()])
        order = torch.argsort(failing.int(), stable=True)
        kept = order[max(0, len(order) - self.capacity) :].sort().values
        self.states, self.failing = states.select(kept), failing[kept]

    def choose(self, n: int) -> Tensor:
        """Indices of at most n of the states, shape (n,): those that still fail first, of these the latest."""
        order = torch.argsort(self.failing.int(), stable=True).flip(0)
        return order[: max(0, n)].sort().values

    def note(self, index: Tensor, failed: Tensor) -> None:
        """Whether some of them, shape (n,), failed when they were run again."""
        self.failing = self.failing.index_copy(0, index, failed.cpu())

    def state(self) -> dict:
        """Everything an exact continuation needs; tensors only."""
        return {} if self.states is None else {"states": self.states.tensors(), "failing": self.failing.clone()}

    def restore(self, state: dict, like: MDState) -> None:
        """Go on from what `state` returned; `like` has replicas of the same atoms."""
        self.states = restored(state["states"], like) if state else None
        self.failing = state["failing"] if state else torch.zeros(0, dtype=torch.bool)


def restored(tensors: dict[str, Tensor], like: MDState) -> MDState:
    """A state from its tensors, however many replicas it has; `like` has replicas of the same atoms."""
    return like.select(torch.zeros(len(tensors["step"]), dtype=torch.int64)).restore(tensors)
