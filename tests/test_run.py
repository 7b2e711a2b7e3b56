"""Fine-tuning runs on disk: exact resume after any end, what the directory holds, the final comparison."""

import json
import random
import re
import shutil
from collections import Counter
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from ase.io import read
from ase.io.trajectory import TrajectoryWriter

import stabie_ase.runs.comparison as comparison
import stabie_ase.runs.directory as directory_module
import stabie_ase.runs.finetune as run_module
import stabie_ase.runs.finetune_directory as run_directory_module
import stabie_ase.runs.report.view as view
from stabie_ase.observables.averages import SlicedMeans
from stabie_ase.potentials.checkpoint import load_potential
from stabie_ase.runs.evaluation import StabilityResult
from stabie_ase.runs.finetune import Finetuning, Inputs
from stabie_ase.runs.monitor import Monitor
from stabie_ase.runs.report.html import write_report
from stabie_ase.stability import BondLengthDeviation, StabilityStatistics
from stabie_ase.system.options import from_dict
from stabie_ase.training.options import FinetuneOptions

OPTIONS = tiny.flags(
    max_cycles=3, learning_rate=3e-3, updates_per_window=5, check_replicas=32, check_time_ps=0.06, random_resets=0.1
)
BEGIN = ("finetune", "model.pt", "--ref", "ref.xyz", *OPTIONS)


@pytest.fixture
def no_report(monkeypatch):
    """Spare the seconds that figures take."""
    monkeypatch.setattr("stabie_ase.runs.report.html.write_report", lambda path: path / "report.html")


def make_folder(folder):
    folder.mkdir(exist_ok=True)
    shutil.copy(tiny.model_path(), folder / "model.pt")
    shutil.copy(tiny.reference_path(), folder / "ref.xyz")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with model.pt and ref.xyz, as the working directory."""
    monkeypatch.chdir(make_folder(tmp_path / "here"))
    return tmp_path / "here"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run directory of an uninterrupted run, and what was printed; not to be changed."""
    folder = make_folder(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = tiny.run(*BEGIN)
    assert result.exit_code == 0, result.output
    return folder / "model-stabie", result


def same_ends(one, other):
    """Two run directories that ended in the same bits."""
    a, b = (torch.load(path / "model.pt", weights_only=True)["state_dict"] for path in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    assert metrics(one) == metrics(other)
    assert json.loads((one / "result.json").read_text()) == json.loads((other / "result.json").read_text())
    left, right = (read(path / "unstable.traj", ":") for path in (one, other))
    assert len(left) == len(right)
    for x, y in zip(left, right):
        assert x.info == y.info and np.array_equal(x.positions, y.positions) and np.array_equal(x.get_tags(), y.get_tags())
    assert not list(one.glob(".*")) and not list(other.glob(".*"))


def metrics(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def half_done(here, n_windows=4):
    """A run directory stopped after some windows."""
    finetuning = Finetuning.begin("model-stabie", Inputs("model.pt", "ref.xyz"), tiny.config(max_cycles=3))
    stop_after(finetuning, n_windows)
    return here / "model-stabie"


def stop_after(finetuning, n_windows):
    """Train for some windows; True if the loop ended before."""
    done = []

    def stop(record):
        done.append(record)
        if len(done) == n_windows:
            raise KeyboardInterrupt

    try:
        finetuning.train(on_window=stop)
    except KeyboardInterrupt:
        return finetuning.training.finished
    return True


def refused(*arguments):
    result = tiny.run(*arguments)
    assert result.exit_code not in (0, 130) and isinstance(result.exception, SystemExit), result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("stabie: ", "comparison: "))]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- exact resume


@pytest.mark.parametrize("n_kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed(here, finished, n_kills):
    """SIGKILL a short while after a run, or what is left of it, has saved one more window."""
    draw, run = random.Random(n_kills), here / "model-stabie"
    arguments = BEGIN
    for _ in range(n_kills):
        before = saved_windows(run)
        process = tiny.Process(here, *arguments)
        process.wait_for(lambda: saved_windows(run) > before or not process.process.is_alive() or (run / "model.pt").exists())
        assert process.kill(after=draw.uniform(0.0, 0.25)) in (-9, 0)
        arguments = ("finetune", "--resume", "model-stabie")
    process = tiny.Process(here, *arguments)
    assert process.end() == 0, process.output
    assert "model-stabie/model.pt" in process.stdout
    same_ends(run, finished[0])


def saved_windows(run):
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "state.pt").exists() else 0


def test_stopped_after_every_window_and_between_the_phases(here, finished):
    options = json.loads((finished[0] / "config.json").read_text())["config"]
    finetuning = Finetuning.begin("model-stabie", Inputs("model.pt", "ref.xyz"), from_dict(FinetuneOptions, options))
    while not stop_after(finetuning, 1):
        finetuning = Finetuning.resume("model-stabie")
    Finetuning.resume("model-stabie").finish()
    same_ends(here / "model-stabie", finished[0])


def test_a_weight_is_told_kept_and_taken_up_again(here):
    said = []

    class Words(Monitor):
        message = staticmethod(said.append)

    config = tiny.config(observable="hr,bond-length,weight=2", max_cycles=3)
    finetuning = Finetuning.begin("run", Inputs("model.pt", "ref.xyz"), config, Words())
    stop_after(finetuning, 2)
    kept = json.loads((here / "run" / "config.json").read_text())
    assert "Observables: hr, bond-length (weight 2)" in said and kept["observable"] == ["hr", "bond-length (weight 2)"]
    assert "hr, bond-length (weight 2)" in write_report("run").read_text()
    finetuning.directory._claimed.close()
    for one in (finetuning, Finetuning.resume("run")):
        assert [target.weight for target in one.training.pools[0].condition.targets] == [1.0, 2.0]


def test_stopped_in_the_final_comparison(here, finished, no_report):
    shutil.copytree(finished[0], "run")
    for name in ("result.json", "model.pt", "report.html"):
        (here / "run" / name).unlink()

    class Interrupt(Monitor):
        def progress(self, task, done, total, note):
            if task == "comparison" and not note.startswith("start"):
                raise KeyboardInterrupt

    # The copy's inputs are those of the finished run, which are still there.
    with pytest.raises(KeyboardInterrupt):
        Finetuning.resume("run").finish(Interrupt())
    assert not (here / "run" / "result.json").exists()
    result = tiny.run("finetune", "--resume", "run")
    assert result.exit_code == 0
    same_ends(here / "run", finished[0])


class FullDisk:
    """Lets some writes of one kind pass and refuses the next."""

    def __init__(self, real, n_good):
        self.real, self.left = real, n_good

    def __call__(self, *arguments, **settings):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return self.real(*arguments, **settings)


@pytest.mark.parametrize(
    "place, name, n_good",
    [
        (directory_module, "write_atomically", 0),
        (directory_module, "write_atomically", 6),
        (TrajectoryWriter, "write", 7),
        (run_directory_module, "save_potential", 0),
        (run_directory_module, "as_json", 3),
    ],
    ids=["first state", "later state", "unstable frames", "model", "metrics"],
)
def test_full_disk_leaves_a_run_that_can_be_resumed(here, finished, no_report, monkeypatch, place, name, n_good):
    real = getattr(place, name)
    full = FullDisk(real, n_good)
    monkeypatch.setattr(place, name, (lambda *a, **s: full(*a, **s)) if isinstance(place, type) else full)
    line = refused(*BEGIN)
    assert "cannot write to model-stabie: No space left on device" in line
    assert "go on later with: stabie-ase finetune --resume model-stabie" in line
    monkeypatch.setattr(place, name, real)
    result = tiny.run("-q", "finetune", "--resume", "model-stabie")
    assert result.exit_code == 0, result.output
    same_ends(here / "model-stabie", finished[0])


def test_full_disk_when_the_report_is_written_loses_no_result(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    monkeypatch.setattr("stabie_ase.runs.live.write_report", FullDisk(None, 0))
    line = refused("finetune", "--resume", tmp_path / "run")
    assert "the run is finished, but its report cannot be written" in line and "No space left on device" in line
    assert f"stabie-ase finetune --resume {tmp_path / 'run'}" in line


def test_what_torch_makes_of_a_full_disk_is_told_as_one(here, monkeypatch):
    def save(data, file):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904 - as torch does

    monkeypatch.setattr(torch, "save", save)
    assert "No space left on device" in refused(*BEGIN)


def test_full_disk_at_the_very_beginning_leaves_nothing(here, monkeypatch):
    before = sorted(p.name for p in here.iterdir())
    monkeypatch.setattr(directory_module, "as_json", FullDisk(None, 0))
    assert "cannot write to model-stabie: No space left on device" in refused(*BEGIN)
    assert sorted(p.name for p in here.iterdir()) == before


def test_killed_before_the_run_began_does_not_block_its_place(here):
    (here / "model-stabie").mkdir()
    (here / "model-stabie" / ".config.json.tmp").write_text("{")
    (here / "model-stabie" / ".config.json.12345.tmp").write_text("{")
    run_directory_module.RunDirectory.check_free("model-stabie")


def test_left_overs_of_a_killed_process_are_cleared(here):
    run = half_done(here)
    (run / ".state.pt.12345.tmp").write_bytes(b"half")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"phase": "sim')
    n_frames = len(read(run / "unstable.traj", ":"))
    with TrajectoryWriter(run / "unstable.traj", "a") as trajectory:
        trajectory.write(tiny.frames(1)[0])
    Finetuning.resume(run)
    assert len(metrics(run)) == 4 and len(read(run / "unstable.traj", ":")) == n_frames
    assert not list(run.glob(".*"))


def test_resumed_from_another_folder(here, monkeypatch, tmp_path):
    run = half_done(here)
    monkeypatch.chdir(tmp_path)
    assert Finetuning.resume(run).training.progress.window or Finetuning.resume(run).training.progress.cycle


# -- what cannot be resumed


def test_finished_run_says_so(finished):
    before = bytes_of(finished[0])
    result = tiny.run("finetune", "--resume", finished[0])
    assert result.exit_code == 0
    assert result.stdout == f"{finished[0]} is finished; its model is {finished[0] / 'model.pt'}\n"
    assert bytes_of(finished[0]) == before


def test_finished_run_needs_no_inputs_and_gets_its_report(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["inputs"] |= {"model": "/gone/model.pt", "reference": "/gone/ref.xyz"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert tiny.run("finetune", "--resume", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--replicas", "13"), "--replicas"),
        (("--criterion", "bonds:0.5", "--seed", "7"), "--criterion, --seed"),
        (("--check-time", "9"), "--check-time"),
        (("--max-time", "1"), "--max-time"),
        (("--dtype", "float64"), "--dtype"),
        (("--energy-key", "E"), "--energy-key"),
        (("--device", "cuda"), "--device"),
        (("model.pt",), "MODEL"),
        (("--ref", "ref.xyz"), "--ref"),
        (("--output", "elsewhere"), "--output"),
        (("--valid", "ref.xyz"), "--valid"),
        (("--config", "options.json"), "--config"),
        (("--cross-fit",), "--cross-fit"),
    ],
    ids=lambda x: "".join(x),
)
def test_changed_options_are_refused(here, finished, extra, words):
    before = bytes_of(finished[0])
    (here / "options.json").write_text("{}")
    line = refused("finetune", "--resume", finished[0], *extra)
    assert f"leave out {words}, or begin a new run" in line
    assert bytes_of(finished[0]) == before


def test_the_same_options_again_are_no_change(finished):
    extra = ("--replicas", "12", "--seed", "0", "--device", "cpu", "--no-cross-fit")
    assert tiny.run("finetune", "--resume", finished[0], *extra).exit_code == 0


def damaged_runs():
    def config(change):
        def damage(run):
            data = json.loads((run / "config.json").read_text())
            change(data)
            (run / "config.json").write_text(json.dumps(data))

        return damage

    def cut(name, n):
        return lambda run: (run / name).write_bytes((run / name).read_bytes()[:n])

    def flip(run):
        data = bytearray((run / "state.pt").read_bytes())
        data[100:400] = bytes(300)
        (run / "state.pt").write_bytes(data)

    def other_state(run):
        torch.save({"state": {"weights": {}}, "lengths": {"metrics": 1, "unstable": 0}}, run / "state.pt")

    def changed_input(run):
        with open(run.parent / "ref.xyz", "a") as file:
            file.write("\n")

    return {
        "no config": (lambda run: (run / "config.json").unlink(), "no config.json"),
        "config cut": (cut("config.json", 200), "config.json is damaged"),
        "config empty": (cut("config.json", 0), "config.json is damaged"),
        "config no object": (lambda run: (run / "config.json").write_text("[]"), "config.json is damaged"),
        "config without inputs": (config(lambda c: c.pop("inputs")), "config.json is damaged"),
        "config with an unknown option": (config(lambda c: c["config"].update(replica=3)), "unknown option 'replica'"),
        "config with a wrong value": (config(lambda c: c["config"]["dynamics"].update(replicas="3")), "expected a whole number"),
        "other version": (config(lambda c: c.update(format=99)), "written in format 99"),
        "state cut": (cut("state.pt", 3000), "state.pt is damaged"),
        "state empty": (cut("state.pt", 0), "state.pt is damaged"),
        "state flipped": (flip, "state.pt is damaged"),
        "state of something else": (lambda run: torch.save([1, 2], run / "state.pt"), "state.pt is damaged"),
        "state of another model": (other_state, "state.pt is damaged"),
        "frames cut": (cut("unstable.traj", 500), "unstable.traj is damaged"),
        "reference changed": (changed_input, "the reference file of"),
        "reference gone": (lambda run: (run.parent / "ref.xyz").unlink(), "the reference file of"),
        "model gone": (lambda run: (run.parent / "model.pt").unlink(), "the model file of"),
    }


@pytest.fixture(scope="module")
def half_done_run(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("half"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        half_done(folder)
    return folder


@pytest.mark.parametrize("case", damaged_runs())
def test_damaged_run_is_refused_in_one_line(half_done_run, tmp_path, case):
    folder = tmp_path / "copy"
    shutil.copytree(half_done_run, folder)
    run = folder / "model-stabie"
    config = json.loads((run / "config.json").read_text())
    config["inputs"] |= {"model": str(folder / "model.pt"), "reference": str(folder / "ref.xyz")}
    (run / "config.json").write_text(json.dumps(config))
    damage, words = damaged_runs()[case]
    damage(run)
    before = bytes_of(run)
    assert words in refused("finetune", "--resume", run)
    assert bytes_of(run).keys() == before.keys() and bytes_of(run)["metrics.jsonl"] == before["metrics.jsonl"]


def test_no_run_at_all(here):
    assert "no such directory" in refused("finetune", "--resume", "nothing")
    assert "no config.json" in refused("finetune", "--resume", ".")
    assert "is no run directory" in refused("finetune", "--resume", "ref.xyz")


def test_a_device_that_has_gone(half_done_run, tmp_path, monkeypatch):
    shutil.copytree(half_done_run / "model-stabie", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["inputs"]["device"] = "cuda"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA was asked for" in refused("finetune", "--resume", tmp_path / "run")


def test_trust_is_not_inherited(half_done_run, tmp_path):
    """A run directory from someone else must not run code by being resumed."""
    shutil.copytree(half_done_run / "model-stabie", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["inputs"]["trust_checkpoint"] = True
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert "was begun with --trust-checkpoint" in refused("finetune", "--resume", tmp_path / "run")


def test_other_versions_are_told(half_done_run, tmp_path, caplog):
    shutil.copytree(half_done_run / "model-stabie", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["versions"]["torch"] = "0.4"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    Finetuning.resume(tmp_path / "run")
    assert "torch 0.4 -> " in caplog.text


# -- what a run directory holds


def test_the_model_became_more_stable(finished):
    """Start to end, seed 0: 10.4 -> 1.1 failures per replica-ps (p = 6e-5), seed 1: 5.4 -> 0 (p = 3e-4)."""
    path, printed = finished
    result = json.loads((path / "result.json").read_text())
    assert result["gained"] and "more stable" in result["message"]
    start, end = result["models"]["start"], result["models"]["stabie"]
    assert start["hazard_per_ps_interval"][0] > end["hazard_per_ps"]
    assert end["held_out_force_mae_eV_per_A"] < 1.05 * start["held_out_force_mae_eV_per_A"]
    assert {"reference_force_mae_eV_per_A", "held_out_energy_mae_eV", "hr_error_floor", "failures_by_cause"} <= set(end)
    assert sum(start["what_broke"].values()) == start["n_failed"] and all("bond" in what for what in start["what_broke"])
    assert "On held-out frames: force MAE" in result["message"] and "held out" in result["frames"]["held_out"]
    assert result["p_value"] <= 0.05 and result["test"]["rounds"] >= 1
    assert result["message"] in printed.stdout and "replicas failed" in printed.stdout


def test_files_of_a_run(finished):
    path, printed = finished
    assert {p.name for p in path.iterdir()} == {
        "config.json", "log.txt", "metrics.jsonl", "state.pt", "model.pt", "unstable.traj", "result.json", "report.html", "figures",
    }  # fmt: skip
    assert f"Model: {path.name}/model.pt" in printed.stdout and "stabie-ase view model-stabie" in printed.stdout
    assert load_potential(path / "model.pt").family == "schnet"
    state = torch.load(path / "state.pt", weights_only=True)  # tensors and plain values only
    assert state["lengths"] == {"metrics": len(metrics(path)), "unstable": len(read(path / "unstable.traj", ":"))}


def test_what_broke_in_training_is_told(finished):
    path, printed = finished
    (line,) = [line for line in printed.stdout.splitlines() if line.startswith("What broke in training: ")]
    assert re.findall(r"(\S+ \S+) (\d+)", line.split(": ")[1]) == [("C-C bond", str(len(read(path / "unstable.traj", ":"))))]


def test_unstable_frames_are_read_once(here, monkeypatch):
    read_frames, files = view._of_frames, []
    monkeypatch.setattr(view, "_of_frames", lambda trajectory, what: files.append(trajectory) or read_frames(trajectory, what))
    printed = tiny.run(*BEGIN)
    assert "What broke in training: C-C bond" in printed.stdout and "each at the moment" in (here / "model-stabie/report.html").read_text()
    assert [file.name for file in files] == ["unstable.traj"]


def test_config_holds_every_option_resolved(finished):
    config = json.loads((finished[0] / "config.json").read_text())
    assert set(config["config"]) == {option.name for option in fields(FinetuneOptions)}
    assert config["config"]["dynamics"]["temperature_K"] == tiny.TEMPERATURE  # from the reference
    assert config["config"]["dynamics"]["replicas"] == 12 and config["config"]["labels"]["learning_rate"] == 3e-3
    assert from_dict(FinetuneOptions, config["config"]).dynamics.replicas == 12
    assert config["inputs"]["model"] == str(finished[0].parent / "model.pt") and len(config["digests"]["model"]) == 64
    assert {"torch", "ase", "numpy", "stabie_ase", "python"} <= set(config["versions"]) and config["hardware"]
    assert config["model"] == "model.pt" and config["reference"].startswith("40 frames of C4")


def test_metrics_are_one_line_a_window(finished):
    records = metrics(finished[0])
    assert {r["phase"] for r in records} == {"simulation", "learning"}
    for r in records:
        assert {"phase", "cycle", "window", "md_replica_ps", "unstable_fraction"} <= set(r) and 0 <= r["unstable_fraction"] <= 1
    assert [r["md_replica_ps"] for r in records] == sorted(r["md_replica_ps"] for r in records)


def test_unstable_frames_on_disk_carry_their_story(finished):
    frames = read(finished[0] / "unstable.traj", ":")
    criterion = BondLengthDeviation.from_reference(tiny.reference().frames, 0.3)
    lengths = {tuple(b): float(r) for b, r in zip(criterion.bonds.T.tolist(), criterion.lengths)}
    assert len(frames) > 5
    for atoms in frames:
        blamed = tuple(np.flatnonzero(atoms.get_tags() == 1))
        assert abs(atoms.get_distance(*blamed) - lengths[blamed]) == pytest.approx(atoms.info["value"], abs=1e-9)
        assert {"cycle", "replica", "time_ps", "criterion", "value"} <= set(atoms.info)


def test_config_file_reproduces_the_run(here, finished, no_report):
    result = tiny.run("-q", "finetune", "model.pt", "--ref", "ref.xyz", "--config", finished[0] / "config.json", "--output", "again")
    assert result.exit_code == 0, result.output
    same_ends(here / "again", finished[0])


def captured(monkeypatch, *arguments):
    """The inputs and the config that a command would begin a run with."""
    got = []

    def instead(output, inputs, config, *rest, **settings):
        got.append((str(output), inputs, config))
        raise KeyboardInterrupt

    monkeypatch.setattr(Finetuning, "begin", instead)
    assert tiny.run("finetune", "model.pt", "--ref", "ref.xyz", *arguments).exit_code == 130
    return got[0]


def test_flags_win_over_the_config_file(here, monkeypatch):
    (here / "options.json").write_text('{"replicas": 5, "window_fs": 100, "cross_fit": true}')
    _, _, config = captured(monkeypatch, "--config", "options.json", "--replicas", "7", "--no-cross-fit")
    assert (config.dynamics.replicas, config.phases.window_fs, config.estimator.cross_fit) == (7, 100, False)
    assert config.dynamics.timestep_fs == FinetuneOptions().dynamics.timestep_fs


def test_config_of_a_run_brings_its_keys_but_neither_files_nor_trust(here, monkeypatch):
    inputs = asdict(Inputs("old.pt", "old.xyz", "valid.xyz", "E", "F", "cpu", "float64", None, True))
    (here / "options.json").write_text(json.dumps({"config": {}, "inputs": inputs}))
    output, got, _ = captured(monkeypatch, "--config", "options.json", "--forces-key", "G")
    assert got == Inputs("model.pt", "ref.xyz", None, "E", "G", "cpu", "float64", None, False)
    assert output == "model-stabie"


@pytest.mark.parametrize(
    "model, run, result",
    [
        ("a/b.pt", "a/b-stabie", "model.pt"),
        ("b.v2.model", "b.v2-stabie", "model.model"),
        ("plain", "plain-stabie", "model"),
    ],
)
def test_names_of_run_and_model(here, monkeypatch, model, run, result):
    got = []
    monkeypatch.setattr(Finetuning, "begin", lambda output, *rest, **settings: got.append(str(output)) or 1 / 0)
    tiny.run("finetune", model, "--ref", "ref.xyz")
    assert got == [run]
    assert run_module.model_path(run_directory_module.RunDirectory(run), Inputs(model, "ref.xyz")).name == result


# -- the final comparison


def stability(n_failed, ps=100.0, n=50):
    """Of a test in which some of the replicas failed."""
    failed = np.arange(n) < n_failed
    observed = SlicedMeans(torch.zeros((n, 1, 1), dtype=torch.float64), torch.ones((n, 1), dtype=torch.int64))
    statistics = StabilityStatistics(np.full(n, ps / n), failed)
    return StabilityResult(statistics, Counter(bonds=n_failed), [], {"hr": observed}, torch.ones((n, 1), dtype=torch.bool))


@pytest.mark.parametrize(
    "failures, kept, shown",
    [
        ({"start": 40, "best": 5, "last": 30}, "best", 5),
        ({"start": 40, "best": 30, "last": 5}, "last", 5),
        ({"start": 40, "best": 39, "last": 45}, "start", 39),
        ({"start": 5, "best": 40, "last": 45}, "start", 40),
        ({"start": 40}, "start", 40),
    ],
)
def test_the_winner_is_written_and_the_start_unless_something_was_gained(here, monkeypatch, failures, kept, shown):
    finetuning = Finetuning.begin("run", Inputs("model.pt", "ref.xyz"), tiny.config())
    start = finetuning.training.start_weights
    name = "network.lin1.bias"
    candidates = {k: start | {name: start[name] + i} for i, k in enumerate(failures)}
    assert list(candidates)[0] == "start"
    monkeypatch.setattr(finetuning.training, "candidates", lambda: candidates)

    def fake(potential, *arguments):
        shift = float((potential.state_dict()[name] - start[name])[0])
        return stability(list(failures.values())[round(shift)])

    monkeypatch.setattr(comparison, "run_stability_test", fake)
    result = finetuning.finish()
    rounds = result["test"]["rounds"]
    assert result["models"]["start"]["n_failed"] == rounds * failures["start"]
    assert result["models"]["stabie"]["n_failed"] == rounds * shown
    assert result["gained"] is (kept != "start")
    written = load_potential(here / "run" / "model.pt").state_dict()
    assert torch.equal(written[name], candidates[kept][name])


def test_the_comparison_uses_starts_and_seeds_of_its_own(here, monkeypatch):
    finetuning = Finetuning.begin("run", Inputs("model.pt", "ref.xyz"), tiny.config(seed=4))
    tests = []
    candidates = dict.fromkeys(("start", "best", "last"), finetuning.training.start_weights)
    monkeypatch.setattr(finetuning.training, "candidates", lambda: candidates)
    monkeypatch.setattr(comparison, "run_stability_test", lambda *a: tests.append(a[3]) or stability(3))
    finetuning.finish()
    seeds = [t.seed for t in tests]
    assert seeds[:2] == [5 + comparison.HEAT_SEED_OFFSET] * 2  # those that choose are not those that tell
    assert seeds[2:] == [5 + k // 2 for k in range(len(seeds) - 2)] and tests[0].replicas == 8


@pytest.mark.parametrize(
    "asked, seconds, expected",
    [
        ((8, None), 5.0, (8, 4.0)),  # five seconds for a picosecond of a replica: time enough
        ((8, None), 1000.0, (8, 0.037)),  # 600 s / (8 replicas of 2 models, 1000 s a picosecond), in two digits
        ((8, None), 1e9, (8, 0.005)),  # one look at the criterion at least
        ((8, 3.0), 1e9, (8, 3.0)),  # as asked
        ((None, None), 1.0, (64, 4.0)),
        ((None, None), 6.0, (12, 4.0)),  # 50 replica-ps of each model: fewer replicas before a shorter time
        ((None, None), 50.0, (8, 0.75)),
        ((None, 0.1), 50.0, (60, 0.1)),
    ],
)
def test_a_comparison_nobody_has_timed_takes_no_longer_than_the_loop(here, asked, seconds, expected):
    finetuning = Finetuning.begin("run", Inputs("model.pt", "ref.xyz"), tiny.config(check_replicas=asked[0], check_time_ps=asked[1]))
    assert finetuning.check_round == (asked[0] or 64, asked[1] or 4.0)  # no speed known yet
    counters = finetuning.training.pools[0].counters
    counters.md_steps, counters.md_seconds = 1000, seconds
    assert finetuning.check_round == pytest.approx(expected)


def test_a_comparison_is_long_enough_for_criteria_of_windows(here, monkeypatch, caplog):
    """However slow the dynamics are; who asks for a shorter one is told that such criteria find nothing."""
    finetuning = Finetuning.begin("run", Inputs("model.pt", "ref.xyz"), tiny.config(check_replicas=None, check_time_ps=None))
    counters = finetuning.training.pools[0].counters
    counters.md_steps, counters.md_seconds = 1000, 1e6
    (plan,) = finetuning.plans
    judge = SimpleNamespace(name="slow", span_ps=1.0)
    monkeypatch.setattr(finetuning, "plans", [replace(plan, yardstick=replace(plan.yardstick, criteria=[judge]))])
    assert finetuning.check_round == (8, 1.0)
    finetuning.plans[0].yardstick.warn_if_blind(1.0)
    assert not caplog.messages
    finetuning.plans[0].yardstick.warn_if_blind(0.5)
    assert caplog.messages == ["replicas run 0.5 ps, and slow judges windows of 1 ps: it finds nothing"]


@pytest.mark.parametrize("hazard, limits, told", [
    (100.0, {}, False),  # 0.12 replica-ps are enough, and two rounds of eight replicas of 0.03 ps are more
    (1.0, {}, True),
    (1.0, {"check_time_ps": 3.0}, False),
    (1.0, {"check_time_ps": 3.0, "check_max_time_min": 0.05}, True),  # 3 s, of which either model has 1.5
])  # fmt: skip
def test_a_comparison_too_short_for_a_rare_failure_is_warned_of_once_that_is_known(here, monkeypatch, caplog, hazard, limits, told):
    finetuning = Finetuning.begin("run", Inputs("model.pt", "ref.xyz"), tiny.config(check_rounds=2, **limits))
    progress, phases = finetuning.training.progress, iter(["simulation", "learning", "simulation", "learning", "finished"])
    counters = finetuning.training.pools[0].counters
    counters.md_steps, counters.md_seconds = 1000, 1.0  # one replica-ps a second

    def step():
        record = {"phase": progress.phase, "cycle": progress.cycle, "window": 1, "hazard_per_ps": hazard}
        progress.phase = next(phases)
        progress.cycle += record["phase"] == "learning"
        return record, []

    monkeypatch.setattr(finetuning.training, "step", step)
    finetuning.train()
    warned = [message for message in caplog.messages if "a gain may be missed" in message]
    assert len(warned) == told and all(f"fails about {hazard:.2g} times a replica-ps" in message for message in warned)


def test_criteria_that_call_the_reference_unstable_are_warned_of(here, caplog):
    Finetuning.begin("run", Inputs("model.pt", "ref.xyz"), tiny.config(criterion="bonds:0.02"))
    assert "of 40 reference frames are unstable by the criteria of training (bonds" in caplog.text
    caplog.clear()
    Finetuning.begin("other", Inputs("model.pt", "ref.xyz"), tiny.config())
    assert "tolerances" not in caplog.text
