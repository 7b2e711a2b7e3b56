"""Pretraining on disk: a model trained from random weights, and the directory beside it that an interrupted run goes on from."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols

from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import save_potential
from stabie_ase.potentials.family import families
from stabie_ase.runs.directory import UnusableRun, WorkDirectory
from stabie_ase.runs.inputs import FromFiles, digests
from stabie_ase.runs.monitor import Monitor
from stabie_ase.runs.run import Live, Run
from stabie_ase.structures.reference import Reference, read_reference
from stabie_ase.system.options import BadOption
from stabie_ase.training.pretrain import Pretraining
from stabie_ase.training.pretrain_options import PretrainOptions

SAVE_EVERY = 5.0
"""Seconds between two saved states: what ctrl-C or a crash may cost, and an epoch can be shorter than a disk's sync."""

BUDGET = ("epochs", "max_time_min")
"""Options that may be others when a run is gone on with."""


class PretrainDirectory(WorkDirectory):
    """Its state alone."""

    command = "pretrain"


@dataclass(frozen=True)
class PretrainInputs(FromFiles):
    """What pretraining was asked to work on, as config.json holds it."""

    FILES = ("reference",)

    family: str
    reference: str | list[str]
    energy_key: str | None = None
    forces_key: str | None = None
    device: str = "cpu"
    dtype: str = "float32"


class PretrainRun(Run):
    """A run of `stabie-ase pretrain`, in the directory MODEL.pretrain until MODEL is written.

    Parameters
    ----------
    inputs : PretrainInputs
    config : PretrainOptions
    frames : Reference
    potential : Potential
        With random weights.
    """

    directory_class = PretrainDirectory
    inputs_class = PretrainInputs
    config_class = PretrainOptions

    def __init__(self, inputs: PretrainInputs, config: PretrainOptions, frames: Reference, potential: Potential):
        self.inputs, self.config, self.frames = inputs, config, frames
        self.training = Pretraining(potential, frames, config)

    @classmethod
    def set_up(cls, inputs: PretrainInputs, config: PretrainOptions, monitor: Monitor, live: Live) -> PretrainRun:
        """Everything that can be wrong, looked at before anything is written."""
        family = families()[inputs.family]
        if family.build is None:
            raise BadOption(f"{family.name} models cannot be trained from nothing; give a checkpoint to finetune")
        frames = read_reference(inputs.reference, inputs.energy_key, inputs.forces_key, min_frames=10)
        torch.manual_seed(config.seed)
        potential = family.build(frames).to(device=inputs.device, dtype=getattr(torch, inputs.dtype))
        monitor.message(f"Reference: {frames.source}")
        if frames.atom_energies:
            of = ", ".join(chemical_symbols[z] for z in sorted(frames.atom_energies))
            monitor.message(f"Reference energies of {of} are those of the isolated atoms")
        return cls(inputs, config, frames, potential)

    @classmethod
    def begin_or_resume(
        cls, output: str | os.PathLike, inputs: PretrainInputs, config: PretrainOptions, monitor: Monitor | None = None
    ) -> PretrainRun:
        """A run that writes a model: the interrupted one if there is any, with a budget that may be another.

        Parameters
        ----------
        output : path
            Of the model; the run's directory is beside it.
        inputs : PretrainInputs
            Frames and family; those of an interrupted run have to be the same.
        config : PretrainOptions
            All but epochs and time have to be the same.
        monitor : Monitor, optional
            Told in words what is found on the way.

        Returns
        -------
        PretrainRun

        Raises
        ------
        UnusableRun
            What is there is of a run with other options, or no run.
        """
        path = Path(f"{os.fspath(output)}.pretrain")
        if not path.exists():
            return cls.begin(path, inputs, config, monitor)
        try:
            opened = cls.opened(path)
        except UnusableRun as error:
            raise UnusableRun(f"{error}; remove {path} to begin anew") from error
        now, then = _must_be_the_same(inputs, config), _must_be_the_same(opened.inputs, opened.config)
        now["reference"], then["reference"] = digests(inputs, config)["reference"], opened.description["digests"].get("reference")
        different = [name for name in now if now[name] != then[name]]
        if different:
            raise UnusableRun(f"{path} is of a run with another {', '.join(different)}; remove it to begin anew")
        return cls.resume(path, monitor, **{name: getattr(config, name) for name in BUDGET})

    def restore(self, state: dict) -> None:
        """Go on from what state.pt holds."""
        self.training.restore(state)

    @property
    def onwards(self) -> str:
        """How to go on with interrupted work, in words."""
        return f"the same command goes on from {self.directory.path}"

    @property
    def output(self) -> Path:
        """Where the model goes."""
        return self.directory.path.with_suffix("")

    def run(self, monitor: Monitor | None = None) -> Path:
        """Train to the end and write the model; the directory goes, since nothing is left to do in it."""
        training, monitor = self.training, monitor or Monitor()
        monitor.message(f"Training {self.inputs.family} on {len(training.train)} frames, validating on {len(training.validation)}")
        if training.epoch:
            monitor.message(f"Going on after epoch {training.epoch}")
        try:
            self._to_end(monitor)
            save_potential(training.potential, self.output)
        except BaseException:
            if not self.directory.state_path.exists():  # there is nothing to go on from
                self._remove()
            raise
        self._remove()
        return self.output

    def _to_end(self, monitor: Monitor) -> None:
        training, config = self.training, self.config
        budget, saved = 60.0 * config.max_time_min, time.monotonic()

        def tell(note: str) -> None:
            monitor.progress("pretrain", max(training.seconds, budget * training.epoch / config.epochs), budget, note)

        tell("")
        while not training.finished:
            record = training.run_epoch()
            tell(f"epoch {record['epoch']}, force MAE {1000 * record['force_mae_eV_per_A']:.1f} meV/Å")
            if time.monotonic() - saved > SAVE_EVERY:
                self.directory.save(training.state())
                saved = time.monotonic()
        monitor.progress("pretrain", budget, budget, "")
        training.take_best()

    def _remove(self) -> None:
        shutil.rmtree(self.directory.path, ignore_errors=True)


def _must_be_the_same(inputs: PretrainInputs, config: PretrainOptions) -> dict[str, Any]:
    """By name, all but the budget and where it is worked on."""
    options = {name: value for name, value in asdict(config).items() if name not in BUDGET}
    return options | asdict(replace(inputs, device=""))
