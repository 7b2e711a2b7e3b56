"""The contract of an update rule: how samples become a change of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from stabie_ase.boltzmann import Samples
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.reference import spread
from stabie_ase.system.spec import Spec
from stabie_ase.training.accuracy import Accuracy, Bounds, Growth
from stabie_ase.training.condition import Condition
from stabie_ase.training.labels import LabelledFrames, QMLoss
from stabie_ase.training.options import FinetuneOptions

Windows = Sequence[tuple[Condition, Samples]]
"""What one window of dynamics at each condition has told."""


ATOMS_AT_ONCE, MIN_FRAMES_AT_ONCE, MAX_FRAMES_AT_ONCE = 700, 2, 32
"""In a step on energies and forces: 32 frames of aspirin, with which its length and number were found. A frame of a liquid has as many
forces as ten of these molecules, and takes as long."""


ENERGY_WEIGHT, OFFSET_WEIGHT = 5.0, 0.01
"""Of energies beside forces, and in them of what all atoms have in common, here and in the metric of a step (`QMLoss`).

What all atoms have in common is by far the stiffest direction there is, and no dynamics depend on it. Adam's steps, as long in it as in any
other, threw a SchNet of water (192 atoms, 31 meV/Å) off by 1 eV: 100 steps at 1e-4 left forces 2.8 % worse with weights of 20 and 1, 1.0 %
with 20 and 0; 240 with 5 and 0 1.8 % better, and energies 4 %. A natural step that lifts failures as much is shorter: of a good SchNet of
aspirin by 5 kT 0.139 of the force RMSE (20 and 1), 0.119 (20 and 0.01), 0.112 (5 and 0.01), of one of water by 3 kT 0.045, 0.030, 0.027.
"""

FRAMES_OF_OFFSET = 64
"""Whose energies tell by how much all atoms are off."""


@dataclass
class Work:
    """What an update rule works with.

    Attributes
    ----------
    potential : Potential
        Trained in place.
    labelled : LabelledFrames
        Energies and forces to train on.
    loss : QMLoss
        Of them.
    accuracy : Accuracy
        Errors on frames that are held out, beside those of the starting model.
    bounds : Bounds
        By how much they may grow in a state that is kept.
    config : FinetuneOptions
    seconds_left : callable
        How much of the run's time is left, in seconds.
    on_label_step : callable or None
        Told the number of each step on energies and forces, and how many there are in its run, so that progress is seen.
    """

    potential: Potential
    labelled: LabelledFrames
    loss: QMLoss
    accuracy: Accuracy
    bounds: Bounds
    config: FinetuneOptions
    seconds_left: Callable[[], float] = lambda: math.inf
    on_label_step: Callable[[int, int], None] | None = None

    @property
    def batch_size(self) -> int:
        """Frames in a step on energies and forces."""
        given, frames = self.config.labels.qm_batch_size, self.labelled
        fitting = round(ATOMS_AT_ONCE * len(frames) / frames.batch.n_atoms)
        return given or min(max(fitting, MIN_FRAMES_AT_ONCE), MAX_FRAMES_AT_ONCE)

    def out_of_time(self) -> bool:
        """Whether the run's time is over."""
        return self.seconds_left() <= 0.0

    def some_labelled(self) -> LabelledFrames:
        """At most `FRAMES_OF_OFFSET` of them, all over the set."""
        return self.labelled.select(torch.tensor(spread(len(self.labelled), FRAMES_OF_OFFSET), device=self.labelled.energies.device))

    def figures(self, growth: Growth) -> dict[str, float]:
        """Errors on held-out frames for the log, units in the names: forces, the upper limit of their mean, and energies.

        Parameters
        ----------
        growth : Growth

        Returns
        -------
        dict of str to float
        """
        return {
            "force_mae_eV_per_A": growth.force_mae,
            "force_mae_limit_eV_per_A": (1.0 + growth.force_growth) * self.accuracy.start_mae,
            "energy_mae_eV": growth.energy_mae,
        }

    def accurate(self) -> bool:
        """Whether the potential is within the bounds as it is."""
        return self.accuracy.measure(self.potential).within(self.bounds)


@dataclass
class UpdateInfo:
    """What an update rule says of one window.

    Attributes
    ----------
    updates, taken_back : int
        Changes of the parameters, and how many of them were undone again.
    growth : Growth or None
        Errors on held-out frames afterwards.
    figures : dict of str to float
        For the log and the report, units in the names.
    force_calls : int
        Frames whose energies, and mostly a gradient of them, were worked out: samples, labelled and held-out ones.
    """

    updates: int = 0
    taken_back: int = 0
    growth: Growth | None = None
    figures: dict[str, float] = field(default_factory=dict)
    force_calls: int = 0


OF_GRADIENTS = frozenset({"observable_weight", "natural_iterations", "updates_per_window"})
"""Options of rules that go down a gradient of the estimator and shape their steps."""


class UpdateRule:
    """Changes the parameters by what windows of dynamics have told.

    Parameters
    ----------
    work : Work
        The potential, and what its accuracy is judged by.

    Attributes
    ----------
    needs_dynamics : bool
        Without them it is called with no windows, and the run consists of updates alone.
    lower_fraction : float
        Unstable fraction of a window of learning up to which an update is not worth its time.
    unused : frozenset of str
        Names of options of updates and labels that it ignores.
    """

    needs_dynamics: ClassVar[bool] = True
    lower_fraction: ClassVar[float] = 0.1
    unused: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, work: Work):
        self.work = work

    @classmethod
    def from_spec(cls, spec: Spec, work: Work) -> UpdateRule:
        """The rule with the options that a specification gives; BadSpec for others."""
        spec.read({})
        return cls(work)

    def apply_(self, windows: Windows) -> UpdateInfo:
        """One or more updates in place."""
        raise NotImplementedError

    def apply_counted_(self, windows: Windows) -> UpdateInfo:
        """The same, its force calls counted by the potential's own: what a rule costs, whatever it does."""
        frames: list[int] = []
        counting = self.work.potential.register_forward_hook(lambda potential, given, energies: frames.append(given[0].n_systems))
        try:
            return replace(self.apply_(windows), force_calls=sum(frames))
        finally:
            counting.remove()

    def next_phase(self) -> None:
        """A learning phase has ended."""

    def state(self) -> dict:
        """Everything an exact continuation needs; tensors and plain values only."""
        return {}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
