"""One thread for everything: tests work on a handful of atoms, where a second one only waits for the first."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import shutil

import pytest
import tiny


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with model.pt and ref.xyz, as the working directory."""
    shutil.copy(tiny.model_path(), tmp_path / "model.pt")
    shutil.copy(tiny.reference_path(), tmp_path / "ref.xyz")
    monkeypatch.chdir(tmp_path)
    return tmp_path
