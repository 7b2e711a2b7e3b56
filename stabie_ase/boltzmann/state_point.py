"""Thermodynamic states."""

from __future__ import annotations

from dataclasses import dataclass

from ase import units
from torch import Tensor


@dataclass(frozen=True)
class StatePoint:
    """Temperature, and pressure where the volume is free.

    Parameters
    ----------
    temperature_K : float
    pressure_GPa : float or None
        At constant volume there is none.
    """

    temperature_K: float
    pressure_GPa: float | None = None

    def __post_init__(self):
        if not self.temperature_K > 0:
            raise ValueError(f"a temperature is above 0 K, got {self.temperature_K:g} K")

    @property
    def beta(self) -> float:
        """1/(k_B T), in 1/eV."""
        return 1.0 / (units.kB * self.temperature_K)

    def exponent(self, energies: Tensor, volumes: Tensor | None = None) -> Tensor:
        """-β (U + P V), of which the probability of a configuration is the exponential.

        Parameters
        ----------
        energies : Tensor
            In eV.
        volumes : Tensor, optional
            In Å³; needed at constant pressure.

        Returns
        -------
        Tensor
            A number without a unit for each of the energies.
        """
        if self.pressure_GPa is None:
            return -self.beta * energies
        if volumes is None:
            raise ValueError(f"at {self.pressure_GPa:g} GPa the probability of a configuration depends on its volume: give volumes")
        return -self.beta * (energies + self.pressure_GPa * units.GPa * volumes)
