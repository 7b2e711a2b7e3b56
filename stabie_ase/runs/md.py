"""Molecular dynamics on disk: trajectories, a thermodynamic log and exact restarts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from stabie_ase.dynamics import MDState, PotentialForces, kinetic_energy
from stabie_ase.dynamics.starts import start, starting_frames
from stabie_ase.dynamics.state import degrees_of_freedom, has_momenta, remove_com_momentum, take_momenta
from stabie_ase.potentials.base import Potential
from stabie_ase.runs.directory import FrameLog, TextLog, WorkDirectory
from stabie_ase.runs.options import MDConfig
from stabie_ase.stability import Criterion, Failures, StabilityStatistics, look, watched, with_memory

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


class Production:
    """Replicas run to a requested time. Nothing is written before `take_up` says where.

    Parameters
    ----------
    config : MDConfig
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

    def __init__(
        self, config: MDConfig, potential: Potential, frames: Sequence[Atoms], criteria: Sequence[Criterion] = ()
    ):
        self.config, self.potential = config, potential
        self.criteria = list(criteria)
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

    def take_up(self, directory: MDDirectory) -> None:
        """Work in an arranged directory from now on, from its last state or from the start."""
        self.directory, saved = directory, directory.load()
        if saved is not None:
            try:
                state = saved["state"]
                self.state, self.done = self.state.restore(state["replicas"]), int(state["done"])
                self.failed_step = state["failed_step"].to(self.failed_step.device)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise self.directory.damaged_state(error) from error
        self.directory.cut_to(saved)

    def run(self, on_sample: Callable[[int, MDState, Tensor], None] | None = None) -> None:
        """Take all replicas to the end; `on_sample(steps_done, state, stopped)` after every frame.

        A ctrl-C costs the steps since the last frame.
        """
        if self.done == 0 and self.directory.thermo.length == 0:
            with self.directory.writing():
                self.directory.thermo.append(COLUMNS)
                everyone = torch.arange(self.config.replicas, device=self.state.batch.device)
                self._write(everyone, self._at_start)
            self._save()
        try:
            self._to_end(on_sample)
        except KeyboardInterrupt:
            self._save()
            raise
        self._save()

    def _to_end(self, on_sample: Callable[[int, MDState, Tensor], None] | None) -> None:
        config, saved = self.config, time.monotonic()
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
            if on_sample:
                on_sample(self.done, self.state, self.stopped)
            if time.monotonic() - saved > SAVE_EVERY:
                self._save()
                saved = time.monotonic()

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
