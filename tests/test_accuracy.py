"""Frames that a model has not been trained on, told by their errors."""

import numpy as np
import pytest
import tiny
import torch

from stabie_ase.potentials.analytic import Harmonic
from stabie_ase.training import accuracy
from stabie_ase.training.accuracy import hold_out


def parted(monkeypatch, errors, fraction=0.1):
    """Indices of the frames held out where frame k has the k-th force error."""
    reference = tiny.reference()
    assert len(errors) == len(reference)
    monkeypatch.setattr(accuracy, "force_errors_by_frame", lambda potential, frames: torch.as_tensor(errors))
    trained, held_out = hold_out(Harmonic(), reference, fraction)
    assert sorted([*trained.energies, *held_out.energies]) == sorted(reference.energies)
    energies = reference.energies.tolist()
    return [energies.index(e) for e in held_out.energies], [energies.index(e) for e in reference.split(fraction)[1].energies]


def test_frames_that_stand_out_are_those_not_trained_on(monkeypatch):
    errors = np.full(40, 0.04)
    errors[[3, 11, 12, 30]] = 0.1
    found, usual = parted(monkeypatch, errors)
    assert found == [3, 11, 12, 30] != usual


def test_frames_that_stand_out_beyond_the_most_are_trained_on(monkeypatch):
    """No frame is lost: `parted` counts them."""
    monkeypatch.setattr(accuracy, "MAX_HELD_OUT_FRAMES", 3)
    errors = np.full(40, 0.04)
    errors[[3, 11, 12, 30, 31]] = 0.1
    assert parted(monkeypatch, errors)[0] == [3, 11, 12]


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_ordinary_spread_is_no_sign(monkeypatch, fraction):
    """Errors of one kind of frames, their standard deviation 15 to 25 % of the mean, a hundred times."""
    rng = np.random.default_rng(0)
    for spread in np.repeat([0.15, 0.25], 50):
        found, usual = parted(monkeypatch, 0.1 * np.exp(spread * rng.normal(size=40)), fraction)
        assert found == usual


def test_pretraining_and_finetuning_hold_out_the_same_frames(monkeypatch):
    found, usual = parted(monkeypatch, np.full(40, 0.1))
    assert found == usual


def test_a_large_reference_is_not_predicted_as_a_whole(monkeypatch):
    """Its held-out frames are some of those that pretraining holds out."""
    monkeypatch.setattr(accuracy, "MAX_HELD_OUT_FRAMES", 3)
    monkeypatch.setattr(accuracy, "MAX_MEMORISED_FRAMES", 39)
    errors = np.full(40, 0.04)
    errors[:4] = 1.0
    found, usual = parted(monkeypatch, errors)
    assert len(found) == 3 and set(found) < set(usual)
