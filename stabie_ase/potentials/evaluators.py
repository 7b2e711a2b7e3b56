"""How a potential's `evaluate` is carried out: as it is written, compiled by torch, or by kernels that somebody has written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]

MAX_ROUNDING_FRACTION = 1e-3
"""Largest difference of two forces, as a fraction of the largest force, that is put down to the order of single-precision sums."""


class Evaluated(Protocol):
    """What an evaluator needs of a potential."""

    def evaluate(self, inputs: Tensors) -> Tensor:
        """Energies in eV, shape (n_atoms,) or (n_systems,)."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the potential."""
        ...


class Evaluator(Protocol):
    """Carries out a potential's `evaluate`, where it fits; what it does not fit is carried out as it is written."""

    def fits(self, potential: Evaluated, inputs: Tensors) -> bool:
        """Whether these inputs may be given to it."""
        ...

    def __call__(self, potential: Evaluated, inputs: Tensors) -> Tensor:
        """What `potential.evaluate(inputs)` returns, to round-off."""
        ...

    def carry_over(self) -> None:
        """Bring parameters to where its code expects them; called where a block of dynamics begins."""
        ...


class Plain:
    """`evaluate` as it is written."""

    def fits(self, potential: Evaluated, inputs: Tensors) -> bool:
        """Always."""
        return True

    def __call__(self, potential: Evaluated, inputs: Tensors) -> Tensor:
        """Energies in eV, as `evaluate` returns them."""
        return potential.evaluate(inputs)

    def carry_over(self) -> None:
        """Nothing to do: it works on the parameters themselves."""


class Compiled:
    """`evaluate` compiled by torch at the first call, with the parameters where they are.

    The code is for forces of any number of atoms, pairs and systems, except that torch makes other code of a size of one: inputs
    with such a size in another place than those of the first call do not fit.

    Parameters
    ----------
    function : callable
        `evaluate`, or what does the same and can be compiled.
    """

    def __init__(self, function: Callable[[Tensors], Tensor]):
        self.function = torch.compile(function, dynamic=True)
        self.ones: tuple[bool, ...] | None = None

    def fits(self, potential: Evaluated, inputs: Tensors) -> bool:
        """Whether only forces are asked for, of inputs of the kind that the code was made for."""
        return asks_for_forces(potential, inputs) and self.ones in (None, _ones(inputs))

    def __call__(self, potential: Evaluated, inputs: Tensors) -> Tensor:
        """Energies in eV, as `evaluate` returns them."""
        self.ones = _ones(inputs)
        return self.function(inputs)

    def carry_over(self) -> None:
        """Nothing to do: it works on the parameters themselves."""


def asks_for_forces(potential: Evaluated, inputs: Tensors) -> bool:
    """Whether a gradient will be taken in these inputs, none of which is empty, and in no parameter: as in dynamics."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs.values()):
        return False
    return all(x.numel() for x in inputs.values()) and not any(p.requires_grad for p in potential.parameters())


def _ones(inputs: Tensors) -> tuple[bool, ...]:
    return tuple(n == 1 for x in inputs.values() for n in x.shape)
