"""The state points of a fine-tuning run: what replicas start from, observables are matched to, and models are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from ase import Atoms

from stabie_ase.boltzmann import Grouping, choose_grouping, targets_at
from stabie_ase.potentials.base import Potential
from stabie_ase.runs.checks import check_stress
from stabie_ase.runs.comparison import Trial
from stabie_ase.runs.evaluation import StabilityTest, Yardstick
from stabie_ase.runs.run import Live
from stabie_ase.stability import TRAINING, VERDICT, criteria_from, default_criteria
from stabie_ase.structures.kind import SystemKind
from stabie_ase.structures.reference import Reference, TargetFrames
from stabie_ase.structures.reference.targets import read_target
from stabie_ase.structures.setting import Setting
from stabie_ase.system.options import BadOption, with_temperature
from stabie_ase.training.condition import Condition
from stabie_ase.training.options import ConditionOptions, FinetuneOptions
from stabie_ase.training.updates import chosen_rule, rule_class


@dataclass(frozen=True)
class Plan:
    """One state point of a run.

    Attributes
    ----------
    name : str
        "350 K" and the like.
    condition : Condition
        What training runs.
    yardstick : Yardstick
        What models are held against.
    options : ConditionOptions
        With everything that was found out.
    kind : SystemKind
        Of the system.
    """

    name: str
    condition: Condition
    yardstick: Yardstick
    options: ConditionOptions
    kind: SystemKind

    def trial(self, test: StabilityTest) -> Trial:
        """The comparison of models here, like a test elsewhere but for temperature and pressure."""
        point = self.condition.point
        here = replace(test, temperature_K=point.temperature_K, pressure_GPa=point.pressure_GPa)
        return Trial(self.name, self.condition.starts, self.yardstick, here)


def planned(config: FinetuneOptions, reference: Reference, potential: Potential, live: Live) -> tuple[FinetuneOptions, list[Plan]]:
    """All state points of a run, and its options with what was found out on the way.

    Parameters
    ----------
    config : FinetuneOptions
    reference : Reference
        Which state points without frames of their own start from and are matched to.
    potential : Potential
    live : Live
        Observables and criteria that are objects: they count at all state points.

    Returns
    -------
    config : FinetuneOptions
    plans : list of Plan

    Raises
    ------
    ValueError
        In one line, what was given, what was expected and what to try.
    """
    if not config.conditions:
        plan = _plan(ConditionOptions(), config, reference, potential, live)
        found = plan.options
        dynamics = replace(config.dynamics, temperature_K=found.temperature_K)
        estimator = replace(config.estimator, groups=plan.condition.grouping.name)
        found_out = {"dynamics": dynamics, "estimator": estimator, "observable": found.observable, "criterion": found.criterion}
        return _with_rule(replace(config, **found_out), [plan]), [plan]
    _check_used(config)
    plans = [_plan(own, config, reference, potential, live) for own in config.conditions]
    names = [plan.name for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise BadOption(f"conditions: {names.count(name)} are of {name}; name each state point once")
    # All of them now have their own: what stood beside them is used up.
    dynamics = replace(config.dynamics, temperature_K=None, pressure_GPa=None)
    found_out = {"conditions": tuple(plan.options for plan in plans), "dynamics": dynamics, "observable": None, "criterion": None}
    return _with_rule(replace(config, **found_out), plans), plans


def _with_rule(config: FinetuneOptions, plans: Sequence[Plan]) -> FinetuneOptions:
    """With the update rule that suits where none is given."""
    groupings = [plan.condition.grouping for plan in plans]
    rule = chosen_rule(config, groupings)
    if rule in ("natural", "regression"):  # others compare samples as they come
        for grouping in groupings:
            _check_samples(config, grouping)
    phases = replace(config.phases, lower_fraction=config.phases.lower(rule_class(rule)[0].lower_fraction))
    return replace(config, update=replace(config.update, rule=rule), phases=phases)


def _check_used(config: FinetuneOptions) -> None:
    """What stands beside conditions that all have their own would be ignored."""
    beside = {"temperature_K": config.dynamics, "pressure_GPa": config.dynamics, "observable": config, "criterion": config}
    for name, options in beside.items():
        if getattr(options, name) is not None and all(getattr(own, name) is not None for own in config.conditions):
            raise BadOption(f"{name} is given beside conditions that each have their own; give it in one of the two places")
    if not any(own.judge for own in config.conditions):
        raise BadOption("conditions: none has judge: true; models have to be compared at one of them at least")


def _plan(own: ConditionOptions, config: FinetuneOptions, reference: Reference, potential: Potential, live: Live) -> Plan:
    known, where = _known(own, reference, potential)
    found = _with_defaults(own, config)
    found = with_temperature(found, known.temperature_K, where)
    dynamics = replace(config.dynamics, **{name: getattr(found, name) for name in ("temperature_K", "pressure_GPa", "replicas")})
    if dynamics.pressure_GPa is not None:
        check_stress(potential, known.frames, where)
    times = (dynamics.timestep_fs, dynamics.check_every_fs)
    setting = Setting(known.frames, dynamics.temperature_K, known.temperature_K, *times)
    found, observables, criteria = live.resolved(found, setting, TRAINING)
    grouping = choose_grouping(config.estimator.groups, setting, observables, potential)
    _check_times(config, grouping)
    at = partial(targets_at, observables, known, dynamics.temperature_K, config.reweight, config.reweight)
    targets = at()
    usual = default_criteria(setting, VERDICT, windows=setting.one_temperature, chosen=True)
    judges = criteria_from(config.check.criterion or "", setting, usual)
    # What only the user knows to look for counts in the verdict as it does in training.
    yardstick = Yardstick.of(judges, setting, targets).with_criteria(criteria)
    of_groups = targets if grouping.whole else at(groups_of=grouping)
    condition = Condition.of(known.frames, of_groups, criteria, dynamics, potential.device, grouping)
    return Plan(_name(found), condition, yardstick, found, setting.kind)


def _check_times(config: FinetuneOptions, grouping: Grouping) -> None:
    """Whether windows are long enough for what is done within them."""
    average = config.estimator.average_fs or 0.0
    if average and not grouping.lasting:
        raise BadOption(
            f"average_fs is {average:g}, expected none with the estimator {grouping.name}: neighbours come and go, so that a group has no "
            "trajectory of its own; leave --average out"
        )


def _check_samples(config: FinetuneOptions, grouping: Grouping) -> None:
    """Whether each window has samples to compare."""
    window, sample, average = config.phases.window_fs, config.dynamics.sample_every_fs, config.estimator.average_fs or 0.0
    if config.within(grouping.whole) and not max(2.0 * sample, average) <= window:
        raise BadOption(
            f"sample_every_fs is {sample:g} and average_fs {average:g}, expected two samples or more in a window ({window:g} fs), which "
            "are compared with each other, and averages over a part of it; --no-within-trajectories compares those of all windows"
        )


def _known(own: ConditionOptions, reference: Reference, potential: Potential) -> tuple[Reference | TargetFrames, str]:
    """Frames to start from and to be matched to, and what to call them."""
    if own.reference is None:
        return reference, "the reference"
    known = read_target(own.reference)
    if not isinstance(known, TargetFrames):
        raise BadOption(f"conditions: {own.reference} is a curve, expected frames to start from; match an observable to it by target=FILE")
    potential.check_numbers(z for atoms in known.frames for z in set(atoms.numbers))
    return known.isolated(potential.cutoff), own.reference


def _with_defaults(own: ConditionOptions, config: FinetuneOptions) -> ConditionOptions:
    """What a condition leaves open is as for all."""
    beside = {
        "temperature_K": config.dynamics.temperature_K,
        "pressure_GPa": config.dynamics.pressure_GPa,
        "replicas": config.dynamics.replicas,
        "observable": config.observable,
        "criterion": config.criterion,
    }
    return replace(own, **{name: value for name, value in beside.items() if getattr(own, name) is None})


def _name(found: ConditionOptions) -> str:
    pressure = "" if found.pressure_GPa is None else f" and {found.pressure_GPa:g} GPa"
    return f"{found.temperature_K:g} K{pressure}" + ("" if found.reference is None else f", {found.reference}")


def frames_of(plans: Sequence[Plan]) -> list[Atoms]:
    """Where replicas start, at all state points."""
    return [atoms for plan in plans for atoms in plan.condition.starts]
