"""Vibrational densities of states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from ase import units
from torch import Tensor

from stabie_ase.observables.base import Axis
from stabie_ase.observables.dynamical import Dynamical, OfVelocities

PER_CM_IN_THZ = 100.0 * units._c * 1e-12
"""One cm⁻¹ as a frequency."""

UNITS = {"cm-1": ("cm⁻¹", "cm", PER_CM_IN_THZ), "THz": ("THz", "ps", 1.0)}
"""How they and their inverse are written, and what they are in THz."""

WINDOWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "hann": lambda x: 0.5 + 0.5 * torch.cos(torch.pi * x),
    "blackman": lambda x: 0.42 + 0.5 * torch.cos(torch.pi * x) + 0.08 * torch.cos(2.0 * torch.pi * x),
    "none": torch.ones_like,
}
"""Functions of t / t_max that are 1 at 0."""


def _one_of(known: Mapping) -> Callable[[str], str]:
    def reader(text: str) -> str:
        if text not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return text

    return reader


@dataclass(frozen=True)
class VibrationalDensityOfStates(OfVelocities):
    """Vibrational density of states, the Fourier transform of the mass-weighted velocity autocorrelation function.

    g(ν) = 4 ∫ w(t) c(t) cos(2π ν t) dt from 0 to `t_max`, where c(t) = Σ_i m_i ⟨v_i(0)·v_i(t)⟩ / Σ_i m_i ⟨v_i²⟩ (Dickey and Paskin,
    Phys. Rev. 188, 1407, 1969; Thomas et al., Phys. Chem. Chem. Phys. 15, 6608, 2013) and w is a window, so that ∫ g(ν) dν = 1 from 0 to
    the highest frequency, 1 / (2 interval). In classical mechanics every mode has the same weight. Lines are 1 / (2 t_max) apart
    and, with a window, about twice as wide; a vibration faster than the highest frequency appears folded back below it.

    Parameters
    ----------
    element : int, optional
        See `Dynamical`; of one element alone it is normalised by itself.
    t_max : float, optional
        See `Dynamical`, in ps.
    remove_drift : bool
        See `Dynamical`.
    window : {"hann", "blackman", "none"}
    unit : {"cm-1", "THz"}
        Of ν; g is in its inverse.
    """

    window: str = "hann"
    unit: str = "cm-1"
    kind, min_lags = "vdos", 2
    readers = {**Dynamical.readers, "window": _one_of(WINDOWS), "unit": _one_of(UNITS)}

    def __post_init__(self):
        if self.window not in WINDOWS or self.unit not in UNITS:
            raise ValueError(
                f"{self.name}: expected a window of {', '.join(WINDOWS)}, and a unit of {', '.join(UNITS)}, got {self.window}, {self.unit}"
            )

    def scale(self, masses: Tensor) -> Tensor:
        """The root of the masses, shape (n_atoms,)."""
        return masses.sqrt()

    @property
    def label(self) -> str:  # type: ignore[override]
        """Of its values, with their unit."""
        return f"VDOS ({UNITS[self.unit][1]})"

    def statistic(self, means: Tensor, interval_ps: float) -> Tensor:
        """g of each autocorrelation function, shape (n, n_lags)."""
        n = means.shape[1]
        window = WINDOWS[self.window](torch.arange(n, dtype=means.dtype, device=means.device) / (n - 1))
        # The function of t and -t, which is periodic in 2 t_max to the transform.
        transform = torch.fft.hfft((window * means / means[:, :1]).to(torch.complex128), 2 * (n - 1))[:, :n]
        return 2.0 * interval_ps * UNITS[self.unit][2] * transform

    def axis(self, n_lags: int, interval_ps: float) -> Axis:
        """Frequencies from 0 to 1 / (2 interval)."""
        spacing = 1.0 / (2.0 * (n_lags - 1) * interval_ps)
        name, _, in_THz = UNITS[self.unit]
        return Axis(spacing / in_THz * torch.arange(n_lags, dtype=torch.float64), f"ν ({name})")

    def note(self, n_lags: int, interval_ps: float) -> str:
        """The resolution, and beyond what frequency frames tell nothing."""
        name, _, in_THz = UNITS[self.unit]
        resolution, highest = (1.0 / (2.0 * time * in_THz) for time in ((n_lags - 1) * interval_ps, interval_ps))
        return f"resolution {resolution:.3g} {name}; frames are too rare for vibrations beyond {highest:.4g} {name}, which are folded back"
