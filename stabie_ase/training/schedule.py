"""When to find failures and when to learn from them."""

from __future__ import annotations

from dataclasses import dataclass

SIMULATION, LEARNING, MATCHING, FINISHED = "simulation", "learning", "matching", "finished"

STABILITY, OBSERVABLES = "stability", "observables"
"""What a run can be for."""


@dataclass(frozen=True)
class Schedule:
    """Ends a simulation phase once enough replicas have failed, and a learning phase once few still do.

    Parameters
    ----------
    upper_fraction, lower_fraction : float
        Unstable fractions of the replicas that end a simulation and a learning phase.
    max_simulation_windows, max_learning_windows : int
        Windows after which a phase ends anyway.
    """

    upper_fraction: float
    lower_fraction: float
    max_simulation_windows: int
    max_learning_windows: int
    first = SIMULATION

    def after(self, phase: str, window: int, unstable: float) -> str:
        """The phase of the next window.

        Parameters
        ----------
        phase : str
            Of the window that has just ended.
        window : int
            Its number in the phase, from 1.
        unstable : float
            Fraction of the replicas that have failed: since the phase began, or in this window of learning.

        Returns
        -------
        str
        """
        if phase == SIMULATION:
            if unstable >= self.upper_fraction or window >= self.max_simulation_windows:
                return LEARNING if unstable > 0 else FINISHED
            return SIMULATION
        return SIMULATION if not self.teaches(unstable) or window >= self.max_learning_windows else LEARNING

    def teaches(self, unstable: float) -> bool:
        """Whether the unstable fraction of a window of learning is enough to learn from."""
        return unstable > self.lower_fraction


@dataclass(frozen=True)
class Matching:
    """All replicas teach in every window, whether they fail or not, and go on from its end: for a model whose observables are off."""

    first = MATCHING

    def after(self, phase: str, window: int, unstable: float) -> str:
        """The same phase, until the budget is spent."""
        return MATCHING

    def teaches(self, unstable: float) -> bool:
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
