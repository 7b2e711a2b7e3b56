"""The StABIE loop (Raja et al., arXiv 2402.13984, section 3.2): find where replicas fail, learn there, go on.

    pretrained potential
    repeat: simulation phase   run replicas; stop each that fails and rewind it to the start of that window
            learning phase     run all from there, broken ones too; weighted backward of the Boltzmann estimator plus
                               the energy/force gradient; back to the same start; until the failures are gone
    keep the best state by measured stability
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from ase import Atoms, units
from torch import Tensor

from stabie_ase.batch import AtomsBatch
from stabie_ase.boltzmann import accumulate_gradient, estimate, potential_energies
from stabie_ase.dynamics import Integrator, Langevin, MDState, NoseHooverChain, Trajectory, simulate
from stabie_ase.dynamics.random import RESETS, replica_keys, uniforms
from stabie_ase.evaluation import reference_mean, start
from stabie_ase.observables import Observable
from stabie_ase.potentials.base import Potential
from stabie_ase.reference import Reference
from stabie_ase.stability import BondLengthDeviation, Failures
from stabie_ase.training.qm import LabelledFrames, QMLoss, minibatch, qm_errors

logger = logging.getLogger(__name__)

SIMULATION, LEARNING, FINISHED = "simulation", "learning", "finished"


@dataclass(frozen=True)
class FinetuneConfig:
    """Every knob of the loop. Times are in fs and ps, temperatures in K, tolerances in Å.

    Attributes
    ----------
    observable : str
        Name of the observable that is matched.
    temperature_K : float or None
        None takes the reference's.
    timestep_fs : float
    thermostat : str
        "langevin", whose noise is replayed after a rewind, or "nose-hoover".
    friction_per_fs, damping_fs : float
        Of the one and of the other.
    replicas : int
    window_fs, sample_every_fs, check_every_fs : float
        Length of a window, and the time between frames for the estimator and between looks at the criterion.
    criterion : str
        KIND:TOLERANCE.
    upper_share, lower_share : float
        Unstable share that ends a simulation phase, and a learning phase.
    max_simulation_windows, max_learning_windows : int
        Windows after which a phase ends anyway.
    random_resets : float
        Share of the stable replicas put back to a reference frame at the start of a simulation phase.
    observable_weight, qm_weight : float
        W and λ of W L_obs + λ L_QM.
    learning_rate : float
        Of Adam.
    updates_per_window : int
        Optimiser steps at most on the samples of one window.
    min_ess_share : float
        Samples are reused while Kish's effective sample size is above this share of their number.
    gradient_clip : float
        Largest norm of a gradient.
    qm_batch_size : int
    cross_fit : bool
        Unbiased estimator from two halves of the replicas, at the price of variance.
    force_error_bound : float
        A state whose force error on the reference exceeds the start's by more than this share is not kept.
    max_time_min : float
    max_cycles, max_updates : int or None
    check_ps : float
        Length of the final comparison with the starting model.
    seed : int
    """

    observable: str = "hr"
    temperature_K: float | None = None
    timestep_fs: float = 0.5
    thermostat: str = "langevin"
    friction_per_fs: float = 0.01
    damping_fs: float = 20.0
    replicas: int = 32
    window_fs: float = 500.0
    sample_every_fs: float = 25.0
    check_every_fs: float = 5.0
    criterion: str = "bonds:0.25"
    upper_share: float = 0.5
    lower_share: float = 0.1
    max_simulation_windows: int = 40
    max_learning_windows: int = 8
    random_resets: float = 0.05
    observable_weight: float = 1.0
    qm_weight: float = 1.0
    learning_rate: float = 1e-4
    updates_per_window: int = 5
    min_ess_share: float = 0.5
    gradient_clip: float = 1.0
    qm_batch_size: int = 16
    cross_fit: bool = False
    force_error_bound: float = 0.05
    max_time_min: float = 30.0
    max_cycles: int | None = None
    max_updates: int | None = None
    check_ps: float = 4.0
    seed: int = 0

    def steps(self, time_fs: float) -> int:
        """A time as a number of steps, at least one."""
        return max(1, round(time_fs / self.timestep_fs))

    @property
    def integrator(self) -> Integrator:
        if self.thermostat == "nose-hoover":
            return NoseHooverChain(self.timestep_fs * units.fs, self.damping_fs * units.fs)
        return Langevin(self.timestep_fs * units.fs, self.friction_per_fs / units.fs)


@dataclass
class Progress:
    """Counters of a run; plain numbers, saved with it."""

    phase: str = SIMULATION
    cycle: int = 0
    window: int = 0
    updates: int = 0
    md_steps: int = 0
    starts: int = 0
    failures_in_phase: int = 0
    stable_steps_in_phase: int = 0
    learning_rate: float = 0.0
    seconds: float = 0.0


class StabieTraining:
    """The loop, one window a call of `step`; everything it needs to go on is in `state()`.

    Parameters
    ----------
    potential : Potential
        Trained in place.
    reference : Reference
        Frames to start from, to take the observable from and to train energies and forces on.
    observable : Observable
    criterion : BondLengthDeviation
    config : FinetuneConfig
        With a temperature.
    """

    def __init__(
        self,
        potential: Potential,
        reference: Reference,
        observable: Observable,
        criterion: BondLengthDeviation,
        config: FinetuneConfig,
    ):
        self.potential, self.reference, self.observable, self.config = potential, reference, observable, config
        self.criterion = criterion
        self.escaped = replace(criterion, tolerance=10.0 * criterion.tolerance)
        self.target = reference_mean(observable, reference).to(potential.device)
        self.labelled = LabelledFrames.from_reference(reference, potential.device)
        self.loss = QMLoss()
        self.integrator = config.integrator
        self.progress = Progress(learning_rate=config.learning_rate)
        self.replicas = self._fresh(config.replicas)
        self.failed = torch.zeros(config.replicas, dtype=torch.bool, device=potential.device)
        self.optimizer = torch.optim.Adam(potential.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        self.start_force_mae = qm_errors(potential, self.labelled).force_mae_eV_per_A
        self.best = {"hazard": math.inf, "cycle": -1, "weights": self._weights()}

    # -- the two phases

    def step(self) -> tuple[dict[str, object], list[Atoms]]:
        """Run one window of the present phase; returns a record for the log and the frames that failed in it."""
        began = time.monotonic()
        run = self._simulate if self.progress.phase == SIMULATION else self._learn
        record, unstable = run()
        self.progress.seconds += time.monotonic() - began
        if self._budget_spent():
            self.progress.phase = FINISHED
        return record, unstable

    @property
    def finished(self) -> bool:
        return self.progress.phase == FINISHED

    def _simulate(self) -> tuple[dict[str, object], list[Atoms]]:
        """One window of those that have not failed. A failed replica keeps its state from before the window: rewound."""
        config, progress = self.config, self.progress
        if progress.window == 0:
            self._random_resets()
        going = (~self.failed).nonzero()[:, 0]
        ends, _, failures = self._window(self.replicas.select(going), stop_unstable=True)
        fine = ~failures.failed
        self.replicas = self.replicas.put(going[fine], ends.select(fine.nonzero()[:, 0]))
        self.failed[going[~fine]] = True
        progress.failures_in_phase += int(failures.failed.sum())
        progress.stable_steps_in_phase += self._stable_steps(failures)
        progress.window += 1
        share = float(self.failed.double().mean())
        record = self._record(share=share, hazard_per_ps=self._hazard())
        unstable = self._unstable_frames(failures, going)
        if share >= config.upper_share or progress.window >= config.max_simulation_windows:
            self._remember_if_best()
            self._enter(LEARNING if self.failed.any() else SIMULATION)
        return record, unstable

    def _learn(self) -> tuple[dict[str, object], list[Atoms]]:
        """One window of all replicas from the start of the phase, then updates on its samples."""
        config, progress = self.config, self.progress
        ends, trajectory, failures = self._window(self.replicas, stop_unstable=False)
        progress.window += 1
        if progress.window == 1 and failures.share < 0.5 * float(self.failed.double().mean()):
            logger.warning(
                "only %.0f %% of the replicas failed again after the rewind, %.0f %% had failed before: "
                "there is little to learn from them",
                100 * failures.share,
                100 * float(self.failed.double().mean()),
            )
        record = self._record(share=failures.share)
        if failures.share > config.lower_share:
            record |= self._update(trajectory)
        if failures.share <= config.lower_share or progress.window >= config.max_learning_windows:
            self._next_starts(ends, failures)
            progress.cycle += 1
            self._enter(SIMULATION)
        return record, []

    def _window(self, state: MDState, stop_unstable: bool) -> tuple[MDState, Trajectory | None, Failures]:
        config = self.config
        n_steps = config.steps(config.window_fs)
        result = simulate(
            state,
            self.integrator,
            self.potential,
            n_steps,
            [self.criterion],
            check_every=config.steps(config.check_every_fs),
            sample_every=None if stop_unstable else config.steps(config.sample_every_fs),
            stop_unstable=stop_unstable,
            escaped=[self.escaped],
        )
        self.progress.md_steps += n_steps * state.n_systems
        return result

    # -- learning

    def _update(self, trajectory: Trajectory) -> dict[str, object]:
        """Optimiser steps on one window's samples while their effective number holds."""
        config, frames, energies, values, fold = self.config, *self._samples(trajectory)
        first_loss = last_ess = None
        change = torch.zeros_like(energies)
        for k in range(config.updates_per_window):
            if k:
                change = potential_energies(self.potential, frames) - energies
            if not torch.isfinite(change).all():
                break
            result = estimate(
                values, self.target, self.observable.weights.to(values), config.temperature_K, change, fold
            )
            last_ess = result.effective_samples / len(values)
            if last_ess < config.min_ess_share:
                break
            first_loss = float(result.loss) if first_loss is None else first_loss
            self._optimizer_step(frames, result.sample_weights)
        return {
            "n_samples": len(values),
            "observable_loss": first_loss,
            "ess_share": last_ess,
            "updates": self.progress.updates,
            "force_mae_eV_per_A": qm_errors(self.potential, self.labelled).force_mae_eV_per_A,
        }

    def _samples(self, trajectory: Trajectory) -> tuple[AtomsBatch, Tensor, Tensor, Tensor | None]:
        """Frames of a window with their energies and observables; frames that are not finite are left out."""
        values_of = trajectory.frames()
        frames, frame, replica = values_of
        energies = trajectory.potential_energy[frame, replica]
        values = self.observable(frames)
        usable = (torch.isfinite(energies) & torch.isfinite(values).all(dim=1)).nonzero()[:, 0]
        fold = (replica[usable] % 2 == 0) if self.config.cross_fit else None
        return frames.select(usable), energies[usable], values[usable], fold

    def _optimizer_step(self, frames: AtomsBatch, sample_weights: Tensor) -> None:
        config, progress = self.config, self.progress
        self.optimizer.zero_grad()
        if config.observable_weight:
            accumulate_gradient(self.potential, frames, config.observable_weight * sample_weights)
        chosen = minibatch(len(self.labelled), config.qm_batch_size, config.seed, progress.updates)
        (config.qm_weight * self.loss(self.potential, self.labelled.select(chosen))).backward()
        torch.nn.utils.clip_grad_norm_(self.potential.parameters(), config.gradient_clip)
        self.optimizer.step()
        progress.updates += 1

    # -- between the phases

    def _enter(self, phase: str) -> None:
        progress = self.progress
        progress.phase, progress.window = phase, 0
        if phase == SIMULATION:
            self.failed = torch.zeros_like(self.failed)
            progress.failures_in_phase = progress.stable_steps_in_phase = 0

    def _next_starts(self, ends: MDState, failures: Failures) -> None:
        """Go on from the ends of the window; replicas that failed in it start afresh."""
        self.replicas = ends
        self._restart(failures.failed | ~ends.alive)

    def _random_resets(self) -> None:
        draws = uniforms(self.replicas.key, self.replicas.step, RESETS)
        self._restart(draws < self.config.random_resets)

    def _restart(self, chosen: Tensor) -> None:
        index = chosen.nonzero()[:, 0]
        if len(index):
            self.replicas = self.replicas.put(index, self._fresh(len(index)))

    def _fresh(self, n: int) -> MDState:
        """New replicas from the reference, with random streams used by none before."""
        seed = int(replica_keys(self.config.seed, 1, first=self.progress.starts)[0] % (1 << 31))
        self.progress.starts += 1
        return start(
            self.potential, self.reference.frames, n, self.config.temperature_K, self.config.integrator, seed
        )

    def _remember_if_best(self) -> None:
        """The simulation phase has measured the hazard of the weights it ran with."""
        error = qm_errors(self.potential, self.labelled).force_mae_eV_per_A
        accurate = error <= (1.0 + self.config.force_error_bound) * self.start_force_mae
        if accurate and self._hazard() < self.best["hazard"]:
            self.best = {"hazard": self._hazard(), "cycle": self.progress.cycle, "weights": self._weights()}

    def _weights(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self.potential.state_dict().items()}

    def _hazard(self) -> float:
        """Failures per replica-ps in this simulation phase, with half a failure added so that none is not zero."""
        progress = self.progress
        ps = progress.stable_steps_in_phase * self.config.timestep_fs / 1000.0
        return (progress.failures_in_phase + 0.5) / max(ps, 1e-9)

    def _stable_steps(self, failures: Failures) -> int:
        n_steps = self.config.steps(self.config.window_fs)
        return int(torch.where(failures.failed, failures.step, n_steps).sum())

    def _budget_spent(self) -> bool:
        config, progress = self.config, self.progress
        return (
            progress.seconds >= 60.0 * config.max_time_min
            or (config.max_cycles is not None and progress.cycle >= config.max_cycles)
            or (config.max_updates is not None and progress.updates >= config.max_updates)
        )

    # -- what leaves the loop

    def _record(self, **values: object) -> dict[str, object]:
        progress = self.progress
        return {
            "phase": progress.phase,
            "cycle": progress.cycle,
            "window": progress.window,
            "md_replica_ps": progress.md_steps * self.config.timestep_fs / 1000.0,
            **values,
        }

    def _unstable_frames(self, failures: Failures, replicas: Tensor) -> list[Atoms]:
        """Frames at the failure, the atoms to blame tagged 1."""
        images, frames = failures.frames.to_atoms(), []
        for k in failures.failed.nonzero()[:, 0].tolist():
            atoms = images[k]
            tags = [0] * len(atoms)
            for a in failures.atoms[k]:
                tags[a] = 1
            atoms.set_tags(tags)
            atoms.info |= {
                "cycle": self.progress.cycle,
                "replica": int(replicas[k]),
                "time_ps": float(int(self.replicas.step[replicas[k]]) + int(failures.step[k]))
                * self.config.timestep_fs
                / 1000.0,
                "criterion": failures.criterion[k],
                "value": float(failures.value[k]),
            }
            frames.append(atoms)
        return frames

    def state(self) -> dict:
        """Everything an exact continuation needs; tensors and plain values only."""
        return {
            "weights": self._weights(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "replicas": self.replicas.tensors(),
            "failed": self.failed,
            "progress": vars(self.progress).copy(),
            "best": self.best,
            "start_force_mae": self.start_force_mae,
        }

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.potential.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replicas = self._restore_replicas(state["replicas"])
        self.failed = state["failed"].to(self.failed.device)
        self.progress = Progress(**state["progress"])
        self.best = state["best"]
        self.start_force_mae = state["start_force_mae"]

    def _restore_replicas(self, tensors: dict[str, Tensor]) -> MDState:
        return self.replicas.restore(tensors)


def train(training: StabieTraining, on_window: Callable[[dict[str, object], list[Atoms]], None] | None = None) -> None:
    """Run the loop until its budget is spent."""
    while not training.finished:
        record, unstable = training.step()
        if on_window:
            on_window(record, unstable)
