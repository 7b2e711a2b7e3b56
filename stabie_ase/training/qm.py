"""Energies and forces: the loss, the errors, and training from scratch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabie_ase.batch import AtomsBatch
from stabie_ase.neighbors import neighbor_list
from stabie_ase.potentials.base import Potential
from stabie_ase.reference import Reference


@dataclass(frozen=True)
class LabelledFrames:
    """Frames with reference energies, shape (n_systems,), in eV, and forces, shape (n_atoms, 3), in eV/Å."""

    batch: AtomsBatch
    energies: Tensor
    forces: Tensor

    @classmethod
    def from_reference(cls, reference: Reference, device: str | torch.device = "cpu") -> LabelledFrames:
        """All frames of a reference."""
        return cls(
            AtomsBatch.from_atoms(reference.frames, device),
            torch.as_tensor(reference.energies, dtype=torch.float64, device=device),
            torch.as_tensor(np.concatenate(reference.forces), dtype=torch.float64, device=device),
        )

    def __len__(self) -> int:
        return self.batch.n_systems

    def select(self, systems: Tensor) -> LabelledFrames:
        """Some of the frames."""
        return LabelledFrames(self.batch.select(systems), self.energies[systems], self.forces[self.batch.atom_index(systems)])

    def chunks(self, size: int) -> Iterator[LabelledFrames]:
        """All frames, `size` at a time."""
        for systems in torch.arange(len(self), device=self.batch.device).split(size):
            yield self.select(systems)


@dataclass(frozen=True)
class QMLoss:
    """L_QM = mean over frames of w_E (ΔU)²/N + w_F Σ_a ‖ΔF_a‖²/(3N), with N the atoms of the frame.

    The first term grows linearly with size for independent errors of the atoms, hence one division by N.

    Parameters
    ----------
    energy_weight : float
        w_E in 1/eV².
    forces_weight : float
        w_F in Å²/eV².
    """

    energy_weight: float = 1.0
    forces_weight: float = 1.0

    def __call__(self, potential: Potential, frames: LabelledFrames) -> Tensor:
        """The loss, float64, with its graph."""
        batch = frames.batch
        prediction = potential.compute(batch, neighbor_list(batch, potential.cutoff), create_graph=True)
        energy_term = (prediction.energies - frames.energies).square() / batch.counts
        squared = (prediction.forces.double() - frames.forces).square().sum(dim=1)
        forces_term = batch.sum_over_atoms(squared) / (3 * batch.counts)
        return (self.energy_weight * energy_term + self.forces_weight * forces_term).mean()


@dataclass(frozen=True)
class QMErrors:
    """Mean absolute errors; forces in eV/Å over components, energies in eV a frame, before and after removing the mean offset."""

    force_mae_eV_per_A: float
    energy_mae_eV: float
    energy_mae_offset_removed_eV: float
    force_rmse_eV_per_A: float


def qm_errors(potential: Potential, frames: LabelledFrames, chunk_size: int = 64) -> QMErrors:
    """Errors of a potential on labelled frames."""
    energy_errors, force_errors = [], []
    with potential.frozen():
        for part in frames.chunks(chunk_size):
            prediction = potential.compute(part.batch, neighbor_list(part.batch, potential.cutoff))
            energy_errors.append(prediction.energies - part.energies)
            force_errors.append(prediction.forces.double() - part.forces)
    energy, force = torch.cat(energy_errors), torch.cat(force_errors)
    return QMErrors(
        float(force.abs().mean()),
        float(energy.abs().mean()),
        float((energy - energy.mean()).abs().mean()),
        float(force.square().mean().sqrt()),
    )


def minibatch(n: int, size: int, seed: int, step: int) -> Tensor:
    """Frames of training step `step`: epochs of shuffled frames, a pure function of its arguments."""
    size = min(size, n)
    per_epoch = n // size
    epoch, k = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return torch.as_tensor(order[k * size : (k + 1) * size])


def reference_energies(reference: Reference) -> dict[int, float]:
    """Energy of each element in eV by least squares over the frames' compositions, the smallest solution where it is open."""
    numbers = sorted({int(z) for atoms in reference.frames for z in atoms.numbers})
    counts = np.array([[np.count_nonzero(atoms.numbers == z) for z in numbers] for atoms in reference.frames], dtype=float)
    solution = np.linalg.lstsq(counts, reference.energies, rcond=None)[0]
    return dict(zip(numbers, solution.tolist()))


@dataclass(frozen=True)
class PretrainConfig:
    """How to train on energies and forces.

    Attributes
    ----------
    epochs : int
        Passes over the training frames at most.
    max_time_min : float
        Wall time at most.
    batch_size : int
    learning_rate : float
        Of Adam at the start; halved when the validation error has not improved for `patience` epochs.
    patience : int
        In epochs.
    min_learning_rate : float
        Training has converged when the learning rate would fall below.
    ema_decay : float
        Of the exponential moving average of the weights, which is what is validated and saved.
    validation_share : float
        Part of the reference kept out of training.
    seed : int
    """

    epochs: int = 2000
    max_time_min: float = 60.0
    batch_size: int = 10
    learning_rate: float = 1e-3
    patience: int = 50
    min_learning_rate: float = 1e-5
    ema_decay: float = 0.99
    validation_share: float = 0.1
    seed: int = 0


class Pretraining:
    """Energy and force training of a potential, one epoch a call; `best` holds the best weights by validation.

    Parameters
    ----------
    potential : Potential
        Trained in place.
    reference : Reference
    config : PretrainConfig
    """

    def __init__(self, potential: Potential, reference: Reference, config: PretrainConfig, loss: QMLoss | None = None):
        self.potential, self.config, self.loss = potential, config, loss or QMLoss()
        train, validation = reference.split(config.validation_share, config.seed)
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
        """One pass over the training frames and one validation; returns what a log wants."""
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
        return {
            "model": self.potential.state_dict(),
            "average": self.average,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.epoch, self.best_epoch, self.last_cut, self.seconds, self.best_error],
        }

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.potential.load_state_dict(state["model"])
        self.average, self.best = dict(state["average"]), dict(state["best"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best_epoch, self.last_cut, self.seconds, self.best_error = state["counters"]


def pretrain(training: Pretraining, on_epoch: Callable[[dict[str, float]], None] | None = None) -> None:
    """Train until finished and leave the best weights in the potential."""
    while not training.finished:
        record = training.run_epoch()
        if on_epoch:
            on_epoch(record)
    training.potential.load_state_dict(training.best)
