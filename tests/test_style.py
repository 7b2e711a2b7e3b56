"""What linters say of the code; their settings and exceptions are in .ci/."""

import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_ruff():
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", ".ci/ruff.toml", "stabie_ase", "examples", "tests", ".ci"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_house_is_within_its_limits():
    """Lengths of functions and files, docstrings, annotations: .ci/house.py says which and where."""
    house = runpy.run_path(str(ROOT / ".ci" / "house.py"))
    figures, faults, untold, untyped = house["measure"]()
    assert house["outside"](figures) == [], (figures, faults, untold, untyped)


def test_types():
    """What the type checker says; it keeps what it has found out in a folder of its own, so that a second run takes seconds."""
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ".ci/mypy.ini", "stabie_ase"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
