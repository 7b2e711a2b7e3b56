"""When to find failures and when to learn from them."""

from __future__ import annotations

from dataclasses import dataclass

SIMULATION, LEARNING, MATCHING, FINISHED = "simulation", "learning", "matching", "finished"

STABILITY, OBSERVABLES = "stability", "observables"
"""What a run can be for."""


@dataclass(frozen=True)
class Schedule:
    """Ends a simulation phase once enough replicas have failed, and a learning phase once few still do.

    Of a model that seldom fails fewer failures are enough. Waiting for n of them takes a time t = n / (R h) of R replicas with hazard h,
    and what they teach, g = n / (n + n0), saturates. With the time L that learning takes, g / (t + L) is largest where n t = n0 L, which
    knows neither h nor R: unstable fraction times windows is bounded, not the one or the other.

    Parameters
    ----------
    upper_fraction, lower_fraction : float
        Unstable fractions of the replicas that end a simulation and a learning phase. Where fewer than the upper one have failed,
        the lower one is smaller in proportion.
    failure_windows : float
        Unstable fraction times windows that ends a simulation phase as well.
    max_simulation_windows, max_learning_windows : int
        Windows after which a phase ends anyway.
    """

    upper_fraction: float
    lower_fraction: float
    failure_windows: float
    max_simulation_windows: int
    max_learning_windows: int
    first = SIMULATION

    def after(self, phase: str, window: int, unstable: float, failed: float) -> str:
        """The phase of the next window.

        Parameters
        ----------
        phase : str
            Of the window that has just ended.
        window : int
            Its number in the phase, from 1.
        unstable : float
            Fraction of the replicas that have failed: since the phase began, or in this window of learning.
        failed : float
            In the last simulation phase.

        Returns
        -------
        str
        """
        if phase == SIMULATION:
            enough = unstable >= self.upper_fraction or unstable * window >= self.failure_windows
            if enough or window >= self.max_simulation_windows:
                return LEARNING if unstable > 0 else FINISHED
            return SIMULATION
        return SIMULATION if not self.teaches(unstable, failed) or window >= self.max_learning_windows else LEARNING

    def teaches(self, unstable: float, failed: float) -> bool:
        """Whether the unstable fraction of a window of learning is enough to learn from, after so many failed in simulation."""
        return unstable > fewest_that_teach(failed, self.upper_fraction, self.lower_fraction)


def fewest_that_teach(failed: float, upper_fraction: float, lower_fraction: float) -> float:
    """Unstable fraction up to which learning ends, after so many failed in simulation; see `Schedule`."""
    return lower_fraction * min(1.0, failed / upper_fraction)


@dataclass(frozen=True)
class Matching:
    """All replicas teach in every window, whether they fail or not, and go on from its end: for a model whose observables are off."""

    first = MATCHING

    def after(self, phase: str, window: int, unstable: float, failed: float) -> str:
        """The same phase, until the budget is spent."""
        return MATCHING

    def teaches(self, unstable: float, failed: float) -> bool:
        """Always."""
        return True


@dataclass
class Progress:
    """How far a run has come; plain values, saved with it.

    Attributes
    ----------
    phase : str
        That of the next window.
    cycle, window : int
        That have ended, of the run and of the phase.
    updates, taken_back : int
        Changes of the parameters, and how many of them were undone again.
    update_calls : int
        Frames that updates have evaluated.
    seconds : float
        Of finished windows.
    """

    phase: str = SIMULATION
    cycle: int = 0
    window: int = 0
    updates: int = 0
    taken_back: int = 0
    update_calls: int = 0
    seconds: float = 0.0
