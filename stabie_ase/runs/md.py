"""Molecular dynamics on disk: trajectories, a thermodynamic log and exact restarts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixCom
from torch import Tensor

from stabie_ase.dynamics import MDState, PotentialForces, kinetic_energy
from stabie_ase.dynamics.compilation import compile_where_wanted
from stabie_ase.dynamics.starts import start, starting_frames
from stabie_ase.dynamics.state import degrees_of_freedom, has_momenta, remove_com_momentum, take_momenta
from stabie_ase.potentials.base import Potential
from stabie_ase.runs.directory import FrameLog, TextLog, WorkDirectory
from stabie_ase.runs.inputs import OfAModel
from stabie_ase.runs.monitor import Monitor, Rate
from stabie_ase.runs.options import MDOptions
from stabie_ase.runs.run import Live, Run
from stabie_ase.stability import Criterion, Failures, StabilityStatistics, criteria_from, look, watched, with_memory
from stabie_ase.structures.reference import common_temperature, read_frames
from stabie_ase.structures.setting import Setting
from stabie_ase.system.options import BadOption, with_temperature

logger = logging.getLogger(__name__)

SAFE_TIMESTEP_FS = 1.0
"""For hydrogen; the fastest vibration of an atom slows down with the root of its mass."""

SAVE_EVERY = 10.0
"""Seconds between two saved states."""

COLUMNS = "replica,time_ps,potential_energy_eV,kinetic_energy_eV,temperature_K,kinetic_temperature_K,volume_A3,pressure_GPa"
"""The first temperature is that of the heat bath, the other is measured."""


class MDDirectory(WorkDirectory):
    """`thermo.csv`; `frames/replica-0000.traj` and so on, or one `frames.traj`; `unstable.traj`, a frame for each failure."""

    command = "md"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self.thermo, self.unstable = TextLog(self.path / "thermo.csv"), FrameLog(self.path / "unstable.traj")

    def arrange(self, replicas: int, one_file: bool) -> None:
        """Decide where frames go."""
        if one_file:
            logs = [FrameLog(self.path / "frames.traj")]
        else:
            with self.writing():
                (self.path / "frames").mkdir(exist_ok=True)
            logs = [FrameLog(self.path / "frames" / f"replica-{k:04d}.traj") for k in range(replicas)]
        self.logs = {"thermo": self.thermo, "unstable": self.unstable} | {log.path.name: log for log in logs}
        self.log_of = logs * replicas if one_file else logs


@dataclass(frozen=True)
class MDInputs(OfAModel):
    """What a run of dynamics was asked to work on, as config.json holds it."""

    FILES = ("model", "start")

    model: str
    start: str
    device: str = "cpu"
    dtype: str | None = None
    head: str | None = None
    compilation: str = "off"
    trust_checkpoint: bool = False
    one_file: bool = False


class Production(Run):
    """Replicas run to a requested time: a run of `stabie-ase md`.

    Parameters
    ----------
    inputs : MDInputs
    config : MDOptions
        With a temperature.
    potential : Potential
    frames : sequence of Atoms
        To start from.
    criteria : sequence of Criterion
        Any of them stops a replica.

    Attributes
    ----------
    from_file : list of bool
        Replicas that start with the momenta of their frame: not those that use a frame again, which would take the same path.
    failed_step : Tensor of int64, shape (replicas,)
        Steps after which each replica failed and was stopped; -1 for those that go on.
    done : int
        Steps taken by those.
    """

    directory_class = MDDirectory
    inputs_class = MDInputs
    config_class = MDOptions

    def __init__(
        self, inputs: MDInputs, config: MDOptions, potential: Potential, frames: Sequence[Atoms], criteria: Sequence[Criterion] = ()
    ):
        self.inputs, self.config, self.potential, self.frames = inputs, config, potential, frames
        self.criteria = [criterion.for_model(potential) for criterion in criteria]
        self.integrator = config.integrator
        self.forces = PotentialForces.driving(potential, self.integrator)
        self.state = start(
            potential, frames, config.replicas, config.temperature_K, self.integrator, config.seed, config.pressure_GPa
        )
        chosen = starting_frames(frames, config.replicas, config.seed)
        self.from_file = [
            not config.new_momenta and k < len(frames) and has_momenta(atoms) for k, atoms in enumerate(chosen)
        ]
        # Constant energy keeps the centre-of-mass momentum as it finds it; a thermostat would take it for heat.
        fix_com = self.integrator.fix_com and config.ensemble != "nve"
        self.state = take_momenta(self.state, chosen, self.from_file, fix_com)
        self.integrator.check(self.state)
        self.state = with_memory(self.state, self.criteria)
        everyone = torch.arange(config.replicas, device=self.state.batch.device)
        self._at_start = Failures.none(self.state.batch).examine(self.state, everyone, [], look(self.state, []), 0)
        self.failed_step, self.done = self._at_start.step, 0

    @classmethod
    def set_up(cls, inputs: MDInputs, config: MDOptions, monitor: Monitor, live: Live) -> Production:
        """Everything that can be wrong, looked at before anything is written."""
        frames, asked_K = read_frames(inputs.start), config.temperature_K
        found = common_temperature(frames)
        if config.ensemble == "nve" and not config.new_momenta:
            found = found or _kinetic_temperature(frames)
        config = with_temperature(config, found, "the file of starting frames")
        if config.ensemble.startswith("npt") and not all(atoms.pbc.all() and atoms.cell.rank == 3 for atoms in frames):
            raise BadOption(f"{config.ensemble} needs frames with a cell that are periodic in all three directions; use nvt or nve")
        potential = inputs.load_potential()
        potential.check_numbers(z for atoms in frames for z in set(atoms.numbers))
        _warn_of_long_steps(config.timestep_fs, min(atoms.get_masses().min() for atoms in frames))
        # Frames that tell no temperature may be relaxed ones.
        setting = Setting(
            frames, config.temperature_K, common_temperature(frames) or 0.0, config.timestep_fs, config.check_every_fs
        )
        criteria = criteria_from(config.criterion or "", setting)
        run = cls(inputs, config, potential, frames, live.criteria + criteria)
        run._tell_momenta(asked_K, monitor)
        return run

    def settle(self, monitor: Monitor) -> None:
        """The network compiled as asked for; what a trial said takes the place of "auto"."""
        compiled = compile_where_wanted(
            self.inputs.compilation, self.potential, self.frames, self.config.replicas, steps=self.n_steps, say=monitor.message
        )
        self.inputs = replace(self.inputs, compilation=compiled)

    def _tell_momenta(self, asked_K: float | None, monitor: Monitor) -> None:
        """What became of the momenta in the file, if there are any."""
        config, n_kept = self.config, sum(self.from_file)
        if not n_kept:
            return
        text = f"Momenta: {n_kept} of {config.replicas} replicas start with those in the file"
        if n_kept < config.replicas:
            text += f", the others (a frame used again, or without momenta) with new ones at {config.temperature_K:g} K"
        monitor.message(text)
        if config.ensemble == "nve" and asked_K is not None:
            logger.warning("--temperature %g is not used for the momenta in the file; --new-momenta draws new ones at it", asked_K)

    def arrange(self) -> None:
        """Decide where frames go."""
        self.directory.arrange(self.config.replicas, self.inputs.one_file)

    def restore(self, state: dict) -> None:
        """Go on from what state.pt holds."""
        self.state, self.done = self.state.restore(state["replicas"]), int(state["done"])
        self.failed_step = state["failed_step"].to(self.failed_step.device)

    @property
    def n_steps(self) -> int:
        """Of the whole run."""
        return self.config.steps(1000.0 * self.config.time_ps)

    @property
    def stopped(self) -> Tensor:
        """Shape (replicas,), bool."""
        return self.failed_step >= 0

    @property
    def statistics(self) -> StabilityStatistics:
        """Times to the first failure so far."""
        steps = torch.where(self.stopped, self.failed_step, self.done).cpu().numpy()
        return StabilityStatistics(self._ps(steps), self.stopped.cpu().numpy())

    def _ps(self, steps: int | np.ndarray) -> float | np.ndarray:
        return steps * self.config.timestep_fs / 1000.0

    def run(self, monitor: Monitor | None = None) -> None:
        """Take all replicas to the end. A ctrl-C costs the steps since the last frame."""
        monitor, config = monitor or Monitor(), self.config
        bath = "" if config.ensemble == "nve" else f", {config.temperature_K:g} K"
        monitor.message(f"{config.replicas} replicas, {config.ensemble}{bath}, to {config.time_ps:g} ps")
        if self.criteria:
            monitor.message(f"Unstable: {'; '.join(criterion.describe() for criterion in self.criteria)}")
        if self.done == 0 and self.directory.thermo.length == 0:
            with self.directory.writing():
                self.directory.thermo.append(COLUMNS)
                everyone = torch.arange(self.config.replicas, device=self.state.batch.device)
                self._write(everyone, self._at_start)
            self._save()
        try:
            self._to_end(monitor)
        except KeyboardInterrupt:
            self._save()
            raise
        self._save()

    def _to_end(self, monitor: Monitor) -> None:
        config, saved, rate = self.config, time.monotonic(), Rate()
        monitor.progress("md", self.done, self.n_steps, "")
        while self.done < self.n_steps and not bool(self.stopped.all()):
            n = min(config.steps(config.sample_every_fs), self.n_steps - self.done)
            going = (~self.stopped).nonzero()[:, 0]
            ends, _, failures = watched(
                self.state.select(going),
                self.integrator,
                self.forces,
                n,
                self.criteria,
                check_every=min(config.steps(config.check_every_fs), n) if self.criteria else n,
            )
            with self.directory.writing():  # so that the state and the files always belong together
                self.state = self.state.put(going, ends)
                self.failed_step[going[failures.failed]] = self.done + failures.step[failures.failed]
                self.done += n
                self._write(going, failures)
            stopped = f"stopped {100 * float(self.stopped.double().mean()):.0f} %"
            monitor.progress("md", self.done, self.n_steps, f"{stopped}, {rate.update(int(self.state.step.sum()))}")
            if time.monotonic() - saved > SAVE_EVERY:
                self._save()
                saved = time.monotonic()
        monitor.progress("md", self.n_steps, self.n_steps, "")  # all may have been stopped long before

    def _save(self) -> None:
        self.directory.save({"replicas": self.state.tensors(), "failed_step": self.failed_step, "done": self.done})

    def _write(self, replicas: Tensor, failures: Failures) -> None:
        """A frame and a line of the log for each of these replicas, and what their new failures looked like."""
        frames = self._frames(replicas)
        self.directory.thermo.append(*[self._line(atoms) for atoms in frames])
        for k, atoms in zip(replicas.tolist(), frames):
            self.directory.log_of[k].append([atoms])
        steps = self.failed_step[replicas].tolist()
        info = {k: {"replica": replica, "time_ps": self._ps(steps[k])} for k, replica in enumerate(replicas.tolist())}
        self.directory.unstable.append(failures.to_atoms(info))

    def _frames(self, replicas: Tensor) -> list[Atoms]:
        state = self.state.select(replicas)
        images = state.batch.to_atoms()
        momenta, forces = (x.cpu().double().split(state.batch.sizes) for x in (state.momenta, state.forces))
        bath, measured = self._bath_temperatures(state), self._kinetic_temperatures(state)
        for k, atoms in enumerate(images):
            atoms.set_momenta(momenta[k].numpy())
            results = {"energy": float(state.potential_energy[k]), "forces": forces[k].numpy()}
            if state.stress is not None:
                stress = state.stress[k].cpu().double().numpy()
                results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
            atoms.calc = SinglePointCalculator(atoms, **results)
            atoms.info |= {
                "replica": int(replicas[k]),
                "time_ps": self._ps(int(state.step[k])),
                "kinetic_temperature_K": measured[k],
            } | ({} if bath is None else {"temperature_K": bath[k]})
        return images

    def _bath_temperatures(self, state: MDState) -> list[float] | None:
        """What was asked for, in its own digits, unless a ramp moves it; none at constant energy."""
        if self.config.ensemble == "nve":
            return None
        if self.config.end_temperature_K is None:
            return [self.config.temperature_K] * state.n_systems
        return state.temperature.tolist()

    def _kinetic_temperatures(self, state: MDState) -> list[float]:
        """2K/(N_f k_B) of the motion that is counted as heat, in K."""
        if self.integrator.fix_com:
            state = state.replace(momenta=remove_com_momentum(state.batch, state.momenta, state.mobile))
        n_f = degrees_of_freedom(state, self.integrator.fix_com)
        return (2.0 * kinetic_energy(state) / (units.kB * n_f.clamp(min=1.0))).tolist()

    @staticmethod
    def _line(atoms: Atoms) -> str:
        kinetic, volume, pressure = atoms.get_kinetic_energy(), "", ""
        if atoms.pbc.all():
            volume = f"{atoms.get_volume():.4f}"
        if "stress" in atoms.calc.results:
            pressure = f"{-atoms.get_stress(include_ideal_gas=True)[:3].mean() / units.GPa:.6f}"
        info = atoms.info
        bath = f"{info['temperature_K']:.6g}" if "temperature_K" in info else ""
        return (
            f"{info['replica']},{info['time_ps']:.6g},{atoms.get_potential_energy():.8g},{kinetic:.8g},"
            f"{bath},{info['kinetic_temperature_K']:.6g},{volume},{pressure}"
        )


def _warn_of_long_steps(timestep_fs: float, lightest: float) -> None:
    safe = SAFE_TIMESTEP_FS * (lightest / 1.008) ** 0.5
    if timestep_fs > safe:
        logger.warning("a time step of %g fs is long for atoms of %.3g amu; up to %.2g fs is usual", timestep_fs, lightest, safe)


def _kinetic_temperature(frames: Sequence[Atoms]) -> float | None:
    """Mean over the frames that have momenta, in K."""
    moving = [atoms.copy() for atoms in frames if has_momenta(atoms)]
    for atoms in moving:  # drift is no heat
        atoms.set_constraint(atoms.constraints or FixCom())
        atoms.set_momenta(atoms.get_momenta())
    found = [atoms.get_temperature() if atoms.get_number_of_degrees_of_freedom() else 0.0 for atoms in moving]
    return max(1e-3, sum(found) / len(found)) if found else None
