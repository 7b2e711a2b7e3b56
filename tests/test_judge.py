"""The independent judge finds what it says that it finds, and its arithmetic is that of the textbooks."""

import argparse
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed, Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from stabie_ase.potentials.checkpoint import save_potential
from stabie_ase.potentials.schnet import SchNetPotential

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "independent_judge.py"
DATA = files("stabie_ase") / "data"
MODEL, REF = DATA / "aspirin_schnet.pt", DATA / "aspirin_xtb_train.xyz"
sys.path.append(str(SCRIPT.parent))
import independent_judge as judge  # noqa: E402


@pytest.fixture(scope="module")
def reference():
    return judge.Reference(judge.read_frames(DATA / "aspirin_xtb_test.xyz"), 500.0)


def test_it_shares_no_criteria_with_the_package():
    listing = "import sys, independent_judge; print(*(name for name in sys.modules if name.startswith('stabie_ase.')))"
    done = subprocess.run([sys.executable, "-c", listing], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    rooms = {name.split(".")[1] for name in done.stdout.split()}
    assert "potentials" in rooms and not rooms & {"dynamics", "observables", "runs", "stability", "training"}


def normal(reference):
    """A frame of the reference, to be spoilt, and its energy."""
    return reference.frames[0].positions.copy(), float(reference.energies[0])


def cause(verdict):
    return verdict and verdict[0]


def test_frames_that_nobody_learnt_from_are_in_order(reference):
    others = judge.read_frames(REF)
    assert [reference.verdict(f.positions, f.get_potential_energy()) for f in others] == [None] * len(others)
    assert reference.bonded.sum() == 21 and reference.watched.sum() == 210 - 21


@pytest.mark.parametrize("change", [-0.6, 0.6])
def test_a_bond_off_its_mean_is_found_either_way(reference, change):
    positions, energy = normal(reference)
    pair = np.flatnonzero(reference.bonded)[reference.mean_lengths[reference.bonded].argmax()]  # a terminal C-C
    first, second = (side[pair] for side in reference.pairs)
    vector = positions[first] - positions[second]
    length = np.linalg.norm(vector)
    positions[first] = positions[second] + vector / length * (reference.mean_lengths[pair] + change)
    found, detail = reference.verdict(positions, energy)
    assert found == "bond" and detail
    positions[first] = positions[second] + vector / length * (reference.mean_lengths[pair] + 0.4 * np.sign(change))
    assert cause(reference.verdict(positions, energy)) != "bond"


def test_a_contact_is_found_where_bonds_are_whole(reference):
    """Another molecule's hydrogens: methane and hydrogen, which come as close as we like with every bond as it was."""
    def pair(distance):
        atoms = molecule("CH4") + molecule("H2")
        atoms.positions[5:] += [0.0, 0.0, distance]
        atoms.calc = SinglePointCalculator(atoms, energy=0.0)
        return atoms

    far = judge.Reference([pair(4.0), pair(5.0)], 500.0)
    assert far.bonded.sum() == 5
    assert cause(far.verdict(pair(2.0).positions, 0.0)) is None
    assert cause(far.verdict(pair(1.4).positions, 0.0)) == "contact"
    near = judge.Reference([pair(1.4), pair(5.0)], 500.0)  # the reference does so itself
    assert cause(near.verdict(pair(1.4).positions, 0.0)) is None


def test_an_energy_is_sunk_below_the_margin(reference):
    positions, _ = normal(reference)
    assert reference.margin == pytest.approx(1.5 * 21 * 8.617333e-5 * 500.0, rel=1e-5)
    lowest = reference.energies.min()
    assert reference.verdict(positions, lowest - 0.99 * reference.margin) is None
    assert cause(reference.verdict(positions, lowest - 1.01 * reference.margin)) == "sunk"
    assert cause(judge.Reference(reference.frames, 500.0, margin=0.1).verdict(positions, lowest - 0.11)) == "sunk"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_a_failure(reference, value):
    positions, energy = normal(reference)
    assert cause(reference.verdict(positions, value)) == "not finite"
    positions[3, 1] = value
    assert cause(reference.verdict(positions, energy)) == "not finite"


def lives(failed, lived, time_ps, whole_ps):
    dead = [{"replica": k, "cause": "bond", "detail": "", "time_ps": time_ps} for k in range(failed)]
    alive = {"cause": None, "detail": "", "time_ps": whole_ps, "energies": [0.0], "closest": 1.5}
    return dead + [{"replica": k, **alive} for k in range(lived)]


def test_hazards_medians_and_ratios(reference):
    counts = reference.counts.sum(0)
    rows = [lives(10, 0, 1.0, 4.0), lives(1, 9, 1.0, 4.0), lives(0, 10, 1.0, 4.0)]
    all_dead, one_dead, none_dead = (judge.judged([r | {"counts": counts} for r in row], reference) for row in rows)
    assert all_dead["hazard"] == 1.0
    np.testing.assert_allclose(all_dead["hazard_95"], [0.47954, 1.83904], rtol=1e-4)  # Garwood's interval of 10 events
    assert none_dead["hazard_95"][0] == 0.0 and none_dead["hazard_95"][1] == pytest.approx(3.68888 / 40, rel=1e-5)
    assert all_dead["median_ps"] == 1.0 and one_dead["median_ps"] == np.inf
    assert one_dead["h_error"] == 0.0 and one_dead["closest"] == 1.5
    ratio = judge.compare(all_dead, one_dead)
    assert ratio["ratio"] == pytest.approx(37.0) and ratio["ratio_95"][0] < 37.0 < ratio["ratio_95"][1] and ratio["p"] < 1e-5
    assert judge.compare(all_dead, none_dead)["ratio"] == np.inf
    assert judge.compare(none_dead, none_dead) is None


def test_h_error_runs_from_agreement_to_no_overlap(reference):
    assert judge.h_error(np.array([1, 3, 0]), np.array([2, 6, 0])) == 0.0
    assert judge.h_error(np.array([1, 3, 0]), np.array([0, 0, 5])) == 2.0
    assert 0.0 < reference.floor(np.random.default_rng(0)) < 0.2
    far = reference.mean_lengths + 100.0
    assert reference.histogram(far).sum() == len(far)  # none is lost beyond the last bin


def arguments(**changes):
    settings = {"seed": 0, "replicas": 3, "time": 0.02, "timestep": 0.5, "device": "cpu", "trust": False, "jobs": 1}
    return argparse.Namespace(**settings | changes)


def test_explosions_are_counted_by_all_processes_alike(reference, tmp_path, capsys):
    reference = judge.Reference(reference.frames[:5], 500.0)
    torch.manual_seed(0)
    potential = SchNetPotential.build({1: -13.0, 6: -1000.0, 8: -2000.0})
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter *= 40.0  # numbers on the reference, and forces that tear molecules apart
    path = tmp_path / "broken.pt"
    save_potential(potential, path)
    offset = judge.mean_offset(potential, reference)
    alone = judge.run_model("broken", path, offset, reference, arguments())
    assert all(told["cause"] is not None and 0.0 < told["time_ps"] <= 0.02 for told in alone)
    assert judge.run_model("broken", path, offset, reference, arguments(jobs=2)) == alone
    assert capsys.readouterr().err.count("replica 2 of 3") == 2


class GivesUp(Calculator):
    """No forces, until it cannot."""

    implemented_properties = ["energy", "forces"]
    calls = 0

    def calculate(self, atoms=None, properties=(), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        if self.calls > 7:
            raise CalculationFailed("not finite")
        self.results = {"energy": 0.0, "forces": np.zeros((len(atoms), 3))}


@pytest.mark.parametrize("timestep", [0.25, 0.5, 2.5])
def test_a_model_that_gives_up_is_not_finite_from_that_step(reference, monkeypatch, timestep):
    monkeypatch.setattr(judge, "loaded", lambda *_: None)
    monkeypatch.setattr(judge, "StABIECalculator", lambda _: GivesUp())
    told = judge.run_replica(0, "no file", 0.0, reference, arguments(timestep=timestep))
    assert told["cause"] == "not finite" and 6 <= told["time_ps"] / timestep * 1000 <= 7


@pytest.mark.parametrize("timestep", [0.25, 0.5, 1.0, 5.0])
def test_looks_are_5_fs_apart_at_any_timestep(reference, monkeypatch, timestep):
    monkeypatch.setattr(GivesUp, "calls", -1000)
    monkeypatch.setattr(judge, "loaded", lambda *_: None)
    monkeypatch.setattr(judge, "StABIECalculator", lambda _: GivesUp())
    monkeypatch.setattr(judge.Reference, "verdict", lambda *_: None)
    told = judge.run_replica(0, "no file", 0.0, reference, arguments(timestep=timestep))
    assert told["time_ps"] == pytest.approx(0.02) and len(told["energies"]) == 4


def run_script(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    judge.main()


def test_its_document_is_plain_json_and_tables_fit_in_100_columns(tmp_path, monkeypatch, capsys):
    model, output = tmp_path / "a_model_with_quite_a_long_name_of_its_own.pt", tmp_path / "out.json"
    model.write_bytes(MODEL.read_bytes())
    run_script(monkeypatch, "--quick", MODEL, model, "--ref", REF, "--output", output)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    document = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert document["models"][MODEL.name]["median_ps"] is None  # longer than it ran
    assert document["models"][MODEL.name]["replicas"] == document["models"][model.name]["replicas"]
    assert list(document["ratios_to_first"]) == [model.name]


@pytest.mark.parametrize("options, words", [
    ([MODEL], "--ref"),
    ([MODEL, MODEL, "--ref", REF], "given twice"),
    (["nowhere.pt", "--ref", REF], "nowhere.pt"),
    ([MODEL, "--ref", "nowhere.xyz"], "nowhere.xyz"),
    ([MODEL, "--ref", MODEL], str(MODEL)),
    ([MODEL, "--ref", REF, "--time", "0.001"], "0.001"),
    ([MODEL, "--ref", REF, "--timestep", "0.3"], "0.3 fs"),
    ([MODEL, "--ref", REF, "--timestep", "nan"], "nan"),
    ([MODEL, "--ref", REF, "--output", "no/folder/out.json"], "no/folder"),
])  # fmt: skip
def test_what_cannot_be_judged_is_refused_in_one_line(monkeypatch, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, *options)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert words in printed.err.splitlines()[-1]


def with_frames(path, change):
    frames = read(REF, ":3")
    write(path, change(frames))
    return path


@pytest.mark.parametrize("change, words", [
    (lambda frames: [f.copy() for f in frames], "energies"),
    (lambda frames: [*frames, frames[0][:20]], "same atoms"),
    (lambda frames: [f.set_cell([9, 9, 9]) or f.set_pbc(True) or f for f in frames], "periodic"),
])  # fmt: skip
def test_references_that_it_cannot_use_are_refused_in_one_line(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        judge.read_frames(with_frames(tmp_path / "ref.xyz", change))
