"""What frames tell of an observable: its value and the error of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stabie_ase.observables.base import Axis

NO_ERROR = "too few independent frames for an error"


@dataclass(frozen=True)
class Observed:
    """An observable of some frames.

    Attributes
    ----------
    axis : Axis
    value : Tensor of float64, shape (d,)
    error : Tensor of float64, shape (d,), or None
        Standard error; None, or not a number for some components, where the frames do not tell it.
    label : str
        Of the values, with their unit.
    n_frames, n_replicas : int
        Behind the value.
    note : str
        How it was computed, where that was not asked for.
    """

    axis: Axis
    value: Tensor
    error: Tensor | None
    label: str
    n_frames: int
    n_replicas: int
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and words."""
        return {
            "axis": self.axis.values.tolist(),
            "axis_label": self.axis.label,
            "names": list(self.axis.names),
            "value": self.value.tolist(),
            "error": None if self.error is None else self.error.tolist(),
            "label": self.label,
            "n_frames": self.n_frames,
            "n_replicas": self.n_replicas,
            "note": "; ".join(filter(None, [self.note, NO_ERROR if self.error is None else ""])),
        }
