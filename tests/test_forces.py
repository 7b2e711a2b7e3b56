"""Forces of many systems: in parts where memory is short, and never lost."""

import ctypes
import gc
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

import stabie_ase.dynamics.forces as forces_module
import stabie_ase.system.memory as memory
from stabie_ase.dynamics import Langevin, PotentialForces, initial_state, simulate
from stabie_ase.dynamics.forces import atoms_that_fit
from stabie_ase.potentials.analytic import LennardJones, Morse
from stabie_ase.structures.batch import AtomsBatch

CPU = torch.device("cpu")


class Crowded(Morse):
    """Runs out of memory above so many systems, and remembers how many it was asked for."""

    def __init__(self, most, error=torch.OutOfMemoryError):
        super().__init__(depth=4.5, a=1.9, r0=1.1)
        self.most, self.error, self.asked = most, error, []

    def compute(self, batch, neighbors, stress=False):
        self.asked.append(batch.n_systems)
        if batch.n_systems > self.most:
            raise self.error("CUDA out of memory or DefaultCPUAllocator: can't allocate memory: you tried to allocate a lot")
        return super().compute(batch, neighbors, stress=stress)


def molecules(n, seed=0):
    rng = np.random.default_rng(seed)
    frames = [molecule(("N2", "O2", "H2O")[k % 3]) for k in range(n)]
    for atoms in frames:
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    return AtomsBatch.from_atoms(frames)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("most", [1, 3, 9])
def test_out_of_memory_halves_what_is_computed_at_once(most, error, caplog):
    batch, roomy = molecules(10), PotentialForces(Crowded(99))
    crowded = PotentialForces(Crowded(most, error))
    with caplog.at_level(logging.WARNING):
        found, expected = crowded(batch), roomy(batch)
    assert roomy.potential.asked == [10] and "out of memory" in caplog.text
    torch.testing.assert_close(found.energies, expected.energies)
    torch.testing.assert_close(found.forces, expected.forces)
    crowded.potential.asked.clear()
    crowded(batch)
    PotentialForces(crowded.potential)(batch)  # what was learned goes for the next one too
    assert max(crowded.potential.asked) <= most and sum(crowded.potential.asked) == 20


def test_dynamics_go_on_where_memory_runs_out():
    integrator, ends = Langevin(0.2, 0.1), []
    for potential in (Crowded(99), Crowded(4)):
        state = initial_state(molecules(10), PotentialForces(potential), 300.0, seed=3)
        potential.most = min(potential.most, 2)  # there is ever less
        ends.append(simulate(state, integrator, PotentialForces(potential), 20))
    torch.testing.assert_close(ends[0].batch.positions, ends[1].batch.positions, rtol=0, atol=1e-10)


def test_a_system_that_does_not_fit_is_told():
    with pytest.raises(MemoryError, match="3 atoms do not fit in the memory of cpu"):
        PotentialForces(Crowded(0))(molecules(10))


def test_other_errors_are_passed_on():
    class Broken(Morse):
        def compute(self, batch, neighbors, stress=False):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        PotentialForces(Broken(depth=4.5, a=1.9, r0=1.1))(molecules(4))


def test_stress_and_lists_of_parts():
    """Periodic cells in parts: as at once, and with lists that are kept."""
    rng = np.random.default_rng(1)
    frames = [bulk("Ar", "fcc", 5.3, cubic=True).repeat(2) for _ in range(5)]
    for atoms in frames:
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    batch = AtomsBatch.from_atoms(frames)
    at_once = PotentialForces(LennardJones(0.0104, 3.4, 8.0), stress=True)
    parts = PotentialForces(LennardJones(0.0104, 3.4, 8.0), stress=True)
    parts._set(2 * 32 + 5)
    for _ in range(2):
        for found, expected in zip(parts(batch), at_once(batch)):
            torch.testing.assert_close(found, expected)
    assert [(key, list.n_builds) for key, list in parts._parts.items()] == [((0, 2), 1), ((2, 2), 1), ((4, 2), 1)]


@pytest.mark.parametrize("free, expected", [(1e12, float("inf")), (8e8, 16 * 2.0), (1e8, 2 * 2.0)])
def test_what_fits_is_measured(monkeypatch, free, expected):
    """A call that takes 32 MB a system, held against the memory there is."""
    monkeypatch.setattr(forces_module, "free_bytes", lambda device: free)
    monkeypatch.setattr(forces_module, "taken_bytes", lambda function, device: (function(), 32e6 * seen[-1])[1])
    seen = []
    batch = AtomsBatch.from_atoms([Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])] * 100)
    assert atoms_that_fit(lambda part: seen.append(part.n_systems), batch) == expected
    assert seen == [2**k for k in range(len(seen))] and sum(seen) < 2 * 100


def test_large_batches_are_measured_and_small_ones_are_not(monkeypatch):
    monkeypatch.setattr(forces_module, "free_bytes", lambda device: 1.0)
    monkeypatch.setattr(forces_module, "taken_bytes", lambda function, device: (function(), 100.0)[1])
    potential = Crowded(999)
    PotentialForces(potential)(molecules(10))
    assert potential.asked == [10]
    PotentialForces(potential)(molecules(600))
    assert max(potential.asked[1:]) == 1


@pytest.mark.skipif(memory._forget_peak() is False, reason="the kernel does not count here")
def test_taken_is_what_a_call_holds_at_its_peak():
    size = 300 * 2**20

    def call():
        torch.ones(size, dtype=torch.uint8)

    gc.collect()
    assert memory.taken_bytes(call, CPU) == pytest.approx(size, rel=0.2)
    assert memory.taken_bytes(lambda: None, CPU) < 0.05 * size


def test_limit_of_a_container(tmp_path):
    assert memory._free_of_group(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_of_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._free_of_group(tmp_path) == 400.0


def test_free_memory_is_what_the_machine_says():
    free = memory.free_bytes(CPU)
    assert free is None or 1e6 < free < 1e14


KEEPS = """
import resource, sys
import torch
from stabie_ase.system.allocator import keep_freed_memory
from stabie_ase.system.memory import taken_bytes
assert sys.argv[1] != "keep" or keep_freed_memory()
size = 40 * 2**20
def call():
    x = torch.ones(size // 4)
    return x * (x + 1.0)
for _ in range(5):
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, taken_bytes(call, torch.device("cpu")) / size)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.skipif(memory._forget_peak() is False, reason="the kernel does not count here")
def test_kept_memory_is_not_fetched_again_and_still_measured():
    """A process of its own, whose setting it is; tensors above glibc's 32 MB find the pages of earlier ones."""
    faults, taken = {}, {}
    for name in ("keep", "default"):
        out = subprocess.run([sys.executable, "-c", KEEPS, name], capture_output=True, text=True, check=True).stdout
        faults[name], taken[name] = (float(x) for x in out.split())
    assert faults["keep"] < 0.2 * faults["default"]
    assert all(x == pytest.approx(3.0, rel=0.2) for x in taken.values())
