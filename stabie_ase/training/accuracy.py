"""How accurate a model still is: frames that it has not been trained on, and how far its force error has grown on them."""

from __future__ import annotations

import logging
from typing import NamedTuple

from stabie_ase.potentials.base import Potential
from stabie_ase.qm import LabelledFrames, force_errors_by_frame, qm_errors, upper_limit
from stabie_ase.reference import Reference

logger = logging.getLogger(__name__)

UNSEEN = 2.0
"""Frames whose force error stands out and is on average so many times that of the others were not trained on.

Errors of frames of one kind have a standard deviation of about 15 % of the mean on molecules at one temperature.
"""

OUTSTANDING = 1.5
"""Times the median from which on an error stands out."""

FEWEST = 0.05
"""Share of the frames that has to stand out: fewer are odd frames."""

MOST = 500
"""Frames held out at most: they are predicted after every update, and a hundred tell a growth of 1 %."""

LARGE = 5000
"""Frames from which on a reference is not learned by heart, and is not predicted as a whole to see that."""


def hold_out(potential: Potential, reference: Reference, share: float | None = None) -> tuple[Reference, Reference]:
    """Part a reference into frames for the energy/force term and frames to judge accuracy by.

    Training on frames that a model has not seen makes it look more accurate than it is, and a model that knows the frames
    it is judged by looks worse after any change. If some frames stand out by their errors, they are those that were
    held out when the model was trained, by whatever code; else the part is the one that `stabie-ase pretrain` holds out.

    Parameters
    ----------
    potential : Potential
        As it was before any fine-tuning.
    reference : Reference
    share : float, optional
        Of the frames that are held out, if none stand out; see `Reference.split`.

    Returns
    -------
    trained, held_out : Reference
        At most 500 frames are held out.
    """
    trained, held_out = reference.split(share, MOST)
    if len(reference) > LARGE:
        return trained, held_out
    errors = force_errors_by_frame(potential, LabelledFrames.from_reference(reference, potential.device)).cpu()
    outstanding = errors > OUTSTANDING * errors.median()
    error_rest, error_worst = float(errors[~outstanding].mean()), float(errors[outstanding].mean())
    if outstanding.sum() < FEWEST * len(reference) or not error_worst > UNSEEN * error_rest:
        return trained, held_out
    worst = outstanding.nonzero()[:MOST, 0].tolist()
    rest = sorted(set(range(len(reference))) - set(worst))
    logger.info(
        "accuracy is judged by the %d frames that the model predicts worst, force MAE %.0f meV/Å against %.0f of the others: "
        "it has not been trained on them, it seems",
        len(worst),
        1000.0 * error_worst,
        1000.0 * error_rest,
    )
    return reference.subset(rest), reference.subset(worst)


class ForceError(NamedTuple):
    """A force error beside that of the starting model.

    Attributes
    ----------
    mae : float
        Mean absolute error of the components, in eV/Å.
    growth : float
        Share by which it may have grown since the start. A few frames do not know it well, and some get better by chance:
        what counts is the upper limit of the mean difference frame by frame, with 90 % confidence.
    """

    mae: float
    growth: float


class Accuracy:
    """Force error on held-out frames, against that of the starting model.

    Parameters
    ----------
    potential : Potential
        The starting model.
    frames : LabelledFrames
    """

    def __init__(self, potential: Potential, frames: LabelledFrames):
        self.frames = frames
        self.start_rmse = qm_errors(potential, frames).force_rmse_eV_per_A
        self.start_errors = force_errors_by_frame(potential, frames)

    @property
    def start_mae(self) -> float:
        """Of the starting model, in eV/Å."""
        return float(self.start_errors.mean())

    def measure(self, potential: Potential) -> ForceError:
        """The force error of a potential now."""
        errors = force_errors_by_frame(potential, self.frames)
        return ForceError(float(errors.mean()), upper_limit(errors - self.start_errors) / self.start_mae)

    def state(self) -> dict:
        """What the starting model was like; tensors and plain numbers."""
        return {"start_errors": self.start_errors, "start_rmse": self.start_rmse}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.start_errors, self.start_rmse = state["start_errors"].to(self.start_errors), state["start_rmse"]
