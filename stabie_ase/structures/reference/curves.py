"""Curves over distances, as experiments give them, and their means over the bins of an observable."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stabie_ase.structures.reference.unusable import UnusableReference


@dataclass(frozen=True)
class Curve:
    """Values at distances, linear in between.

    Attributes
    ----------
    r : ndarray, shape (n,)
        In Å, increasing.
    value : ndarray, shape (n,)
        In the unit of the observable that is matched to it.
    error : ndarray, shape (n,), or None
        Standard errors of the values; None where nothing tells them.
    unit : str or None
        Of the values, where it is told; "" of a number without one.
    temperature_K, pressure_GPa : float or None
        At which it was measured, where that is told.
    source : str
        Where it is from.
    """

    r: np.ndarray
    value: np.ndarray
    error: np.ndarray | None = None
    unit: str | None = None
    temperature_K: float | None = None
    pressure_GPa: float | None = None
    source: str = "a curve"

    def __post_init__(self):
        for name in ("r", "value", "error"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        columns = {"r": self.r, "values": self.value} | ({} if self.error is None else {"errors": self.error})
        if len({x.shape for x in columns.values()}) > 1 or self.r.ndim != 1 or len(self.r) < 2:
            shapes = ", ".join(f"{len(np.atleast_1d(x))} {name}" for name, x in columns.items())
            raise UnusableReference(f"{self.source}: {shapes}; a curve has as many of each, and two points or more")
        for name, x in columns.items():
            if not np.isfinite(x).all():
                raise UnusableReference(f"{self.source}: {name} are not finite in row {_first(~np.isfinite(x))}; remove it")
        if not (np.diff(self.r) > 0).all():
            k = _first(np.diff(self.r) <= 0)
            raise UnusableReference(f"{self.source}: r goes from {self.r[k - 1]:g} to {self.r[k]:g} Å in row {k + 1}; sort the rows by r")
        if self.r[0] < 0:
            raise UnusableReference(f"{self.source}: r begins at {self.r[0]:g} Å; distances are not negative")
        if self.error is not None and (self.error < 0).any():
            raise UnusableReference(f"{self.source}: an error of {self.error.min():g}; expected standard errors, which are not negative")

    def above(self, r_min: float) -> Curve:
        """The part from a distance in Å on; UnusableReference if that is not two points."""
        if not np.count_nonzero(self.r >= r_min) > 1:
            raise UnusableReference(f"{self.source}: ends at {self.r[-1]:g} Å, so that nothing is left above {r_min:g} Å")
        kept = self.r >= r_min
        return replace(self, r=self.r[kept], value=self.value[kept], error=None if self.error is None else self.error[kept])

    def bin_means(self, edges: np.ndarray, shells: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means over bins of the curve and of its errors, by integrating what is linear between the points.

        Errors of neighbouring points are of one origin, so that a mean over them is not known better than each.

        Parameters
        ----------
        edges : ndarray, shape (d + 1,)
            Of the bins, in Å.
        shells : bool
            Means over spherical shells, ∫ r² g dr / ∫ r² dr, as of a radial distribution function, instead of over widths.

        Returns
        -------
        values : ndarray, shape (d,)
            Zero in bins that are not wholly within the curve's range.
        errors : ndarray, shape (d,)
            Likewise; zero where none are told.
        known : ndarray of bool, shape (d,)
            Bins that are.
        """
        slack = 1e-9 * edges[-1]
        known = (edges[:-1] >= self.r[0] - slack) & (edges[1:] <= self.r[-1] + slack)
        error = np.zeros_like(self.value) if self.error is None else self.error
        volumes = _integrals(edges, self.r, np.ones_like(self.r), shells)
        values, errors = (np.where(known, _integrals(edges, self.r, y, shells) / volumes, 0.0) for y in (self.value, error))
        return values, errors, known


def _first(flags: np.ndarray) -> int:
    """Of rows, counted from 1."""
    return int(flags.argmax()) + 1


def _integrals(edges: np.ndarray, r: np.ndarray, y: np.ndarray, shells: bool) -> np.ndarray:
    """∫ y dr or ∫ r² y dr over each bin; Simpson's rule between knots is exact, where y is linear."""
    knots = np.union1d(edges, r[(r > edges[0]) & (r < edges[-1])])
    middles, steps = 0.5 * (knots[1:] + knots[:-1]), np.diff(knots)

    def integrand(x):
        return np.interp(x, r, y) * (x**2 if shells else 1.0)

    at = integrand(knots)
    parts = steps / 6.0 * (at[:-1] + 4.0 * integrand(middles) + at[1:])
    return np.add.reduceat(parts, np.searchsorted(knots, edges[:-1]))
