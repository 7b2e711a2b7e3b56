"""Steps on energies and forces alone."""

from __future__ import annotations

import copy
import math

import torch

from stabie_ase.training.labels import minibatch
from stabie_ase.training.updates.base import Work


class LabelSteps:
    """A run of Adam's steps on energies and forces, with a learning rate that falls to zero.

    Parameters
    ----------
    work : Work

    Attributes
    ----------
    runs : int
        So far; each has other frames.
    """

    def __init__(self, work: Work):
        self.work, self.runs = work, 0
        self.optimizer = torch.optim.Adam(work.potential.parameters(), lr=work.config.labels.learning_rate, betas=(0.9, 0.99))

    def run(self) -> None:
        """All steps of one run."""
        work, config = self.work, self.work.config
        for k in range(config.labels.qm_steps):
            chosen = minibatch(len(work.labelled), work.batch_size, config.seed, self.runs * config.labels.qm_steps + k)
            self.optimizer.zero_grad()
            work.loss(work.potential, work.labelled.select(chosen)).backward()
            norm = torch.nn.utils.clip_grad_norm_(work.potential.parameters(), config.update.gradient_clip)
            if not torch.isfinite(norm):
                break
            for group in self.optimizer.param_groups:
                group["lr"] = 0.5 * config.labels.learning_rate * (1.0 + math.cos(math.pi * k / config.labels.qm_steps))
            self.optimizer.step()
            if work.on_label_step:
                work.on_label_step(k + 1)
        self.runs += 1

    def state(self) -> dict:
        """Everything an exact continuation needs."""
        return {"optimizer": copy.deepcopy(self.optimizer.state_dict()), "runs": self.runs}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.runs = state["runs"]
