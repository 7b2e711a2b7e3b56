"""What every integrator has to obey."""

from __future__ import annotations

import torch

from stabie_ase.dynamics import Integrator, MDState, PotentialForces, simulate
from stabie_ase.dynamics.state import ForceFunction


def check_integrator(integrator: Integrator, state: MDState, forces: ForceFunction, n_steps: int = 20) -> None:
    """Hold an integrator against the contract.

    It counts its steps, leaves the state it was given alone, keeps atoms that are held where they are, takes the same path again from
    the same state, in pieces too, and the path of a replica does not depend on the others.

    Parameters
    ----------
    integrator : Integrator
    state : MDState
        Of two replicas at least; atoms may be held.
    forces : ForceFunction
    n_steps : int

    Raises
    ------
    AssertionError
        In a sentence, what was expected and what was found.
    """
    integrator.check(state)
    state = integrator.prepare(state)
    before = {name: x.clone() for name, x in state.tensors().items()}
    end = simulate(state, integrator, forces, n_steps)
    for name, x in state.tensors().items():
        assert torch.equal(x, before[name]), f"{name} of the state that was given has changed"
    assert torch.equal(end.step, state.step + n_steps), f"{(end.step - state.step).tolist()} steps are counted, expected {n_steps}"
    held = ~state.mobile
    assert torch.equal(end.batch.positions[held], state.batch.positions[held]), "atoms that are held have moved"
    _same(simulate(state, integrator, forces, n_steps), end, "from the same state")
    half = simulate(simulate(state, integrator, forces, n_steps // 2), integrator, forces, n_steps - n_steps // 2)
    _same(half, end, "in two pieces")
    fresh = PotentialForces(forces.potential, stress=forces.stress) if isinstance(forces, PotentialForces) else forces
    for k in range(state.n_systems):
        alone = simulate(state.select([k]), integrator, fresh, n_steps)
        x, expected = alone.batch.positions, end.select([k]).batch.positions
        assert torch.allclose(x, expected, rtol=1e-8, atol=1e-8), f"the path of replica {k} depends on the others"


def _same(found: MDState, expected: MDState, how: str) -> None:
    for name, x in expected.tensors().items():
        other = found.tensors()[name]
        assert torch.allclose(other.double(), x.double(), rtol=1e-9, atol=1e-9, equal_nan=True), f"another path {how}: {name} differs"
