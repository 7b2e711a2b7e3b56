"""Several state points: what is given is used or refused, all are trained at, and models are compared at each."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import tiny
import torch
from ase import units
from ase.build import bulk
from ase.io import write

import stabie_ase
from stabie_ase.boltzmann import StatePoint
from stabie_ase.dynamics import PotentialForces, simulate
from stabie_ase.dynamics.starts import start
from stabie_ase.potentials.analytic import LennardJones
from stabie_ase.runs.checks import InconsistentLabels, check_stress
from stabie_ase.runs.conditions import Plan, planned
from stabie_ase.runs.evaluation import StabilityTest, Yardstick
from stabie_ase.runs.run import Live
from stabie_ase.structures.kind import kind_of
from stabie_ase.system.options import BadOption, from_dict
from stabie_ase.training.condition import Condition
from stabie_ase.training.options import ConditionOptions, DynamicsOptions, FinetuneOptions

ARGON = LennardJones(0.0104, 3.4, 8.0)
SMALL = {"replicas": 6, "max_updates": 1, "check_replicas": 4, "check_rounds": 1}


def plans_of(conditions, **changes):
    config = tiny.config(conditions=conditions, **({"temperature_K": None} | changes))
    return planned(config, tiny.reference(), tiny.model(), Live())


def options(text):
    return from_dict(FinetuneOptions, {"conditions": text})


# -- options


def test_rows_of_options():
    config = options([{"temperature_K": 300.0}, {"temperature_K": 400.0, "judge": False}])
    assert config.conditions == (ConditionOptions(temperature_K=300.0), ConditionOptions(temperature_K=400.0, judge=False))
    assert from_dict(FinetuneOptions, json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    "given, words",
    [
        ("300", "conditions is '300', expected a list"),
        ([300.0], "expected a list, each with options by their names"),
        ([{"temprature_K": 300.0}], "conditions: unknown option 'temprature_K'; did you mean 'temperature_K'"),
        ([{"temperature_K": -1.0}], "conditions: temperature_K is -1, expected a number between"),
    ],
)
def test_rows_that_are_none(given, words):
    with pytest.raises(BadOption, match=words):
        options(given)


def test_one_condition_is_what_the_options_say():
    config, (plan,) = plans_of(())
    assert plan.name == "600 K" and plan.condition.point == StatePoint(600.0) and plan.condition.replicas == config.dynamics.replicas
    assert config.observable == "hr" and config.dynamics.temperature_K == 600.0 and config.conditions == ()


def test_what_a_condition_leaves_open_is_as_for_all():
    config, plans = plans_of([{"temperature_K": 600.0}, {"temperature_K": 590.0, "replicas": 5, "criterion": "bonds:0.2"}], replicas=7)
    assert [plan.name for plan in plans] == ["600 K", "590 K"]
    assert [plan.condition.replicas for plan in plans] == [7, 5]
    assert [plan.condition.criteria[0].tolerance for plan in plans] == [0.3, 0.2]
    assert [own.observable for own in config.conditions] == ["hr", "hr"] and config.dynamics.temperature_K is None
    again, _ = planned(config, tiny.reference(), tiny.model(), Live())
    assert again == config


@pytest.mark.parametrize(
    "conditions, changes, words",
    [
        ([{"temperature_K": 600.0}, {"temperature_K": 600.0}], {}, "2 are of 600 K; name each state point once"),
        ([{"temperature_K": 600.0}], {"temperature_K": 500.0}, "temperature_K is given beside conditions that each have their own"),
        ([{"temperature_K": 600.0, "judge": False}], {}, "none has judge: true"),
        ([{"pressure_GPa": 1.0}], {}, "a pressure is given, but the reference is not periodic in all directions"),
        ([{"temperature_K": 100.0}], {}, "count effectively at 100 K"),
    ],
)
def test_contradictory_state_points_are_refused(conditions, changes, words):
    with pytest.raises(ValueError, match=words):
        plans_of(conditions, **changes)


def test_a_pressure_and_a_thermostat_without_one():
    with pytest.raises(BadOption, match="a pressure is for the langevin thermostat"):
        DynamicsOptions(pressure_GPa=0.1, thermostat="nose-hoover")


# -- runs


def test_a_run_at_two_temperatures(tmp_path):
    """Trained and judged at both, resumed to the same bits, and told of in table and report."""
    conditions = [{"temperature_K": 600.0}, {"temperature_K": 590.0, "replicas": 5}]
    settings = {name: value for name, value in tiny.FAST.items() if name != "replicas"} | SMALL | {"conditions": conditions}
    result = stabie_ase.finetune(tiny.model_path(), tiny.reference_path(), output=tmp_path / "run", **settings)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [own["temperature_K"] for own in saved["config"]["conditions"]] == [600.0, 590.0] and saved["at"] == ["600 K", "590 K"]
    start = result.models["start"]
    assert set(start["conditions"]) == {"600 K", "590 K"} and start["n_replicas"] == 8
    assert {"hr at 600 K_error", "hr at 590 K_error"} <= set(start)
    assert set(result.details["observables"]) == {"hr at 600 K", "hr at 590 K"}
    report = (tmp_path / "run" / "report.html").read_text()
    assert "at 600 K and at 590 K" in report and "hr at 590 K error" in report


def test_frames_of_a_condition_need_no_energies(tmp_path):
    reference = tiny.reference()
    bare = [atoms.copy() for atoms in reference.frames[:12]]
    for atoms in bare:
        atoms.info["temperature_K"] = 590.0
    write(tmp_path / "cold.traj", bare)
    config, plans = plans_of([{}, {"reference": str(tmp_path / "cold.traj")}])
    assert plans[1].condition.point.temperature_K == 590.0 and len(plans[1].condition.starts) == 12
    expected = plans[1].condition.targets[0].observable(stabie_ase.AtomsBatch.from_atoms(bare)).mean(dim=0)
    assert torch.allclose(plans[1].condition.targets[0].value, expected)
    assert plans[1].name == f"590 K, {tmp_path / 'cold.traj'}"


# -- pressure


def crystal():
    atoms = bulk("Ar", "fcc", 4.9, cubic=True).repeat(2)
    atoms.positions += 0.1 * np.random.default_rng(0).normal(size=atoms.positions.shape)
    return atoms


def test_the_stress_is_held_against_finite_strain(monkeypatch):
    potential = ARGON
    check_stress(potential, [crystal()], "the reference")
    real = LennardJones.compute

    def wrong(self, batch, neighbors, stress=False, create_graph=False):
        found = real(self, batch, neighbors, stress, create_graph)
        return found._replace(stress=None if found.stress is None else 1.2 * found.stress)

    monkeypatch.setattr(LennardJones, "compute", wrong)
    with pytest.raises(InconsistentLabels, match="stress is not the derivative of its energy"):
        check_stress(potential, [crystal()], "the reference")


def test_constant_pressure_is_sampled_in_training_and_verdict():
    """The condition's integrator moves the cell, at the pressure of its state point; so does the trial that models are compared in."""
    dynamics = DynamicsOptions(temperature_K=80.0, pressure_GPa=0.2, replicas=4)
    condition = Condition.of([crystal()], [], [], dynamics)
    plan = Plan("80 K and 0.2 GPa", condition, Yardstick([], []), ConditionOptions(), kind_of([crystal()]))
    test = plan.trial(StabilityTest(300.0, replicas=4, time_ps=0.05, check_every_fs=5.0)).test
    assert (test.temperature_K, test.pressure_GPa) == (80.0, 0.2)
    for integrator, pressure in ((condition.integrator, condition.point.pressure_GPa), (test.integrator, test.pressure_GPa)):
        state = start(ARGON, condition.starts, 4, 80.0, integrator, 0, pressure)
        assert torch.allclose(state.pressure.double(), torch.full((4,), 0.2 * units.GPa, dtype=torch.float64))
        end = simulate(state, integrator, PotentialForces.driving(ARGON, integrator), 20)
        assert not torch.allclose(end.batch.cells, state.batch.cells)
