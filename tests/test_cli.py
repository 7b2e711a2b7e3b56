"""The command line as its users meet it: bad input, files that stay untouched, ctrl-C, progress, help."""

import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from ase.io import read, write

from stabie_ase.cli.progress import ProgressBar
from stabie_ase.system.files import as_json


def contents(folder):
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} | {
        p.relative_to(folder): None for p in folder.rglob("*") if p.is_dir()
    }


def refused(*arguments, folder=None):
    """Run a command that must end in one line and change nothing; returns the line."""
    before = contents(folder) if folder else None
    result = tiny.run(*arguments)
    assert result.exit_code not in (0, 130), result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    assert "Traceback" not in result.output
    if folder:
        assert contents(folder) == before
    return lines[0]


def told(line, *fragments):
    for fragment in fragments:
        assert fragment in line, line


FINETUNE = ("finetune", "model.pt", "--ref", "ref.xyz")
EVALUATE = ("evaluate", "model.pt", "--ref", "ref.xyz")
COMMANDS = {"finetune": FINETUNE, "evaluate": EVALUATE, "pretrain": ("pretrain", "--model", "schnet", "--ref", "ref.xyz", "-o", "new.pt")}


# -- reference files (what each says is the business of test_reference)


@pytest.mark.parametrize("command", COMMANDS)
def test_reference_that_cannot_be_read(here, command):
    (here / "ref.xyz").unlink()
    told(refused(*COMMANDS[command], folder=here), "ref.xyz: no such file")
    (here / "ref.xyz").touch()
    told(refused(*COMMANDS[command], folder=here), "empty")
    (here / "ref.xyz").write_bytes(bytes(range(128, 256)))
    told(refused(*COMMANDS[command], folder=here), "not a structure file")
    (here / "ref.xyz").unlink()
    (here / "ref.xyz").mkdir()
    told(refused(*COMMANDS[command], folder=here), "is a directory")


@pytest.mark.parametrize("command", COMMANDS)
def test_reference_without_labels(here, command):
    frames = read("ref.xyz", ":")
    for atoms in frames:
        atoms.info["my_energy"] = atoms.calc.results["energy"]
        atoms.calc = None
    write("ref.xyz", frames)
    told(refused(*COMMANDS[command], folder=here), "no energy", "keys found: my_energy, temperature_K", "--energy-key")
    told(refused(*COMMANDS[command], "--energy-key", "my_energy", folder=here), "no forces", "--forces-key")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: a.calc.results["forces"].__setitem__((0, 0), np.nan), "not finite"),
        (lambda a: a.calc.results["forces"].__setitem__((0, 0), 1e4), "1e+04 eV/Å"),
    ],
)
def test_reference_with_a_damaged_frame(here, change, words):
    frames = read("ref.xyz", ":")
    change(frames[7])
    write("ref.xyz", frames)
    for arguments in COMMANDS.values():
        told(refused(*arguments, folder=here), "ref.xyz: frame 7", words)


def labelled(path, frames, temperature=600.0):
    frames = tiny.label(frames)
    for atoms in frames:
        atoms.info["temperature_K"] = temperature
    write(path, frames)


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_systems_that_do_not_fit(here, command):
    images = tiny.frames(12)
    labelled("ref.xyz", [atoms[:3] if k == 5 else atoms for k, atoms in enumerate(images)])
    told(refused(*COMMANDS[command], folder=here), "one molecule")
    nitrogen = [Atoms("C3N", atoms.positions) for atoms in images]
    labelled("ref.xyz", nitrogen)
    told(refused(*COMMANDS[command], folder=here), "does not know N", "made for C")
    for atoms in images:
        results = atoms.calc.results
        atoms.set_cell([2.5, 5.0, 5.0])  # bonds reach from one image to the next
        atoms.pbc = True
        atoms.calc = tiny.SinglePointCalculator(atoms, **results)
    write("ref.xyz", images)
    told(refused(*COMMANDS[command], "--criterion", "contacts:0.3", folder=here), "periodic")
    told(refused(*COMMANDS[command], "--observable", "hr", folder=here), "periodic")


def test_too_few_frames(here):
    write("ref.xyz", tiny.frames(9))
    told(refused(*FINETUNE, folder=here), "9 frames, at least 10")
    told(refused(*COMMANDS["pretrain"], folder=here), "9 frames, at least 10")


def test_validation_frames_are_checked_too(here):
    told(refused(*FINETUNE, "--valid", "no.xyz", folder=here), "no.xyz: no such file")
    labelled("valid.xyz", [Atoms("N4", atoms.positions) for atoms in tiny.frames(3)])
    told(refused(*FINETUNE, "--valid", "valid.xyz", folder=here), "does not know N")


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_no_temperature_anywhere(here, command):
    frames = read("ref.xyz", ":")
    for atoms in frames:
        del atoms.info["temperature_K"]
    write("ref.xyz", frames)
    told(refused(*COMMANDS[command], folder=here), "no single temperature", "--temperature")


# -- checkpoints


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2000])


def without_file(path):
    path.unlink()


def directory(path):
    path.unlink()
    path.mkdir()


CHECKPOINTS = {
    "missing": (without_file, ("no such file",)),
    "directory": (directory, ("not a file",)),
    "empty": (lambda path: path.write_bytes(b""), ("empty",)),
    "truncated": (cut_short, ("cut short or damaged",)),
    "random bytes": (lambda path: path.write_bytes(bytes(range(256)) * 8), ("not a torch checkpoint",)),
    "unknown family": (lambda path: torch.save({"weight": torch.zeros(3)}, path), ("keys weight", "Known:", "MACE")),
    "evil": (lambda path: torch.save(Evil(), path), ("posix.system", "--trust-checkpoint")),
    "old pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), ("not a torch checkpoint",)),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint_that_cannot_be_used(here, case):
    damage, words = CHECKPOINTS[case]
    damage(here / "model.pt")
    for arguments in (FINETUNE, EVALUATE):
        told(refused(*arguments, folder=here), "model.pt", *words)
    assert not (here / "pwned").exists()


def test_compared_checkpoint_is_checked_before_anything_runs(here, monkeypatch):
    monkeypatch.setattr("stabie_ase.runs.evaluate.run_stability_test", None)
    told(refused(*EVALUATE, "--compare", "other.pt", folder=here), "other.pt: no such file")


# -- options

BAD_FINETUNE_OPTIONS = [
    (("--device", "gpu"), ("unknown device 'gpu'", "cpu, cuda")),
    (("--device", "meta"), ("unknown device 'meta'",)),
    (("--dtype", "float16"), ("float32",)),
    (("--observable", "rfd"), ("unknown observable 'rfd'", "did you mean 'rdf'")),
    (("--criterion", "torsions:0.3"), ("unknown criterion 'torsions'", "known: angles, bonds")),
    (("--criterion", "bonds"), ("no tolerance", "bonds:0.25")),
    (("--criterion", "bonds:-0.5"), ("positive", "-0.5")),
    (("--criterion", "bonds:nan"), ("positive", "nan")),
    (("--criterion", "bonds:inf"), ("positive", "inf")),
    (("--check-criterion", "bonds:zero"), ("expected a number",)),
    (("--timestep", "-1"), ("timestep_fs is -1", "0.001")),
    (("--timestep", "0"), ("timestep_fs is 0",)),
    (("--timestep", "1e6"), ("timestep_fs", "20")),
    (("--timestep", "nan"), ("timestep_fs is nan",)),
    (("--timestep", "half"), ("'half' is not a valid float",)),
    (("--temperature", "-300"), ("temperature_K is -300",)),
    (("--temperature", "0"), ("temperature_K is 0",)),
    (("--temperature", "inf"), ("temperature_K is inf",)),
    (("--replicas", "0"), ("replicas is 0", "2")),
    (("--replicas", "-3"), ("replicas is -3",)),
    (("--replicas", "99999999999"), ("replicas",)),
    (("--replicas", "2.5"), ("'2.5' is not a valid integer",)),
    (("--window", "-1"), ("window_fs is -1",)),
    (("--window", "1e300"), ("window_fs",)),
    (("--relaxation-time", "9"), ("relaxation_time_fs is 9", "langevin thermostat", "leave it out")),
    (("--window", "500", "--sample-every", "1000"), ("sample_every_fs is 1000", "one window (500 fs)")),
    (("--timestep", "0.5", "--check-every", "0.1"), ("check_every_fs is 0.1", "one step (0.5 fs)")),
    (("--observable-weight", "-1"), ("observable_weight is -1",)),
    (("--observable-weight", "nan"), ("observable_weight is nan",)),
    (("--upper-fraction", "1.5"), ("upper_fraction is 1.5",)),
    (("--lower-fraction", "0.1", "--upper-fraction", "0.1"), ("lower_fraction is 0.1 and upper_fraction 0.1",)),
    (("--max-time", "-1"), ("max_time_min is -1",)),
    (("--max-cycles", "0"), ("max_cycles is 0",)),
    (("--seed", "-1"), ("seed is -1",)),
    (("--thermostat", "berendsen"), ("'berendsen' is not one of",)),
    (("--replica", "3"), ("No such option '--replica'", "--replicas")),
    (("--head", "dft"), ("no head 'dft'",)),
    (("surplus",), ("unexpected extra argument",)),
]


@pytest.mark.parametrize("arguments, words", BAD_FINETUNE_OPTIONS, ids=lambda x: "=".join(x)[:40])
def test_bad_option_of_finetune(here, arguments, words):
    told(refused(*FINETUNE, *arguments, folder=here), *words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--time", "0"), ("time_ps is 0",)),
        (("--time", "nan"), ("time_ps is nan",)),
        (("--time", "1e300"), ("time_ps",)),
        (("--replicas", "0"), ("replicas is 0",)),
        (("--replicas", "99999999999"), ("replicas",)),
        (("--temperature", "nan"), ("temperature_K is nan",)),
        (("--timestep", "inf"), ("timestep_fs is inf",)),
        (("--observable", "rfd"), ("unknown observable 'rfd'", "did you mean 'rdf'")),
        (("--criterion", "x"), ("unknown criterion",)),
        (("--device", "gpu"), ("unknown device",)),
        (("--seed", "-1"), ("seed is -1",)),
    ],
    ids=lambda x: "=".join(x)[:40],
)
def test_bad_option_of_evaluate(here, arguments, words):
    told(refused(*EVALUATE, *arguments, folder=here), *words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--model", "gap"), ("'gap' is not one of 'schnet', 'mace'",)),
        (("--epochs", "0"), ("epochs is 0",)),
        (("--learning-rate", "nan"), ("learning_rate is nan",)),
        (("--batch-size", "-1"), ("batch_size is -1",)),
        (("--device", "gpu"), ("unknown device",)),
    ],
    ids=lambda x: "=".join(x)[:40],
)
def test_bad_option_of_pretrain(here, arguments, words):
    family = () if "--model" in arguments else ("--model", "schnet")
    told(refused("pretrain", *family, "--ref", "ref.xyz", "-o", "new.pt", *arguments, folder=here), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("command", COMMANDS)
def test_cuda_that_is_not_there(here, command):
    for device in ("cuda", "cuda:1"):
        told(refused(*COMMANDS[command], "--device", device, folder=here), "CUDA was asked for", "--device cpu")


def test_cuda_device_that_is_not_there(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told(refused(*EVALUATE, "--device", "cuda:2", folder=here), "no cuda:2")


def test_missing_arguments(here):
    told(refused("finetune", folder=here), "give MODEL and --ref FILE, or --resume RUN")
    told(refused("finetune", "model.pt", folder=here), "give MODEL and --ref FILE")
    told(refused("evaluate", folder=here), "Missing argument 'MODEL'")
    told(refused("pretrain", "--ref", "ref.xyz", folder=here), "Missing option")
    told(refused("fine-tune", folder=here), "No such command 'fine-tune'")
    told(refused("view", "ref.xyz", folder=here), "neither a run directory")


# -- config files


@pytest.mark.parametrize(
    "content, words",
    [
        ("not json", ("not JSON",)),
        ("", ("not JSON",)),
        ("[1, 2]", ("expected options and their values",)),
        ('{"config": 3}', ("unknown option 'config'",)),
        ('{"replica": 3}', ("unknown option 'replica'", "did you mean 'replicas'?")),
        ('{"max_tme": 3}', ("unknown option 'max_tme'", "did you mean 'max-time'?")),
        ('{"replicas": "many"}', ("'many' is not a valid integer",)),
        ('{"replicas": 3.5}', ("'3.5' is not a valid integer",)),
        ('{"timestep_fs": true}', ("timestep_fs is True, expected a value",)),
        ('{"timestep_fs": NaN}', ("timestep_fs is nan",)),
        ('{"timestep": {"fs": 1}}', ("timestep is {'fs': 1}, expected a value",)),
        ('{"timestep": [1, 2]}', ("expected one value",)),
        ('{"cross_fit": 1}', ("cross_fit is 1, expected true or false",)),
        ('{"criterion": 0.25}', ("unknown criterion '0.25'",)),
        ('{"observable": ["hr", "hr"]}', ("given twice",)),
        ('{"check": {"replica": 3}}', ("check: unknown option 'replica'", "did you mean 'replicas'?")),
        ('{"chek": {"replicas": 3}}', ("unknown option 'chek'", "did you mean 'check'?")),
        ('{"check": {"replicas": 3}, "check-replicas": 4}', ("check-replicas is given twice",)),
        ('{"check": 3}', ("check is 3, expected options by their names",)),
        ('{"replicas": 3, "replicas": 4}', ("replicas is given twice",)),
        ('{"check": {"rounds": 3, "rounds": 4}}', ("rounds is given twice",)),
        ('{"check": {"replicas": {"n": 3}}}', ("check: replicas is {'n': 3}, expected a value",)),
        ('{"config": {}, "inputs": {"device": "gpu"}}', ("unknown device 'gpu'",)),
    ],
)
def test_bad_config_file(here, content, words):
    (here / "options.json").write_text(content)
    told(refused(*FINETUNE, "--config", "options.json", folder=here), *words)


def test_config_file_that_cannot_be_read(here):
    told(refused(*FINETUNE, "--config", "nothing.json", folder=here), "nothing.json: No such file")
    told(refused(*FINETUNE, "--config", ".", folder=here), "Is a directory")
    (here / "options.json").write_bytes(bytes(range(128, 256)))
    told(refused(*FINETUNE, "--config", "options.json", folder=here), "no text")
    (here / "options.yaml").write_text("replicas: [3")
    told(refused(*FINETUNE, "--config", "options.yaml", folder=here), "neither JSON nor YAML")
    (here / "options.yaml").write_text("check:\n  rounds: 3\n  rounds: 4\n")
    told(refused(*FINETUNE, "--config", "options.yaml", folder=here), "rounds is given twice")


SECTIONS = """
check: {replicas: 3, check-rounds: 2, time_ps: 0.5, max-time: 1}
dynamics: {timestep: 0.25, friction_per_fs: 0.02}
labels:
  qm-steps: 7
update: {update: labels-only, gradient-clip: 2}
estimator: {cross-fit: true}
"""


def test_options_of_a_section_stand_together(here, monkeypatch):
    """By the names of the flags or of the options, with or without the section's own."""
    from stabie_ase.runs.finetune import Finetuning

    got = []
    monkeypatch.setattr(Finetuning, "begin", lambda output, inputs, config, *rest, **settings: got.append(config) or sys.exit(3))
    (here / "options.yaml").write_text(SECTIONS)
    tiny.run(*FINETUNE, "--config", "options.yaml", "--check-rounds", "4")
    (config,) = got
    assert (config.check.replicas, config.check.rounds, config.check.time_ps, config.check.max_time_min) == (3, 4, 0.5, 1)
    assert (config.dynamics.timestep_fs, config.dynamics.friction_per_fs, config.labels.qm_steps) == (0.25, 0.02, 7)
    assert (config.update.rule, config.update.gradient_clip, config.estimator.cross_fit) == ("labels-only", 2, True)


EVERY_COMMAND = {
    "finetune": ("model: model.pt\nref: [ref.xyz]\nmax-time: 0\nreplicas: 4\ncheck-rounds: 1\ncheck-time: 0.01\ncheck-replicas: 2\n"
                 "output: run\ntimestep: 1\n", ("replicas", "check_replicas"), "run/config.json"),
    "md": ("model: model.pt\nstart: ref.xyz\ntime: 0.004\ntimestep: 1\nreplicas: 2\nsample-every: 2\nno-fix-com: true\noutput: md\n",
           ("replicas", "fix_com"), "md/config.json"),
    "evaluate": ("model: model.pt\nref: ref.xyz\ntime: 0.004\ntimestep: 1\nreplicas: 2\noutput: found.json\n", (), "found.json"),
    "pretrain": ("model: schnet\nref: ref.xyz\nepochs: 1\noutput: new.pt\nlearning-rate: 1e-4\n", (), "new.pt"),
    "bench": ("model: model.pt\nref: ref.xyz\nreplicas: 1\nseconds: 0.01\n", (), None),
}  # fmt: skip


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_every_command_takes_its_options_from_a_file(here, command):
    """All that it needs, by the names of the flags; what is typed wins."""
    text, names, made = EVERY_COMMAND[command]
    (here / "options.yaml").write_text(text)
    result = tiny.run(command, "--config", "options.yaml", *(["--replicas", "3"] if names else []))
    assert result.exit_code == 0, result.output
    if names:
        config = json.loads((here / made).read_text())["config"]
        dynamics = config.get("dynamics", config)
        assert dynamics["replicas"] == 3 and dynamics["timestep_fs"] == 1.0
        assert config.get("fix_com", False) is False and config.get("check", {"replicas": 2})["replicas"] == 2
    elif made:
        assert (here / made).exists()
    (here / "options.yaml").write_text(text + "sed: 3\n")
    told(refused(command, "--config", "options.yaml"), "unknown option 'sed'", "seconds" if command == "bench" else "did you mean 'seed'?")


# -- what exists stays


def test_run_directory_that_is_not_empty(here):
    (here / "model-stabie").mkdir()
    (here / "model-stabie" / "notes.txt").write_text("mine")
    line = refused(*FINETUNE, folder=here)
    told(line, "model-stabie exists", "--output")
    assert "--resume" not in line
    (here / "model-stabie" / "config.json").write_text("{}")
    told(refused(*FINETUNE, folder=here), "--resume model-stabie")
    told(refused(*FINETUNE, "--output", "ref.xyz", folder=here), "ref.xyz exists")
    told(refused(*FINETUNE, "--output", "ref.xyz/run", folder=here), "not a folder that can be written to")


def test_unwritable_folder(here, monkeypatch):
    if os.access("/proc", os.W_OK):  # root may write everywhere, or so the permissions say
        told(refused(*FINETUNE, "--output", "/proc/run", folder=here), "cannot write to /proc/run")
    monkeypatch.setattr("os.access", lambda *a, **k: False)
    told(refused(*FINETUNE, folder=here), "cannot make model-stabie", "--output")
    told(refused(*EVALUATE, "--output", "result.json", folder=here), "cannot be written to")
    told(refused(*COMMANDS["pretrain"], folder=here), "cannot be written to")


@pytest.mark.parametrize("family", ["schnet", "mace"])
def test_the_placeholder_x_is_no_element_to_learn(here, family):
    frames = read(here / "ref.xyz", ":")
    for atoms in frames:
        atoms.numbers[0] = 0
    write(here / "ref.xyz", frames)
    told(refused("-q", "pretrain", "--model", family, "--ref", "ref.xyz", "-o", "new.pt", folder=here), "X (Z = 0)")


@pytest.mark.parametrize("arguments", [(*EVALUATE, "--output"), ("pretrain", "--model", "schnet", "--ref", "ref.xyz", "-o")])
def test_outputs_are_checked_before_any_work(here, arguments, monkeypatch):
    monkeypatch.setattr("stabie_ase.structures.reference.read_reference", None)
    told(refused(*arguments, "missing/new.json", folder=here), "missing is no folder")
    told(refused(*arguments, "model.pt", folder=here), "model.pt exists and is not overwritten")
    told(refused(*arguments, ".", folder=here), "exists")


# -- evaluate


FIGURES = {
    "n_replicas", "n_failed", "stable_replica_ps", "hazard_per_ps", "median_stable_ps", "reference_force_mae_eV_per_A",
    "reference_energy_mae_eV", "hr_error",
}  # fmt: skip


NOT_FINITE = """
import torch
from stabie_ase.observables import Axis, Observable

class Odd(Observable):
    name, label, axis = "odd", "odd", Axis.of_names("component", ["nan", "inf", "one"])

    def values(self, batch):
        return torch.tensor([[float("nan"), float("inf"), 1.0]]).expand(batch.n_systems, 3)
"""


def json_of(text):
    """As a strict reader takes it: NaN and Infinity are no JSON."""
    return json.loads(text, parse_constant=pytest.fail)


def test_an_observable_that_is_not_finite_spoils_no_file(here):
    (here / "odd.py").write_text(NOT_FINITE)
    shutil.copy("model.pt", "same.pt")
    odd = ("--observable", "odd.py:Odd,hr")
    evaluated = tiny.run(
        *EVALUATE, *odd, "--compare", "same.pt", "--time", "0.03", "--replicas", "4", "--timestep", "1", "--output", "result.json"
    )
    trained = tiny.run(*FINETUNE, *odd, *tiny.flags(update="labels-only", max_updates=1), "--output", "run")
    (row,) = [line for line in trained.stdout.splitlines() if line.startswith("odd error") and "while" not in line]
    assert evaluated.exit_code == 0, evaluated.output
    assert row.split() == ["odd", "error", *2 * ["not", "finite"]]
    assert "not finite" in evaluated.stdout
    figures = json_of((here / "result.json").read_text())["model.pt"]
    assert figures["odd_error"] is None and figures["odd_error_floor"] is None and figures["hr_error"] > 0
    result = json_of((here / "run" / "result.json").read_text())
    assert result["models"]["start"]["odd_error"] is None and result["observables"]["odd"]["reference"] == [None, None, 1.0]
    for line in (here / "run" / "metrics.jsonl").read_text().splitlines():
        json_of(line)
    assert "<th scope=\"row\">odd error</th><td>-</td><td>-</td>" in (here / "run" / "report.html").read_text()


def test_numbers_that_are_not_finite_are_null():
    data = {"a": [1.5, float("nan"), (float("inf"), np.float64("-inf"))], "b": {"c": float("nan"), "d": True, "e": "NaN", "f": 2}}
    assert json_of(as_json(data)) == {"a": [1.5, None, [None, None]], "b": {"c": None, "d": True, "e": "NaN", "f": 2}}


def test_evaluate_compares_from_the_same_starts(here, monkeypatch):
    import stabie_ase.runs.evaluation

    starts, real = [], stabie_ase.runs.evaluation.start

    def recorded(*arguments):
        starts.append(real(*arguments))
        return starts[-1]

    monkeypatch.setattr(stabie_ase.runs.evaluation, "start", recorded)
    shutil.copy("model.pt", "same.pt")
    result = tiny.run(
        *EVALUATE, "--compare", "same.pt", "--time", "0.06", "--replicas", "8", "--timestep", "1", "--criterion", "bonds:0.3",
        "--output", "result.json", "--seed", "3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert torch.equal(starts[0].batch.positions, starts[1].batch.positions)
    assert torch.equal(starts[0].momenta, starts[1].momenta) and torch.equal(starts[0].key, starts[1].key)
    figures = json.loads((here / "result.json").read_text())
    assert set(figures) == {"model.pt", "same.pt"}
    same, compared = figures["model.pt"], figures["same.pt"]
    assert same == {name: value for name, value in compared.items() if name in same} and same.keys() < compared.keys()
    assert compared["p_value"] > 0.4 and "p = " in result.stdout  # of equal models
    assert compared["hr_error_while_both_stable"] > 0
    assert set(figures["model.pt"]) >= FIGURES
    assert figures["model.pt"]["n_replicas"] == 8
    low, high = figures["model.pt"]["hazard_per_ps_interval"]
    assert low <= figures["model.pt"]["hazard_per_ps"] <= high
    assert figures["model.pt"]["hr_error"] > 0 and 0 < figures["model.pt"]["median_stable_ps"] < 0.06
    assert {"reference_energy_mae_eV", "reference_energy_mae_with_offset_eV"} <= set(figures["model.pt"])
    assert "same.pt" in result.stdout and "Reference: 40 frames of C4" in result.stdout
    assert os.listdir(here).count("result.json") == 1 and not list(here.glob(".*"))


def test_median_that_is_not_reached_is_null(here):
    options = ("--time", "0.005", "--replicas", "2", "--criterion", "bonds:9", "--output", "result.json")
    result = tiny.run(*EVALUATE, *options)
    figures = json.loads((here / "result.json").read_text())["model.pt"]
    assert figures["n_failed"] == 0 and figures["median_stable_ps"] is None and "> 0.005" in result.stdout


def test_evaluate_is_repeatable_and_depends_on_the_seed(here):
    def figures(name, *extra):
        options = ("--time", "0.03", "--replicas", "6", "--timestep", "1", "--criterion", "bonds:0.2", "--output", name)
        assert tiny.run("-q", *EVALUATE, *options, *extra).exit_code == 0
        return (here / name).read_text()

    assert figures("a.json") == figures("b.json", "--seed", "0")
    assert figures("c.json", "--seed", "1") != (here / "a.json").read_text()


def test_temperature_given_wins(here):
    result = tiny.run(*EVALUATE, "--time", "0.005", "--replicas", "2", "--temperature", "50")
    assert "at 50 K" in result.stdout


# -- pretrain


def pretrain(*extra):
    return ("pretrain", "--model", "schnet", "--ref", "ref.xyz", "-o", "new.pt", "--batch-size", "40", *extra)


@pytest.fixture
def small_builder(monkeypatch):
    """Pretraining in this process builds the tiny SchNet."""
    tiny.small_builder(monkeypatch)


def test_pretrain_writes_a_model_that_opens(here, small_builder):
    result = tiny.run(*pretrain("--epochs", "2"))
    assert result.exit_code == 0, result.output
    assert "Training schnet on 32 frames, validating on 8" in result.stdout and "Wrote new.pt" in result.stdout
    assert sorted(p.name for p in here.iterdir()) == ["model.pt", "new.pt", "ref.xyz"]
    assert tiny.run("-q", "evaluate", "new.pt", "--ref", "ref.xyz", "--time", "0.005", "--replicas", "2").exit_code == 0


@pytest.mark.parametrize(
    "family, extra, rate", [("schnet", (), 1e-3), ("mace", (), 1e-2), ("mace", ("--learning-rate", "0.002"), 0.002)]
)
def test_each_family_has_its_learning_rate(here, small_builder, monkeypatch, family, extra, rate):
    from stabie_ase.runs import pretrain as module

    tiny.small_builder(monkeypatch, "mace")
    began, real = [], module.Pretraining
    monkeypatch.setattr(module, "Pretraining", lambda *a: began.append(a[2]) or real(*a))
    assert tiny.run("pretrain", "--model", family, *pretrain("--epochs", "1", *extra)[3:]).exit_code == 0
    assert began[0].learning_rate == rate


def test_pretrain_goes_on_after_ctrl_c(here, small_builder, monkeypatch):
    from stabie_ase.training.pretrain import Pretraining

    assert tiny.run("-q", *pretrain("--epochs", "6")).exit_code == 0
    shutil.move("new.pt", "uninterrupted.pt")

    real, calls = Pretraining.run_epoch, []

    def interrupted(self):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(None)
        return real(self)

    monkeypatch.setattr("stabie_ase.runs.pretrain.SAVE_EVERY", -1.0)
    monkeypatch.setattr(Pretraining, "run_epoch", interrupted)
    result = tiny.run(*pretrain("--epochs", "6"))
    assert result.exit_code == 130
    assert "the same command goes on from new.pt.pretrain" in result.stderr
    monkeypatch.setattr(Pretraining, "run_epoch", real)
    told(refused(*pretrain("--epochs", "6", "--seed", "1"), folder=here), "another seed", "remove it")
    result = tiny.run(*pretrain("--epochs", "6"))
    assert result.exit_code == 0 and "Going on after epoch 3" in result.stdout
    assert not (here / "new.pt.pretrain").exists()
    one, other = (torch.load(name, weights_only=True)["state_dict"] for name in ("new.pt", "uninterrupted.pt"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_pretrain_refuses_a_state_that_is_not_its_own(here, small_builder):
    (here / "new.pt.pretrain").write_bytes(b"nonsense")
    told(refused(*pretrain(), folder=here), "new.pt.pretrain is no run directory: it is a file; remove new.pt.pretrain")
    (here / "new.pt.pretrain").unlink()
    (here / "new.pt.pretrain").mkdir()
    (here / "new.pt.pretrain" / "config.json").write_text("{}")
    told(refused(*pretrain(), folder=here), "config.json is damaged", "remove new.pt.pretrain to begin anew")


def test_pretrain_refuses_a_state_that_is_damaged(here, small_builder, monkeypatch):
    monkeypatch.setattr("stabie_ase.runs.pretrain.SAVE_EVERY", -1.0)
    monkeypatch.setattr("stabie_ase.runs.pretrain.save_potential", lambda *arguments: 1 / 0)
    tiny.run(*pretrain("--epochs", "1"))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    (here / "new.pt.pretrain" / "state.pt").write_bytes(b"nonsense")
    told(refused(*pretrain("--epochs", "1"), folder=here), "state.pt is damaged", "remove it to let the run begin again")


def test_pretrain_on_a_full_disk(here, small_builder, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "new.pt")

    monkeypatch.setattr("stabie_ase.potentials.schnet.write_atomically", full)
    told(refused("-q", *pretrain("--epochs", "1"), folder=here), "new.pt: No space left on device")


# -- ctrl-C


def test_ctrl_c_during_finetune(here):
    """One line with the command that goes on; and that command does."""
    metrics = here / "model-stabie" / "metrics.jsonl"

    def n_lines():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    process = tiny.Process(here, *FINETUNE, *tiny.flags(max_cycles=400))
    process.wait_for(lambda: n_lines() >= 2)
    assert process.interrupt() == 130
    assert process.stderr == "\ninterrupted; go on with: stabie-ase finetune --resume model-stabie\n"
    assert "Run directory: model-stabie" in process.stdout
    assert not list(here.glob("model-stabie/.*"))
    lines = metrics.read_text().splitlines()
    process = tiny.Process(here, "finetune", "--resume", "model-stabie")
    process.wait_for(lambda: n_lines() > len(lines))
    process.kill()
    assert metrics.read_text().splitlines()[: len(lines) - 1] == lines[:-1]


def test_a_run_is_worked_on_by_one_process_at_a_time(here):
    metrics = here / "model-stabie" / "metrics.jsonl"
    process = tiny.Process(here, *FINETUNE, *tiny.flags(max_cycles=400))
    process.wait_for(metrics.exists)
    result = tiny.run("finetune", "--resume", "model-stabie")
    assert result.exit_code == 1 and "another process is working on it" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    process.kill()
    process = tiny.Process(here, "finetune", "--resume", "model-stabie")  # a lock dies with its owner
    n = len(metrics.read_text().splitlines())
    process.wait_for(lambda: len(metrics.read_text().splitlines()) > n)
    assert process.interrupt() == 130


def test_ctrl_c_before_anything_was_written(here, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("stabie_ase.runs.inputs.read_reference", interrupted)
    before = contents(here)
    result = tiny.run(*FINETUNE)
    assert result.exit_code == 130 and result.stderr.strip() == "interrupted"
    assert contents(here) == before


# -- how it talks


@pytest.mark.parametrize("command", ["", "demo", "evaluate", "finetune", "pretrain", "view"])
def test_help(command):
    result = tiny.run(*command.split(), "-h")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stdout == tiny.run(*command.split(), "--help").stdout


def test_every_finetune_option_is_in_the_help_with_its_default():
    from stabie_ase.cli.options import flag
    from stabie_ase.system.options import leaves
    from stabie_ase.training.options import FinetuneOptions

    text = " ".join(tiny.run("finetune", "--help").stdout.split())
    for leaf in leaves(FinetuneOptions):
        default = leaf.option.default
        assert f"{flag(leaf.name)} " in text
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert f"[default: {default}]" in text


def test_help_does_not_wait_for_torch():
    code = "import sys, stabie_ase.cli; assert not {'torch', 'ase', 'scipy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tiny.ROOT)


def test_version():
    import stabie_ase

    assert tiny.run("--version").stdout == f"stabie-ase, version {stabie_ase.__version__}\n"


def test_quiet_gives_results_and_no_more(here):
    result = tiny.run("-q", *EVALUATE, "--time", "0.005", "--replicas", "2")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.strip().splitlines()[0].strip() == "model.pt"


def test_unexpected_errors_are_one_line_unless_asked(here, monkeypatch):
    def broken(*arguments, **settings):
        raise KeyError("a bug")

    monkeypatch.setattr("stabie_ase.runs.evaluate.read_reference", broken)
    told(refused(*EVALUATE), "KeyError: 'a bug'", "-vv")
    assert isinstance(tiny.run("-vv", *EVALUATE).exception, KeyError)


def test_progress_in_a_pipe_is_plain_lines(capsys):
    with ProgressBar(100.0, "work", every=0.0) as progress:
        progress.show(25.0, "going well")
        progress.show(50.0, "going on")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"work: 25 % after 0 s, 0 s left; going well", lines[0])
    assert "\r" not in "".join(lines)
    with ProgressBar(100.0, "work", quiet=True, every=0.0) as progress:
        progress.show(25.0, "going well")
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("stabie_ase.cli.progress.REFRESH_SECONDS", 0.0)
    log = logging.getLogger("stabie_ase")
    with ProgressBar(100.0, "work") as progress:
        progress.show(25.0, "going well")
        tiny.run("--help")
        log.warning("beware")
        progress.show(100.0, "going on")
    text = capsys.readouterr().err
    assert "work  25 % |" in text.replace("25%", "25 %") or "25%" in text
    assert "going well" in text and "100%" in text and text.endswith("\n")
