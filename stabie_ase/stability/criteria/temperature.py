"""Replicas that heat up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ase import units
from scipy import stats

from stabie_ase.dynamics import MDState
from stabie_ase.stability.criteria.base import OneFrame, Verdict
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import Spec

FALSE_ALARM_CHANCE = 1e-12
"""Of a kinetic energy beyond the limit at any one look, in equilibrium with the bath."""


@dataclass(frozen=True)
class KineticTemperature(OneFrame):
    """Unstable once the kinetic energy is more than the heat bath gives.

    In equilibrium 2K/kT follows a χ² distribution with a degree of freedom for each momentum; the limit is the value that
    it exceeds once in 10¹² looks. A replica that begins at a frame of a hotter reference shares out that heat first, half
    of it to its momenta.

    Parameters
    ----------
    ratio : float
        Limit of the kinetic temperature, as a multiple of the bath's.
    reference_K : float
        Temperature of the frames that replicas start from.
    """

    ratio: float
    reference_K: float = 0.0
    name, unit = "temperature", "K"

    @classmethod
    def for_atoms(cls, n_atoms: int, reference_temperature_K: float | None = None) -> KineticTemperature:
        """For systems of so many atoms, from frames of a temperature (K) if that is known."""
        n_f = 3 * n_atoms
        return cls(float(stats.chi2.isf(FALSE_ALARM_CHANCE, n_f)) / n_f, reference_temperature_K or 0.0)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> KineticTemperature:
        """`temperature`."""
        spec.read({})
        return cls.for_atoms(len(setting.frames[0]), setting.reference_temperature_K)

    def judge(self, state: MDState) -> Verdict:
        """The excess of the kinetic temperature over the bath's, as a part of what is allowed."""
        batch = state.batch
        kinetic = batch.sum_over_atoms(0.5 * state.momenta.double().square().sum(dim=1) / batch.masses.double())
        value = 2.0 * kinetic / (3.0 * units.kB * batch.counts.double())
        bath = state.temperature.double()
        warmest = torch.maximum(bath, 0.5 * (bath + self.reference_K))
        severity = ((value - bath) / (self.ratio * warmest - bath)).clamp(min=0.0)
        return Verdict(severity, value, torch.zeros((batch.n_systems, 0), dtype=torch.int64, device=batch.device))

    def describe(self) -> str:
        return f"a kinetic temperature of more than {self.ratio:.2g} times that of the heat bath"
