"""The largest time step at which a model is as stable as at a small one (Raja et al., arXiv 2402.13984, A.12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ase import Atoms

from stabie_ase.potentials.base import Potential
from stabie_ase.runs.evaluation import StabilityTest, Yardstick, run_stability_test
from stabie_ase.runs.monitor import Monitor
from stabie_ase.stability import StabilityStatistics
from stabie_ase.stability.sequential import ERROR_RATE
from stabie_ase.stability.survival import fewer_p_value


@dataclass(frozen=True)
class TimestepScan:
    """Stability at several time steps, from equal starts and for the same time.

    Attributes
    ----------
    timesteps_fs : tuple of float
        Increasing; the first is the one that the others are held against.
    statistics : tuple of StabilityStatistics
    """

    timesteps_fs: tuple[float, ...]
    statistics: tuple[StabilityStatistics, ...]

    @property
    def largest_stable_fs(self) -> float:
        """The largest time step, in fs, up to which no step fails more often than the first beyond chance (one-sided, 5 % each)."""
        first, largest = self.statistics[0], self.timesteps_fs[0]
        for timestep, here in zip(self.timesteps_fs[1:], self.statistics[1:]):
            if fewer_p_value(here.n_failed, first.n_failed, here.stable_replica_ps, first.stable_replica_ps) <= ERROR_RATE:
                break
            largest = timestep
        return largest

    def rows(self) -> list[dict[str, object]]:
        """Of each time step, plain values with units in the names."""
        return [
            {
                "timestep_fs": timestep,
                "n_failed": here.n_failed,
                "stable_replica_ps": here.stable_replica_ps,
                "hazard_per_ps": here.hazard_per_ps,
                "hazard_per_ps_interval": list(here.hazard_interval()),
            }
            for timestep, here in zip(self.timesteps_fs, self.statistics)
        ]

    def describe(self, name: str) -> str:
        """In a sentence, of a model of this name."""
        found = ", ".join(f"{row['hazard_per_ps']:.3g} at {row['timestep_fs']:g} fs" for row in self.rows())
        beyond = "the largest tried" if self.largest_stable_fs == self.timesteps_fs[-1] else "beyond it failures become more frequent"
        return f"{name}: largest stable time step {self.largest_stable_fs:g} fs, {beyond}; failures per replica-ps: {found}"


def scan_timesteps(
    potential: Potential,
    frames: Sequence[Atoms],
    yardstick: Yardstick,
    test: StabilityTest,
    known: StabilityStatistics,
    timesteps_fs: Sequence[float],
    monitor: Monitor,
    name: str,
) -> TimestepScan:
    """Run a test again with larger time steps.

    Parameters
    ----------
    potential : Potential
    frames : sequence of Atoms
    yardstick : Yardstick
    test : StabilityTest
        With the smallest time step.
    known : StabilityStatistics
        What came of it.
    timesteps_fs : sequence of float
        The others, in fs, increasing.
    monitor : Monitor
        Told how far the work has come.
    name : str
        What to call the model.

    Returns
    -------
    TimestepScan
    """
    found = [known]
    for k, timestep in enumerate(timesteps_fs):
        monitor.progress(f"{name}, time steps", k, len(timesteps_fs), f"{timestep:g} fs")
        found.append(run_stability_test(potential, frames, yardstick, replace(test, timestep_fs=timestep)).statistics)
    monitor.progress(f"{name}, time steps", len(timesteps_fs), len(timesteps_fs), "")
    return TimestepScan((test.timestep_fs, *timesteps_fs), tuple(found))
