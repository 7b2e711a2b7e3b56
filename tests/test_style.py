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


def test_docstrings():
    """Docstrings and signatures tell the same. DOC111, a type in a docstring, is no fault: it tells shapes and units."""
    found = subprocess.run(
        [Path(sys.executable).with_name("pydoclint"), "--quiet", "--config", ".ci/pydoclint.toml", "-sfn", "True", "stabie_ase"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    told = [line for line in (found.stdout + found.stderr).splitlines() if line.strip() and " DOC111: " not in line]
    assert found.returncode in (0, 1) and told == []


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
