"""The replicas of one condition: run, rewound, restarted."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.dynamics import MDState, PotentialForces, Trajectory
from stabie_ase.dynamics.integrators import update_forces
from stabie_ase.dynamics.random import LEARNERS, RESETS, replica_keys, uniforms
from stabie_ase.dynamics.starts import start
from stabie_ase.potentials.base import Potential
from stabie_ase.stability import Failures, watched, with_memory
from stabie_ase.training.bank import Bank, joined, restored
from stabie_ase.training.condition import Condition

SEED_STRIDE = 7_919
"""Added to the seed from one pool to the next, so that no two share random streams."""

MIN_SOUND_LEARNERS = 8
"""Replicas that have not failed and take part in learning: what is stable has to be known beside what is not. None where samples are
groups of atoms: most of those of a system that fails are sound."""


@dataclass
class Counters:
    """Of a pool's dynamics; plain numbers, saved with a run.

    Attributes
    ----------
    md_steps, md_seconds
        Steps of all replicas together, and what they took.
    starts : int
        Batches of replicas that began at the reference.
    failures, stable_steps
        In this simulation phase.
    """

    md_steps: int = 0
    md_seconds: float = 0.0
    starts: int = 0
    failures: int = 0
    stable_steps: int = 0


@dataclass(frozen=True)
class Window:
    """Lengths, in steps, and the severity beyond which a replica is stopped though unstable ones run on."""

    n_steps: int
    check_every: int
    sample_every: int
    escape: float


@dataclass(frozen=True)
class Lesson:
    """What a learning phase begins with, window after window.

    Attributes
    ----------
    state : MDState
        Replicas of the pool, then states from its bank.
    rows : Tensor of int64, shape (n_rows,)
        Which replicas these are.
    banked : Tensor of int64, shape (n_banked,)
        Which of the bank's states.
    """

    state: MDState
    rows: Tensor
    banked: Tensor


class ReplicaPool:
    """Replicas of a condition under a potential that is being trained.

    Parameters
    ----------
    condition : Condition
    potential : Potential
    window : Window
    seed : int
    bank : int
        States before failures that are kept beyond the phase that found them.

    Attributes
    ----------
    replicas : MDState
        Where they are: those that failed in this simulation phase as they were at the start of the window in which they did.
    failed : Tensor of bool, shape (replicas,)
        In this simulation phase.
    counters : Counters
    on_look : callable or None
        Told of every look, see `Watch`.
    """

    def __init__(self, condition: Condition, potential: Potential, window: Window, seed: int, bank: int = 0):
        self.condition, self.potential, self.window, self.seed = condition, potential, window, seed
        self.counters, self.on_look = Counters(), None
        self.replicas = self._fresh(condition.replicas)
        self.failed = torch.zeros(condition.replicas, dtype=torch.bool, device=potential.device)
        self.bank = Bank(bank)
        self.lesson: Lesson | None = None

    def simulate(self) -> tuple[Failures, Tensor, Tensor]:
        """One window of those that have not failed; a replica that fails is rewound to the start of it.

        Returns
        -------
        failures : Failures
        going : Tensor of int64, shape (n_running,)
            The replicas that they are of.
        began : Tensor of int64, shape (n_running,)
            The steps that these had taken.
        """
        going = (~self.failed).nonzero()[:, 0]
        began = self.replicas.step[going]
        ends, _, failures = self._run(self.replicas.select(going), stop_unstable=True)
        fine = ~failures.failed
        self.replicas = self.replicas.put(going[fine], ends.select(fine.nonzero()[:, 0]))
        self.failed[going[~fine]] = True
        self.counters.failures += int(failures.failed.sum())
        self.counters.stable_steps += int(torch.where(failures.failed, failures.step, self.window.n_steps).sum())
        return failures, going, began

    @staticmethod
    def failing_frames(failures: Failures, going: Tensor, began: Tensor, timestep_fs: float, **where: float) -> list[Atoms]:
        """Frames at the failures of a simulation window, the atoms to blame tagged 1; as `simulate` tells them, and where they are from."""
        failed = failures.failed.nonzero()[:, 0].tolist()
        times = ((began + failures.step) * timestep_fs / 1000.0).tolist()
        return failures.to_atoms({k: {"replica": int(going[k]), "time_ps": times[k], **where} for k in failed})

    def _gather(self, everyone: bool) -> Lesson:
        """What a learning phase begins with: the replicas that failed, others from the bank up to half, and of whole systems as many that
        did not fail.

        Or all replicas.
        """
        if everyone:
            rows = torch.arange(len(self.failed), device=self.failed.device)
            return Lesson(self.replicas, rows, rows[:0])
        failed = self.failed.nonzero()[:, 0]
        banked = self.bank.choose(self.condition.replicas // 2 - len(failed))
        n_sound = max(len(failed) + len(banked), MIN_SOUND_LEARNERS) if self.condition.grouping.whole else 0
        chance = uniforms(self.replicas.key, self.replicas.step, LEARNERS).masked_fill(self.failed, math.inf)
        sound = chance.argsort()[: min(n_sound, len(chance) - len(failed))]
        rows = torch.cat([failed, sound]).sort().values
        state = self.replicas.select(rows)
        if self.bank.states is not None and len(banked):
            state = self._with_forces(joined(state, self.bank.states.select(banked)))
        return Lesson(state, rows, banked)

    def learn(self, everyone: bool = False) -> tuple[MDState, Trajectory, Failures]:
        """One window of the lesson, of everyone if asked for, unstable replicas too; it stays where it was."""
        lesson = self.lesson = self.lesson or self._gather(everyone)
        ends, trajectory, failures = self._run(lesson.state, stop_unstable=False)
        assert trajectory is not None
        self.bank.note(lesson.banked, failures.failed[len(lesson.rows) :])
        return ends, trajectory, failures

    def failed_again(self, failures: Failures) -> float:
        """Of the replicas that failed in this simulation phase, the fraction that did so again in a window of learning; 1 of none."""
        assert self.lesson is not None
        rows = self.lesson.rows
        again = failures.failed[: len(rows)][self.failed[rows]]
        return float(again.double().mean()) if len(again) else 1.0

    def go_on_from(self, ends: MDState, failures: Failures) -> None:
        """Go on from the ends of a learning window; replicas that failed in it start afresh, and go to the bank as they were."""
        assert self.lesson is not None
        rows = self.lesson.rows
        mine = torch.arange(len(rows), device=rows.device)
        was = self.failed[rows]
        self.bank.add(self.lesson.state.select(mine[was]), failures.failed[mine][was])
        broken = (failures.failed | ~ends.alive)[mine]
        self.replicas = self.replicas.put(rows, ends.select(mine))
        self._restart(torch.zeros_like(self.failed).index_copy(0, rows, broken))
        self.lesson = None

    def reset_some(self, fraction: float) -> None:
        """Put a fraction of the replicas back to the reference, chosen at random."""
        self._restart(uniforms(self.replicas.key, self.replicas.step, RESETS) < fraction)

    def forget_failures(self) -> None:
        """Begin another simulation phase."""
        self.failed = torch.zeros_like(self.failed)
        self.counters.failures = self.counters.stable_steps = 0

    def renew_forces(self) -> int:
        """The replicas carry forces: those of the potential's new weights from here on; returns how many frames that took."""
        self.replicas = self._with_forces(self.replicas)
        if self.lesson is None:
            return self.replicas.n_systems
        self.lesson = replace(self.lesson, state=self._with_forces(self.lesson.state))
        return self.replicas.n_systems + self.lesson.state.n_systems

    def _with_forces(self, state: MDState) -> MDState:
        return update_forces(state, PotentialForces.driving(self.potential, self.condition.integrator))

    def _run(self, state: MDState, stop_unstable: bool) -> tuple[MDState, Trajectory | None, Failures]:
        began, integrator, window = time.monotonic(), self.condition.integrator, self.window
        ends, trajectory, failures = watched(
            state,
            integrator,
            PotentialForces.driving(self.potential, integrator),
            window.n_steps,
            [criterion.for_model(self.potential) for criterion in self.condition.criteria],
            check_every=window.check_every,
            sample_every=None if stop_unstable else window.sample_every,
            stop_unstable=stop_unstable,
            escape=window.escape,
            on_look=self.on_look,
        )
        self.counters.md_steps += int((ends.step - state.step).sum())
        self.counters.md_seconds += time.monotonic() - began
        return ends, trajectory, failures

    def _restart(self, chosen: Tensor) -> None:
        index = chosen.nonzero()[:, 0]
        if len(index):
            self.replicas = self.replicas.put(index, self._fresh(len(index)))

    def _fresh(self, n: int) -> MDState:
        """New replicas from the reference, with random streams used by none before."""
        condition, seed = self.condition, int(replica_keys(self.seed, 1, first=self.counters.starts)[0] % (1 << 31))
        self.counters.starts += 1
        point = condition.point
        state = start(
            self.potential, condition.starts, n, point.temperature_K, condition.integrator, seed, point.pressure_GPa or 0.0
        )
        return with_memory(state, condition.criteria)

    def state(self) -> dict:
        """Everything an exact continuation needs; tensors and plain values only."""
        saved = {"replicas": self.replicas.tensors(), "failed": self.failed.clone(), "counters": vars(self.counters).copy()}
        lesson = self.lesson
        if lesson is not None:
            saved["lesson"] = {"state": lesson.state.tensors(), "rows": lesson.rows, "banked": lesson.banked}
        return saved | {"bank": self.bank.state()}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.replicas = self.replicas.restore(state["replicas"])
        self.failed = state["failed"].to(self.failed.device)
        self.counters = Counters(**state["counters"])
        self.bank.restore(state["bank"], self.replicas)
        lesson, device = state.get("lesson"), self.failed.device
        if lesson is not None:
            lesson = Lesson(restored(lesson["state"], self.replicas), lesson["rows"].to(device), lesson["banked"])
        self.lesson = lesson
