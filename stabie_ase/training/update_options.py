"""Options of updates, and of the energies and forces that they keep to; without torch, as `options` is."""

from __future__ import annotations

from dataclasses import dataclass

from stabie_ase.system.options import check_options, option


@dataclass(frozen=True)
class UpdateOptions:
    """How samples become a change of the parameters."""

    rule: str | None = option(
        None,
        "how samples change the model: natural (the natural gradient of the estimator), regression (failures are raised by a given energy "
        "and fitted together with the labels), labels-only (energies and forces alone, as a control), penalized (the published recipe, as "
        "in penalized:sgd,learning_rate=1e-4,penalty=1), or FILE.py:CLASS; if not given regression for the stability of a liquid of "
        "molecules, else natural",
        name="update",
    )
    observable_weight: float = option(1.0, "factor on the length of the natural gradient's steps for the observables", 1e-9, 1e9)
    natural_iterations: int = option(
        64, "conjugate gradients that shape a step for the observable so that forces change least; 0: plain gradient", 0, 10_000
    )
    updates_per_window: int = option(3, "updates at most on the samples of one window", 1, 1_000_000)
    gradient_clip: float = option(1.0, "largest norm of a gradient", 1e-12, 1e12)

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class LabelOptions:
    """Energies and forces of the reference: training on them, and by how much their errors may grow."""

    learning_rate: float | None = option(
        None,
        "largest learning rate of Adam's steps on energies and forces; each run ends at zero; if not given 1e-4, in regression 6e-4",
        0.0,
        1.0,
    )
    qm_steps: int | None = option(
        None,
        "energy/force steps after each step down the observable's gradient, where they leave much twice as many again, or of a regression; "
        "if not given 120, in regression 1000",
        0,
        10**6,
    )
    qm_batch_size: int | None = option(
        None, "frames in a step on energies and forces; as many as have some 700 atoms, 2 to 32, if not given", 1, 1_000_000
    )
    validation_fraction: float | None = option(
        None,
        "part of the reference kept out of the energy/force term to judge accuracy by, if not given a tenth or, of few frames, a fifth; "
        "frames the model has not been trained on, if some stand out by their errors, else what pretraining keeps out",
        0.0,
        0.9,
    )
    force_error_bound: float = option(
        0.05,
        "fraction by which the force error may grow in a state that is kept, by the upper limit of the mean over the validation frames",
        0.0,
        100.0,
    )
    force_error_confidence: float = option(
        0.75, "confidence of that limit; a few validation frames take most of the bound for a high one", 0.5, 0.9999
    )
    energy_error_bound: float = option(
        0.1,
        "fraction by which the mean energy error, less its offset, may grow on the validation frames in a state that is kept",
        0.0,
        100.0,
    )

    def __post_init__(self):
        check_options(self)
