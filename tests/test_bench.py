"""`stabie-ase bench`: what it prints, never how fast it is."""

import shutil

import pytest
import tiny

from stabie_ase.benchmark import Measurement, recommended


def test_the_fewest_replicas_near_the_best_rate():
    measured = [Measurement(n, rate, None) for n, rate in ((1, 10.0), (2, 19.0), (4, 30.0), (8, 31.0), (16, 29.0))]
    assert recommended(measured).replicas == 4
    assert recommended(measured[:2]).replicas == 2
    assert recommended(measured[:1]).replicas == 1


def test_a_table_and_a_recommendation(tmp_path, monkeypatch):
    shutil.copy(tiny.model_path(), tmp_path / "model.pt")
    shutil.copy(tiny.reference_path(), tmp_path / "ref.xyz")
    monkeypatch.chdir(tmp_path)
    result = tiny.run("bench", "model.pt", "--ref", "ref.xyz", "--replicas", "4", "--seconds", "0.02")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()[2:-1]]
    assert [row[0] for row in rows] == ["1", "2", "4"] and all(float(row[1]) > 0 for row in rows)
    assert result.output.splitlines()[-1].startswith("Use --replicas ")


@pytest.mark.parametrize("option, message", [("--replicas", "not in the range"), ("--seconds", "not in the range")])
def test_bad_numbers_are_refused(option, message):
    result = tiny.run("bench", "model.pt", "--ref", "ref.xyz", option, "0")
    assert result.exit_code != 0 and message in result.output
