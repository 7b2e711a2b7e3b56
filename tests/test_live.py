"""The commands as functions: paths, frames in memory, potentials and bare modules, observables and criteria that are objects."""

import json

import numpy as np
import pytest
import tiny
import torch

import stabie_ase
from stabie_ase import BondLengthDeviation, DistanceDistribution, Topology
from stabie_ase.observables import BondLengths
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.system.files import as_json

OPTIONS = {**tiny.FAST, "temperature_K": tiny.TEMPERATURE, "max_cycles": 1, "seed": 3}


@pytest.fixture()
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_give_what_the_command_line_gives(here):
    found = stabie_ase.finetune(tiny.model_path(), tiny.reference_path(), output="by-python", **OPTIONS)
    typed = tiny.run(
        "finetune", str(tiny.model_path()), "--ref", str(tiny.reference_path()), "--output", "typed", *tiny.flags(max_cycles=1, seed=3)
    )
    assert typed.exit_code == 0, typed.output
    expected = json.loads((here / "typed" / "result.json").read_text())
    assert json.loads(json.dumps(found.models)) == expected["models"] and found.message == expected["message"]
    assert found.path.name == "by-python" and (found.path / "report.html").exists()
    after = stabie_ase.load_potential(found.path / "model.pt").state_dict()
    assert all(torch.equal(x, after[name]) for name, x in found.potential.state_dict().items())


@pytest.mark.parametrize("bare", [False, True], ids=["potential", "module"])
def test_live_objects_give_the_same_and_are_left_alone(here, bare):
    potential, frames = tiny.model(), tiny.reference().frames
    before = {name: x.clone() for name, x in potential.state_dict().items()}
    positions = frames[0].positions.copy()
    hr = DistanceDistribution.from_reference(frames)
    bonds = BondLengthDeviation.from_reference(frames, 0.3)
    options = {name: value for name, value in OPTIONS.items() if name != "criterion"}
    found = stabie_ase.finetune(
        potential.network if bare else potential, frames, observables=[hr, BondLengths(Topology.from_frames(frames))], criteria=[bonds],
        output="live", **options,
    )  # fmt: skip
    assert {"hr_error", "bond-length_error"} <= found.models["start"].keys()
    assert all(torch.equal(x, before[name]) for name, x in potential.state_dict().items())
    assert np.array_equal(frames[0].positions, positions) and isinstance(found.potential, SchNetPotential)
    assert (here / "live" / "inputs" / "start.pt").exists() and (here / "live" / "inputs" / "reference.traj").exists()


def test_a_run_of_live_objects_is_resumed_with_the_same(here):
    frames, bonds = tiny.reference().frames, BondLengthDeviation.from_reference(tiny.reference().frames, 0.3)
    options = {name: value for name, value in OPTIONS.items() if name != "criterion"} | {"max_cycles": 2}
    whole = stabie_ase.finetune(tiny.model(), frames, criteria=[bonds], output="whole", **options)

    class Stop(Exception):
        pass

    def stop(record):
        raise Stop

    with pytest.raises(Stop):
        stabie_ase.finetune(tiny.model(), frames, criteria=[bonds], output="broken", on_window=stop, **options)
    refused = tiny.run("finetune", "--resume", "broken")
    assert refused.exit_code != 0 and "begun in Python with these objects: bonds" in refused.output
    resumed = stabie_ase.resume("broken", criteria=[bonds])
    assert resumed.models == whole.models


def test_without_an_output_nothing_is_left(here):
    found = stabie_ase.finetune(tiny.model(), tiny.reference().frames, **OPTIONS)
    assert found.path is None and list(here.iterdir()) == [] and "start" in found.models


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"criteria": "bond:0.3"}, "did you mean 'bonds'"),
        ({"max_tme_min": 3.0}, "unknown option 'max_tme_min'"),
        ({"observables": ["hr", "hr"]}, "given twice"),
        ({"observables": [DistanceDistribution(9.0), "hr"]}, "two observables have one name among hr, hr"),
        ({"observables": "hr,weight=0"}, "expected a positive finite number"),
        ({"frames": []}, "0 frames"),
        ({"model": "none.pt"}, "none.pt: no such file"),
    ],
)
def test_what_is_wrong_is_told_and_leaves_nothing(here, changes, words):
    given = {"model": tiny.model(), "frames": tiny.reference().frames, "output": "run", **OPTIONS} | changes
    if "criteria" in changes:
        given.pop("criterion")
    with pytest.raises(ValueError, match=words):
        stabie_ase.finetune(given.pop("model"), given.pop("frames"), **given)
    assert list(here.iterdir()) == []


def test_what_a_run_was_begun_with_as_text_is_not_given_again(here):
    with pytest.raises(ValueError, match="give objects only, not bonds:0.3"):
        stabie_ase.resume("run", criteria="bonds:0.3")
    with pytest.raises(ValueError, match="run is no run directory: no such directory"):
        stabie_ase.resume("run")


def test_a_finished_run_tells_what_it_came_to(here):
    found = stabie_ase.finetune(tiny.model_path(), tiny.reference_path(), output="run", **OPTIONS)
    again = stabie_ase.resume("run")
    assert again.details == json.loads(as_json(found.details)) and again.report_path.samefile(found.report_path)
    assert all(torch.equal(x, again.potential.state_dict()[name]) for name, x in found.potential.state_dict().items())


def test_a_monitor_is_told_what_goes_on(here):
    """Words, the directory, and for each task a share that grows to all of it."""
    told = []

    class Notes(stabie_ase.Monitor):
        def message(self, text):
            told.append(("message", text))

        def began(self, path, onwards):
            told.append(("began", onwards))

        def progress(self, task, done, total, note):
            told.append((task, done / total, note))

    stabie_ase.finetune(tiny.model_path(), tiny.reference_path(), output="run", monitor=Notes(), **OPTIONS)
    assert told[0][0] == "message" and "40 frames" in told[0][1] and ("began", "go on with: stabie-ase finetune --resume run") in told
    for task in ("stabie", "comparison"):
        fractions = [entry[1] for entry in told if entry[0] == task]
        assert fractions == sorted(fractions) and fractions[-1] == 1.0
    notes = [entry[2] for entry in told if entry[0] == "stabie"]
    assert any("unstable" in note and "replica-steps/s" in note for note in notes) and any("update 1" in note for note in notes)


def test_evaluate_paths_and_objects(here):
    options = {"time_ps": 0.03, "replicas": 6, "timestep_fs": 1.0, "temperature_K": tiny.TEMPERATURE, "criterion": "bonds:0.3"}
    by_path = stabie_ase.evaluate(tiny.model_path(), tiny.reference_path(), **options)
    live = stabie_ase.evaluate(tiny.model(), tiny.reference().frames, compare={"truth": tiny.truth()}, **options)
    (summary,) = by_path.values()
    assert live["model"] == summary
    assert live["truth"]["n_failed"] == 0 and live["truth"]["p_value"] <= 1.0
    typed = tiny.run(
        "evaluate", str(tiny.model_path()), "--ref", str(tiny.reference_path()), "--time", "0.03", "--replicas", "6", "--timestep", "1",
        "--temperature", str(tiny.TEMPERATURE), "--criterion", "bonds:0.3", "--output", "found.json",
    )  # fmt: skip
    assert typed.exit_code == 0, typed.output
    assert list(json.loads((here / "found.json").read_text()).values()) == [json.loads(json.dumps(summary))]
    with pytest.raises(ValueError, match="two models are called 'model'"):
        stabie_ase.evaluate(tiny.model(), tiny.reference().frames, compare={"model": tiny.truth()}, **options)


def test_evaluation_refuses_two_of_one_name_as_well(here):
    model, frames = tiny.model(), tiny.reference().frames
    with pytest.raises(ValueError, match="two observables have one name among hr, hr"):
        stabie_ase.evaluate(model, frames, observables=[DistanceDistribution(9.0), "hr"], time_ps=0.01)
    bonds = BondLengthDeviation.from_reference(frames, 0.3)
    with pytest.raises(ValueError, match="two criteria have one name among bonds, .*bonds;"):
        stabie_ase.evaluate(model, frames, criteria=[bonds, "bonds:0.4"], time_ps=0.01)


def test_a_criterion_that_is_an_object_takes_the_place_of_the_usual_one(here):
    """The others that suit the system count beside it."""
    told = []
    monitor = stabie_ase.Monitor()
    monitor.message = told.append
    bonds = BondLengthDeviation.from_reference(tiny.reference().frames, 0.123)
    stabie_ase.evaluate(tiny.model(), tiny.reference().frames, criteria=[bonds], time_ps=0.001, replicas=2, monitor=monitor)
    lines = "\n".join(told)
    assert "0.123 Å" in lines and lines.count("a bond off") == 1 and lines.count("  - ") > 3
