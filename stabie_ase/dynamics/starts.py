"""Replicas that start from frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from stabie_ase.dynamics.forces import PotentialForces
from stabie_ase.dynamics.integrators import Integrator
from stabie_ase.dynamics.state import MDState, initial_state, mobile_atoms
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch


def starting_frames(frames: Sequence[Atoms], n: int, seed: int) -> list[Atoms]:
    """n frames in random order, each used about equally often."""
    rng = np.random.default_rng([seed, 1])
    rounds = -(-n // len(frames))
    order = np.concatenate([rng.permutation(len(frames)) for _ in range(rounds)])[:n]
    return [frames[k] for k in order]


def start(
    potential: Potential,
    frames: Sequence[Atoms],
    n: int,
    temperature_K: float,
    integrator: Integrator,
    seed: int,
    pressure_GPa: float = 0.0,
) -> MDState:
    """n replicas at random frames with Maxwell-Boltzmann momenta, as an integrator needs them.

    Parameters
    ----------
    potential : Potential
    frames : sequence of Atoms
        Atoms that are held stay where they are (`mobile_atoms`).
    n : int
    temperature_K : float
    integrator : Integrator
    seed : int
        Chooses frames, momenta and noise.
    pressure_GPa : float
        For a barostat.

    Returns
    -------
    MDState
        With the integrator's own columns.
    """
    chosen = starting_frames(frames, n, seed)
    batch = AtomsBatch.from_atoms(chosen, device=potential.device)
    state = initial_state(
        batch,
        PotentialForces.driving(potential, integrator),
        temperature_K,
        seed=seed,
        fix_com=integrator.fix_com,
        pressure_GPa=pressure_GPa,
        mobile=mobile_atoms(chosen).to(batch.device),
    )
    return integrator.prepare(state)
