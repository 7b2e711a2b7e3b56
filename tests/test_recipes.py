"""Recipes: other defaults, which give way to whatever is given; what a step of the published one does; what it costs."""

import copy
import json
from dataclasses import asdict

import pytest
import tiny
import torch
from ase import units
from ase.io import write

import stabie_ase
from stabie_ase.boltzmann import WHOLE, Samples, accumulate_gradient
from stabie_ase.observables import DistanceDistribution
from stabie_ase.runs.monitor import Monitor
from stabie_ase.stability import criteria_from
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups
from stabie_ase.system.options import from_dict, in_a_row, row_of
from stabie_ase.training.labels import minibatch
from stabie_ase.training.loop import TrainingLoop
from stabie_ase.training.options import FinetuneOptions
from stabie_ase.training.schedule import LEARNING

MOLECULES = {
    "thermostat": "nose-hoover", "timestep_fs": 0.5, "replicas": 128, "window_fs": 2000 * 0.5, "sample_every_fs": 100 * 0.5,
    "upper_fraction": 0.75, "lower_fraction": 0.0, "random_resets": 0.05, "criterion": "bonds:0.25", "observable": "hr",
    "gradient_clip": 1.0, "average_fs": 0.0, "within_trajectories": False, "fluctuation_floor": 1e6, "near_factor": 1e6,
    "winsorized": False,
}  # fmt: skip
LIQUIDS = {
    **MOLECULES, "timestep_fs": 1.0, "replicas": 8, "sample_every_fs": 100 * 1.0, "random_resets": 0.0,
    "criterion": "intermolecular:1.2", "observable": "bond-length", "estimator": "molecules",
}  # fmt: skip
SHORT = {"window_fs": 30.0, "sample_every_fs": 5.0, "replicas": 12, "timestep_fs": 1.0, "qm_batch_size": 8}


def options(**given):
    return from_dict(FinetuneOptions, given)


class Begun(Exception):
    pass


class UntilBegun(Monitor):
    """Ends a run as soon as it has a directory, and keeps what was said and the options in config.json, in a row."""

    def __init__(self):
        self.said, self.row = [], {}

    def message(self, text):
        self.said.append(text)

    def began(self, path, onwards):
        self.row = row_of(FinetuneOptions, json.loads((path / "config.json").read_text())["config"])
        raise Begun


def begun(output, frames, **given):
    """What is known of a run that has begun."""
    monitor = UntilBegun()
    with pytest.raises(Begun):
        stabie_ase.finetune(str(tiny.model_path()), frames, output=output, monitor=monitor, **given)
    return monitor


@pytest.mark.parametrize("recipe, table, rate, penalty", [("paper", MOLECULES, 1e-3, 10.0), ("paper-liquid", LIQUIDS, 3e-3, 0.0)])
def test_the_published_recipe_is_that_of_the_table(recipe, table, rate, penalty):
    row = in_a_row(options(recipe=recipe))
    assert {name: row[name] for name in table} == table
    usual = in_a_row(FinetuneOptions())
    assert {name for name in row if row[name] != usual[name]} <= {*table, "recipe", "update", "max_learning_windows", "failure_windows"}
    config = options(recipe=recipe, temperature_K=600.0, replicas=2)
    hr = DistanceDistribution(6.0)
    training = TrainingLoop.from_reference(tiny.model(), tiny.reference(), [hr], [], config, grouping=WHOLE)
    assert training.rule.penalty == penalty and training.rule.optimizer.defaults["lr"] == rate
    assert type(training.rule.optimizer) is torch.optim.SGD and training.rule.optimizer.defaults["momentum"] == 0


def test_the_natural_recipe_is_what_there_is_without_one():
    assert options(recipe="natural") == options() == FinetuneOptions() and FinetuneOptions().of_the_recipe() == ""


@pytest.mark.parametrize("given", [{"replicas": 32}, {"dynamics": {"replicas": 32}}], ids=["in a row", "in its section"])
def test_what_is_given_wins_over_a_recipe_though_it_is_the_usual_default(given):
    assert FinetuneOptions().dynamics.replicas == 32
    config = options(recipe="paper", **given)
    assert config.dynamics.replicas == 32 and config.dynamics.thermostat == "nose-hoover"
    assert config.of_the_recipe().endswith("; given otherwise: replicas 32")


def test_options_that_have_been_resolved_stay_as_they_are():
    config = options(recipe="paper", replicas=4, window_fs=100.0)
    assert options(**in_a_row(config)) == options(**asdict(config)) == config


def test_a_value_may_suit_the_recipe_that_would_not_suit_the_usual_defaults():
    assert options(recipe="paper", sample_every_fs=500.0).dynamics.sample_every_fs == 500.0
    with pytest.raises(ValueError, match="to one window"):
        options(sample_every_fs=500.0)


def test_the_command_line_and_a_config_file_take_a_recipe(here):
    (here / "options.yaml").write_text("recipe: paper\nreplicas: 4\ntemperature: 600\n")
    result = tiny.run(
        "finetune", "model.pt", "--ref", "ref.xyz", "--config", "options.yaml", "--timestep", "0.25", "--max-time", "0", "--output", "run",
        "--check-replicas", 2, "--check-time", 0.01, "--check-rounds", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    row = row_of(FinetuneOptions, json.loads((here / "run" / "config.json").read_text())["config"])
    assert row == MOLECULES | {"replicas": 4, "timestep_fs": 0.25} | {name: row[name] for name in row if name not in MOLECULES}
    assert row["recipe"] == "paper" and row["update"].startswith("penalized:sgd")


def test_recipes_that_are_none(here):
    with pytest.raises(ValueError, match="recipe is 'published', expected one of 'natural', 'paper'"):
        options(recipe="published")
    result = tiny.run("finetune", "model.pt", "--ref", "ref.xyz", "--recipe", "published")
    assert result.exit_code == 2 and "'published' is not one of" in result.output and not (here / "model-stabie").exists()


def test_a_resumed_run_keeps_its_recipe_and_ends_in_the_same_bits(here):
    given = {"recipe": "paper", **SHORT, "max_updates": 2, "check": {"replicas": 2, "time_ps": 0.02, "rounds": 1}, "criterion": "bonds:0.3"}
    whole = stabie_ase.finetune("model.pt", "ref.xyz", output="whole", **given)

    def stop(record):
        if record.get("updates") == 1:
            raise Begun

    with pytest.raises(Begun):
        stabie_ase.finetune("model.pt", "ref.xyz", output="parts", on_window=stop, **given)
    parts = stabie_ase.resume("parts")
    configs = [json.loads((here / name / "config.json").read_text())["config"] for name in ("whole", "parts")]
    assert configs[0] == configs[1] and configs[0]["recipe"] == "paper" and configs[0]["dynamics"]["replicas"] == 12
    states = [torch.load(here / name / "state.pt", weights_only=True)["state"]["weights"] for name in ("whole", "parts")]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    assert whole.models == parts.models


def periodic(length):
    """Frames in a cube of this side, in Å; the range of the model is 4 Å."""
    images = tiny.frames(12)
    for atoms in images:
        atoms.set_cell([length] * 3)
        atoms.pbc = True
    return images


@pytest.mark.parametrize("length, recipe", [(30.0, "paper"), (5.2, "paper-liquid")])
def test_the_recipe_for_liquids_is_for_what_is_periodic_to_the_model(length, recipe, tmp_path):
    write(tmp_path / "ref.extxyz", periodic(length))
    run = begun(tmp_path / "run", str(tmp_path / "ref.extxyz"), recipe="paper", criterion="bonds:0.3", estimator="global")
    table = {"paper": MOLECULES, "paper-liquid": LIQUIDS}[recipe] | {"recipe": recipe, "criterion": "bonds:0.3", "estimator": "global"}
    assert {name: run.row[name] for name in table} == table
    (words,) = [text for text in run.said if text.startswith("Recipe")]
    assert words.startswith(f"Recipe {recipe}: ") and "; given otherwise: " in words and "criterion bonds:0.3" in words


def test_objects_take_the_place_of_what_a_recipe_names(tmp_path):
    setting = Setting(tiny.frames(), tiny.TEMPERATURE)
    row = begun(tmp_path / "run", tiny.frames(), recipe="paper", criteria=criteria_from("contacts:0.3", setting)).row
    assert row["criterion"] is None and row["observable"] == "hr"


def published(**changes):
    """A loop of the recipe whose replicas have failed."""
    config = options(recipe="paper", temperature_K=tiny.TEMPERATURE, **SHORT, criterion="bonds:0.3", max_simulation_windows=4, **changes)
    reference = tiny.reference()
    torch.manual_seed(0)
    training = TrainingLoop.from_reference(
        tiny.model(), reference, [DistanceDistribution.from_reference(reference.frames)],
        criteria_from(config.criterion, Setting(reference.frames, tiny.TEMPERATURE)), config,
    )  # fmt: skip
    while training.progress.phase != LEARNING:
        training.step()
    return training


def test_a_step_of_the_published_recipe_is_its_formula():
    """θ' = θ - η clip(∇[L_obs + λ L_QM]), the observable's gradient written out as a covariance."""
    training = published()
    condition, by_hand = training.pools[0].condition, copy.deepcopy(training.potential)
    (target,) = condition.targets
    before = {name: x.detach().clone() for name, x in by_hand.named_parameters()}
    samples = Samples.from_trajectory(copy.deepcopy(training.pools[0]).learn()[1], [target.observable])
    values, energies = samples.values["hr"], by_hand(samples.frames, neighbor_list(samples.frames, by_hand.cutoff))
    off = 2.0 * target.observable.measure * (values.mean(dim=0) - target.value)
    beta, labelled = 1.0 / (units.kB * tiny.TEMPERATURE), training.work.labelled
    observed = -beta / (len(values) - 1) * (((values - values.mean(dim=0)) @ off) * energies).sum()
    chosen = minibatch(len(labelled), 8, training.config.seed, 0)
    (observed + 10.0 * training.rule.loss(by_hand, labelled.select(chosen))).backward()
    norm = float(torch.cat([p.grad.flatten().double() for p in by_hand.parameters()]).norm())
    assert norm > 1.0  # clipped
    record, _ = training.step()
    assert record["updates"] == 1 and record["gradient_norm"] == pytest.approx(norm, rel=1e-3)
    for name, p in by_hand.named_parameters():
        step = training.potential.get_parameter(name) - before[name]
        torch.testing.assert_close(step, -1e-3 * p.grad / norm, rtol=5e-3, atol=2e-7)


def test_force_calls_are_those_of_the_dynamics_and_the_frames_of_the_updates():
    training = published()
    calls = training.md_steps  # no update so far
    assert training.force_calls == calls > 0
    record, _ = training.step()
    frames = record["n_samples"] + 8 + len(training.accuracy.frames)  # one gradient of each, and the errors on held-out frames
    assert training.md_steps == calls + 12 * 30
    renewed = 12 + len(training.pools[0].lesson.rows)  # forces of the new weights, of the replicas and of the lesson
    assert record["force_calls"] == training.md_steps + frames + renewed
    other = published()
    other.restore(copy.deepcopy(training.state()))
    assert other.force_calls == record["force_calls"]


def test_force_calls_of_energies_and_forces_alone():
    config = tiny.config(update="labels-only", qm_steps=3, qm_batch_size=8)
    training = TrainingLoop.from_reference(tiny.model(), tiny.reference(), [DistanceDistribution(6.0)], [], config)
    records = [training.step()[0] for _ in range(2)]
    each = 3 * 8 + len(training.accuracy.frames)
    tried = each + len(training.accuracy.frames)  # what the learning rate does to the model, beside what it is like
    assert [record["force_calls"] for record in records] == [tried + each, tried + 2 * each]


def test_force_calls_of_groups_are_frames():
    """Energies of atoms are evaluations of their frame."""
    potential, frames, counted = tiny.model(), AtomsBatch.from_atoms(tiny.frames()[:5]), []
    potential.register_forward_hook(lambda potential, given, energies: counted.append(given[0].n_systems))
    groups = Groups(torch.arange(20), torch.arange(20) // 2, torch.arange(5).repeat_interleave(2))
    accumulate_gradient(potential, frames, torch.ones(10).double(), groups, chunk_size=2)
    assert counted == [2, 2, 1]
