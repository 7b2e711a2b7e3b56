"""Training a potential on energies and forces from random weights: the starting points of StABIE."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stabie_ase.potentials.base import Potential
from stabie_ase.structures.reference import Reference
from stabie_ase.training.labels import LabelledFrames, QMErrors, QMLoss, minibatch, qm_errors
from stabie_ase.training.pretrain_options import PretrainOptions


class Pretraining:
    """Energy and force training of a potential, one epoch a call; `best` holds the best weights by validation.

    Parameters
    ----------
    potential : Potential
        Trained in place.
    reference : Reference
    config : PretrainOptions
    loss : QMLoss, optional
    """

    def __init__(self, potential: Potential, reference: Reference, config: PretrainOptions, loss: QMLoss | None = None):
        self.potential, self.config, self.loss = potential, config, loss or QMLoss()
        train, validation = reference.split(config.validation_fraction)
        self.train, self.validation = (LabelledFrames.from_reference(r, potential.device) for r in (train, validation))
        self.optimizer = torch.optim.Adam(potential.parameters(), lr=config.learning_rate, amsgrad=True)
        self.average = {name: x.detach().clone() for name, x in potential.state_dict().items()}
        self.best = copy.deepcopy(self.average)
        self.epoch, self.best_epoch, self.last_cut, self.seconds = 0, 0, 0, 0.0
        self.best_error = math.inf

    @property
    def finished(self) -> bool:
        """Whether epochs, time or learning rate have run out."""
        config = self.config
        rate = self.optimizer.param_groups[0]["lr"]
        return self.epoch >= config.epochs or self.seconds >= 60 * config.max_time_min or rate < config.min_learning_rate

    def run_epoch(self) -> dict[str, float]:
        """One pass over the training frames and one validation; returns what a log wants, errors in eV and eV/Å."""
        started, total = time.monotonic(), 0.0
        per_epoch = len(self.train) // min(self.config.batch_size, len(self.train))
        for k in range(per_epoch):
            chosen = minibatch(len(self.train), self.config.batch_size, self.config.seed, self.epoch * per_epoch + k)
            self.optimizer.zero_grad()
            loss = self.loss(self.potential, self.train.select(chosen))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.potential.parameters(), 10.0)
            self.optimizer.step()
            self._update_average()
            total += float(loss.detach())
        self.epoch += 1
        errors = self._validate()
        self.seconds += time.monotonic() - started
        return {
            "epoch": self.epoch,
            "loss": total / per_epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "force_mae_eV_per_A": errors.force_mae_eV_per_A,
            "energy_mae_eV": errors.energy_mae_eV,
        }

    def take_best(self) -> None:
        """Leave the best weights in the potential."""
        self.potential.load_state_dict(self.best)

    def _update_average(self) -> None:
        for name, x in self.potential.state_dict().items():
            if x.is_floating_point():
                self.average[name].lerp_(x.detach(), 1.0 - self.config.ema_decay)

    def _validate(self) -> QMErrors:
        live = {name: x.detach().clone() for name, x in self.potential.state_dict().items()}
        self.potential.load_state_dict(self.average)
        with torch.no_grad():
            errors = qm_errors(self.potential, self.validation)
        self.potential.load_state_dict(live)
        error = errors.force_rmse_eV_per_A
        if error < self.best_error:
            self.best_error, self.best_epoch = error, self.epoch
            self.best = {name: x.clone() for name, x in self.average.items()}
        elif self.epoch - max(self.best_epoch, self.last_cut) >= self.config.patience:
            self.last_cut = self.epoch
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5
        return errors

    def state(self) -> dict:
        """Everything an exact continuation needs; tensors and plain values only."""
        return copy.deepcopy(
            {
                "model": self.potential.state_dict(),
                "average": self.average,
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "counters": [self.epoch, self.best_epoch, self.last_cut, self.seconds, self.best_error],
            }
        )

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        state = copy.deepcopy(state)
        self.potential.load_state_dict(state["model"])
        self.average, self.best = (self._here(state[name]) for name in ("average", "best"))
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best_epoch, self.last_cut, self.seconds, self.best_error = state["counters"]

    def _here(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(self.potential.device) for name, x in weights.items()}


def pretrain(training: Pretraining, on_epoch: Callable[[dict[str, float]], None] | None = None) -> None:
    """Train until finished and leave the best weights in the potential."""
    while not training.finished:
        record = training.run_epoch()
        if on_epoch:
            on_epoch(record)
    training.take_best()
