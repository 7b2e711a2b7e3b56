"""Regression: failures are raised by a given energy, and the model is fitted to that and to its labels at once."""

from __future__ import annotations

import copy
from dataclasses import replace

from stabie_ase.system.spec import BadSpec
from stabie_ase.training.labels import energy_offset
from stabie_ase.training.schedule import STABILITY
from stabie_ase.training.updates.base import OF_GRADIENTS, UpdateInfo, UpdateRule, Windows, Work
from stabie_ase.training.updates.found import Found, ess_fraction, find
from stabie_ase.training.updates.gradients import telling
from stabie_ase.training.updates.label_steps import RATE_FACTOR, LabelSteps
from stabie_ase.training.updates.lifted import Lifted

LEARNING_RATE, STEPS = 6e-4, 1000
"""Of a run, in which the rate rises to the first and falls to zero.

A SchNet of water (64 channels, 32 meV/Å) got better in 2000 such steps on two frames each, by 4 % with nothing held; 240 steps at 3.7e-6,
the largest rate that does not spoil it in a short run, moved little of what is held.
"""

RAISE_KT, WEIGHT = 5.0, 0.3
"""How much energy failures of a window shall gain, in k_B T, and what (eV)² of it that is missing, an atom, counts beside labels, in 1/eV².

Failures that are e⁵ times rarer are gone for most users; those that are still there come again, with another window. Up to three times as
much for those deep below what they were when sound (water) left forces beyond their bound after two runs.
"""

SOUND_FS = 50.0
"""How long before a failure molecules are looked for where they were sound: a hydrogen takes some 25 fs from a bond into contact."""

MAX_FURTHER_RUNS = 2
"""Of one update, after the first, where errors are beyond their bounds."""

MAX_LIFTED = 64
"""Windows whose failures are held."""


class Regression(UpdateRule):
    """One long run of steps on labels and on failures, whose energies are asked to rise by `RAISE_KT`; back if errors have grown too far.

    Down the gradient of the estimator in the space of energies, not of parameters: of the samples ∂L/∂U_i = w_i, so that those of w_i < 0
    are to rise. All of these that a criterion blames are asked for it, as an energy that is raised by several k_B T is enough, and no step
    along a gradient gives all kinds of failures that: it raises what is cheapest. A network fits it as it fits labels, in many
    small steps at a rate that falls to zero. What was raised in windows before is asked for in all later runs.
    """

    lower_fraction, unused = 0.25, OF_GRADIENTS

    def __init__(self, work: Work):
        super().__init__(work)
        if work.config.goal != STABILITY:
            raise BadSpec(f"regression raises failures, and the goal is {work.config.goal}; give --update natural or --goal {STABILITY}")
        self.steps = LabelSteps(work, STEPS, LEARNING_RATE, WEIGHT)
        self.lifted: list[Lifted] = []

    def apply_(self, windows: Windows) -> UpdateInfo:
        """One update; none where nothing of the windows is unstable and to become rarer."""
        work, potential = self.work, self.work.potential
        estimates, figures = telling(work, [found for window in windows for found in find(work, *window)])
        asked = self._asked(estimates)
        if not asked:
            return UpdateInfo(figures=figures)
        before = copy.deepcopy((potential.state_dict(), self.steps.optimizer.state_dict()))
        growth = self.steps.run_until([*self.lifted, *asked], 1.0, MAX_FURTHER_RUNS)
        following = [found.reweighted(potential) for found in estimates]
        figures |= {
            "observable_loss": sum(found.estimate.loss for found in estimates),
            "ess_fraction": ess_fraction(following),
            "raised_kT": max(was.raised(now.change) for was, now in zip(estimates, following)),
        }
        kept = growth.within(work.bounds)
        if kept:
            self.lifted = [*self.lifted, *asked][-MAX_LIFTED:]
        else:
            potential.load_state_dict(before[0])
            self.steps.optimizer.load_state_dict(before[1])
            self.steps.rate = RATE_FACTOR * self.steps.largest_rate
            growth = work.accuracy.measure(potential)
        figures |= {"learning_rate": self.steps.largest_rate} | work.figures(growth)
        return UpdateInfo(1, int(not kept), growth, figures)

    def _asked(self, estimates: list[Found]) -> list[Lifted]:
        """Failures of a window, and the energies that they are to have."""
        asked = []
        for found in estimates:
            rise = RAISE_KT / found.condition.point.beta
            asked += [replace(failing, energies=failing.energies + rise) for failing in self._failing(found) if failing is not None]
        return asked

    def _failing(self, found: Found) -> list[Lifted | None]:
        """Failures of a window, at the energies that they have now: of molecules, of what is between them, or of whole frames."""
        potential, grouping = self.work.potential, found.condition.grouping
        if grouping.blamed is not None:
            found = found.of_groups(grouping.blamed)
        alone, together = found.to_blame(potential)
        if grouping.conformers is None and grouping.blamed is None:
            offset = energy_offset(potential, self.work.some_labelled())
            return [Lifted.of(potential, found.estimate, offset, alone | together)]
        failing = []
        if found.estimate.samples.conformers is not None:
            of_several = found.estimate.samples.groups.group.bincount() > 1  # an atom has no conformations
            failing.append(Lifted.of(potential, found.estimate, candidates=alone & of_several))
        if found.estimate.samples.conformers is None or grouping.blamed is not None:
            n_frames = max(1, round(SOUND_FS / self.work.config.dynamics.sample_every_fs))
            failing.append(Lifted.beside_before(potential, found.estimate, n_frames, together))
        return failing

    def state(self) -> dict:
        """Everything an exact continuation needs."""
        return self.steps.state() | {"lifted": [x.tensors() for x in self.lifted]}

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.steps.restore(state)
        self.lifted = [Lifted.restored(x, self.work.potential.device) for x in state["lifted"]]
