"""What an observable is matched to in place of the reference: a curve, or other frames of the same system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms

from stabie_ase.structures.reference.curve_files import is_curve, read_curve
from stabie_ase.structures.reference.curves import Curve
from stabie_ase.structures.reference.frames import named_frames
from stabie_ase.structures.reference.isolated import isolated
from stabie_ase.structures.reference.labels import KEYS, common_temperature, energy_of
from stabie_ase.structures.reference.unusable import UnusableReference


@dataclass(frozen=True)
class TargetFrames:
    """Frames whose mean an observable is matched to.

    Attributes
    ----------
    frames : sequence of Atoms
    energies : ndarray, shape (n_frames,), or None
        In eV; None where not all frames have one.
    temperature_K : float or None
        As the frames tell it, when they all agree.
    source : str
        Where they are from.
    """

    frames: Sequence[Atoms]
    energies: np.ndarray | None = None
    temperature_K: float | None = None
    source: str = "frames in memory"

    def isolated(self, cutoff: float) -> TargetFrames:
        """Periodic frames as isolated molecules where no image is within a model's cutoff (Å), as of a reference."""
        return replace(self, frames=isolated(self.frames, cutoff))

    def check_system(self, others: Sequence[Atoms]) -> None:
        """Raise UnusableReference for frames of a composition that is not among others'; larger cells of a liquid have the same."""
        whole = dict.fromkeys(atoms.get_chemical_formula() for atoms in others)
        known = {*whole, *map(composition, others)}
        for k, atoms in enumerate(self.frames):
            formula = atoms.get_chemical_formula()  # also of a molecule that is alone in a box on one side only
            if formula not in known and composition(atoms) not in known:
                raise UnusableReference(
                    f"{self.source}: frame {k} is of {formula}, but the reference holds {', '.join(list(whole)[:5])}; "
                    "expected frames of the same system"
                )


@dataclass(frozen=True)
class Number:
    """A number that an observable of one component is matched to, as an experiment tells a density.

    Attributes
    ----------
    value : float
        In the observable's unit.
    error : float or None
        Its standard error, where that is known.
    """

    value: float
    error: float | None = None
    temperature_K = None

    def __post_init__(self):
        if not np.isfinite(self.value):
            raise UnusableReference(f"a value of {self.value:g}, expected a finite number")
        if self.error is not None and not 0.0 <= self.error < np.inf:
            raise UnusableReference(f"an error of {self.error:g}; expected a standard error, which is finite and not negative")

    @property
    def source(self) -> str:
        """The number, with its error."""
        return f"{self.value:g}" + ("" if self.error is None else f" ± {self.error:g}")


def composition(atoms: Atoms) -> str:
    """The formula, of periodic frames that of the smallest unit."""
    formula = atoms.symbols.formula
    return (formula.reduce()[0] if atoms.pbc.any() else formula).format("hill")


def read_target(name: str, column: str | None = None, error: str | None = None, above: float | None = None) -> Curve | TargetFrames:
    """Read a curve, or frames with or without energies.

    Parameters
    ----------
    name : str
        A file as of `read_curve` where it is called so (`is_curve`), else FILE or FILE@SELECTION as of `read_frames`.
    column : str, optional
        Name of the values of a curve.
    error : str, optional
        Name of their errors.
    above : float, optional
        Distance in Å from which on a curve counts.

    Returns
    -------
    Curve or TargetFrames

    Raises
    ------
    UnusableReference
        What cannot be read, and options of a curve for what is none.
    """
    if is_curve(name):
        curve = read_curve(name, column, error)
        return curve if above is None else curve.above(above)
    given = {"column": column, "error": error, "above": above}
    unused = [key for key, value in given.items() if value is not None]
    if unused:
        raise UnusableReference(f"{name}: {' and '.join(unused)} is for curves, and these are frames; leave it out")
    where, frames = map(list, zip(*named_frames(name)))
    for atoms in frames:
        atoms.set_constraint()
    key = next((key for key, _ in KEYS if all(energy_of(atoms, key) is not None for atoms in frames)), None)
    energies = None if key is None else np.array([float(np.asarray(energy_of(atoms, key)).reshape(())) for atoms in frames])
    return TargetFrames(frames, energies, common_temperature(frames, where), f"{len(frames)} frames of {name}")
