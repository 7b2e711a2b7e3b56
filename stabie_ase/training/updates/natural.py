"""The natural gradient: what changes failures most for a given change of energies and forces of sound frames."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from stabie_ase.boltzmann.gradient import energy_change
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.training.accuracy import Growth
from stabie_ase.training.labels import energy_offset, minibatch
from stabie_ase.training.schedule import OBSERVABLES, STABILITY
from stabie_ase.training.updates.base import UpdateInfo, UpdateRule, Windows, Work
from stabie_ase.training.updates.direction import natural_direction
from stabie_ase.training.updates.found import Found, ess_fraction, find
from stabie_ase.training.updates.gradients import collect, is_noise, known_gradient, telling
from stabie_ase.training.updates.label_steps import LabelSteps
from stabie_ase.training.updates.lifted import Lifted

logger = logging.getLogger(__name__)

FIRST_STEP_FRACTION = 0.125
"""First longest step for the observables: how much it changes forces, as a fraction of the starting model's force error.

Most of it is made good by the steps on energies and forces that follow. It adapts where steps are as long as that.
"""

MIN_BALANCE, MAX_BALANCE = 1.0 / 16, 8.0
"""Limits of the factor on that length which follows the errors on the held-out frames."""

CHEAP_FRACTION, GROWTH_BOUND_FRACTION = 0.25, 0.9
"""Parts of the bounds on the growth of errors: up to the first steps grow, beyond the second they shrink.

Close to the bound a step is taken back whatever its length, and nothing moves any more. What a longer step lifts grows with its length,
what it spoils with the square of that.
"""

MAX_RAISE_KT, TOLD_KT = 5.0, 1.0
"""How far one step lifts what is to become rarer at most, see `Found.raised`, in k_B T; and how much rarer, see `Found.rarer`, it is when
steps on one window's samples end.

Where failures are much rarer already, what is left to be seen in the samples is noise, and following it spoils forces for nothing. Holes
of a model that is far from right are deep: the demo's failures fell by 1.6 and 1.7 in seven minutes with 2 kT a step, by 3.5 with 5 kT, one
seed of each on a busy machine. No other values were tried.
"""

MENDED_FRACTION = 0.5
"""Part of the bounds beyond which a longer run of steps on energies and forces follows the first.

The more there is to mend the more a run mends, and it takes as long.
"""

MENDING_LENGTH, MAX_MENDING_RUNS = 2, 4
"""How many times longer such a run is than the first, and how many there are at most.

A long run, in which the rate falls once, mends more than several short ones. SchNet of aspirin, 54 meV/Å, after a step that lifted failures
by 5 kT: forces +0.5 %, after a run of 60 +0.7 %, after one of 240 more +0.2 % and energies -2.6 %, 6.4 kT left; of water, 51 meV/Å, 3 kT:
+0.3 %, +0.1 %, and after one of 120 more -1.5 % and -9 %, 3.3 kT left.
"""

ATOMIC_WEIGHT = 50.0
"""Of energies of atoms in the metric, in 1/eV², where samples are parts of a frame (`natural_direction`).

One step for g_OO of water (SchNet, 64 molecules that are samples each), on frames of replicas that took no part: ΔU and what it should be
have a correlation of 0.06 without, and their effective number falls to 15 %; 0.50, 0.59 and 0.59 with 5, 50 and 500, and 96 to 99 %.
"""

MAX_LIFTED = 32
"""Windows whose frames are held."""


class NaturalGradient(UpdateRule):
    """A step down the natural gradient of the estimator, steps on energies and forces, and back if errors have grown too far.

    Of the gradient only the direction is used: its length falls with the square of the unstable fraction, and the last
    failures would never be learned. How far a step goes is a fraction of the force error (`FIRST_STEP_FRACTION`)
    times a balance that follows the errors on the held-out frames, and no farther than failures are to be lifted (`MAX_RAISE_KT`).
    """

    def __init__(self, work: Work):
        super().__init__(work)
        self.steps, self.balance, self.directions = LabelSteps(work), 1.0, 0
        self.lifted: list[Lifted] = []

    def apply_(self, windows: Windows) -> UpdateInfo:
        """Updates on one window's samples while they tell something: their effective number holds and failures are not much rarer yet.

        None, where stability is the goal, if the gradient is shorter than its standard error: that costs forces for nothing.
        """
        work, config, info = self.work, self.work.config, UpdateInfo()
        estimates = [found for window in windows for found in find(work, *window)]
        if not estimates:
            return info
        self.steps.calibrate()
        raised, rarer, direction, lifted = 0.0, 0.0, None, list[Lifted]()
        for _ in range(config.update.updates_per_window):
            before = {name: x.detach().clone() for name, x in work.potential.state_dict().items()}
            if direction is None:
                if not info.figures:
                    estimates, info.figures = telling(work, estimates)
                collect(work.potential, estimates)
                info.figures = info.figures or known_gradient(work.potential, estimates)
                if config.goal == STABILITY and is_noise(info.figures):
                    info.growth = info.growth or work.accuracy.measure(work.potential)
                    break
                direction = self._direction(estimates)
            self._step(*direction)
            part = self._shorten(before, estimates)
            stepped = self._lifted(estimates)
            info.growth = self._mend(stepped)
            info.updates += 1
            self._rebalance(info.growth, part)
            told = False
            if info.growth.within(work.bounds):
                afresh = config.goal == OBSERVABLES
                following, direction, lifted = [found.reweighted(work.potential, afresh) for found in estimates], None, stepped
                raised += max(was.raised(now.change) for was, now in zip(estimates, following))
                rarer += max(was.rarer(now.change) for was, now in zip(estimates, following))
                estimates = following
                met = part < 1.0 and config.goal == OBSERVABLES
                told = met or rarer > TOLD_KT or not ess_fraction(estimates) >= config.estimator.min_ess_fraction
            else:
                # More than energies and forces can make good: take the step back, and try a shorter one in the same direction. Another
                # window would be this one again, with the same weights from the same start.
                work.potential.load_state_dict(before)
                info.taken_back += 1
                info.growth = work.accuracy.measure(work.potential)
            if told or work.out_of_time():
                break
        self.lifted = [*self.lifted, *lifted][-MAX_LIFTED:]
        info.figures |= {
            "observable_loss": sum(found.estimate.loss for found in estimates),
            "ess_fraction": ess_fraction(estimates),
            "raised_kT": raised,
            "balance": self.balance,
        } | work.figures(info.growth)
        return info

    def _lifted(self, estimates: list[Found]) -> list[Lifted]:
        """What is to be held of a step."""
        potential = self.work.potential
        offset = energy_offset(potential, self.work.some_labelled())
        return [x for x in (Lifted.of(potential, found.estimate, offset) for found in estimates) if x is not None]

    def _rebalance(self, growth: Growth, part: float) -> None:
        """Shorter steps where errors have grown too far, or nearly; longer ones where they hardly have and a step was whole."""
        bounds = self.work.bounds
        factor = 1.2 if part == 1.0 and growth.within(bounds, CHEAP_FRACTION) else 1.0
        if not growth.within(bounds, GROWTH_BOUND_FRACTION):
            factor = part * (0.7 if growth.within(bounds) else 0.5)
        self.balance = min(max(factor * self.balance, MIN_BALANCE), MAX_BALANCE)

    def _mend(self, lifted: list[Lifted]) -> Growth:
        """A run of steps on energies and forces, and longer ones while errors are beyond half of their bounds and fall; they at the end.

        What a step spoils grows with what has been spoiled before, and most of that can be mended while what was lifted stays where it is.
        What a step has done to sound frames does not: where observables are the goal there is none, or no other, once errors are within
        `GROWTH_BOUND_FRACTION` of their bounds.
        """
        work, lifted = self.work, [*self.lifted, *lifted]
        if work.config.goal == STABILITY:
            return self.steps.run_until(lifted, MENDED_FRACTION, MAX_MENDING_RUNS, MENDING_LENGTH)
        growth = work.accuracy.measure(work.potential)
        if growth.within(work.bounds, GROWTH_BOUND_FRACTION):
            return growth
        return self.steps.run_until(lifted, GROWTH_BOUND_FRACTION, MAX_MENDING_RUNS)

    def _direction(self, estimates: list[Found]) -> tuple[list[Tensor], float]:
        """Where to go by the gradient that the parameters hold, and how far that changes forces."""
        work, config, draw = self.work, self.work.config, 2 * self.directions
        self.directions += 1
        sound = [work.labelled.batch, *{id(found.sound): found.sound for found in estimates}.values()]
        frames, others = self._some(sound, draw), self._some(sound, draw + 1)
        squares, iterations = self.steps.squares(), config.update.natural_iterations
        atomic = ATOMIC_WEIGHT if any(found.of_atoms for found in estimates) else 0.0
        return natural_direction(
            work.potential, frames, work.loss, iterations, squares=squares, unseen=others, atomic_weight=atomic
        )  # fmt: skip

    def _some(self, pools: list[AtomsBatch], draw: int) -> list[AtomsBatch]:
        """A few frames of each pool that has any, other ones in each draw."""
        size, seed = self.work.batch_size, self.work.config.seed
        return [pool.select(minibatch(pool.n_systems, size, seed, draw)) for pool in pools if pool.n_systems]

    @torch.no_grad()
    def _step(self, direction: list[Tensor], change: float) -> None:
        """A step that changes forces by as much as the balance says, if the direction changes them at all."""
        if not (math.isfinite(change) and change > 0):
            return
        work = self.work
        length = self.balance * work.config.update.observable_weight * FIRST_STEP_FRACTION * work.accuracy.start_rmse / change
        for p, part in zip(work.potential.parameters(), direction):
            p.sub_((length * part).to(p.dtype))

    @torch.no_grad()
    def _shorten(self, before: dict[str, Tensor], estimates: list[Found]) -> float:
        """The step from some parameters to the present ones no longer than it takes; the part of it that is left.

        That is to lift failures or, where observables are the goal, to the least loss along it: the zero of a slope that is linear.
        """
        potential = self.work.potential
        changes = [energy_change(potential, found.estimate.samples) for found in estimates]
        raised = max(found.raised(change) for found, change in zip(estimates, changes))
        part = MAX_RAISE_KT / raised if raised > MAX_RAISE_KT else 1.0
        if self.work.config.goal == OBSERVABLES:
            here, there = map(sum, zip(*(found.slopes(change) for found, change in zip(estimates, changes))))
            part = min(part, here / (here - there)) if here < 0.0 < there else part
        if part < 1.0:
            for name, p in potential.named_parameters():
                p.copy_(torch.lerp(before[name], p, part))
        return part

    def state(self) -> dict:
        """Everything an exact continuation needs."""
        return self.steps.state() | {"balance": self.balance, "directions": self.directions, "lifted": [x.tensors() for x in self.lifted]}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.steps.restore(state)
        self.balance = state["balance"]
        self.directions = state.get("directions", self.steps.runs)  # of a state that has none, one for each run on labels
        self.lifted = [Lifted.restored(x, self.work.potential.device) for x in state["lifted"]]
