"""Looks at running replicas: how bad each is, and the first failure of each with its cause."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.dynamics import ForceFunction, Integrator, MDState, Recorder, Trajectory, simulate
from stabie_ase.stability.criteria.base import Criterion, Verdict
from stabie_ase.structures.batch import AtomsBatch

NOT_FINITE = "not finite"
"""The cause of a failure that no criterion has to look for."""


class Look(NamedTuple):
    """What all criteria say of some replicas at one time.

    Attributes
    ----------
    severity : Tensor of float64, shape (n_running,)
        Of the criterion by which a replica is worst; infinite where a number is not finite.
    worst : Tensor of int64, shape (n_running,)
        Which criterion that is; 0 stands for numbers that are not finite, k + 1 for criterion k.
    verdicts : list of Verdict
        In that order.
    """

    severity: Tensor
    worst: Tensor
    verdicts: list[Verdict]

    @property
    def unstable(self) -> Tensor:
        """Shape (n_running,), bool."""
        return ~(self.severity <= 1.0)


def look(state: MDState, criteria: Sequence[Criterion]) -> Look:
    """Judge the replicas that run, `active` of shape (n_running,); returns those to be stopped, bool."""
    severity = torch.zeros_like(state.potential_energy).masked_fill(~state.alive, torch.inf)
    verdicts = [Verdict(severity, severity, state.step.new_zeros((state.n_systems, 0)))]
    verdicts += [criterion.judge(state) for criterion in criteria]
    severities = torch.stack([_worst_if_unknown(v.severity) for v in verdicts])
    return Look(*severities.max(dim=0), verdicts)


def with_memory(state: MDState, criteria: Sequence[Criterion]) -> MDState:
    """The state with what criteria remember of replicas that they have not seen before; as it is where it has been there."""
    new = {name: x for criterion in criteria for name, x in criterion.memory(state.batch).items() if name not in state.extra}
    return state.remember(**new) if new else state


def _worst_if_unknown(x: Tensor) -> Tensor:
    """Float64, with infinity for what is not a number."""
    return torch.where(torch.isnan(x), torch.inf, x.double())


@dataclass(frozen=True)
class Failures:
    """First failure of each replica in one run.

    Attributes
    ----------
    step : Tensor of int64, shape (n_systems,)
        Steps into the run at which it was seen; -1 for none.
    value : Tensor of float64, shape (n_systems,)
        What the criterion measured; infinite for numbers that are not finite.
    criterion : list of str or None
    atoms : list of list of int
        Atoms to blame, numbered within their system.
    frames : AtomsBatch
        Positions and cells at the failure; at the start for the others.
    momenta : Tensor, shape (n_atoms, 3)
        At the failure, in amu Å / ASE time; zero for the others.
    """

    step: Tensor
    value: Tensor
    criterion: list[str | None]
    atoms: list[list[int]]
    frames: AtomsBatch
    momenta: Tensor

    @classmethod
    def none(cls, batch: AtomsBatch) -> Failures:
        """Nothing has failed yet."""
        n = batch.n_systems
        value = torch.zeros(n, dtype=torch.float64, device=batch.device)
        step, momenta = torch.full((n,), -1, device=batch.device), torch.zeros_like(batch.positions)
        return cls(step, value, [None] * n, [[] for _ in range(n)], batch, momenta)

    @property
    def failed(self) -> Tensor:
        """Shape (n_systems,), bool."""
        return self.step >= 0

    @property
    def fraction(self) -> float:
        """Fraction of the replicas that have failed."""
        return float(self.failed.double().mean())

    @property
    def causes(self) -> Counter[str]:
        """Failures by criterion."""
        return Counter(name for name in self.criterion if name is not None)

    def examine(self, state: MDState, active: Tensor, criteria: Sequence[Criterion], looked: Look, step: int) -> Failures:
        """Take down which of the replicas `active`, shape (n_running,), whose present state is `state`, have failed now."""
        new = (looked.unstable & ~self.failed[active]).nonzero()[:, 0]
        if not len(new):
            return self
        names = [NOT_FINITE, *(criterion.name for criterion in criteria)]
        replicas = active[new]
        criterion, atoms, value = list(self.criterion), list(self.atoms), self.value.clone()
        for k, replica, worst in zip(new.tolist(), replicas.tolist(), looked.worst[new].tolist()):
            verdict = looked.verdicts[worst]
            criterion[replica], atoms[replica] = names[worst], [a for a in verdict.atoms[k].tolist() if a >= 0]
            value[replica] = _worst_if_unknown(verdict.value[k])
        where, there = self.frames.atom_index(replicas), state.batch.atom_index(new)
        frames = self.frames.replace(
            positions=self.frames.positions.index_copy(0, where, state.batch.positions[there]),
            cells=self.frames.cells.index_copy(0, replicas, state.batch.cells[new]),
        )
        return replace(
            self,
            step=self.step.index_fill(0, replicas, step),
            value=value,
            criterion=criterion,
            atoms=atoms,
            frames=frames,
            momenta=self.momenta.index_copy(0, where, state.momenta[there].to(self.momenta)),
        )

    def to_atoms(self, info: Mapping[int, dict] | None = None) -> list[Atoms]:
        """Each frame at a failure with its momenta; atoms to blame are tagged 1, `info` tells more of a replica.

        The frame's own info tells `replica`, `criterion` and `value`.
        """
        chosen = self.failed.nonzero()[:, 0]
        images = self.frames.select(chosen).to_atoms() if len(chosen) else []
        momenta = self.momenta.cpu().double().numpy()
        for k, atoms in zip(chosen.tolist(), images):
            atoms.set_momenta(momenta[self.frames.atom_index(chosen.new_tensor([k])).cpu().numpy()])
            atoms.set_tags([int(a in self.atoms[k]) for a in range(len(atoms))])
            atoms.info |= {"replica": k, "criterion": self.criterion[k], "value": float(self.value[k])} | (info or {}).get(k, {})
        return images


OnLook = Callable[[int, MDState, Failures], None]
"""Told the steps done, the replicas that ran until now and the failures so far, after every look."""


class Watch:
    """Judges running replicas by criteria, notes the first failure of each, and may stop them.

    Parameters
    ----------
    state : MDState
        At the start, with what criteria remember (`with_memory`).
    criteria : sequence of Criterion
        A number that is not finite is always a failure.
    every : int
        Steps between two looks.
    stop_unstable : bool
        Stop a replica at its first failure, or let it run on while it is finite.
    escape : float
        Severity beyond which a replica is stopped in any case: fragments far apart have nothing more to tell.
    on_look : callable, optional

    Attributes
    ----------
    failures : Failures
    severity : Tensor of float64, shape (n_systems,)
        At each replica's last look.
    memory : dict of str to Tensor, shape (n_systems, ...)
        What the criteria remember now.
    """

    def __init__(
        self,
        state: MDState,
        criteria: Sequence[Criterion],
        every: int = 10,
        stop_unstable: bool = True,
        escape: float = math.inf,
        on_look: OnLook | None = None,
    ):
        self.criteria, self.every, self.stop_unstable, self.escape, self.on_look = criteria, every, stop_unstable, escape, on_look
        self.failures, self.severity = Failures.none(state.batch), torch.zeros_like(state.potential_energy)
        names = {name for criterion in criteria for name in criterion.memory(state.batch)}
        self.memory = {name: x.clone() for name, x in state.extra.items() if name in names}

    def look(self, steps_done: int, running: MDState, active: Tensor) -> Tensor:
        """Judge the replicas that run; returns those to be stopped."""
        if self.memory:
            running = running.remember(**{name: x[active] for name, x in self.memory.items()})
        looked = look(running, self.criteria)
        for verdict in looked.verdicts:
            for name, x in verdict.memory.items():
                self.memory[name][active] = x
        self.severity[active] = looked.severity
        self.failures = self.failures.examine(running, active, self.criteria, looked, steps_done)
        if self.on_look:
            self.on_look(steps_done, running, self.failures)
        stopped = looked.severity > self.escape
        return stopped | self.failures.failed[active] if self.stop_unstable else stopped


def watched(
    state: MDState,
    integrator: Integrator,
    forces: ForceFunction,
    n_steps: int,
    criteria: Sequence[Criterion] = (),
    check_every: int = 10,
    sample_every: int | None = None,
    stop_unstable: bool = True,
    escape: float = math.inf,
    record_momenta: bool = False,
    on_look: OnLook | None = None,
) -> tuple[MDState, Trajectory | None, Failures]:
    """Simulate under a `Watch`, with a `Recorder` if frames are asked for.

    Parameters
    ----------
    state : MDState
        Replicas to begin with.
    integrator : Integrator
    forces : ForceFunction
    n_steps : int
    criteria : sequence of Criterion
    check_every : int
        Steps between two looks at the criteria.
    sample_every : int, optional
        Steps between two frames; without it none is kept. Each is looked at too: its severity is the trajectory's column
        "severity".
    stop_unstable : bool
        See `Watch`.
    escape : float
        See `Watch`.
    record_momenta : bool
        Keep momenta with the frames.
    on_look : callable, optional
        See `Watch`.

    Returns
    -------
    state : MDState
        The last frame of every replica, with what the criteria remember of it.
    trajectory : Trajectory or None
    failures : Failures

    Examples
    --------
    >>> from ase import units
    >>> from ase.io import read
    >>> from stabie_ase import (
    ...     AtomsBatch, Langevin, PotentialForces, Setting, criteria_from, initial_state, load_potential, watched
    ... )
    >>> frames = read("aspirin.xyz", ":")
    >>> forces = PotentialForces(load_potential("aspirin_schnet.pt"))
    >>> state = initial_state(AtomsBatch.from_atoms(frames[:4]), forces, temperature_K=300.0)
    >>> criteria = criteria_from("bonds:0.5,contacts:0.5", Setting(frames, 300.0))
    >>> state, _, failures = watched(state, Langevin(0.5 * units.fs, 0.01 / units.fs), forces, 10, criteria, check_every=5)
    >>> print(f"{failures.fraction:.0%} failed")
    0% failed
    """
    state = with_memory(state, criteria)
    every = check_every if sample_every is None else math.gcd(check_every, sample_every)
    watch, recorder = Watch(state, criteria, every, stop_unstable, escape, on_look), None
    if sample_every is not None:
        severity = {"severity": lambda _, active: watch.severity[active]}
        recorder = Recorder(state, n_steps, sample_every, record_momenta, severity)
    end = simulate(state, integrator, forces, n_steps, [watch, recorder] if recorder else [watch])
    return end.remember(**watch.memory), recorder.trajectory if recorder else None, watch.failures
