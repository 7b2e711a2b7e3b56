"""How accurate a model still is: frames that it has not been trained on, and how far its errors have grown on them."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

from torch import Tensor

from stabie_ase.potentials.base import Potential
from stabie_ase.structures.reference import Reference
from stabie_ase.training.labels import LabelledFrames, errors_by_frame, force_errors_by_frame, qm_errors, upper_limit

logger = logging.getLogger(__name__)

MIN_UNSEEN_RATIO = 2.0
"""Frames whose force error stands out and is on average so many times that of the others were not trained on.

Errors of frames of one kind have a standard deviation of about 15 % of the mean on molecules at one temperature.
"""

OUTSTANDING_FACTOR = 1.5
"""Times the median from which on an error stands out."""

MIN_OUTSTANDING_FRACTION = 0.05
"""Share of the frames that has to stand out: fewer are odd frames."""

MAX_HELD_OUT_FRAMES = 500
"""Frames held out at most: they are predicted after every update, and a hundred tell a growth of 1 %."""

MAX_MEMORISED_FRAMES = 5000
"""Frames from which on a reference is not learned by heart, and is not predicted as a whole to see that."""


def hold_out(potential: Potential, reference: Reference, fraction: float | None = None) -> tuple[Reference, Reference]:
    """Part a reference into frames for the energy/force term and frames to judge accuracy by.

    Training on frames that a model has not seen makes it look more accurate than it is, and a model that knows the frames
    it is judged by looks worse after any change. If some frames stand out by their errors, they are those that were
    held out when the model was trained, by whatever code; else the part is the one that `stabie-ase pretrain` holds out.

    Parameters
    ----------
    potential : Potential
        As it was before any fine-tuning.
    reference : Reference
    fraction : float, optional
        Of the frames that are held out, if none stand out; see `Reference.split`.

    Returns
    -------
    trained, held_out : Reference
        At most 500 frames are held out.
    """
    trained, held_out = reference.split(fraction, MAX_HELD_OUT_FRAMES)
    if len(reference) > MAX_MEMORISED_FRAMES:
        return trained, held_out
    errors = force_errors_by_frame(potential, LabelledFrames.from_reference(reference, potential.device)).cpu()
    outstanding = errors > OUTSTANDING_FACTOR * errors.median()
    error_rest, error_worst = float(errors[~outstanding].mean()), float(errors[outstanding].mean())
    if outstanding.sum() < MIN_OUTSTANDING_FRACTION * len(reference) or not error_worst > MIN_UNSEEN_RATIO * error_rest:
        return trained, held_out
    worst = outstanding.nonzero()[:MAX_HELD_OUT_FRAMES, 0].tolist()
    rest = sorted(set(range(len(reference))) - set(worst))
    logger.info(
        "accuracy is judged by the %d frames that the model predicts worst, force MAE %.0f meV/Å against %.0f of the others: "
        "it has not been trained on them, it seems",
        len(worst),
        1000.0 * error_worst,
        1000.0 * error_rest,
    )
    return reference.subset(rest), reference.subset(worst)


class Growth(NamedTuple):
    """Errors beside those of the starting model.

    Attributes
    ----------
    force_mae : float
        Mean absolute error of the components, in eV/Å.
    force_growth : float
        Fraction by which it may have grown since the start. A few frames do not know it well, and some get better by chance:
        what counts is the upper limit of the mean difference frame by frame, with the confidence asked for.
    energy_mae : float
        Mean absolute error of a frame less the mean offset, in eV.
    energy_growth : float
        Fraction by which the mean has grown. Energies of a few frames tell too little for an upper limit to be of use.
    """

    force_mae: float
    force_growth: float
    energy_mae: float
    energy_growth: float

    def within(self, bounds: Bounds, part: float = 1.0) -> bool:
        """Whether both are within a part (a fraction) of their bounds; what is not a number is not."""
        return self.force_growth <= part * bounds.force and self.energy_growth <= part * bounds.energy

    def part(self, bounds: Bounds) -> float:
        """How much of its bound the error that has grown most beside it has used up."""
        growths = (self.force_growth, self.energy_growth)
        return max(grown / bound if bound > 0.0 else math.copysign(math.inf, grown) for grown, bound in zip(growths, bounds))


class Bounds(NamedTuple):
    """Fractions by which errors may grow."""

    force: float
    energy: float


class Accuracy:
    """Errors on held-out frames, against those of the starting model.

    Parameters
    ----------
    potential : Potential
        The starting model.
    frames : LabelledFrames
    confidence : float
        Of the upper limit of the growth of the force error.
    """

    def __init__(self, potential: Potential, frames: LabelledFrames, confidence: float):
        self.frames, self.confidence = frames, confidence
        self.start_rmse = qm_errors(potential, frames).force_rmse_eV_per_A
        self.start_energies, self.start_forces = errors_by_frame(potential, frames)

    @property
    def start_mae(self) -> float:
        """Of the starting model's forces, in eV/Å."""
        return float(self.start_forces.mean())

    def measure(self, potential: Potential) -> Growth:
        """The errors of a potential now."""
        energies, forces = errors_by_frame(potential, self.frames)
        return Growth(
            float(forces.mean()),
            _fraction(upper_limit(forces - self.start_forces, self.confidence), self.start_mae),
            float(energies.mean()),
            _fraction(float((energies - self.start_energies).mean()), float(self.start_energies.mean())),
        )

    def state(self) -> dict[str, Tensor | float]:
        """What the starting model was like; tensors of shape (n_frames,) and plain numbers."""
        return {"start_energies": self.start_energies, "start_forces": self.start_forces, "start_rmse": self.start_rmse}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.start_energies = state["start_energies"].to(self.start_energies)
        self.start_forces = state["start_forces"].to(self.start_forces)
        self.start_rmse = state["start_rmse"]


def _fraction(difference: float, start: float) -> float:
    """Of a start of zero, as of a single frame less its own offset, nothing can be said: no growth."""
    return difference / start if start > 0 else 0.0
