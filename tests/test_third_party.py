"""An observable, a criterion and an update rule of somebody else's, one file outside the package, through the command line."""

import json

import numpy as np
import pytest
import tiny
from ase.io import read

CODE = '''
import torch
from stabie_ase.observables import Axis, Observable
from stabie_ase.stability import Verdict
from stabie_ase.stability.criteria.base import OneFrame
from stabie_ase.training.updates import NaturalGradient


class Gyration(Observable):
    """A single number for each frame."""

    name, label, axis = "gyration", "radius of gyration (Å)", Axis.of_names("", ["R"])

    def values(self, batch):
        centre = batch.sum_over_atoms(batch.positions) / batch.counts[:, None]
        squares = (batch.positions - centre[batch.system]).square().sum(dim=1)
        return (batch.sum_over_atoms(squares) / batch.counts).sqrt()[:, None]


class Inverted(OneFrame):
    """The tetrahedron that the first four atoms make is on its way to the other hand."""

    name, unit = "inverted", "Å³"

    def __init__(self, volume, tolerance):
        self.volume, self.tolerance = volume, tolerance

    @classmethod
    def from_spec(cls, spec, setting):
        volumes = [float(signed(torch.as_tensor(atoms.positions)[None])) for atoms in setting.frames]
        return cls(sum(volumes) / len(volumes), spec.read({"tolerance": float}).get("tolerance", 1.0))

    def judge(self, state):
        volume = signed(state.batch.positions.view(state.n_systems, -1, 3)).double()
        return Verdict((1.0 - volume / self.volume) / self.tolerance, volume, torch.arange(4).expand(state.n_systems, 4))

    def describe(self):
        return f"a tetrahedron of another hand ({self.volume:.2f} Å³ in the reference)"


def signed(positions):
    a, b, c = (positions[:, k] - positions[:, 0] for k in (1, 2, 3))
    return torch.linalg.det(torch.stack([a, b, c], dim=1)) / 6


class Halved(NaturalGradient):
    """Steps of half the length."""

    def _step(self, direction, length):
        super()._step(direction, 0.5 * length)
'''


@pytest.fixture()
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


def begin(output, **changes):
    return [
        "finetune", str(tiny.model_path()), "--ref", str(tiny.reference_path()), "--output", output, *tiny.flags(max_cycles=2, **changes),
        "--observable", "hr", "--observable", "mine.py:Gyration", "--criterion", "mine.py:Inverted,tolerance=0.2",
        "--update", "mine.py:Halved",
    ]  # fmt: skip


def test_a_run_with_classes_of_ones_own(here):
    """Reported under their own names, with a figure of a single component, and judged by a criterion of one's own."""
    result = tiny.run(*begin("run"))
    assert result.exit_code == 0, result.output
    assert "Code of yours" in result.output and "gyration error" in result.output
    found = json.loads((here / "run" / "result.json").read_text())
    start = found["models"]["start"]
    assert np.isfinite(start["gyration_error"]) and start["gyration_error_floor"] > 0 and "hr_error" in start
    assert found["observables"]["gyration"]["names"] == ["R"] and len(found["observables"]["gyration"]["reference"]) == 1
    assert (here / "run" / "figures" / "observable-gyration.png").stat().st_size > 5000
    about = json.loads((here / "run" / "config.json").read_text())
    assert any("of another hand" in line for line in about["criterion"])
    assert about["config"]["update"]["rule"] == f"{here}/mine.py:Halved"
    frames = read(here / "run" / "unstable.traj", ":")
    assert {atoms.info["criterion"] for atoms in frames} <= {"inverted", "bonds", "not finite"}
    assert "inverted" in {atoms.info["criterion"] for atoms in frames}


def test_it_resumes_exactly_also_from_another_folder(here, monkeypatch):
    whole = tiny.run(*begin("whole"))
    assert whole.exit_code == 0, whole.output
    process = tiny.Process(here, *begin("killed"))
    log = here / "killed" / "metrics.jsonl"
    process.wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 2)
    process.kill()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    resumed = tiny.run("finetune", "--resume", str(here / "killed"))
    assert resumed.exit_code == 0, resumed.output
    one, other = (json.loads((here / name / "result.json").read_text())["models"] for name in ("whole", "killed"))
    assert one == other


def test_code_that_has_changed_is_told(here):
    process = tiny.Process(here, *begin("killed"))
    log = here / "killed" / "metrics.jsonl"
    process.wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 1)
    process.kill()
    (here / "mine.py").write_text(CODE + "\n")
    changed = tiny.run("finetune", "--resume", "killed")
    assert changed.exit_code != 0 and "the code of killed has changed since the run began" in changed.output
    (here / "mine.py").unlink()
    gone = tiny.run("finetune", "--resume", "killed")
    assert gone.exit_code != 0 and "the code file of killed is gone" in gone.output


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("--observable", "mine.py:Gyrations", "mine.py has no Gyrations; did you mean 'Gyration'?"),
        ("--observable", "none.py:Gyration", "none.py: no such file"),
        ("--criterion", "mine.py:Inverted,tolerence=2", "did you mean 'tolerance'?"),
        ("--criterion", "mine.py:Inverted:3", "takes no argument"),
        ("--update", "broken.py:Rule", "broken.py cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_line_before_anything_is_written(here, flag, value, words):
    (here / "broken.py").write_text("1 / 0\n")
    arguments = ["finetune", str(tiny.model_path()), "--ref", str(tiny.reference_path()), "--output", "run", *tiny.flags()]
    result = tiny.run(*arguments, flag, value) if flag != "--criterion" else tiny.run(*arguments, "--criterion", value)
    assert result.exit_code != 0 and words in result.output and "Traceback" not in result.output
    assert not (here / "run").exists()
