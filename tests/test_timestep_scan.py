"""The largest stable time step: where it must be by the leapfrog's stability limit, and what chance does not decide."""

import json

import numpy as np
import pytest
import tiny

from stabie_ase.runs.options import EvaluationOptions
from stabie_ase.runs.timestep_scan import TimestepScan
from stabie_ase.stability import StabilityStatistics
from stabie_ase.system.options import BadOption


def statistics(n_failed, n=40, ps=2.0):
    return StabilityStatistics(np.where(np.arange(n) < n_failed, 0.5 * ps, ps), np.arange(n) < n_failed)


@pytest.mark.parametrize(
    "failures, largest",
    [((0, 0, 0), 4.0), ((0, 0, 40), 2.0), ((0, 40, 0), 1.0), ((10, 12, 30), 2.0), ((10, 3, 2), 4.0), ((0, 1, 2), 4.0)],
)
def test_chance_does_not_decide(failures, largest):
    """The first step that fails more often than the smallest ends it, whatever larger ones do."""
    assert TimestepScan((1.0, 2.0, 4.0), tuple(statistics(n) for n in failures)).largest_stable_fs == largest


def test_beyond_the_leapfrog_limit_nothing_is_stable(tmp_path):
    """ω h = 2: of four carbon atoms in a tetrahedron of springs the stiffest mode has ω² = 4 k/m, so that h is 16.5 fs."""
    import stabie_ase

    k = 2.0 * 3.0 * 1.8**2  # of Morse's well
    limit = 2.0 / np.sqrt(4.0 * k / 12.011) / 0.09822694788464063
    steps = f"{0.5 * limit:.3f},{1.3 * limit:.3f}"
    truth, frames = tiny.truth(), tiny.frames()
    found = stabie_ase.evaluate(
        truth, frames, timestep_fs=1.0, time_ps=0.5, replicas=12, criteria="bonds:0.8", temperature_K=600.0, timestep_scan=steps
    )["model"]
    assert found["largest_stable_timestep_fs"] == pytest.approx(0.5 * limit, abs=1e-3)
    assert [row["n_failed"] for row in found["timestep_scan"]] == [0, 0, 12]


@pytest.mark.parametrize("text", ["", "a", "0.5", "2,1", "1,1", "1,200", "nan"])
def test_steps_that_are_none(text):
    with pytest.raises(BadOption, match="timestep_scan is"):
        EvaluationOptions(timestep_scan=text)


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--time", "0.02", "--replicas", "4", "--timestep", "1", "--timestep-scan", "2,4", "--output", "found.json"]
    result = tiny.run("evaluate", tiny.model_path(), "--ref", tiny.reference_path(), *arguments)
    assert result.exit_code == 0 and "largest stable time step" in result.output
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert [row["timestep_fs"] for row in found["timestep_scan"]] == [1.0, 2.0, 4.0]
