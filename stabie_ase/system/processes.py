"""One process or several: each has samples of its own, sums are taken over all of them, and all take the same step.

With one process, which is all there is unless `torch.distributed` has been started, every function is the identity.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def size() -> int:
    """Processes that work together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if size() > 1 else 0


def dealt(n: int) -> range:
    """Which of n replicas are this process's: consecutive ones, and no process has more than one beyond another."""
    first, last = (n * k // size() for k in (rank(), rank() + 1))
    return range(first, last)


def total(x: Tensor) -> Tensor:
    """The sum over processes of a tensor that has one shape in all of them."""
    if size() == 1:
        return x
    everywhere = x.detach().clone()
    distributed.all_reduce(everywhere)
    return everywhere


def softmax(x: Tensor) -> Tensor:
    """exp(x), shape (n,), over its sum over all processes, each of which has an x of its own length."""
    if size() == 1:
        return torch.softmax(x, dim=0)
    largest = x.max() if len(x) else x.new_tensor(-torch.inf)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    parts = torch.exp(x - largest)
    return parts / total(parts.sum())


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Give each parameter the sum over processes of its gradients; one without any counts as zero where others have it."""
    if size() == 1:
        return
    for p in parameters:
        p.grad = total(torch.zeros_like(p) if p.grad is None else p.grad)
