"""Energies and forces alone: the control, without any observable."""

from __future__ import annotations

from stabie_ase.training.updates.base import OF_GRADIENTS, UpdateInfo, UpdateRule, Windows, Work
from stabie_ase.training.updates.label_steps import LabelSteps


class LabelsOnly(UpdateRule):
    """As many steps on energies and forces in each update as other rules take to make good what a step has spoiled."""

    needs_dynamics = False
    unused = OF_GRADIENTS

    def __init__(self, work: Work):
        super().__init__(work)
        self.steps = LabelSteps(work)

    def apply_(self, windows: Windows) -> UpdateInfo:
        """One update; windows play no part."""
        self.steps.calibrate()
        self.steps.run()
        growth = self.work.accuracy.measure(self.work.potential)
        return UpdateInfo(1, 0, growth, {"force_mae_eV_per_A": growth.force_mae})

    def state(self) -> dict:
        """That of the steps."""
        return self.steps.state()

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.steps.restore(state)
