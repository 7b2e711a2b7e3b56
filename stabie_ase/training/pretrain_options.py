"""Options of training on energies and forces; without torch, as `options` is."""

from __future__ import annotations

from dataclasses import dataclass

from stabie_ase.system.options import check_options, option


@dataclass(frozen=True)
class PretrainOptions:
    """How to train on energies and forces."""

    epochs: int = option(5000, "passes over the training frames at most", 1, 1_000_000_000)
    max_time_min: float = option(60.0, "wall time at most", 0.0, 1e6)
    batch_size: int = option(10, "frames in one step", 1, 1_000_000)
    learning_rate: float = option(1e-3, "learning rate of Adam at the start, ten times this for mace; halved on a plateau", 1e-12, 1.0)
    patience: int = option(50, "epochs without a better validation error that make a plateau", 1, 1_000_000)
    min_learning_rate: float = option(1e-5, "learning rate below which training has converged", 0.0, 1.0)
    ema_decay: float = option(0.99, "decay of the moving average of the weights that is validated and saved", 0.0, 1.0)
    validation_fraction: float | None = option(
        None, "part of the reference kept out of training; a tenth if not given, of few frames a fifth", 0.0, 0.9
    )
    seed: int = option(0, "seed of the weights and the order of the frames", 0, 2**31 - 1)

    def __post_init__(self):
        check_options(self)
