"""A liquid goes through the loop: radial distribution, distances between atoms, energies; its teacher is a Lennard-Jones potential."""

import json
import runpy
from pathlib import Path

import pytest
import tiny
import torch
from ase.io import read, write

from stabie_ase.potentials.checkpoint import load_potential, save_potential
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.stability import default_criteria
from stabie_ase.structures.reference import read_reference, reference_energies
from stabie_ase.structures.setting import Setting
from stabie_ase.training.pretrain import Pretraining
from stabie_ase.training.pretrain_options import PretrainOptions

ARGON = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "data" / "make_argon.py"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Frames of the liquid, and a small SchNet whose training was broken off."""
    folder = tmp_path_factory.mktemp("argon")
    write(folder / "argon.xyz", ARGON["frames"](12, 60))
    reference = read_reference(str(folder / "argon.xyz"))
    torch.manual_seed(0)
    potential = SchNetPotential.build(
        reference_energies(reference), hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=8, cutoff=5.0
    )
    training = Pretraining(potential, reference, PretrainOptions(learning_rate=1e-3))
    for _ in range(2):
        training.run_epoch()
    save_potential(potential, folder / "model.pt")
    return folder


def test_what_suits_these_frames_is_chosen_by_the_system(files):
    """After 60 steps the atoms are still near the sites of the crystal that they started from."""
    setting = Setting(read(files / "argon.xyz", ":"), 90.0, timestep_fs=4.0)
    assert default_criteria(setting, 0.25) == "intermolecular,lindemann,energy,temperature"
    assert default_criteria(setting, 0.5, windows=True) == "intermolecular,lindemann,energy,temperature,rdf"
    assert setting.topology.bonds.shape[1] == 0 and setting.topology.molecule.tolist() == list(range(32))


def test_an_estimator_that_does_not_suit_is_refused_before_anything_is_written(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("finetune", str(files / "model.pt"), "--ref", str(files / "argon.xyz"), "--output", "run", "--estimator")
    for text, told in (("nearest:31", "expected 1 to 30"), ("radius:9", "beyond half the width"), ("local", "known: global, molecules")):
        result = tiny.run(*command, text)
        assert result.exit_code != 0 and told in result.output and not (tmp_path / "run").exists()
    for given, told in (("--average", "leave --average out"), ("--sample-every", "two samples or more in a window (250 fs)")):
        result = tiny.run(*command, "nearest:12", given, "200", "--within-trajectories")
        assert result.exit_code != 0 and told in result.output and not (tmp_path / "run").exists()
    monkeypatch.setattr(SchNetPotential, "gives_atomic_energies", False)
    monkeypatch.setattr(SchNetPotential, "energies", lambda self, batch, near: batch.sum_over_atoms(self._evaluated(batch, near).double()))
    result = tiny.run(*command, "nearest:12")
    assert result.exit_code != 0 and "schnet potential gives none" in result.output and not (tmp_path / "run").exists()


def test_a_liquid_goes_through_finetune(files, tmp_path, monkeypatch):
    """Its replicas fail, updates are made, the comparison and the report are of the radial distribution."""
    monkeypatch.chdir(tmp_path)
    result = tiny.run(
        "finetune", str(files / "model.pt"), "--ref", str(files / "argon.xyz"), "--output", "run", "--temperature", "400", "--no-reweight",
        "--criterion", "intermolecular:2.9", "--timestep", "4", "--window", "200", "--sample-every", "20", "--check-every", "20",
        "--replicas", "6", "--max-updates", "2", "--qm-steps", "2", "--natural-iterations", "2", "--check-replicas", "4",
        "--check-time", "0.1", "--check-rounds", "1", "--force-error-bound", "10", "--energy-error-bound", "10",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Estimator: nearest:12 (the system is 32 atoms Ar)" in result.output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["estimator"]["groups"] == "nearest:12"
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    observed = found["observables"]["rdf:Ar-Ar"]
    assert observed["names"] == [] and max(observed["reference"]) > 1.5
    assert found["models"]["start"]["rdf:Ar-Ar_error"] > 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(record.get("updates", 0) >= 1 for record in records)
    frames = read(tmp_path / "run" / "unstable.traj", ":")
    assert {atoms.info["criterion"] for atoms in frames} == {"intermolecular"} and frames[0].pbc.all()
    i, j = (frames[0].get_tags() == 1).nonzero()[0]
    assert frames[0].get_distance(i, j, mic=True) == pytest.approx(frames[0].info["value"]) and frames[0].info["value"] < 2.9
    before, after = (load_potential(path) for path in (files / "model.pt", next((tmp_path / "run").glob("model.*"))))
    assert after.cutoff == before.cutoff
    assert "rdf:Ar-Ar error" in result.output and (tmp_path / "run" / "figures" / "observable-rdf-Ar-Ar.png").exists()
