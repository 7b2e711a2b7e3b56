"""Regression: failures gain the energy that is asked for, labels keep theirs, and what cannot be had is taken back."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms, units
from helpers import samples_of
from test_lifted import TRUTH, energies, estimate, stretched
from test_localized import CUTOFF, gas
from test_stabie_loop import loop as loop_of_a_molecule
from tiny import config as configured

from stabie_ase.boltzmann import WHOLE, StatePoint
from stabie_ase.observables import observables_from
from stabie_ase.potentials.analytic import Morse
from stabie_ase.stability import criteria_from
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups
from stabie_ase.system.options import from_dict
from stabie_ase.system.spec import BadSpec
from stabie_ase.training.loop import TrainingLoop
from stabie_ase.training.options import FinetuneOptions
from stabie_ase.training.updates import LabelsOnly, NaturalGradient, Regression, ignored, usual_rule
from stabie_ase.training.updates.found import Found
from stabie_ase.training.updates.label_steps import RATE_FACTOR
from stabie_ase.training.updates.lifted import Lifted
from stabie_ase.training.updates.regression import LEARNING_RATE, RAISE_KT, STEPS, WEIGHT

KT = units.kB * 1200.0


class Stepped(Morse):
    """The truth, but for a hole of 2 eV from 1.9 to 2.6 Å, where no label is, with a step at its edge whose height in eV can be trained."""

    def __init__(self):
        super().__init__(3.0, 1.8, 1.5, CUTOFF)
        for p in self.parameters():
            p.requires_grad_(False)
        self.step = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def pair_energies(self, distances):
        edges = torch.sigmoid((distances - 1.9) / 0.005) * torch.sigmoid((2.6 - distances) / 0.005)
        return super().pair_energies(distances) + (self.step - 2.0) * edges


def loop(potential=None, **changes):
    reference = gas()
    setting = Setting(reference.frames, 1200.0, 1200.0)
    given = {"sample_every_fs": 5.0, "replicas": 16, "force_error_bound": 100.0, "energy_error_bound": 100.0, "criterion": "bonds:0.5"}
    given |= {"temperature_K": 1200.0, "reweight": False}
    config = configured(**{**given, "qm_steps": 300, "learning_rate": 0.005, "qm_batch_size": 4, **changes})
    observables, criteria = observables_from("hr", setting), criteria_from(config.criterion, setting)
    return TrainingLoop.from_reference(potential or Stepped(), reference, observables, criteria, config)


def until_updated(training):
    while not (record := training.step()[0]).get("updates"):
        pass
    return record


def test_it_is_the_rule_of_liquids_of_molecules():
    """For stability; whatever the samples are, but not of other systems, and not where observables are the goal."""
    training = loop()
    assert all(isinstance(loop(estimator=name).rule, Regression) for name in ("global", "molecules", "nearest:2"))
    assert isinstance(training.rule, Regression) and isinstance(loop_of_a_molecule().rule, NaturalGradient)
    assert isinstance(loop(goal="observables").rule, NaturalGradient)
    assert isinstance(loop(update="labels-only").rule, LabelsOnly)
    assert usual_rule([training.pools[0].condition.grouping, WHOLE], "stability") == "natural"
    with pytest.raises(BadSpec, match="goal is observables"):
        loop(update="regression", goal="observables")


def conditional(potential, lifted, height):
    """Energies of held frames beside those with the molecule at rest, at some height of the step."""
    other = copy.deepcopy(potential)
    with torch.no_grad():
        other.step.fill_(height)
        return torch.cat([energies(part.frames, other) - energies(part.at_rest, other) for part in lifted])


def missing(training, height=None):
    """Σ max(0, U* - U)² of all that is held, at the height that the step has or at some other; U is linear in it."""
    potential, lifted = training.potential, training.rule.lifted
    at_zero, asked = conditional(potential, lifted, 0.0), torch.cat([part.energies for part in lifted])
    slope = conditional(potential, lifted, 1.0) - at_zero
    height = float(potential.step.detach()) if height is None else height
    return float((asked - at_zero - height * slope).clamp(min=0.0).square().sum())


def test_failures_rise_by_what_is_asked_and_what_rose_is_held():
    """Of independent molecules the step in front of which no label is gets as high as failures are to rise."""
    training = loop()
    record = until_updated(training)
    (first,) = training.rule.lifted
    torch.testing.assert_close(first.energies, conditional(training.potential, [first], 0.0) + RAISE_KT * KT)
    step, enough = training.potential.step, RAISE_KT * KT
    # Not all molecules that fail are behind the step.
    assert missing(training) < 1.05 * missing(training, enough) < 0.3 * missing(training, 0.0)
    # What is above what was asked for is not pulled down: Adam's momentum takes it a little farther.
    assert 0.9 * enough < float(step.detach()) < 1.5 * enough
    assert record["updates"] == 1 and 0.7 * RAISE_KT < record["raised_kT"] < 1.5 * RAISE_KT
    # Those that fail a window later are asked for more, and those before for what they were.
    height = float(step.detach())
    fitted, steps = [], training.rule.steps
    steps.run, real = lambda lifted: fitted.append(lifted) or real(lifted), steps.run
    while len(training.rule.lifted) < 2:
        training.step()
    assert [id(part) for part in fitted[-1]] == [id(part) for part in training.rule.lifted]
    torch.testing.assert_close(training.rule.lifted[0].energies, first.energies)
    assert float(step.detach()) > height + 0.5 * enough
    assert missing(training) < 1.05 * min(missing(training, x) for x in np.linspace(0.0, 4.0 * enough, 41))


@pytest.mark.parametrize("estimator", ["global", "molecules", "nearest:2"])
def test_whatever_the_samples_molecules_that_fail_rise(estimator):
    """By conditional energies: what is held is molecules beside one at rest, each in its frame."""
    training = loop(estimator=estimator)
    record = until_updated(training)
    (first,) = training.rule.lifted
    assert record["updates"] == 1
    assert (first.frames.sum_over_atoms(first.atoms.double()) == 2).all() and first.frames.n_atoms > 2 * len(first)
    torch.testing.assert_close(first.energies, conditional(training.potential, [first], 0.0) + RAISE_KT * KT)
    assert 0.9 * RAISE_KT * KT < float(training.potential.step.detach()) < 1.5 * RAISE_KT * KT


def test_more_than_labels_allow_is_taken_back():
    """Weights and optimizer are those of before, nothing is held, and the next run has a smaller rate."""
    training = loop()
    while training.progress.phase == "simulation":
        training.step()
    training.work.bounds = training.work.bounds._replace(force=-1.0)
    before = copy.deepcopy((training.potential.state_dict(), training.rule.steps.optimizer.state_dict()))
    record, _ = training.step()
    assert record["updates"] == 1 == training.progress.taken_back and training.rule.lifted == []
    assert all(torch.equal(x, before[0][name]) for name, x in training.potential.state_dict().items())
    assert training.rule.steps.optimizer.state_dict()["state"] == before[1]["state"] == {}
    assert training.rule.steps.rate == pytest.approx(RATE_FACTOR * 0.005) == record["learning_rate"]


def test_it_is_resumed_to_the_same_bits():
    training = loop(qm_steps=5)
    until_updated(training)
    other = loop(qm_steps=5)
    other.restore(copy.deepcopy(training.state()))
    for one in (training, other):
        while len(one.rule.lifted) < 3:
            one.step()
    assert torch.equal(training.potential.step, other.potential.step)
    for mine, theirs in zip(training.rule.lifted, other.rule.lifted, strict=True):
        assert all(torch.equal(x, theirs.tensors()[name]) for name, x in mine.tensors().items())


def test_without_failures_nothing_is_changed():
    training = loop()
    condition = training.pools[0].condition
    sound = samples_of(torch.zeros(4, 1).double(), frames=stretched(1.5, 1.5, 1.5, 1.5), severity=torch.zeros(4))
    sound = replace(sound, values={t.observable.name: torch.zeros(4, t.observable.width).double() for t in condition.targets})
    info = training.rule.apply_([(condition, sound)])
    assert info.updates == 0 and float(training.potential.step.detach()) == 0.0


def test_its_steps_are_its_own_where_none_are_given():
    steps = loop(qm_steps=None, learning_rate=None).rule.steps
    assert (steps.n_steps, steps.learning_rate, steps.holding_weight) == (STEPS, LEARNING_RATE, WEIGHT)


def test_learning_ends_earlier_than_where_an_update_is_short():
    """As given, or where few failures are left, of whatever upper fraction."""
    fractions = [loop(**given).schedule.lower_fraction for given in ({}, {"lower_fraction": 0.02}, {"upper_fraction": 0.2})]
    assert [*fractions, loop_of_a_molecule().schedule.lower_fraction] == [0.25, 0.02, 0.1, 0.1]


def test_a_run_that_time_cuts_short_still_ends_at_a_rate_of_zero(monkeypatch):
    """A third of the steps fit: the rate rises and falls three times as fast."""
    training, rates, steps = loop(), [], 60
    rule, left = training.rule, iter(np.linspace(20.0, 0.0, 21).repeat(2))
    rule.steps.n_steps = steps
    monkeypatch.setattr(training.work, "seconds_left", lambda: next(left))
    monkeypatch.setattr(rule.steps.optimizer, "step", lambda: rates.append(rule.steps.optimizer.param_groups[0]["lr"]))
    rule.steps.run()
    assert 30 < len(rates) < 45 and max(rates) > 0.0045
    assert rates[-1] < 0.1 * max(rates) and int(np.argmax(rates)) < 0.5 * len(rates)


def test_what_is_to_blame_in_one_molecule_and_between_two():
    """A long bond, two molecules in contact, one frame that is sound."""

    def dimers(length, distance):
        return Atoms("C4", [[0, 0, 0], [length, 0, 0], [0, distance, 0], [1.5, distance, 0]], cell=[12.0] * 3, pbc=True)

    setting = Setting([dimers(1.5, 4.0)] * 3, 1200.0)
    frames = AtomsBatch.from_atoms([dimers(2.5, 4.0), dimers(1.5, 1.0), dimers(1.5, 3.9)])
    groups = Groups(torch.arange(12), torch.arange(12) // 2, torch.arange(3).repeat_interleave(2))
    criteria = criteria_from("bonds:0.5,intermolecular:2.0", setting)
    condition = SimpleNamespace(criteria=criteria, point=StatePoint(1200.0))
    known = estimate(frames, [-1.0] * 6, [2.0, 2.0, 0.5], groups)
    known.samples = replace(known.samples, energies=torch.zeros(3).double())
    alone, together = Found(condition, None, [], known, frames, torch.zeros(6), 6.0).to_blame(TRUTH)
    assert alone.tolist() == [True, False, False, False, False, False]
    assert together.tolist() == [False, False, True, True, False, False]


def test_of_drawn_samples_each_counts_as_itself():
    """A sound one stands for a thousand, and would weigh more than what fails in its frame."""
    frames = AtomsBatch.from_atoms([Atoms("C4", [[0, 0, 0], [2.5, 0, 0], [0, 50, 0], [1.6, 50, 0]])])
    groups = Groups(torch.arange(4), torch.arange(4) // 2, torch.tensor([0, 0]))
    known = estimate(frames, [-1.0, -3.0], [2.0], groups)
    assert Lifted.of(TRUTH, known).atoms.tolist() == [False, False, True, True]
    known.samples = replace(known.samples, log_weights=torch.tensor([1.0, 1000.0]).log().double())
    assert Lifted.of(TRUTH, known).atoms.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("regression", ["natural_iterations"]),
        ("labels-only", ["natural_iterations"]),
        ("natural", []),
        ("penalized:sgd", ["natural_iterations", "learning_rate"]),
    ],
)
def test_options_that_a_rule_has_no_use_for_are_told(rule, names):
    given = {"natural_iterations": 7, "learning_rate": 1e-4, "gradient_clip": 0.5}
    assert ignored(rule, from_dict(FinetuneOptions, {"temperature_K": 300.0, "update": rule} | given)) == names
