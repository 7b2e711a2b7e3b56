"""Potential energies that the reference and the temperature do not allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from ase import Atoms, units
from scipy import stats

from stabie_ase.dynamics import MDState
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.energies import potential_energies
from stabie_ase.stability.criteria.base import OneFrame, Verdict
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import spread
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import Spec

FALSE_ALARM_CHANCE = 1e-12
"""Of an energy beyond the limit at any one look, were the energy harmonic."""

MAX_ENERGY_FRAMES = 100
"""Reference frames whose energies by the model are worked out: their mean is known well enough."""


@dataclass(frozen=True)
class EnergyRange(OneFrame):
    """Unstable once the model's potential energy is below or above what its own energies of the reference frames allow.

    Energies are the model's, so that an offset to the reference plays no part. The energy of f harmonic modes above their
    minimum follows ½ kT χ²_f: its mean is f kT/2, and the range ends where that distribution has no more than `FALSE_ALARM_CHANCE`
    left, counted downwards from the lowest and upwards from the highest reference frame. Where the temperature is not
    that of the reference the difference of the means, f k ΔT/2, is added on the side that it moves to.

    Parameters
    ----------
    frames : AtomsBatch
        Some reference frames, evenly spread.
    below, above : float
        Room beyond the lowest and the highest of them, in eV.
    centre, lowest, highest : float
        The model's energies of these frames, in eV; not a number until `for_model` was called.
    """

    frames: AtomsBatch
    below: float
    above: float
    centre: float = float("nan")
    lowest: float = float("nan")
    highest: float = float("nan")
    name, unit = "energy", "eV"

    @classmethod
    def from_reference(
        cls, frames: Sequence[Atoms], temperature_K: float, reference_temperature_K: float | None = None
    ) -> EnergyRange:
        """From frames of one system, temperatures in K; a reference that tells none is taken to be at the one of the dynamics."""
        chosen = [frames[k] for k in spread(len(frames), MAX_ENERGY_FRAMES)]
        n_f = max(1, 3 * len(frames[0]) - 6)
        half_kT = 0.5 * units.kB * temperature_K
        warmer = 0.0 if reference_temperature_K is None else temperature_K - reference_temperature_K
        shift = 0.5 * n_f * units.kB * warmer
        below = half_kT * (n_f - stats.chi2.ppf(FALSE_ALARM_CHANCE, n_f)) + max(0.0, -shift)
        above = half_kT * (stats.chi2.isf(FALSE_ALARM_CHANCE, n_f) - n_f) + max(0.0, shift)
        return cls(AtomsBatch.from_atoms(chosen), float(below), float(above))

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> EnergyRange:
        """`energy`."""
        spec.read({})
        return cls.from_reference(setting.frames, setting.temperature_K, setting.reference_temperature_K)

    def for_model(self, potential: Potential) -> EnergyRange:
        """With the limits of a model as it is now."""
        frames = self.frames.to(potential.device)
        energies = potential_energies(potential, frames)
        return replace(
            self, frames=frames, centre=float(energies.mean()), lowest=float(energies.min()), highest=float(energies.max())
        )

    def judge(self, state: MDState) -> Verdict:
        """How far from the mean of the reference frames the energy is, as a part of what is allowed on that side."""
        value = state.potential_energy - self.centre
        high, low = self.highest + self.above - self.centre, self.lowest - self.below - self.centre
        severity = torch.where(value > 0, value / high, value / low)
        return Verdict(severity, value, state.step.new_zeros((state.n_systems, 0)))

    def describe(self) -> str:
        return (
            f"a potential energy {self.below:.2g} eV below the lowest or {self.above:.2g} eV above the highest reference frame"
        )
