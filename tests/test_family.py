"""Families of potentials: those of other packages are found by entry points, and open, train and write their own files."""

import json
import logging
import os
import subprocess
import sys

import pytest
import tiny
import torch

from stabie_ase.potentials import family as family_module
from stabie_ase.potentials.family import Family, families, names

CODE = '''
import torch
from torch import nn

from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.family import Family
from stabie_ase.system.files import write_atomically


class Springs(Potential):
    """Every pair of atoms is a spring to one distance; its stiffness and length are trained."""

    family, cutoff = "springs", 4.0

    def __init__(self, k, r0):
        super().__init__()
        self.k, self.r0 = nn.Parameter(torch.as_tensor(k)), nn.Parameter(torch.as_tensor(r0))

    def atomic_energies(self, batch, neighbors):
        r = neighbors.vectors(batch).norm(dim=1)
        inside = (r < self.cutoff).to(r.dtype)
        energy = 0.25 * self.k * ((r - self.r0).square() - (self.cutoff - self.r0).square()) * inside
        return energy.new_zeros(batch.n_atoms).index_add(0, neighbors.pairs[0], energy)


def recognise(data):
    return isinstance(data, Springs) or (isinstance(data, dict) and data.get("format") == "springs")


def load(data):
    return data if isinstance(data, Springs) else Springs(data["k"], data["r0"])


def save(potential, path):
    write_atomically({"format": "springs", "k": potential.k.detach().cpu(), "r0": potential.r0.detach().cpu()}, path)


FAMILY = Family("springs", "springs between all atoms", frozenset(), recognise, load, save, suffix=".spr",
                build=lambda reference: Springs(torch.tensor(1.0), torch.tensor(1.6)), pretraining={"learning_rate": 0.02})
'''


@pytest.fixture()
def installed(tmp_path):
    """A folder that holds another package and what pip would have written about it."""
    (tmp_path / "other_package.py").write_text(CODE)
    about = tmp_path / "other_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[stabie_ase.potentials]\nsprings = other_package:FAMILY\nbroken = no_such_package:FAMILY\nwrong = other_package:Springs\n"
    )
    return tmp_path


def run(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(tiny.ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stabie_ase", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_a_potential_of_another_package_is_pretrained_finetuned_and_evaluated(installed):
    """Its files are its own: written by its family, recognised by it again. Others that are broken are named, and do no harm."""
    reference = str(tiny.reference_path())
    made = run(installed, "pretrain", "--model", "springs", "--ref", reference, "-o", "start.spr", "--epochs", "20")
    assert "'broken' of another package cannot be used: ModuleNotFoundError" in made.stderr and "'wrong'" in made.stderr
    start = torch.load(installed / "start.spr", weights_only=True)
    assert start["format"] == "springs" and float(start["k"]) != 1.0
    run(installed, "finetune", "start.spr", "--ref", reference, "--output", "run", *tiny.flags(max_cycles=1, criterion="bonds:0.12"))
    result = json.loads((installed / "run" / "result.json").read_text())
    assert set(result["models"]) == {"start", "stabie"}
    assert torch.load(installed / "run" / "model.spr", weights_only=True)["format"] == "springs"
    run(installed, "-q", "evaluate", "run/model.spr", "--ref", reference, "--time", "0.01", "--replicas", "2")


def test_the_names_of_families_are_told_without_importing_any():
    code = "import sys; from stabie_ase.potentials.family import names; names(); print('torch' in sys.modules, 'mace' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tiny.ROOT)})
    assert done.stdout.split() == ["False", "False"]
    assert names()[:2] == ["schnet", "mace"] == list(families())[:2]


def test_recognising_imports_no_family():
    code = (
        "import sys, torch; from stabie_ase.potentials.checkpoint import load_potential; "
        f"load_potential({str(tiny.model_path())!r}); print('mace' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tiny.ROOT)})
    assert done.stdout.split() == ["False"], done.stderr


def test_a_family_of_the_package_that_is_broken_is_an_error(monkeypatch):
    monkeypatch.setattr(family_module, "OWN", {"schnet": "no.such.module:FAMILY"})
    with pytest.raises(ModuleNotFoundError):
        families.__wrapped__()


def test_others_cannot_replace_our_own(monkeypatch, caplog):
    monkeypatch.setattr(family_module, "others", lambda group: {"schnet": "evil:FAMILY", "more": "evil:FAMILY"})
    with caplog.at_level(logging.WARNING):
        found = families.__wrapped__()
    assert list(found) == ["schnet", "mace"] and isinstance(found["schnet"], Family) and "'more'" in caplog.text
