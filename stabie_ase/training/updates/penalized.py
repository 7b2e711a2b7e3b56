"""The published recipe: one step of a common optimiser on observables and labels together."""

from __future__ import annotations

import copy

import torch

from stabie_ase.boltzmann import Estimator, accumulate
from stabie_ase.system.processes import sum_gradients
from stabie_ase.system.spec import BadSpec, Spec, did_you_mean
from stabie_ase.training.labels import QMLoss, minibatch
from stabie_ase.training.updates.base import OF_GRADIENTS, UpdateInfo, UpdateRule, Windows, Work

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}

PENALIZED_ENERGY_WEIGHT = 20.0
"""Of energies beside forces; what is published does not tell. They count whole, what all atoms have in common as well."""


class PenalizedGradient(UpdateRule):
    """One step a window on Σ L_obs + λ L_QM (Raja et al., arXiv 2402.13984, eq. 6), its gradient clipped.

    L_QM is that of a minibatch of labelled frames. The observables count by their own measure, frames as they come, near or
    far. A step is kept whatever it does to errors: λ is what holds them.

    Parameters
    ----------
    work : Work
    optimizer : str
        "sgd" or "adam".
    learning_rate : float
    penalty : float
        λ.
    decay : float
        Factor on the learning rate from one learning phase to the next.
    """

    unused = OF_GRADIENTS | {"learning_rate", "qm_steps"}

    def __init__(self, work: Work, optimizer: str = "sgd", learning_rate: float = 1e-3, penalty: float = 1.0, decay: float = 1.0):
        super().__init__(work)
        self.penalty, self.decay, self.updates, self.loss = penalty, decay, 0, QMLoss(PENALIZED_ENERGY_WEIGHT)
        self.optimizer = OPTIMIZERS[optimizer](work.potential.parameters(), lr=learning_rate)

    @classmethod
    def from_spec(cls, spec: Spec, work: Work) -> PenalizedGradient:
        """`penalized:sgd` or `penalized:adam`, with `learning_rate`, `penalty` and `decay`."""
        return cls(
            work,
            **spec.read({"optimizer": _optimizer, "learning_rate": _positive, "penalty": _not_negative, "decay": _positive}, "optimizer"),
        )

    def apply_(self, windows: Windows) -> UpdateInfo:
        """One step."""
        work, config = self.work, self.work.config
        self.optimizer.zero_grad()
        loss = 0.0
        for condition, samples in windows:
            if len(samples) < 2:
                continue
            estimator = Estimator(condition.point, config.estimator.cross_fit, drawn=condition.grouping.drawn)
            for part, targets in samples.by_energies(condition.targets):
                estimate = estimator(part, targets)
                accumulate(work.potential, estimate)
                loss += estimate.loss
        sum_gradients(work.potential.parameters())
        chosen = minibatch(len(work.labelled), work.batch_size, config.seed, self.updates)
        labels = self.loss(work.potential, work.labelled.select(chosen))
        (self.penalty * labels).backward()
        norm = torch.nn.utils.clip_grad_norm_(work.potential.parameters(), config.update.gradient_clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.updates += 1
        growth = work.accuracy.measure(work.potential)
        figures = {"observable_loss": loss, "label_loss": float(labels.detach()), "gradient_norm": float(norm)}
        return UpdateInfo(1, 0, growth, figures | {"force_mae_eV_per_A": growth.force_mae, "energy_mae_eV": growth.energy_mae})

    def next_phase(self) -> None:
        """A learning phase has ended: smaller steps from here on."""
        for group in self.optimizer.param_groups:
            group["lr"] *= self.decay

    def state(self) -> dict:
        """Everything an exact continuation needs."""
        return {"optimizer": copy.deepcopy(self.optimizer.state_dict()), "updates": self.updates}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


def _optimizer(text: str) -> str:
    if text not in OPTIMIZERS:
        raise BadSpec(did_you_mean(text, OPTIMIZERS))
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError("expected a positive number")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise ValueError("expected a number of at least zero")
    return value
