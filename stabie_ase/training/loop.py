"""The StABIE loop (Raja et al., arXiv 2402.13984, section 3.2): find where replicas fail, learn there, go on.

    pretrained potential
    repeat: simulation phase   run replicas; stop each that fails and rewind it to the start of that window
            learning phase     run all from there, broken ones too; a step down the natural gradient of the Boltzmann
                               estimator, then energies and forces; back to the same start; until the failures are gone
    keep the best state by measured stability
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from ase import Atoms
from torch import Tensor

from stabie_ase.boltzmann import accumulate_gradient, fluctuation_weights, potential_energies, squared_loss
from stabie_ase.config import FinetuneConfig
from stabie_ase.dynamics import MDState, PotentialForces, Trajectory
from stabie_ase.dynamics.integrators import update_forces
from stabie_ase.dynamics.random import RESETS, replica_keys, uniforms
from stabie_ase.observables import Observable
from stabie_ase.potentials.base import Potential
from stabie_ase.runs.evaluation import start
from stabie_ase.stability import Criterion, Failures, OnLook, watched, with_memory
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import Reference
from stabie_ase.training.accuracy import Accuracy, Bounds, hold_out
from stabie_ase.training.labels import LabelledFrames, QMLoss, minibatch
from stabie_ase.training.natural import natural_direction
from stabie_ase.training.samples import Samples

logger = logging.getLogger(__name__)

SIMULATION, LEARNING, FINISHED = "simulation", "learning", "finished"

STEP = 0.5
"""First length of a step for the observable: how much it changes forces, as a share of the starting model's force error.

Most of it is made good by the steps on energies and forces that follow. It adapts.
"""

SHORTEST, LONGEST = 1.0 / 16, 8.0
"""Limits of the factor on that length which follows the force error on the validation frames."""

ROOM = 0.9
"""Share of the bound on the growth of the force error up to which steps grow; beyond it they shrink.

Close to the bound a step is taken back whatever its length, and nothing moves any more.
"""

ENERGY_WEIGHT = 20.0
"""Of energies beside forces, here and in the metric of a step: with pretraining's weight of one a step for the observable shifts
the energies of sound frames, and what repairs the forces does not mend them.

SchNet, 50 frames of aspirin, 20 updates: held-out energy MAE 80 -> 105 meV with a weight of 1, 80 -> 59 meV with 20, hazard the same.
"""

DOUBT = 5
"""Updates all taken back from the first on, after which it is said what that most likely means."""


WHY_TAKEN_BACK = (
    "each raised the force or energy error on the frames it is judged by beyond its bound: most likely the model was trained on "
    "those frames; give --valid FILE with frames it has not seen, or a looser --force-error-bound or --energy-error-bound"
)


@dataclass
class Progress:
    """Counters of a run; plain numbers, saved with it."""

    phase: str = SIMULATION
    cycle: int = 0
    window: int = 0
    updates: int = 0
    taken_back: int = 0
    md_steps: int = 0
    md_seconds: float = 0.0
    starts: int = 0
    failures_in_phase: int = 0
    stable_steps_in_phase: int = 0
    balance: float = 1.0
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
    criteria : sequence of Criterion
        All of them decide what is stable; near and far are measured by whichever is worst.
    config : FinetuneConfig
        With a temperature.
    """

    def __init__(
        self,
        potential: Potential,
        reference: Reference,
        observable: Observable,
        criteria: Sequence[Criterion],
        config: FinetuneConfig,
        validation: Reference | None = None,
    ):
        self.potential, self.reference, self.observable, self.config = potential, reference, observable, config
        self.criteria = list(criteria)
        values = observable(AtomsBatch.from_atoms(reference.frames))
        self.target = values.mean(dim=0).to(potential.device)
        self.reference_values = values.to(self.target)
        trained, held_out = (
            hold_out(potential, reference, config.validation_share) if validation is None else (reference, validation)
        )
        self.labelled = LabelledFrames.from_reference(trained, potential.device)
        self.held_out_source = (
            f"{len(held_out)} frames of the reference that are held out" if validation is None else validation.source
        )
        self.accuracy = Accuracy(potential, LabelledFrames.from_reference(held_out, potential.device), config.force_error_confidence)
        self.bounds = Bounds(config.force_error_bound, config.energy_error_bound)
        self.loss = QMLoss(energy_weight=ENERGY_WEIGHT)
        self.integrator = config.integrator
        self.progress = Progress()
        self.replicas = self._fresh(config.replicas)
        self.failed = torch.zeros(config.replicas, dtype=torch.bool, device=potential.device)
        self.optimizer = torch.optim.Adam(potential.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        self.start_weights = self._weights()
        self.best = {"hazard": math.inf, "cycle": 0, "weights": self._weights()}
        self._began: float | None = None
        self.on_look: OnLook | None = None
        self.on_qm_step: Callable[[int], None] | None = None

    # -- the two phases

    def step(self) -> tuple[dict[str, object], list[Atoms]]:
        """Run one window of the present phase; returns a record for the log and the frames that failed in it."""
        self._began = time.monotonic()
        if not self.config.observable_weight:
            record, unstable = self._control(), []
        else:
            record, unstable = (self._simulate if self.progress.phase == SIMULATION else self._learn)()
        self.progress.seconds, self._began = self.seconds, None
        if self._budget_spent():
            self.progress.phase = FINISHED
        return record, unstable

    @property
    def seconds(self) -> float:
        """Time spent, that of the window under way included; progress.seconds is that of finished ones."""
        return self.progress.seconds + (0.0 if self._began is None else time.monotonic() - self._began)

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
            self._enter(LEARNING if self.failed.any() else FINISHED)
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
        learned = failures.share > config.lower_share
        if learned:
            record |= self._learn_from(trajectory)
        if not learned or progress.window >= config.max_learning_windows:
            self._next_starts(ends, failures)
            progress.cycle += 1
            self._enter(SIMULATION)
        if learned:
            # The replicas carry forces: those of the new weights from here on.
            self.replicas = update_forces(self.replicas, PotentialForces.driving(self.potential, self.integrator))
        return record, []

    def _control(self) -> dict[str, object]:
        """One update on energies and forces alone: without an observable, dynamics teach nothing."""
        self.progress.phase = LEARNING
        self.progress.window += 1
        self._qm_steps()
        return self._record(updates=self.progress.updates, force_mae_eV_per_A=self.accuracy.measure(self.potential).force_mae)

    def _window(self, state: MDState, stop_unstable: bool) -> tuple[MDState, Trajectory | None, Failures]:
        config, began = self.config, time.monotonic()
        ends, trajectory, failures = watched(
            state,
            self.integrator,
            PotentialForces.driving(self.potential, self.integrator),
            config.steps(config.window_fs),
            [criterion.for_model(self.potential) for criterion in self.criteria],
            check_every=config.steps(config.check_every_fs),
            sample_every=None if stop_unstable else config.steps(config.sample_every_fs),
            stop_unstable=stop_unstable,
            escape=config.escape_factor,
            on_look=self.on_look,
        )
        self.progress.md_steps += int((ends.step - state.step).sum())
        self.progress.md_seconds += time.monotonic() - began
        return ends, trajectory, failures

    # -- learning

    def _learn_from(self, trajectory: Trajectory) -> dict[str, object]:
        """Updates on one window's samples while their effective number holds.

        All frames tell what is off. Only the energies of those not far outside the criterion are changed for it: where
        replicas get lost is a matter of the way out, and what they find further on takes no learning, but most of a step.
        """
        config, progress = self.config, self.progress
        samples = Samples.from_trajectory(trajectory, self.observable, config.half_width)
        record = {"n_samples": len(samples), "updates": progress.updates}
        near = samples.within(config.near_factor)
        if min(len(near.half(k)) for k in ((0, 1) if config.cross_fit else (None,))) < 2:
            logger.warning("all replicas broke at once: %d frames are too few to learn from", len(near))
            return record
        stable = near.within(1.0)
        loss_weights = self._loss_weights(stable.values)
        residuals = samples.residuals(self.target, loss_weights, config.cross_fit)
        weights, n_effective = near.weights(residuals, config.temperature_K)
        for _ in range(config.updates_per_window):
            before = self._weights()
            self._update(near.frames, weights, stable.frames)
            error = self.accuracy.measure(self.potential)
            if not error.within(self.bounds):
                # More than energies and forces can make good: take the step back, and go on with shorter ones.
                self._take_back(before)
                error = self.accuracy.measure(self.potential)
                break
            room = error.within(self.bounds, ROOM)
            progress.balance = min(1.2 * progress.balance, LONGEST) if room else max(0.7 * progress.balance, SHORTEST)
            change = potential_energies(self.potential, near.frames) - near.energies
            weights, n_effective = near.weights(residuals, config.temperature_K, change)
            if not n_effective >= config.min_ess_share * len(near) or self._out_of_time():
                break
        return record | {
            "observable_loss": float(squared_loss(samples.values.mean(dim=0), self.target, loss_weights)[0]),
            "ess_share": n_effective / len(near),
            "updates": progress.updates,
            "balance": progress.balance,
            "force_mae_eV_per_A": error.force_mae,
            "force_mae_limit_eV_per_A": (1.0 + error.force_growth) * self.accuracy.start_mae,
            "energy_mae_eV": error.energy_mae,
        }

    def _take_back(self, before: dict[str, Tensor]) -> None:
        progress = self.progress
        self.potential.load_state_dict(before)
        progress.balance = max(0.5 * progress.balance, SHORTEST)
        progress.taken_back += 1
        if progress.taken_back == progress.updates == DOUBT:
            logger.warning("the first %d updates had to be taken back; %s", DOUBT, WHY_TAKEN_BACK)

    def _loss_weights(self, stable: Tensor) -> Tensor:
        """Deviations count in units of the fluctuations of all frames that are as they should be.

        A few reference frames do not know the tails, and what looks rarer than it is drowns the failures in noise.
        """
        known = torch.cat([self.reference_values, stable.to(self.reference_values)])
        return fluctuation_weights(known, self.observable.weights, self.config.fluctuation_floor).to(self.target)

    def _update(self, frames: AtomsBatch, sample_weights: Tensor, stable: AtomsBatch) -> None:
        """One step for the observable, and what energies and forces make of it.

        Of ∇L_obs only the direction is used: its length falls with the square of the unstable share, and the last
        failures would never be learned.
        """
        config, progress = self.config, self.progress
        self.optimizer.zero_grad()
        accumulate_gradient(self.potential, frames, sample_weights)
        direction, change = natural_direction(
            self.potential, self._sound_frames(stable), self.loss, config.natural_iterations
        )
        if math.isfinite(change) and change > 0:
            length = progress.balance * config.observable_weight * STEP * self.accuracy.start_rmse / change
            with torch.no_grad():
                for p, part in zip(self.potential.parameters(), direction):
                    p -= (length * part).to(p.dtype)
        self._qm_steps()

    def _sound_frames(self, stable: AtomsBatch) -> list[AtomsBatch]:
        """Labelled frames and as many stable ones from the dynamics, other ones for each update."""
        pools = [pool for pool in (self.labelled.batch, stable) if pool.n_systems]
        size, seed, step = self.config.qm_batch_size, self.config.seed, self.progress.updates
        return [pool.select(minibatch(pool.n_systems, size, seed, step)) for pool in pools]

    def _qm_steps(self) -> None:
        """Steps on energies and forces with a learning rate that falls to zero."""
        config, progress = self.config, self.progress
        for k in range(config.qm_steps if config.qm_weight else 0):
            chosen = minibatch(len(self.labelled), config.qm_batch_size, config.seed, progress.updates * config.qm_steps + k)
            self.optimizer.zero_grad()
            self.loss(self.potential, self.labelled.select(chosen)).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.potential.parameters(), config.gradient_clip)
            if not torch.isfinite(norm):
                break
            for group in self.optimizer.param_groups:
                group["lr"] = 0.5 * config.qm_weight * config.learning_rate * (1.0 + math.cos(math.pi * k / config.qm_steps))
            self.optimizer.step()
            if self.on_qm_step:
                self.on_qm_step(k + 1)
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
        state = start(self.potential, self.reference.frames, n, self.config.temperature_K, self.integrator, seed)
        return with_memory(state, self.criteria)

    def _remember_if_best(self) -> None:
        """The simulation phase has measured the hazard of the weights it ran with."""
        if self._accurate() and self._hazard() < self.best["hazard"]:
            self.best = {"hazard": self._hazard(), "cycle": self.progress.cycle, "weights": self._weights()}

    def candidates(self) -> dict[str, dict[str, Tensor]]:
        """Weights worth a comparison: those at the start, the best measured in the loop, and the last if accurate."""
        candidates = {"start": self.start_weights}
        if self.unchanged:
            return candidates
        if self.best["cycle"] > 0:
            candidates["best"] = self.best["weights"]
        if self._accurate():
            candidates["last"] = self._weights()
        return candidates

    @property
    def unchanged(self) -> bool:
        """Whether no update has been kept."""
        return self.progress.updates == self.progress.taken_back

    def _accurate(self) -> bool:
        return self.accuracy.measure(self.potential).within(self.bounds)

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

    def _out_of_time(self) -> bool:
        return self.seconds >= 60.0 * self.config.max_time_min

    def _budget_spent(self) -> bool:
        config, progress = self.config, self.progress
        return (
            self._out_of_time()
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
        began = self.replicas.step[replicas]
        return failures.to_atoms(
            {
                k: {
                    "cycle": self.progress.cycle,
                    "replica": int(replicas[k]),
                    "time_ps": float(began[k] + failures.step[k]) * self.config.timestep_fs / 1000.0,
                }
                for k in failures.failed.nonzero()[:, 0].tolist()
            }
        )

    def state(self) -> dict:
        """Everything an exact continuation needs; tensors and plain values only."""
        return {
            "weights": self._weights(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "replicas": self.replicas.tensors(),
            "failed": self.failed.clone(),
            "progress": vars(self.progress).copy(),
            "best": self.best,
            "accuracy": self.accuracy.state(),
        }

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.potential.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replicas = self.replicas.restore(state["replicas"])
        self.failed = state["failed"].to(self.failed.device)
        self.progress = Progress(**state["progress"])
        self.best = state["best"]
        self.accuracy.restore(state["accuracy"])
