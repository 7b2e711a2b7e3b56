"""What every observable has to obey."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms

from stabie_ase.observables import Observable
from stabie_ase.structures.batch import AtomsBatch


def check_observable(observable: Observable, frames: Sequence[Atoms], tolerance: float = 1e-9) -> None:
    """Hold an observable against the contract.

    It has a name, a label, an axis and a measure of one length; values are float64, finite, a row for each system, and those of a
    frame do not depend on the others, on where it is, how it is turned, nor on what was worked out before.

    Parameters
    ----------
    observable : Observable
    frames : sequence of Atoms
        Two at least, for which it has a meaning.
    tolerance : float
        As a fraction of the largest value.

    Raises
    ------
    AssertionError
        In a sentence, what was expected and what was found.
    """
    d = len(observable.axis.values)
    assert isinstance(observable.name, str) and observable.name, "an observable has a name"
    assert isinstance(observable.label, str) and isinstance(observable.axis.label, str), "an observable has labels"
    assert len(observable.axis.names) in (0, d), f"{len(observable.axis.names)} names of {d} components"
    assert observable.measure.shape == (d,), f"the measure has the shape {tuple(observable.measure.shape)}, the axis has {d} values"
    assert bool((observable.measure > 0).all()), "the measure is positive"
    batch = AtomsBatch.from_atoms(frames)
    values = observable(batch)
    assert values.shape == (len(frames), d), f"values have the shape {tuple(values.shape)}, expected ({len(frames)}, {d})"
    assert values.dtype == torch.float64, f"values are {values.dtype}, expected float64"
    assert torch.isfinite(values).all(), "values are not finite"
    room = tolerance * max(float(values.abs().max()), 1e-300)

    def close(found, expected, what):
        worst = float((found - expected).abs().max())
        assert worst <= room, f"values change {what}: by {worst:.3g}, expected {room:.3g} at most"

    close(observable(batch), values, "from call to call")
    for k in range(len(frames)):
        close(observable(batch.select([k])), values[[k]], "with the other frames")
    moved = [atoms.copy() for atoms in frames]
    for atoms in moved:
        atoms.rotate(33.0, (1.0, -2.0, 0.7), rotate_cell=True)
        atoms.translate(np.array([0.4, -3.3, 1.9]))
    room = max(room, 1e-6 * max(float(values.abs().max()), 1e-300))  # a distance may change its bin by round-off
    counted = int(((observable(AtomsBatch.from_atoms(moved)) - values).abs() > room).sum())
    assert counted <= 0.01 * values.numel(), f"{counted} of {values.numel()} values change when frames are moved and turned"
