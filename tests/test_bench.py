"""`stabie-ase bench`: what it prints, never how fast it is."""

import shutil

import pytest
import tiny

import stabie_ase.runs.benchmark as benchmark
from stabie_ase.runs.benchmark import Measurement, advice, recommended, sweep


def measurements(*rates):
    """Of 1, 2, 4, ... replicas."""
    return [Measurement(2**k, rate, None) for k, rate in enumerate(rates)]


def test_the_fewest_replicas_near_the_best_rate():
    measured = measurements(10.0, 19.0, 30.0, 31.0, 29.0)
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
    assert result.output.splitlines()[-1].startswith("Use --replicas ") and "The limit, --replicas 4," in result.output


def swept(monkeypatch, most, rate, fits=10**9):
    """What a sweep measures on a machine of this rate(replicas), and what it advises."""

    def measure(potential, frames, replicas, seconds, temperature_K):
        if replicas > fits:
            raise MemoryError
        return Measurement(replicas, rate(replicas), None)

    monkeypatch.setattr(benchmark, "measure", measure)
    measured = list(sweep(None, [], most, 1.0, 300.0))
    return [m.replicas for m in measured], advice(measured, most)


def test_what_ended_the_table_is_told(monkeypatch):
    tried, words = swept(monkeypatch, 6, rate=lambda n: 10.0 * n)
    assert tried == [1, 2, 4, 6]
    assert words.startswith("Use --replicas 6. The limit, --replicas 6, ended the table, not the machine")
    tried, words = swept(monkeypatch, 1, rate=lambda n: 10.0 * n)
    assert tried == [1] and "The limit, --replicas 1," in words
    tried, words = swept(monkeypatch, 4, rate=lambda n: min(10.0 * n, 20.0))
    assert tried == [1, 2, 4] and words.startswith("Use --replicas 2: 4 bring little more. The limit, --replicas 4,")
    tried, words = swept(monkeypatch, 1024, rate=lambda n: min(10.0 * n, 40.0))
    assert tried == [1, 2, 4, 8, 16] and words == "Use --replicas 4: more bring little here."
    tried, words = swept(monkeypatch, 16, rate=lambda n: min(10.0 * n, 40.0))
    assert words == "Use --replicas 4: more bring little here."  # the limit was met just when it no longer mattered
    tried, words = swept(monkeypatch, 1024, rate=lambda n: 10.0 * n, fits=8)
    assert tried == [1, 2, 4, 8] and words == "Use --replicas 8; 16 do not fit in memory."


@pytest.mark.parametrize("option, message", [("--replicas", "not in the range"), ("--seconds", "not in the range")])
def test_bad_numbers_are_refused(option, message):
    result = tiny.run("bench", "model.pt", "--ref", "ref.xyz", option, "0")
    assert result.exit_code != 0 and message in result.output
