"""What every criterion has to obey."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ase import Atoms

from stabie_ase.dynamics import PotentialForces, initial_state
from stabie_ase.potentials.base import Potential
from stabie_ase.stability import Criterion, Verdict, look, with_memory
from stabie_ase.structures.batch import AtomsBatch


def check_criterion(
    criterion: Criterion,
    sound: Sequence[Atoms],
    broken: Sequence[Atoms],
    potential: Potential,
    temperature_K: float = 300.0,
    looks: int = 1,
) -> None:
    """Hold a criterion against the contract.

    It says in words what it looks for; sound frames are stable, broken ones are not; what it says of a replica does not depend on
    the others; atoms to blame are some of the replica's; what it remembers has a row for each replica.

    Parameters
    ----------
    criterion : Criterion
    sound : sequence of Atoms
        Stable frames of one system, two at least.
    broken : sequence of Atoms
        Unstable frames of the same system.
    potential : Potential
        That gives their energies.
    temperature_K : float
        Of the heat bath and of the momenta.
    looks : int
        How often each frame is shown, a step after the other, before anything is said of it: a criterion with a memory may need
        several.

    Raises
    ------
    AssertionError
        In a sentence, what was expected and what was found.
    """
    assert criterion.name and criterion.unit and criterion.describe(), "a criterion has a name, a unit and a description"
    criterion = criterion.for_model(potential)
    batch = AtomsBatch.from_atoms([*sound, *broken], device=potential.device)
    state = with_memory(initial_state(batch, PotentialForces(potential), temperature_K), [criterion])
    for _ in range(looks - 1):
        state = state.remember(**criterion.judge(state).memory).replace(step=state.step + 1)
    verdict = criterion.judge(state)
    n = batch.n_systems
    assert isinstance(verdict, Verdict), f"judge returned {type(verdict).__name__}, expected a Verdict"
    for what, x in (("severity", verdict.severity), ("value", verdict.value)):
        assert x.shape == (n,), f"the {what} has the shape {tuple(x.shape)}, expected ({n},)"
    assert verdict.atoms.shape[0] == n and verdict.atoms.dtype == torch.int64, "atoms to blame are int64, a row for each replica"
    assert bool((verdict.atoms < batch.counts[:, None]).all()), "atoms to blame are numbered within their system"
    assert set(verdict.memory) <= set(criterion.memory(batch)), "what is remembered has the names that memory gave"
    assert all(len(x) == n for x in verdict.memory.values()), "what is remembered has a row for each replica"
    unstable = look(state, [criterion]).unstable
    wrong = unstable[: len(sound)].nonzero()[:, 0].tolist()
    assert not wrong, f"sound frames are called unstable: {wrong}"
    missed = (~unstable[len(sound) :]).nonzero()[:, 0].tolist()
    assert not missed, f"broken frames are called stable: {missed}"
    for k in range(n):
        alone = criterion.judge(state.select([k])).severity
        same = torch.allclose(alone.double(), verdict.severity[[k]].double(), rtol=1e-9, atol=1e-12, equal_nan=True)
        assert same, f"what it says of replica {k} depends on the others"
