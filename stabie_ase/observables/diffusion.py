"""Self-diffusion coefficients, from displacements and from velocities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from ase.units import _k as BOLTZMANN_J_PER_K
from torch import Tensor

from stabie_ase.observables.base import Axis
from stabie_ase.observables.dynamical import Dynamical, MeanSquaredDisplacement, OfVelocities
from stabie_ase.observables.observed import Observed
from stabie_ase.observables.series import TimeSeries
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import BadSpec, Spec

if TYPE_CHECKING:
    from typing_extensions import Self

LABEL = "D (10⁻⁹ m²/s)"

ANGSTROM2_PER_PS = 10.0
"""One Å²/ps in 10⁻⁹ m²/s."""

YEH_HUMMER = 2.837297
"""Of the self-interaction of a point force in a periodic cube."""

CUBIC = 1e-3
"""Fraction by which the edges, and cosines by which the angles, of a cell may be off those of a cube."""


@dataclass(frozen=True)
class SelfDiffusion(MeanSquaredDisplacement):
    """Self-diffusion coefficient from the slope of the mean squared displacement (Einstein's relation).

    D = (1/6) d⟨|r(t) - r(0)|²⟩/dt (Allen & Tildesley, section 8.3), the slope of a straight line through the points between `fit_from` and
    `t_max`, all with one weight, in 10⁻⁹ m²/s (0.1 Å²/ps).

    In a periodic box D grows with its width L: with a viscosity η, k_B T ξ / (6π η L), ξ = 2.837297, is added to give that of an
    infinite system (Yeh and Hummer, J. Phys. Chem. B 108, 15873, 2004); for cubic cells. η is not computed, and its error not counted.

    Parameters
    ----------
    element : int, optional
        See `Dynamical`.
    t_max : float, optional
        See `Dynamical`, in ps: the end of the fit.
    remove_drift : bool
        See `Dynamical`.
    fit_from : float, optional
        In ps; half of the longest time if not given. Before it motion is not yet diffusive.
    viscosity : float, optional
        In mPa s.
    temperature_K : float, optional
        Of the correction for the size.
    """

    fit_from: float | None = None
    viscosity: float | None = None
    temperature_K: float | None = None
    kind, label, min_lags = "diffusion", LABEL, 2
    readers = {**Dynamical.readers, "fit_from": float, "viscosity": float}

    def __post_init__(self):
        if self.viscosity is not None and not 0 < self.viscosity < math.inf:
            raise ValueError(f"{self.name}: expected a positive viscosity, in mPa s")

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Self:
        """`diffusion` or `diffusion:O`, with `fit_from` and `t_max` in ps and, for the correction, `viscosity` in mPa s."""
        found = super().from_spec(spec, setting)
        if found.viscosity is None:
            return found
        if not math.isfinite(setting.temperature_K):
            raise BadSpec(f"{str(spec)!r}: the correction for the size of the cell needs a temperature; give --temperature in K")
        return replace(found, temperature_K=setting.temperature_K)

    def statistic(self, means: Tensor, interval_ps: float) -> Tensor:
        """D of each curve, shape (n, 1)."""
        first = self._first(means.shape[1], interval_ps)
        times = interval_ps * torch.arange(first, means.shape[1], dtype=means.dtype, device=means.device)
        centred = times - times.mean()
        slope = (means[:, first:] * centred).sum(dim=1, keepdim=True) / centred.square().sum()
        return ANGSTROM2_PER_PS / 6.0 * slope

    def _first(self, n_lags: int, interval_ps: float) -> int:
        """The first lag of the fit."""
        first = n_lags // 2 if self.fit_from is None else math.ceil(self.fit_from / interval_ps - 1e-6)
        if not 0 <= first <= n_lags - 2:
            raise ValueError(
                f"{self.name}: a line needs two points between fit_from={self.fit_from:g} ps and {(n_lags - 1) * interval_ps:g} ps; "
                "give an earlier fit_from or a later t_max"
            )
        return first

    def axis(self, n_lags: int, interval_ps: float) -> Axis:
        """One component."""
        return Axis.of_names("", ["D"])

    def note(self, n_lags: int, interval_ps: float) -> str:
        """The range of the fit."""
        begin, end = self._first(n_lags, interval_ps) * interval_ps, (n_lags - 1) * interval_ps
        return f"fit from {begin:g} to {end:g} ps"

    def __call__(self, replicas: TimeSeries | Sequence[TimeSeries]) -> Observed:
        """With the correction for the size of the cell where a viscosity is given; see `Dynamical`."""
        replicas = [replicas] if isinstance(replicas, TimeSeries) else list(replicas)
        observed = super().__call__(replicas)
        if self.viscosity is None:
            return observed
        correction = self._correction(replicas)
        note = f"{observed.note}; {correction:.3g} added for the size of the cell"
        return replace(observed, value=observed.value + correction, note=note)

    def _correction(self, replicas: Sequence[TimeSeries]) -> float:
        """In 10⁻⁹ m²/s."""
        if self.temperature_K is None or self.viscosity is None:
            raise ValueError(f"{self.name}: the correction for the size of the cell needs a temperature_K")
        cells = torch.cat([series.frames.cells.double() for series in replicas])
        if not all(bool(series.frames.pbc.all()) for series in replicas) or not _is_cubic(cells):
            raise ValueError(f"{self.name}: the correction for the size of the cell is for cubic cells, periodic in all directions")
        width_m = float(cells.det().abs().pow(1.0 / 3.0).mean()) * 1e-10
        kT = BOLTZMANN_J_PER_K * self.temperature_K
        return 1e9 * YEH_HUMMER * kT / (6.0 * math.pi * 1e-3 * self.viscosity * width_m)


def _is_cubic(cells: Tensor) -> bool:
    lengths = cells.norm(dim=2)
    units = cells / lengths[:, :, None]
    angles = units @ units.mT - torch.eye(3, dtype=cells.dtype, device=cells.device)
    return bool((angles.abs() < CUBIC).all()) and bool((lengths / lengths[:, :1] - 1.0).abs().max() < CUBIC)


@dataclass(frozen=True)
class GreenKuboDiffusion(OfVelocities):
    """Self-diffusion coefficient from the integral of the velocity autocorrelation function.

    D = (1/3) ∫ ⟨v(0)·v(t)⟩ dt from 0 to `t_max` by trapezoids (Allen & Tildesley, section 8.3), in 10⁻⁹ m²/s. Frames must be so close in
    time that they show the decay, for liquids some fs.

    Parameters
    ----------
    element : int, optional
        See `Dynamical`.
    t_max : float, optional
        See `Dynamical`, in ps: the end of the integral.
    remove_drift : bool
        See `Dynamical`.
    """

    kind, label, min_lags = "diffusion-gk", LABEL, 2

    def statistic(self, means: Tensor, interval_ps: float) -> Tensor:
        """D of each curve, shape (n, 1)."""
        return ANGSTROM2_PER_PS / 3.0 * torch.trapezoid(means, dx=interval_ps, dim=1)[:, None]

    def axis(self, n_lags: int, interval_ps: float) -> Axis:
        """One component."""
        return Axis.of_names("", ["D"])

    def note(self, n_lags: int, interval_ps: float) -> str:
        """The end of the integral."""
        return f"integral to {(n_lags - 1) * interval_ps:g} ps"
