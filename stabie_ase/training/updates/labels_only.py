"""Energies and forces alone: the control, without any observable."""

from __future__ import annotations

import copy

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
        """One update; windows play no part. One that time has cut short is taken back if forces are worse than before."""
        potential, accuracy = self.work.potential, self.work.accuracy
        self.steps.calibrate()
        before = copy.deepcopy(potential.state_dict())
        self.steps.run()
        growth, taken_back = accuracy.measure(potential), False
        if self.work.out_of_time():
            after = copy.deepcopy(potential.state_dict())
            potential.load_state_dict(before)
            was = accuracy.measure(potential)
            taken_back = was.force_mae < growth.force_mae
            growth = was if taken_back else growth
            potential.load_state_dict(before if taken_back else after)
        return UpdateInfo(1, int(taken_back), growth, {"force_mae_eV_per_A": growth.force_mae})

    def state(self) -> dict:
        """That of the steps."""
        return self.steps.state()

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.steps.restore(state)
