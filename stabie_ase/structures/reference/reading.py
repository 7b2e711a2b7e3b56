"""Frames with energies and forces, checked, and what was found on the way in one line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from operator import not_

import numpy as np
from ase import Atoms

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.reference.frames import FileNames, UnusableReference, each, named_frames
from stabie_ase.structures.reference.isolated import is_isolated_atom, isolated
from stabie_ase.structures.reference.labels import check_declared_units, choose_keys, common_temperature, energy_of, numbers_in
from stabie_ase.structures.reference.npz import CONVERTED

MAX_FORCE = 300.0
"""Component in eV/Å above which a reference force is taken for a mistake of units or a broken calculation."""

MIN_DISTANCE = 0.4
"""In Å; closer atoms do not occur in a calculation that went well (H2 has 0.74)."""

TELLING_HELD_OUT_FRAMES = 40
"""Frames to hold out if that is no more than a fifth of all: fewer do not tell a growth of the force error by 5 % from chance."""

SAME_ENERGY = 1e-3
"""In eV; energies of one isolated atom that differ by more are of two calculations, or of two states."""

NOT_USED = {
    "charges": ("charge", "total_charge", "initial_charges"),
    "spins": ("spin", "total_spin", "multiplicity", "spin_multiplicity", "initial_magmoms"),
}
"""What models of energies as functions of elements and positions know nothing of, by the names it has in frames."""


@dataclass(frozen=True)
class Reference:
    """Reference frames with energies (eV) and forces (eV/Å).

    Attributes
    ----------
    frames : list of Atoms
    energies : ndarray, shape (n_frames,)
    forces : list of ndarray, shape (n_atoms, 3) each
    temperature_K : float or None
        As the frames' info tells it, when they all agree.
    source : str
        One line about what was read.
    atom_energies : dict of int to float
        Energies of isolated atoms by their atomic number, in eV, from frames that are not among `frames`.
    """

    frames: list[Atoms]
    energies: np.ndarray
    forces: list[np.ndarray]
    temperature_K: float | None
    source: str
    atom_energies: dict[int, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frames)

    def subset(self, index: Sequence[int]) -> Reference:
        """Some of the frames."""
        return replace(
            self,
            frames=[self.frames[k] for k in index],
            energies=self.energies[list(index)],
            forces=[self.forces[k] for k in index],
        )

    def split(self, fraction: float | None = None, most: int | None = None) -> tuple[Reference, Reference]:
        """Random split, the same at all times: what pretraining has held out must be held out of fine-tuning too.

        Parameters
        ----------
        fraction : float, optional
            Of the frames in the second part, at least one and never all. If not given a tenth, and of few frames more:
            up to a fifth of them, to make 40.
        most : int, optional
            Frames in the second part at most; they are some of those that there would be without this limit.

        Returns
        -------
        kept : Reference
        held_out : Reference
            The second part.
        """
        size = len(self)
        order = np.random.default_rng(0).permutation(size).tolist()
        n = round(fraction * size) if fraction is not None else max(round(size / 10), min(round(size / 5), TELLING_HELD_OUT_FRAMES))
        n = min(max(1, n), size - 1, most or size)
        return self.subset(sorted(order[n:])), self.subset(sorted(order[:n]))

    def isolated(self, cutoff: float) -> Reference:
        """Periodic frames as isolated molecules, made whole, if no atom of any has a periodic image within `cutoff` (Å).

        A model with this cutoff predicts the same of them. Frames that are periodic otherwise are returned as they are.
        """
        frames = isolated(self.frames, cutoff)
        if frames is self.frames:
            return self
        periodic = sum(bool(atoms.pbc.any()) for atoms in self.frames)
        note = f"{periodic} in a periodic box taken as isolated: no image is within {cutoff:g} Å, the model's cutoff"
        return replace(self, frames=frames, source=f"{self.source}; {note}")


def read_reference(
    names: FileNames, energy_key: str | None = None, forces_key: str | None = None, min_frames: int = 2
) -> Reference:
    """Read frames in any format ASE knows and check that they can be trained on.

    Frames of isolated atoms among others are set aside. Constraints say how the frames were made and are left out.

    Parameters
    ----------
    names : str or path, or several
        See `read_frames`.
    energy_key : str, optional
        Name of the energies (eV); found under their usual names if not given.
    forces_key : str, optional
        Name of the forces (eV/Å), likewise.
    min_frames : int
        Fewer are an error.

    Returns
    -------
    Reference

    Raises
    ------
    UnusableReference
        The file is missing, empty or no structure file; energies or forces are missing (the keys found are named), not
        finite or huge; atoms sit on top of each other; too few frames.

    Examples
    --------
    >>> from stabie_ase import read_reference
    >>> reference = read_reference("aspirin.xyz")
    >>> print(reference.source)
    50 frames of C9H8O4 from aspirin.xyz (energies from 'energy', forces from 'forces', 500 K)
    """
    reference, keys = _checked(", ".join(each(names)), _shown(names), named_frames(names), energy_key, forces_key, min_frames)
    check_declared_units(names, *keys)
    return reference


def reference_of(
    frames: Sequence[Atoms], energy_key: str | None = None, forces_key: str | None = None, min_frames: int = 2
) -> Reference:
    """Frames in memory as a reference; they are copied, and checked and refused as `read_reference` does it with those of a file."""
    named = [(f"frame {k}", _copied(atoms)) for k, atoms in enumerate(frames)]
    return _checked("the frames given", "memory", named, energy_key, forces_key, min_frames)[0]


def _copied(atoms: Atoms) -> Atoms:
    """With its results, which `Atoms.copy` leaves behind."""
    copied = atoms.copy()
    copied.calc = atoms.calc
    return copied


def _checked(
    source: str, shown: str, named: Sequence[tuple[str, Atoms]], energy_key: str | None, forces_key: str | None, min_frames: int
) -> tuple[Reference, tuple[str, str]]:
    """A reference from frames and what to call each of them, and the keys of its labels."""
    is_lone = [is_isolated_atom(atoms) for _, atoms in named]
    lone, named = list(compress(named, is_lone)), list(compress(named, map(not_, is_lone)))
    if len(named) < min_frames:
        beside = f" beside {len(lone)} of isolated atoms" if lone else ""
        found = f"{len(named)} frame{'' if len(named) == 1 else 's'}{beside}"
        raise UnusableReference(f"{source}: {found}, at least {min_frames} are needed")
    where, frames = map(list, zip(*named))
    energy_key, forces_key = choose_keys(source, frames, energy_key, forces_key)
    energies, forces = zip(*(_labels(at, atoms, energy_key, forces_key) for at, atoms in named))
    temperature = common_temperature(frames, where)
    keys = f"energies from {energy_key!r}, forces from {forces_key!r}"
    at = f"{temperature:g} K" if temperature is not None else "no single temperature given"
    found = f"{len(frames)} frames of {_compositions(frames)} from {shown} ({keys}, {at})"
    notes = [_converted(frames), _lone_in_words(lone), _free_energies(frames, energy_key), _unused(frames), _left_out_constraints(frames)]
    reference = Reference(
        frames,
        np.array(energies),
        list(forces),
        temperature,
        "; ".join([found, *filter(None, notes)]),
        _atom_energies(lone, energy_key),
    )
    return reference, (energy_key, forces_key)


def _labels(where: str, atoms: Atoms, energy_key: str, forces_key: str) -> tuple[float, np.ndarray]:
    """Energy and forces of a frame that passes all checks."""
    energy, forces = numbers_in(where, atoms, energy_key, forces_key)
    if np.abs(forces).max() > MAX_FORCE:
        raise UnusableReference(
            f"{where}: a force of {np.abs(forces).max():.3g} eV/Å, more than {MAX_FORCE:g}; check its units or remove the frame"
        )
    batch = AtomsBatch.from_atoms(atoms)
    try:
        near = neighbor_list(batch, MIN_DISTANCE).half
    except ValueError as error:  # a cell that spans no volume
        raise UnusableReference(f"{where}: {error}") from error
    distances = near.vectors(batch).norm(dim=1)
    if len(distances) and float(distances.min()) < MIN_DISTANCE:
        raise UnusableReference(f"{where}: two atoms are {float(distances.min()):.3f} Å apart; remove the frame")
    return energy, forces


def _atom_energies(lone: Sequence[tuple[str, Atoms]], energy_key: str) -> dict[int, float]:
    """Energies of isolated atoms, of those that have one, by atomic number in eV."""
    found = {}
    for where, atoms in lone:
        energy = energy_of(atoms, energy_key)
        if energy is None:
            continue
        energy, z = float(np.asarray(energy, dtype=float).reshape(())), int(atoms.numbers[0])
        if not abs(energy - found.setdefault(z, energy)) <= SAME_ENERGY:
            raise UnusableReference(
                f"{where}: an isolated {atoms.symbols[0]} of {energy:g} eV, another has {found[z]:g} eV; remove one of them"
            )
    return found


def _compositions(frames: Sequence[Atoms]) -> str:
    formulas = list(Counter(atoms.get_chemical_formula() for atoms in frames))
    return ", ".join(formulas[:5]) + (f" and {len(formulas) - 5} other compositions" if len(formulas) > 5 else "")


def _shown(names: FileNames) -> str:
    shown = [os.path.basename(name) for name in each(names)]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} other names" if len(shown) > 5 else "")


def _converted(frames: Sequence[Atoms]) -> str:
    found = sorted({atoms.info[CONVERTED] for atoms in frames if CONVERTED in atoms.info})
    return f"converted to eV and Å from {', '.join(found)}" if found else ""


def _lone_in_words(lone: Sequence[tuple[str, Atoms]]) -> str:
    symbols = ", ".join(dict.fromkeys(atoms.symbols[0] for _, atoms in lone))
    return f"{len(lone)} frames of isolated atoms ({symbols}) set aside" if lone else ""


def _free_energies(frames: Sequence[Atoms], energy_key: str) -> str:
    """Where electrons are smeared out, forces belong to the free energy, and the energy is extrapolated to no smearing."""
    if energy_key != "energy":
        return ""
    pairs = [(energy_of(atoms, "energy"), energy_of(atoms, "free_energy")) for atoms in frames]
    difference = max((abs(float(e) - float(f)) for e, f in pairs if f is not None), default=0.0)
    return f"'energy' is used, not 'free_energy', which differs by up to {difference:.3g} eV" if difference > 1e-6 else ""


def _unused(frames: Sequence[Atoms]) -> str:
    told = [what for what, names in NOT_USED.items() if any(_tells(atoms, names) for atoms in frames)]
    return f"{' and '.join(told)} of the frames are not used" if told else ""


def _tells(atoms: Atoms, names: Iterable[str]) -> bool:
    """Whether one of the names has a value other than that of a neutral singlet."""
    for name in names:
        value = atoms.arrays.get(name, atoms.info.get(name, 0))
        usual = (0, 1) if "multiplicity" in name or "spin" in name else (0,)
        try:
            if not np.isin(np.asarray(value, dtype=float), usual).all():
                return True
        except (TypeError, ValueError):  # text tells nothing that could be used
            continue
    return False


def _left_out_constraints(frames: Sequence[Atoms]) -> str:
    """Take the constraints off the frames, and say so."""
    kinds = Counter(type(constraint).__name__ for atoms in frames for constraint in atoms.constraints)
    n = sum(bool(atoms.constraints) for atoms in frames)
    for atoms in frames:
        atoms.set_constraint()
    return f"constraints of {n} frames ({', '.join(kinds)}) play no part" if n else ""
