"""Replicas that heat up."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from ase import units
from scipy import stats
from torch import Tensor

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

    Another limit is an excess over the bath's temperature, however many atoms there are (MLIPAudit: a simulation explodes beyond
    10 000 K more).

    Parameters
    ----------
    ratio : float
        Limit of the kinetic temperature, as a multiple of the bath's.
    reference_K : float
        Temperature of the frames that replicas start from.
    excess_K : float or None
        Above the bath's, which is then the limit.
    """

    ratio: float
    reference_K: float = 0.0
    excess_K: float | None = None
    name, unit = "temperature", "K"

    @classmethod
    def for_atoms(cls, n_atoms: int, reference_temperature_K: float | None = None) -> KineticTemperature:
        """For systems of so many atoms, from frames of a temperature (K) if that is known."""
        n_f = 3 * n_atoms
        return cls(float(stats.chi2.isf(FALSE_ALARM_CHANCE, n_f)) / n_f, reference_temperature_K or 0.0)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> KineticTemperature:
        """`temperature`, or `temperature:+10000` for a limit in K above that of the bath."""
        excess_K = spec.read({"excess": _excess}, "excess").get("excess")
        return replace(cls.for_atoms(len(setting.frames[0]), setting.reference_temperature_K), excess_K=excess_K)

    def judge(self, state: MDState) -> Verdict:
        """The excess of the kinetic temperature over the bath's, as a part of what is allowed."""
        batch = state.batch
        kinetic = batch.sum_over_atoms(0.5 * state.momenta.double().square().sum(dim=1) / batch.masses.double())
        value = 2.0 * kinetic / (3.0 * units.kB * batch.counts.double())
        bath = state.temperature.double()
        severity = ((value - bath) / self._allowed(bath)).clamp(min=0.0)
        return Verdict(severity, value, torch.zeros((batch.n_systems, 0), dtype=torch.int64, device=batch.device))

    def _allowed(self, bath: Tensor) -> Tensor:
        """Above the bath's, shape (n_systems,), in K."""
        if self.excess_K is not None:
            return torch.full_like(bath, self.excess_K)
        return self.ratio * torch.maximum(bath, 0.5 * (bath + self.reference_K)) - bath

    def describe(self) -> str:
        if self.excess_K is not None:
            return f"a kinetic temperature of more than {self.excess_K:g} K above that of the heat bath"
        return f"a kinetic temperature of more than {self.ratio:.2g} times that of the heat bath"


def _excess(text: str) -> float:
    """K above the bath's, with the sign that says so."""
    try:
        kelvin = float(text) if text.startswith("+") else math.nan
    except ValueError:
        kelvin = math.nan
    if not 0.0 < kelvin < math.inf:
        raise ValueError("expected K above the heat bath's temperature with a plus, as temperature:+10000")
    return kelvin
