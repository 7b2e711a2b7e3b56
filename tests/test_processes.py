"""Several processes with samples of their own come to what one has from all of them."""

from dataclasses import replace

import pytest
import torch
from ase import Atoms
from helpers import Vector, estimate, samples_of
from torch import multiprocessing

from stabie_ase.boltzmann import Estimator, StatePoint, accumulate_gradient
from stabie_ase.boltzmann.winsorizing import evened
from stabie_ase.observables import Target
from stabie_ase.potentials.analytic import Harmonic
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.system import processes

T = 300.0
ENERGY_CHANGE = (None, "reweighted")
WITHIN = Estimator(StatePoint(T), within=True)


def everything():
    """Values, energy changes and which replica each sample is of; the second process has the rarer ones."""
    draw = torch.Generator().manual_seed(0)
    values, change = (torch.randn((40, d), generator=draw, dtype=torch.float64) for d in (3, 1))
    return values, 0.02 * change[:, 0]


def estimated(values, change):
    found = estimate(values, torch.zeros(3), torch.ones(3), T, energy_change=change)
    potential, frames = Harmonic(1.0), AtomsBatch.from_atoms(Atoms("H")).repeat(len(values)).replace(positions=values)
    accumulate_gradient(potential, frames, found.sample_weights)
    processes.sum_gradients(potential.parameters())
    gradient = torch.cat([p.grad.flatten() for p in potential.parameters()])
    return found.mean, found.sample_weights, torch.tensor(found.effective_samples, dtype=torch.float64), gradient


REPLICA = torch.tensor([0] * 10 + [1] * 10 + [2] * 11 + [3] * 9)


def estimated_within(values, change, replica):
    """Within trajectories, of samples that do not count alike: the heaviest are all in the second process."""
    samples = replace(samples_of(values, replica), log_weights=values[:, 1] + 3.0 * (replica == 3))
    found = WITHIN(samples, [Target(Vector(3), torch.zeros(3).double())], change)
    return found.means["vector"], found.weights, torch.tensor(found.effective_samples, dtype=torch.float64)


UNSTABLE = {"one": REPLICA == 3, "both": (REPLICA == 3) | (torch.arange(40) < 2)}
"""Frames, in the second process alone or in both."""


def evened_weights(unstable, replica):
    """What samples count for once each replica's failure counts alike."""
    return evened(samples_of(torch.zeros(len(replica), 1), replica, severity=0.5 + unstable.double())).log_weights


def work(rank, folder, n):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    values, change = everything()
    mine = torch.tensor_split(torch.arange(len(values)), [31])[rank]
    assert (processes.size(), processes.rank()) == (n, rank)
    found = {kind: estimated(values[mine], change[mine] if kind else None) for kind in ENERGY_CHANGE}
    within = {kind: estimated_within(values[mine], change[mine] if kind else None, REPLICA[mine]) for kind in ENERGY_CHANGE}
    even = {kind: evened_weights(unstable[mine], REPLICA[mine]) for kind, unstable in UNSTABLE.items()}
    torch.save({"found": found, "within": within, "even": even, "dealt": list(processes.dealt(7))}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()  # or its threads may be running when the process ends, which aborts it


def test_two_processes_estimate_what_one_does(tmp_path):
    multiprocessing.spawn(work, (str(tmp_path), 2), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    values, change = everything()
    for kind in ENERGY_CHANGE:
        mean, weights, ess, gradient = estimated(values, change if kind else None)
        assert float(gradient.abs().max()) > 1e-3
        for part in parts:
            torch.testing.assert_close(part["found"][kind][0], mean, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(part["found"][kind][2], ess, rtol=1e-12, atol=0)
            torch.testing.assert_close(part["found"][kind][3], gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.cat([part["found"][kind][1] for part in parts]), weights, rtol=1e-10, atol=1e-14)
        mean, weights, ess = estimated_within(values, change if kind else None, REPLICA)
        for part in parts:
            torch.testing.assert_close(part["within"][kind][0], mean, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(part["within"][kind][2], ess, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat([part["within"][kind][1] for part in parts]), weights, rtol=1e-10, atol=1e-14)
    for kind, unstable in UNSTABLE.items():
        torch.testing.assert_close(torch.cat([part["even"][kind] for part in parts]), evened_weights(unstable, REPLICA))
    assert parts[0]["dealt"] + parts[1]["dealt"] == list(range(7))


def test_one_process_changes_nothing():
    x = torch.randn(5, dtype=torch.float64)
    assert processes.size() == 1 and processes.rank() == 0 and list(processes.dealt(3)) == [0, 1, 2]
    assert processes.total(x) is x and torch.equal(processes.softmax(x), torch.softmax(x, dim=0))


@pytest.mark.parametrize("n, size", [(1, 4), (7, 3), (32, 5)])
def test_replicas_are_dealt_out_evenly(monkeypatch, n, size):
    monkeypatch.setattr(processes, "size", lambda: size)
    dealt = []
    for rank in range(size):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        dealt.append(list(processes.dealt(n)))
    assert sum(dealt, []) == list(range(n)) and max(map(len, dealt)) - min(map(len, dealt)) <= 1
