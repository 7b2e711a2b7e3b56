"""The gradient of what samples have told, and how well it is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stabie_ase.boltzmann import accumulate
from stabie_ase.boltzmann.projection import projection
from stabie_ase.potentials.base import Potential
from stabie_ase.system.processes import sum_gradients
from stabie_ase.training.schedule import STABILITY
from stabie_ase.training.updates.base import Work
from stabie_ase.training.updates.found import Found


def collect(potential: Potential, estimates: Sequence[Found]) -> None:
    """The gradient for the observables, of all processes, into the parameters.

    Parameters
    ----------
    potential : Potential
    estimates : sequence of Found
    """
    for p in potential.parameters():
        p.grad = None
    for found in estimates:
        accumulate(potential, found.estimate)
    sum_gradients(potential.parameters())


def known_gradient(potential: Potential, estimates: Sequence[Found]) -> dict[str, float]:
    """The length of the gradient that the parameters hold, and its standard error.

    Parameters
    ----------
    potential : Potential
    estimates : sequence of Found
        That the gradient was collected from.

    Returns
    -------
    dict of str to float
        "gradient_norm" and "gradient_norm_error", in units of the loss per unit of each parameter; empty for one without a length.
    """
    own = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in potential.parameters()]
    length = sum(float(part.double().square().sum()) for part in own) ** 0.5
    if not (math.isfinite(length) and length > 0):
        return {}
    own = [part / length for part in own]
    squared = 0.0
    for at in estimates:
        strata = at.estimator.strata(at.estimate.samples)
        squared += projection(potential, at.estimate, at.targets, at.estimator.point, own, strata).error ** 2
    return {"gradient_norm": length, "gradient_norm_error": squared**0.5}


def telling(work: Work, estimates: list[Found]) -> tuple[list[Found], dict[str, float]]:
    """Those whose own gradients are longer than their standard errors: what tells nothing costs forces for nothing.

    Parameters
    ----------
    work : Work
    estimates : list of Found
        One for each kind of energies.

    Returns
    -------
    told : list of Found
        All if none is, if there is one, or if stability is not the goal.
    known : dict of str to float
        `known_gradient` of the one that is left of several; else empty.
    """
    if len(estimates) < 2 or work.config.goal != STABILITY:
        return estimates, {}
    kept = []
    for found in estimates:
        collect(work.potential, [found])
        if not is_noise(known := known_gradient(work.potential, [found])):
            kept.append((found, known))
    return [found for found, _ in kept] or estimates, kept[0][1] if len(kept) == 1 else {}


def is_noise(known: dict[str, float]) -> bool:
    """Whether a gradient is shorter than its standard error.

    Parameters
    ----------
    known : dict of str to float
        "gradient_norm" and "gradient_norm_error" of it; empty where nothing is known.

    Returns
    -------
    bool
    """
    return known.get("gradient_norm", math.inf) < known.get("gradient_norm_error", 0.0)
