"""A molecule, a ground truth and a bad model that need seconds: four carbon atoms that all attract each other.

The truth is a Morse potential between all pairs, sampled at 600 K. The model is a SchNet of eight channels whose training
was broken off: its bonds fail within some tens of femtoseconds.
"""

import atexit
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from click.testing import CliRunner

from stabie_ase.dynamics import Langevin, PotentialForces, initial_state, simulate
from stabie_ase.potentials.analytic import Morse
from stabie_ase.potentials.checkpoint import load_potential, save_potential
from stabie_ase.potentials.family import families
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.reference import Reference, read_reference, reference_energies
from stabie_ase.system.options import from_dict
from stabie_ase.training.options import FinetuneOptions
from stabie_ase.training.pretrain import Pretraining, pretrain
from stabie_ase.training.pretrain_options import PretrainOptions

TEMPERATURE = 600.0
BOND = 1.5
TETRAHEDRON = BOND / np.sqrt(8.0) * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)
ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # systems this small gain nothing from more, and bits are compared with those of other processes

FAST = {
    "timestep_fs": 1.0,
    "replicas": 12,
    "window_fs": 30.0,
    "sample_every_fs": 5.0,
    "criterion": "bonds:0.3",
    "updates_per_window": 2,
    "qm_steps": 2,
    "natural_iterations": 2,
    "observable_weight": 0.05,  # two steps on energies and forces make little good
    "qm_batch_size": 8,
    "max_simulation_windows": 4,
    "max_learning_windows": 2,
    "check_replicas": 8,
    "check_time_ps": 0.03,
    "check_criterion": "bonds:0.3",
    "max_time_min": 10.0,
}
"""Options of a loop whose cycles take about a second."""


def truth() -> Morse:
    """U of every pair: 3 eV deep, minimum at 1.5 Å."""
    return Morse(depth=3.0, a=1.8, r0=BOND)


def label(frames: list[Atoms]) -> list[Atoms]:
    """Put the truth's energies and forces on frames, as a file from a quantum code would have them."""
    batch = AtomsBatch.from_atoms(frames)
    exact = truth().compute(batch, neighbor_list(batch, np.inf))
    forces = np.split(exact.forces.numpy(), np.cumsum(batch.sizes)[:-1])
    for atoms, energy, force in zip(frames, exact.energies.tolist(), forces):
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=force)
    return frames


@cache
def _equilibrated(n: int, seed: int) -> AtomsBatch:
    batch = AtomsBatch.from_atoms([Atoms("C4", TETRAHEDRON)] * n)
    state = initial_state(batch, PotentialForces(truth()), TEMPERATURE, seed=seed)
    integrator = Langevin(2.0 * units.fs, 0.02 / units.fs)
    return simulate(state, integrator, PotentialForces(truth()), 150).batch


def frames(n: int = 40, seed: int = 1) -> list[Atoms]:
    """Frames at 600 K with energies, forces and the temperature."""
    images = label(_equilibrated(n, seed).to_atoms())
    for atoms in images:
        atoms.info["temperature_K"] = TEMPERATURE
    return images


@cache
def folder() -> Path:
    """A folder for files that many tests share; none may change them."""
    path = Path(tempfile.mkdtemp(prefix="stabie-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def reference_path() -> Path:
    path = folder() / "ref.xyz"
    write(path, frames())
    return path


@cache
def model_path() -> Path:
    """The unstable SchNet as a file."""
    path = folder() / "model.pt"
    save_potential(_badly_trained(), path)
    return path


def reference() -> Reference:
    return read_reference(reference_path())


def model() -> SchNetPotential:
    """The unstable SchNet, a fresh one at each call."""
    return load_potential(model_path())


def new_schnet(seed: int = 0, elements: Reference | None = None) -> SchNetPotential:
    """Random weights."""
    torch.manual_seed(seed)
    return SchNetPotential.build(
        reference_energies(elements or reference()),
        hidden_channels=8,
        num_filters=8,
        num_interactions=1,
        num_gaussians=12,
        cutoff=4.0,
    )


def _badly_trained() -> SchNetPotential:
    potential = new_schnet()
    pretrain(Pretraining(potential, reference(), PretrainOptions(epochs=30, learning_rate=5e-3)))
    return potential


def small_builder(monkeypatch, family: str = "schnet") -> None:
    """Have pretraining of a family in this process build the small SchNet."""
    made = replace(families()[family], build=lambda reference: new_schnet(elements=reference))
    monkeypatch.setitem(families(), family, made)


def config(**changes) -> FinetuneOptions:
    """Options of a loop that takes a second or two."""
    return from_dict(FinetuneOptions, {"temperature_K": TEMPERATURE} | FAST | changes)


def flags(**changes) -> list[str]:
    """The same options on the command line."""
    from stabie_ase.cli.options import flag

    return [text for name, value in (FAST | changes).items() for text in (flag(name), str(value))]


def run(*arguments, **settings):
    """The command line in this process; the result has exit_code, stdout, stderr and output."""
    from stabie_ase.cli import main

    return CliRunner().invoke(main, [str(a) for a in arguments], **settings)


class Process:
    """The command line in a process of its own, forked from a server that has torch imported already.

    Parameters
    ----------
    folder : Path
        Where it runs.
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["stabie_ase.runs.finetune", "stabie_ase.runs.report.html", "torch_geometric.nn.models"])

    def __init__(self, folder: Path, *arguments):
        self.files = [folder.parent / f"{folder.name}.{name}" for name in ("stdout", "stderr")]
        settings = ([str(a) for a in arguments], str(folder), [str(p) for p in self.files])
        self.process = self._context.Process(target=_in_process, args=settings)
        self.process.start()

    def wait_for(self, condition, seconds: float = 120.0) -> None:
        """Wait until something has happened; an assertion fails if the process ends first."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), self.output
            assert time.monotonic() < end
            time.sleep(0.005)

    def end(self, seconds: float = 120.0) -> int:
        """Wait for the end; returns the exit code, negative for a signal."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self, after: float = 0.0) -> int:
        """SIGKILL, now or in a while."""
        self.process.join(after)
        self.process.kill()
        return self.end()

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C, or another signal."""
        os.kill(self.process.pid, number)
        return self.end()

    @property
    def stdout(self) -> str:
        return self.files[0].read_text()

    @property
    def stderr(self) -> str:
        return self.files[1].read_text()

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def _in_process(arguments: list[str], folder: str, files: list[str]) -> None:
    os.chdir(folder)
    for number, path in zip((1, 2), files):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    from stabie_ase.cli import main

    main(arguments)
