"""Steps on energies and forces alone."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stabie_ase.system import processes
from stabie_ase.training.accuracy import Growth
from stabie_ase.training.labels import minibatch
from stabie_ase.training.updates.base import Work
from stabie_ase.training.updates.lifted import Lifted

logger = logging.getLogger(__name__)

MAX_NOISE_PART = 0.05
"""By how much a run of steps alone may spoil held-out frames, as a part of the bounds on the growth of their errors.

Adam's steps are as long as its learning rate wherever the gradient is noise, as it is for a model that has converged. A SchNet of water
with 31 meV/Å went to 35.5 in 60 steps at 1e-4, and to 31.4 at 2e-5: no step for an observable is then within the bound, however short.
At 1.1e-5 its forces stayed as they were, and energies, 40 meV, grew by 4 % in one run and 6 % in three. With 0.2 most of the bound went
into such noise. Both were measured when what all atoms have in common counted whole (`OFFSET_WEIGHT`), which was much of it.
"""

LEARNING_RATE, STEPS = 1e-4, 120
"""Of a run that mends what a step has spoiled, and how many times, where nothing is given."""

HOLDING_WEIGHT = 20.0
"""Of energies that have sunk, in 1/eV². Ten times as much cost a good model 1.8 % of its forces in place of 1.0 %, for a lift of 6.0 kT in
place of 5.9."""

RISE, MOST_RISING = 0.25, 60
"""Part of a run in which the learning rate rises, and steps at most. Adam's first steps are as long as the rate whatever the gradient
is, as long as it has seen only a few; 120 steps at 1e-4 left a SchNet of water at 31.14 meV/Å without, 31.04 with it, its energies at
40.1 and 39.5 meV."""

LEAST_MENDED = 0.02
"""Part of the bounds on the growth of errors by which a run has to lower them for another to follow."""

RATE_FACTOR, MAX_TRIES = 1.0 / 3.0, 5
"""From one learning rate to the next that is tried, and how many are."""


class LabelSteps:
    """A run of Adam's steps on energies and forces, with a learning rate that rises from zero and falls to it again.

    Parameters
    ----------
    work : Work
    n_steps : int
        Of a run, where `qm_steps` is not given.
    learning_rate : float
        The largest of a run, where none is given.
    holding_weight : float
        Of energies that have sunk, in 1/eV².

    Attributes
    ----------
    runs : int
        So far; each has other frames.
    rate : float or None
        The largest learning rate of a run; None until `calibrate` has found it.
    """

    def __init__(
        self, work: Work, n_steps: int = STEPS, learning_rate: float = LEARNING_RATE, holding_weight: float = HOLDING_WEIGHT
    ):
        given = work.config.labels
        self.work, self.runs, self.holding_weight = work, 0, holding_weight
        self.n_steps = n_steps if given.qm_steps is None else given.qm_steps
        self.learning_rate = learning_rate if given.learning_rate is None else given.learning_rate
        self.rate: float | None = None
        self._tried: list[Tensor] | None = None
        self.optimizer = torch.optim.Adam(work.potential.parameters(), lr=self.learning_rate, betas=(0.9, 0.99))

    def calibrate(self) -> None:
        """Once: the learning rate that was asked for, or a smaller one if a run by itself spoils the potential as it is.

        Weights and optimizer stay what they were; what the last try has learned of the sizes of gradients is kept for `squares`.
        """
        work = self.work
        if self.rate is not None:
            return
        rate = self.rate = self.learning_rate
        if not self.n_steps:
            return
        weights = {name: x.detach().clone() for name, x in work.potential.state_dict().items()}
        optimizer, before = copy.deepcopy(self.optimizer.state_dict()), work.accuracy.measure(work.potential)
        for _ in range(MAX_TRIES):
            self._steps()
            after = work.accuracy.measure(work.potential)
            forces = after.force_mae <= (1.0 + MAX_NOISE_PART * work.bounds.force) * before.force_mae
            energies = after.energy_mae <= (1.0 + MAX_NOISE_PART * work.bounds.energy) * before.energy_mae
            self._tried = self.squares()
            work.potential.load_state_dict(weights)
            self.optimizer.load_state_dict(copy.deepcopy(optimizer))
            if (forces and energies) or work.out_of_time():
                break
            rate = self.rate = rate * RATE_FACTOR
        if rate < self.learning_rate:
            logger.info("steps on energies and forces begin with a learning rate of %.2g: larger ones alone spoil the model", rate)

    def squares(self) -> list[Tensor] | None:
        """Adam's running means of squared gradients, one a parameter; before the first run those of a try, None without one."""
        known, parameters = self.optimizer.state, list(self.work.potential.parameters())
        return [known[p]["exp_avg_sq"] if p in known else torch.zeros_like(p) for p in parameters] if known else self._tried

    def run(self, lifted: Sequence[Lifted] = (), length: int = 1) -> None:
        """One run, so many times as long as others, in which what was lifted shall not sink; shorter where time would run out first."""
        self._steps(lifted, length)
        self.runs += length

    def run_until(self, lifted: Sequence[Lifted], enough: float, most: int, length: int = 1) -> Growth:
        """A run, and others while errors are beyond a part of their bounds and fall.

        Parameters
        ----------
        lifted : sequence of Lifted
        enough : float
            Part of the bounds within which no other run follows.
        most : int
            Runs after the first.
        length : int
            How many times longer these are.

        Returns
        -------
        Growth
            Errors at the end.
        """
        work = self.work
        self.run(lifted)
        growth = work.accuracy.measure(work.potential)
        for _ in range(most):
            if growth.within(work.bounds, enough) or work.out_of_time():
                break
            was = growth.part(work.bounds)
            self.run(lifted, length)
            growth = work.accuracy.measure(work.potential)
            if not growth.part(work.bounds) < was - LEAST_MENDED:
                break
        return growth

    @property
    def largest_rate(self) -> float:
        """Of the next run."""
        return self.learning_rate if self.rate is None else self.rate

    def _steps(self, lifted: Sequence[Lifted] = (), length: int = 1) -> None:
        work, config = self.work, self.work.config
        rate, n = self.largest_rate, length * self.n_steps
        time_left, rising = work.seconds_left(), min(RISE, MOST_RISING / max(n, 1))
        for k in range(n):
            # Steps that time does not allow are left out as the run goes on, not at its end, where the rate falls.
            part = max((k + 0.5) / n, 1.0 - work.seconds_left() / time_left if 0.0 < time_left < math.inf else 0.0)
            if part >= 1.0:
                break
            step = self.runs * self.n_steps + k
            chosen = minibatch(len(work.labelled), work.batch_size, config.seed, step)
            self.optimizer.zero_grad()
            loss, offset = work.loss.with_offset(work.potential, work.labelled.select(chosen))
            (loss + self._sunk(lifted, offset, step)).backward()
            self._share()
            norm = torch.nn.utils.clip_grad_norm_(work.potential.parameters(), config.update.gradient_clip)
            if not torch.isfinite(norm):
                break
            for group in self.optimizer.param_groups:
                group["lr"] = rate * _rise_and_fall(part, rising)
            self.optimizer.step()
            if work.on_label_step:
                work.on_label_step(k + 1, n)

    def _sunk(self, lifted: Sequence[Lifted], offset: Tensor, step: int) -> Tensor | float:
        """How far some frames of one of the windows have sunk beside labelled ones, in units of the loss."""
        work = self.work
        if not lifted:
            return 0.0
        window = lifted[step % len(lifted)]
        some = window.select(minibatch(len(window), work.batch_size, work.config.seed, step // len(lifted)).to(work.potential.device))
        return self.holding_weight * some.sunk(work.potential, offset)

    def _share(self) -> None:
        """The mean of the gradients of all processes: the same steps in all of them, though each holds frames of its own."""
        n = processes.size()
        if n > 1:
            processes.sum_gradients(self.work.potential.parameters())
            for p in self.work.potential.parameters():
                if p.grad is not None:
                    p.grad /= n

    def state(self) -> dict:
        """Everything an exact continuation needs."""
        return {"optimizer": copy.deepcopy(self.optimizer.state_dict()), "runs": self.runs, "rate": self.rate, "tried": self._tried}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.runs, self.rate, self._tried = state["runs"], state["rate"], state.get("tried")  # runs of before had none


def _rise_and_fall(part: float, rising: float) -> float:
    """The learning rate at a part of a run, beside the largest, which is reached after another part."""
    return part / rising if part < rising else 0.5 * (1.0 + math.cos(math.pi * (part - rising) / (1.0 - rising)))
