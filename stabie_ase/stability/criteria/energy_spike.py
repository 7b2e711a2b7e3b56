"""Potential energies that jump."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from ase import units
from scipy.optimize import brentq
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.potentials.base import Potential
from stabie_ase.stability.criteria.base import Verdict
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import Spec

FALSE_ALARM_CHANCE = 1e-12
"""Of a jump beyond the limit between any two looks, were the energy harmonic."""

LAST = "energy-spike last"
"""Name of what is remembered."""


@dataclass(frozen=True)
class EnergySpike:
    """Unstable once the potential energy changes between two looks by more than the temperature allows.

    The limit holds for looks however far apart. A harmonic mode whose coordinate has the correlation ρ between two looks changes
    its energy by x with ⟨exp(s x)⟩ = (1 - s²k²T²(1 - ρ²))^(-1/2), which is largest where ρ = 0: two looks are never less alike than two
    independent draws. So all f modes together change it by more than Δ, either way, with a chance of at most
    2 min_s exp(-sΔ) (1 - s²k²T²)^(-f/2) (Chernoff's bound). The limit is where that is `FALSE_ALARM_CHANCE`, and f k |ΔT|/2 beyond it
    where replicas begin at a reference of another temperature.

    Parameters
    ----------
    limit : float
        In eV.
    """

    limit: float
    name, unit = "energy-spike", "eV"

    @classmethod
    def for_atoms(cls, n_atoms: int, temperature_K: float, reference_temperature_K: float | None = None) -> EnergySpike:
        """For systems of so many atoms, temperatures in K of the dynamics and, if that is known, of the frames they start from."""
        n_f = max(1, 3 * n_atoms - 6)
        warmer = 0.0 if reference_temperature_K is None else abs(temperature_K - reference_temperature_K)
        return cls(units.kB * temperature_K * largest_difference(n_f) + 0.5 * n_f * units.kB * warmer)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> EnergySpike:
        """`energy-spike`."""
        spec.read({})
        return cls.for_atoms(len(setting.frames[0]), setting.temperature_K, setting.reference_temperature_K)

    def memory(self, batch: AtomsBatch) -> dict[str, Tensor]:
        """The energy at the last look; not a number before the first."""
        return {LAST: torch.full((batch.n_systems,), torch.nan, dtype=torch.float64, device=batch.device)}

    def judge(self, state: MDState) -> Verdict:
        """The change since the last look, 0 at the first; an energy that is not finite is not remembered."""
        energy, last = state.potential_energy.double(), state.extra[LAST]
        value = torch.where(torch.isnan(last), 0.0, (energy - last).abs())
        last = torch.where(torch.isfinite(energy), energy, last)
        return Verdict(value / self.limit, value, state.step.new_zeros((state.n_systems, 0)), {LAST: last})

    def for_model(self, potential: Potential) -> EnergySpike:
        """Itself."""
        return self

    def describe(self) -> str:
        return f"a potential energy that changes by more than {self.limit:.3g} eV between two looks"


def largest_difference(n_f: int, chance: float = FALSE_ALARM_CHANCE) -> float:
    """Of two energies of n_f modes, dimensionless, in kT: what they differ by, either way, with no more than a chance, a fraction."""

    def log_bound(x):
        y = (math.sqrt(0.25 * n_f * n_f + x * x) - 0.5 * n_f) / x  # where the derivative of the bound by s = y/kT is zero
        return math.log(2.0) - x * y - 0.5 * n_f * math.log1p(-y * y) - math.log(chance)

    return float(brentq(log_bound, 1e-3, 100.0 * (n_f + 10.0)))
