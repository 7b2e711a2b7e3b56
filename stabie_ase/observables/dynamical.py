"""Observables of whole trajectories: correlations in time, and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from ase import units
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from stabie_ase.observables.base import Axis
from stabie_ase.observables.errors import MIN_GROUPS, blocking_errors, jackknife_errors
from stabie_ase.observables.observed import Observed
from stabie_ase.observables.series import EQUAL, TimeSeries
from stabie_ase.structures.elements import check_known
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import Spec

if TYPE_CHECKING:
    from typing_extensions import Self

DYNAMICAL = {
    "vacf": "stabie_ase.observables.dynamical:VelocityAutocorrelation",
    "msd": "stabie_ase.observables.dynamical:MeanSquaredDisplacement",
    "diffusion": "stabie_ase.observables.diffusion:SelfDiffusion",
    "diffusion-gk": "stabie_ase.observables.diffusion:GreenKuboDiffusion",
    "vdos": "stabie_ase.observables.vibrations:VibrationalDensityOfStates",
}
"""By their names."""

MIN_DEFAULT_LAGS = 10
"""Intervals that a correlation reaches over if nobody asked for another time, as far as there are so many."""

VALUES_AT_ONCE = 2**22
"""Coordinates whose Fourier transforms are held at once."""


Readers = Mapping[str, Callable[[str], Any]]
"""Of the options of a specification."""


def yes_or_no(text: str) -> bool:
    """A flag in a specification; ValueError for other words."""
    if text not in ("yes", "no"):
        raise ValueError("expected yes or no")
    return text == "yes"


def _in_words(value: Any) -> str:
    """As a specification has it."""
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def element_of(text: str) -> int:
    """An atomic number from a symbol; ValueError if it is none."""
    if text not in atomic_numbers:
        raise ValueError("expected an element, as O")
    return atomic_numbers[text]


@dataclass(frozen=True)
class Dynamical:
    """A function of a correlation in time, over all time origins and atoms of all replicas.

    A subclass gives `sums`, the correlation's sums over origins and atoms of one replica, and `statistic`, what is wanted of its
    mean. The standard error is a jackknife's over replicas, of fewer than four of them over blocks of time: each is twice as
    long as the correlation reaches at least, and long against the correlation time of `samples` (see `blocking_errors`).

    Parameters
    ----------
    element : int, optional
        Atomic number of the atoms that count; all do if not given.
    t_max : float, optional
        Longest time of the correlation in ps. If not given, half of the longest replica; a tenth if there are fewer than four replicas,
        since blocks have to be longer.
    remove_drift : bool
        Count the motion relative to the centre of mass of all atoms. Of N equal atoms that move independently it takes 1/N off.
    """

    element: int | None = None
    t_max: float | None = None
    remove_drift: bool = True

    kind: ClassVar[str]
    label: ClassVar[str]
    readers: ClassVar[Readers] = {"element": element_of, "t_max": float, "remove_drift": yes_or_no}
    min_lags: ClassVar[int] = 1

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Self:
        """NAME or NAME:ELEMENT with options; BadSpec for others than there are, or an element that the system has not."""
        found = cls(**spec.read(cls.readers, "element"))
        if found.element is not None:
            check_known((found.element,), torch.as_tensor(setting.frames[0].numbers), spec)
        return found

    @property
    def name(self) -> str:
        """As in a specification: its kind, the element and all options that are not the usual ones."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in self.readers and getattr(self, f.name) != f.default}
        symbol = None if self.element is None else chemical_symbols[given.pop("element")]
        return str(Spec(self.kind, symbol, {option: _in_words(value) for option, value in given.items()}))

    def sums(self, series: TimeSeries, n_lags: int) -> Tensor:
        """The correlation at 0, 1, ... intervals, summed over time origins and the atoms that count, shape (n_lags,)."""
        raise NotImplementedError

    def samples(self, series: TimeSeries) -> Tensor:
        """A number for each frame or interval whose correlation time is that of the errors, shape (n,)."""
        raise NotImplementedError

    def statistic(self, means: Tensor, interval_ps: float) -> Tensor:
        """What is wanted of mean correlations, shape (n, n_lags), at this interval; shape (n, d)."""
        return means

    def axis(self, n_lags: int, interval_ps: float) -> Axis:
        """Of `statistic`; the times of the correlation, in ps."""
        return Axis(interval_ps * torch.arange(n_lags, dtype=torch.float64), "t (ps)")

    def note(self, n_lags: int, interval_ps: float) -> str:
        """What was chosen for the user, in words."""
        return ""

    def __call__(self, replicas: TimeSeries | Sequence[TimeSeries]) -> Observed:
        """Of one replica or of several of one system, which may differ in length.

        Parameters
        ----------
        replicas : TimeSeries or sequence of TimeSeries

        Returns
        -------
        Observed

        Raises
        ------
        ValueError
            No momenta where they are needed, too few frames, replicas that differ in their atoms or intervals, atoms that cannot
            be unwrapped, no atoms of the element.
        """
        replicas = [replicas] if isinstance(replicas, TimeSeries) else list(replicas)
        self._check(replicas)
        n_lags, interval = self._n_lags(replicas), replicas[0].interval_ps

        def statistic(means):
            return self.statistic(means, interval)

        sums, counts = self._pooled(replicas, n_lags)
        groups = replicas if len(replicas) >= MIN_GROUPS else self._in_blocks(replicas, n_lags)
        errors = jackknife_errors(*self._pooled(groups, n_lags), statistic) if len(groups) >= MIN_GROUPS else None
        return Observed(
            self.axis(n_lags, interval),
            statistic((sums.sum(dim=0) / counts.sum(dim=0))[None])[0],
            errors if errors is not None and bool(torch.isfinite(errors).any()) else None,
            self.label,
            sum(map(len, replicas)),
            len(replicas),
            self.note(n_lags, interval),
        )

    def _check(self, replicas: Sequence[TimeSeries]) -> None:
        if not replicas:
            raise ValueError(f"{self.name} is of one replica or more, got none")
        first = replicas[0]
        if any(not torch.equal(other.numbers, first.numbers) for other in replicas):
            raise ValueError(f"{self.name} needs replicas of one system, with its atoms in one order")
        if any(abs(other.interval_fs - first.interval_fs) > EQUAL * first.interval_fs for other in replicas):
            found = ", ".join(f"{fs:g}" for fs in sorted({other.interval_fs for other in replicas}))
            raise ValueError(f"{self.name} needs replicas with one interval between frames, got {found} fs")
        if not bool(self._chosen(first).any()):
            raise ValueError(f"{self.name}: there are no atoms of this element")
        if self.remove_drift and len(first.numbers) == 1:
            raise ValueError(f"{self.name}: one atom does not move relative to its centre of mass; write remove_drift=no")

    def _n_lags(self, replicas: Sequence[TimeSeries]) -> int:
        """Lags of the correlation, that of zero included."""
        longest, interval = max(map(len, replicas)) - 1, replicas[0].interval_ps
        usual = max(longest // (2 if len(replicas) >= MIN_GROUPS else 10), min(MIN_DEFAULT_LAGS, longest))
        n = usual if self.t_max is None else round(self.t_max / interval)
        if not self.min_lags <= n <= longest:
            asked = "" if self.t_max is None else f", t_max={self.t_max:g} ps asks for {n}"
            raise ValueError(
                f"{self.name} needs {self.min_lags} intervals of {interval:g} ps or more, and there are {longest} in the longest "
                f"replica{asked}; give more frames" + (" or another t_max" if asked else "")
            )
        return n + 1

    def _chosen(self, series: TimeSeries) -> Tensor:
        """Atoms that count, bool, shape (n_atoms,)."""
        return torch.ones_like(series.numbers, dtype=torch.bool) if self.element is None else series.numbers == self.element

    def _pooled(self, groups: Sequence[TimeSeries], n_lags: int) -> tuple[Tensor, Tensor]:
        """Sums and samples of each replica or block, shape (n_groups, n_lags)."""
        atoms = int(self._chosen(groups[0]).sum())
        origins = [len(group) - torch.arange(n_lags, device=group.frames.device) for group in groups]
        return torch.stack([self.sums(group, n_lags) for group in groups]), atoms * torch.stack(origins).clamp(min=0).double()

    def _in_blocks(self, replicas: Sequence[TimeSeries], n_lags: int) -> list[TimeSeries]:
        """Stretches of the replicas that are independent of each other; none if that cannot be told."""
        rows = torch.nn.utils.rnn.pad_sequence([self.samples(series) for series in replicas], True, torch.nan)
        errors, lengths = blocking_errors(rows[..., None])
        if not bool(torch.isfinite(errors).all()):
            return []
        size = max(int(lengths), 2 * (n_lags - 1))
        return [series.part(k, k + size) for series in replicas for k in range(0, len(series) - size + 1, size)]


class OfVelocities(Dynamical):
    """What is computed from Σ_i s_i² v_i(0)·v_i(t), s being `scale`."""

    def scale(self, masses: Tensor) -> Tensor:
        """Factors on the velocities of atoms, from their masses in amu, shape (n_atoms,); one each."""
        return torch.ones_like(masses)

    def _velocities(self, series: TimeSeries) -> Tensor:
        """Of the atoms that count, with their factors, shape (n_frames, n, 3)."""
        velocities, masses = series.velocities, series.masses
        if self.remove_drift:
            velocities = velocities - torch.einsum("a,fax->fx", masses / masses.sum(), velocities)[:, None]
        return (self.scale(masses)[:, None] * velocities)[:, self._chosen(series)]

    def sums(self, series: TimeSeries, n_lags: int) -> Tensor:
        """Σ over time origins and atoms of v(0)·v(t), shape (n_lags,)."""
        return autocorrelation_sums(self._velocities(series), n_lags)

    def samples(self, series: TimeSeries) -> Tensor:
        """Mean v² of every frame, shape (n_frames,)."""
        return self._velocities(series).square().sum(dim=2).mean(dim=1)


@dataclass(frozen=True)
class VelocityAutocorrelation(OfVelocities):
    """Velocity autocorrelation function of atoms, over all time origins.

    C(t) = ⟨v_i(0)·v_i(t)⟩, the mean over time origins and atoms i, by FFT (Allen & Tildesley, Computer Simulation of Liquids, 2nd ed.,
    section 8.3); normalised it is C(t)/C(0), without a unit, else in Å²/ps². With masses it is ⟨m_i v_i(0)·v_i(t)⟩, in eV,
    whose value at 0 is 3 k_B T.

    Parameters
    ----------
    element : int, optional
        See `Dynamical`.
    t_max : float, optional
        See `Dynamical`, in ps.
    remove_drift : bool
        See `Dynamical`.
    mass_weighted : bool
    normalised : bool
        To 1 at 0.
    """

    mass_weighted: bool = False
    normalised: bool = True
    kind = "vacf"
    readers = {**Dynamical.readers, "mass_weighted": yes_or_no, "normalised": yes_or_no}

    @property
    def label(self) -> str:  # type: ignore[override]
        """Of its values, with their unit."""
        return "VACF / VACF(0)" if self.normalised else "VACF (eV)" if self.mass_weighted else "VACF (Å²/ps²)"

    def scale(self, masses: Tensor) -> Tensor:
        """The root of the masses, in units that make v² an energy in eV, if asked for, shape (n_atoms,)."""
        return masses.sqrt() / (1000.0 * units.fs) if self.mass_weighted else super().scale(masses)

    def statistic(self, means: Tensor, interval_ps: float) -> Tensor:
        """Normalised if asked for, shape (n, n_lags)."""
        return means / means[:, :1] if self.normalised else means


@dataclass(frozen=True)
class MeanSquaredDisplacement(Dynamical):
    """Mean squared displacement of atoms, over all time origins.

    ⟨|r_i(t) - r_i(0)|²⟩ in Å², the mean over time origins and atoms i of unwrapped positions relative to the centre of mass (Allen
    & Tildesley, section 8.3), by FFT (Kneller et al., Comput. Phys. Commun. 91, 191, 1995).

    Parameters
    ----------
    element : int, optional
        See `Dynamical`.
    t_max : float, optional
        See `Dynamical`, in ps.
    remove_drift : bool
        See `Dynamical`.
    """

    kind, label = "msd", "MSD (Å²)"

    def _positions(self, series: TimeSeries) -> Tensor:
        """Of the atoms that count, shape (n_frames, n, 3)."""
        return (series.displaced if self.remove_drift else series.unwrapped)[:, self._chosen(series)]

    def sums(self, series: TimeSeries, n_lags: int) -> Tensor:
        """Σ over time origins and atoms of |r(t) - r(0)|², shape (n_lags,)."""
        positions = self._positions(series)
        positions = positions - positions.mean(dim=0)  # large numbers would take digits from their differences
        n = min(n_lags, len(positions))
        squares = torch.cat([positions.new_zeros(1), positions.square().sum(dim=(1, 2)).cumsum(dim=0)])
        lag = torch.arange(n, device=positions.device)
        both = squares[len(positions) - lag] + squares[-1] - squares[lag]
        sums = (both - 2.0 * autocorrelation_sums(positions, n)).clamp(min=0.0)
        sums[:1] = 0.0
        return torch.nn.functional.pad(sums, (0, n_lags - n))

    def samples(self, series: TimeSeries) -> Tensor:
        """Mean squared displacement from every frame to the next, shape (n_frames - 1,)."""
        return self._positions(series).diff(dim=0).square().sum(dim=2).mean(dim=1)


def autocorrelation_sums(values: Tensor, n_lags: int) -> Tensor:
    """Σ_t Σ_i x_i(t)·x_i(t + lag) of vectors at equal intervals, by FFT (Wiener-Khinchin), padded so that no end meets a beginning.

    Parameters
    ----------
    values : Tensor of float64, shape (n_frames, n, 3)
    n_lags : int
        From zero; where there are fewer frames the sums are empty.

    Returns
    -------
    Tensor of float64, shape (n_lags,)
    """
    n_frames, size = len(values), 2 * len(values)
    power = values.new_zeros(size // 2 + 1)
    for part in values.flatten(1).split(max(1, VALUES_AT_ONCE // size), dim=1):
        transform = torch.fft.rfft(part, size, dim=0)
        power += (transform.real.square() + transform.imag.square()).sum(dim=1)
    sums = torch.fft.irfft(power, size)[: min(n_lags, n_frames)]
    return torch.nn.functional.pad(sums, (0, n_lags - len(sums)))
