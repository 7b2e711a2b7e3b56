"""Steps taken without looking, whatever becomes of a replica."""

from __future__ import annotations

import torch

from stabie_ase.dynamics.integrators import Integrator
from stabie_ase.dynamics.state import ForceFunction, MDState


def quarantine(new: MDState, old: MDState) -> MDState:
    """Keep a replica at its last finite frame when a step brings a number that is not finite, for good."""
    # Zero times what is not finite is not a number, and stays so in the sum.
    nothing = new.batch.sum_over_atoms(0.0 * (new.momenta + new.forces)).sum(dim=1)
    alive = old.alive & torch.isfinite(new.potential_energy + nothing)
    return new.where(alive, old).replace(alive=alive)


def advance(state: MDState, integrator: Integrator, force_function: ForceFunction, n_steps: int) -> MDState:
    """Take `n_steps` steps without looking."""
    state = integrator.prepare(state)
    for step in integrator.steps(state, n_steps):
        state = quarantine(step(state, force_function), state)
    return state
