"""Frames at equal intervals of time, which dynamical observables are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from ase import Atoms, units
from torch import Tensor

from stabie_ase.dynamics import Trajectory
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import nearest_images

TIME_KEYS = {"time_fs": 1.0, "time_ps": 1000.0}
"""Keys of a frame's info that tell its time, and what they are in, in fs; `stabie-ase md` writes the second."""

EQUAL = 1e-3
"""Fraction by which two intervals may differ: times may be written with a few digits only."""

MAX_FRACTION = 0.4
"""Of a cell's width that an atom may move between two frames: where some move farther, others may have moved more than half unseen."""


@dataclass(frozen=True)
class TimeSeries:
    """One replica's frames at equal intervals.

    Attributes
    ----------
    frames : AtomsBatch
        Each of its systems is a frame, in order; all have the same atoms. Positions may be wrapped into the cell or not.
    interval_fs : float
        Time between two frames.
    momenta : Tensor of float64, shape (n_frames, n_atoms, 3), or None
        In amu Å / ASE time.
    """

    frames: AtomsBatch
    interval_fs: float
    momenta: Tensor | None = None

    def __post_init__(self):
        if not 0.0 < self.interval_fs < np.inf:
            raise ValueError(f"the time between two frames is {self.interval_fs} fs, expected a positive one")
        if not self.frames.same_composition or not bool((self.frames.pbc == self.frames.pbc[0]).all()):
            raise ValueError("frames in a row need the same atoms in one order, periodic in the same directions")

    @classmethod
    def from_atoms(cls, images: Sequence[Atoms], interval_fs: float | None = None) -> TimeSeries:
        """From ASE atoms, whose momenta count if all of them have some.

        Parameters
        ----------
        images : sequence of Atoms
            In the order of time.
        interval_fs : float, optional
            Time between two of them; as their info tells it (`interval_of`) if not given.

        Returns
        -------
        TimeSeries

        Raises
        ------
        ValueError
            Unequal or unknown intervals, frames of several systems.
        """
        interval_fs = interval_of(images, interval_fs)
        return cls(AtomsBatch.from_atoms(images), interval_fs, momenta_of(images))

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory, timestep: float) -> list[TimeSeries]:
        """Of every replica that has a valid frame, the frames up to its first that is not, for a time step in ASE time."""
        every = trajectory.steps.diff().unique()
        if len(every) != 1:
            raise ValueError("a trajectory needs two frames or more at equal numbers of steps to be a series in time")
        interval_fs, found = float(every) * timestep / units.fs, []
        for k, n in enumerate(trajectory.valid.int().cumprod(dim=0).sum(dim=0).tolist()):
            if n == 0:
                continue
            system = trajectory.batch.select([k])
            atoms = trajectory.batch.atom_index(torch.tensor([k], device=trajectory.batch.device))
            frames = system.repeat(n).replace(positions=trajectory.positions[:n, atoms].reshape(-1, 3), cells=trajectory.cells[:n, k])
            momenta = None if trajectory.momenta is None else trajectory.momenta[:n, atoms].double()
            found.append(cls(frames, interval_fs, momenta))
        return found

    def __len__(self) -> int:
        return self.frames.n_systems

    def part(self, begin: int, end: int) -> TimeSeries:
        """The frames from `begin` to before `end`."""
        momenta = None if self.momenta is None else self.momenta[begin:end]
        return replace(self, frames=self.frames.select(range(begin, end)), momenta=momenta)

    @property
    def interval_ps(self) -> float:
        """Time between two frames, in ps."""
        return self.interval_fs / 1000.0

    @property
    def numbers(self) -> Tensor:
        """Atomic numbers, shape (n_atoms,)."""
        return self.frames.numbers.view(len(self), -1)[0]

    @property
    def masses(self) -> Tensor:
        """In amu, float64, shape (n_atoms,)."""
        return self.frames.masses.double().view(len(self), -1)[0]

    @cached_property
    def unwrapped(self) -> Tensor:
        """Positions of which none jumps at the border of the cell, in Å, float64, shape (n_frames, n_atoms, 3).

        Displacements from frame to frame by the nearest image in the later frame's cell, added up from the first frame. Positions
        are wrapped before, so that a cell that changes moves no atom that is far from the origin (the scheme "TOR" of von Bülow,
        Bullerjahn and Hummer, J. Chem. Phys. 153, 021101, 2020).

        Returns
        -------
        Tensor

        Raises
        ------
        ValueError
            An atom moves so far between two frames that it may have been half a cell or more.
        """
        positions = self.frames.positions.double().view(len(self), -1, 3)
        if not bool(self.frames.pbc.any()):
            return positions
        wrapped = nearest_images(positions, self.frames)
        later = self.frames.select(range(1, len(self)))
        steps = nearest_images(wrapped.diff(dim=0), later)
        self._check_steps(steps, later)
        return torch.cat([wrapped[:1], steps]).cumsum(dim=0)

    def _check_steps(self, steps: Tensor, later: AtomsBatch) -> None:
        # In a cell of 2 x times the width a step of more than x widths is no longer one to the nearest image.
        narrow = later.replace(cells=later.cells * (2.0 * MAX_FRACTION))
        far = (nearest_images(steps, narrow) - steps).norm(dim=2) > 1e-6
        if bool(far.any()):
            frame, atom = far.nonzero()[0].tolist()
            raise ValueError(
                f"atom {atom} moves by {float(steps[frame, atom].norm()):.3g} Å or more between frames {frame} and {frame + 1}, about "
                "half a cell, so that nobody knows in which direction; write frames more often"
            )

    @cached_property
    def displaced(self) -> Tensor:
        """Unwrapped positions relative to the centre of mass of all atoms, in Å, shape (n_frames, n_atoms, 3)."""
        weights = self.masses / self.masses.sum()
        return self.unwrapped - torch.einsum("a,fax->fx", weights, self.unwrapped)[:, None]

    @property
    def velocities(self) -> Tensor:
        """In Å/ps, float64, shape (n_frames, n_atoms, 3); ValueError if there are no momenta."""
        if self.momenta is None:
            raise ValueError("the frames have no momenta; keep them with the frames, as ASE's .traj and extended xyz do")
        return self.momenta.double() / self.masses[:, None] * (1000.0 * units.fs)


def momenta_of(images: Sequence[Atoms]) -> Tensor | None:
    """Of frames of one size, float64, shape (n_frames, n_atoms, 3); None if a frame has none, or all are zero."""
    if not all("momenta" in atoms.arrays for atoms in images):
        return None
    momenta = torch.as_tensor(np.stack([atoms.get_momenta() for atoms in images]), dtype=torch.float64)
    return momenta if bool(momenta.any()) else None


def times_fs(images: Sequence[Atoms]) -> list[float] | None:
    """Times that the frames' info tells under one of `TIME_KEYS`, in fs; None if not all do."""
    for key, unit in TIME_KEYS.items():
        if all(key in atoms.info for atoms in images):
            return [unit * float(atoms.info[key]) for atoms in images]
    return None


def interval_of(images: Sequence[Atoms], interval_fs: float | None = None) -> float:
    """Time between two frames in a row.

    Parameters
    ----------
    images : sequence of Atoms
    interval_fs : float, optional
        What the user says it is.

    Returns
    -------
    float
        In fs.

    Raises
    ------
    ValueError
        Nobody tells it, the frames tell another one, or unequal ones.
    """
    if len(images) < 2 and interval_fs is None:
        raise ValueError(f"a series in time needs two frames or more, and there are {len(images)}")
    times = times_fs(images) if len(images) > 1 else None
    if times is None:
        if interval_fs is None:
            keys = " or ".join(TIME_KEYS)
            raise ValueError(f"{len(images)} frames do not tell the time between them ({keys} in their info); give --interval in fs")
        return interval_fs
    gaps = np.diff(times)
    usual = float(np.median(gaps))
    off = np.abs(gaps - usual) > EQUAL * abs(usual)
    if off.any() or usual <= 0:
        k = int(off.argmax())
        raise ValueError(
            f"frames are not at equal intervals: frame {k + 1} comes {gaps[k]:g} fs after the one before, most {usual:g} fs; "
            "select frames that are, as FILE@:100 or FILE@::2"
        )
    mean = float(np.mean(gaps))
    if interval_fs is not None and abs(interval_fs - mean) > EQUAL * mean:
        raise ValueError(f"the interval is given as {interval_fs:g} fs, but the frames tell {mean:g} fs; leave it out or correct it")
    return mean if interval_fs is None else interval_fs
