"""What broke, in words."""

import numpy as np
import pytest
from ase import Atoms

from stabie_ase.runs.report.causes import failures_in_words
from stabie_ase.stability import StabilityStatistics
from stabie_ase.stability.causes import broken


def unstable(criterion, *blamed, symbols="HCOH"):
    atoms = Atoms(symbols, positions=np.arange(3 * len(Atoms(symbols)), dtype=float).reshape(-1, 3))
    atoms.set_tags([int(k in blamed) for k in range(len(atoms))])
    atoms.info["criterion"] = criterion
    return atoms


def test_what_broke_is_named_by_its_elements():
    """Whatever the order of the atoms; hydrogen comes last."""
    frames = [unstable("bonds", 0, 1), unstable("bonds", 1, 3), unstable("bonds", 2, 3), unstable("bonds", 1, 2)]
    frames += [unstable("contacts", 0, 3), unstable("contacts", 0, 2), unstable("energy"), unstable("not finite")]
    frames += [unstable("temperature", 0, 1)]
    assert broken(frames) == {
        "C-H bond": 2, "O-H bond": 1, "C-O bond": 1, "H...H contact": 1, "O...H contact": 1, "energy": 1, "not finite": 1,
        "temperature": 1,
    }  # fmt: skip


def test_frames_that_blame_nobody_are_counted_by_their_criterion():
    assert broken([unstable("bonds"), unstable("bonds", 1), Atoms("H")]) == {"bonds": 2, "unknown": 1}
    assert broken([]) == {}


def words(times, failed, frames=()):
    return failures_in_words(StabilityStatistics(np.array(times), np.array(failed)), 2.0, frames).splitlines()


def test_failures_in_words():
    frames = [unstable("bonds", 2, 3), unstable("bonds", 1, 3), unstable("bonds", 0, 1)]
    lines = words([0.5, 1.0, 1.5, 2.0], [True, True, True, False], frames)
    assert lines[0].startswith("3 of 4 replicas failed: 0.600 failures per replica-ps (95 % interval 0.12 to ")
    assert lines[1].startswith("Median stable time: 1.0 ps (95 % band 0.50 to ")
    assert lines[2:] == ["What broke: C-H bond 2, O-H bond 1"]


@pytest.mark.parametrize("times, failed, expected", [
    ([2.0, 2.0], [False, False],
     ["0 of 2 replicas failed: 0 failures per replica-ps (95 % interval 0 to 0.92)", "Median stable time: > 2 ps"]),
    ([0.0, 0.0], [True, True], ["2 of 2 replicas failed"]),
])  # fmt: skip
def test_none_and_all_at_once(times, failed, expected):
    assert words(times, failed) == expected
