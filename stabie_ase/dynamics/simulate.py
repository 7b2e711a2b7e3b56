"""The simulation loop: advance replicas, and show them to observers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from stabie_ase.dynamics.forces import PotentialForces
from stabie_ase.dynamics.graphs import blocks
from stabie_ase.dynamics.integrators import Integrator
from stabie_ase.dynamics.observers import Observer
from stabie_ase.dynamics.state import ForceFunction, MDState


def simulate(
    state: MDState, integrator: Integrator, forces: ForceFunction, n_steps: int, observers: Sequence[Observer] = ()
) -> MDState:
    """Run a batch of replicas.

    Parameters
    ----------
    state : MDState
    integrator : Integrator
    forces : ForceFunction
        Batch to energies in eV, forces in eV/Å and, for a barostat, stress. The potential behind `PotentialForces` is left as
        it was found and takes no parameter gradients here.
    n_steps : int
    observers : sequence of Observer
        Shown the replicas that run, in this order, every so many steps and at the end. A replica that one of them
        stops costs nothing more. Replicas whose numbers are not finite are stopped once all observers have seen them.

    Returns
    -------
    MDState
        The last frame of every replica: for a stopped one, the frame at which it was stopped.

    Raises
    ------
    ValueError
        The integrator cannot advance the state.

    Examples
    --------
    >>> from ase import units
    >>> from ase.io import read
    >>> from stabie_ase import AtomsBatch, Langevin, PotentialForces, initial_state, load_potential, simulate
    >>> forces = PotentialForces(load_potential("aspirin_schnet.pt"))
    >>> state = initial_state(AtomsBatch.from_atoms(read("aspirin.xyz", ":4")), forces, temperature_K=300.0)
    >>> state = simulate(state, Langevin(0.5 * units.fs, 0.01 / units.fs), forces, n_steps=5)
    >>> state.step.tolist()
    [5, 5, 5, 5]
    """
    integrator.check(state)
    state = running = integrator.prepare(state)
    block = math.gcd(*(observer.every for observer in observers)) or max(n_steps, 1)
    advance = blocks(forces, integrator, block)
    active, done = torch.arange(state.n_systems, device=state.batch.device), 0
    with forces.potential.frozen() if isinstance(forces, PotentialForces) else nullcontext():
        while done < n_steps and len(active):
            n = min(block - done % block, n_steps - done)
            running = advance(running, n)
            done += n
            due = [observer for observer in observers if done % observer.every == 0 or done == n_steps]
            if not due:
                continue
            stopped = ~running.alive
            for observer in due:
                stops = observer.look(done, running, active)
                stopped = stopped if stops is None else stopped | stops
            if stopped.any():
                state = state.put(active, running)
                active, running = active[~stopped], running.select((~stopped).nonzero()[:, 0])
    return state.put(active, running)
