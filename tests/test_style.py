"""What linters say of the code; their settings and exceptions are in .ci/."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_ruff():
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", ".ci/ruff.toml", "stabie_ase", "examples", "tests"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
