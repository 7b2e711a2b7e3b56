"""What kind of system frames show: a molecule, a liquid, a solid, a surface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.geometry import pair_distances
from stabie_ase.structures.reference.frames import spread
from stabie_ase.structures.sites import Sites
from stabie_ase.structures.topology import BOND_FACTOR, Topology, covalent_sums

ISOLATED, MOLECULAR_LIQUID, ATOMIC_LIQUID, SOLID, SURFACE = (
    "isolated molecule", "molecular liquid", "atomic liquid", "solid", "surface",
)  # fmt: skip

MIN_VACUUM = 6.0
"""Å between two planes without an atom between them that make a surface; layers of a crystal are closer."""

MAX_COMPARED_FRAMES = 10
"""Over which the bonds of the first frame must last."""

NONMETALS = (1, 2, 5, 6, 7, 8, 9, 10, 14, 15, 16, 17, 18, 32, 33, 34, 35, 36, 51, 52, 53, 54, 85, 86)
"""And semimetals: bonds between these are covalent; a molecule that a metal binds is one still."""

MAX_SOLID_LINDEMANN = 0.15
"""Root-mean-square displacement from the mean sites over the distance of nearest neighbours up to which frames are of a solid.

Crystals melt at about 0.1 (Lindemann, Phys. Z. 11, 609, 1910; Gilvarry, Phys. Rev. 102, 308, 1956); in a liquid it grows with time.
"""


@dataclass(frozen=True)
class SystemKind:
    """What kind of system it is, and why.

    Attributes
    ----------
    name : str
        `ISOLATED`, `MOLECULAR_LIQUID`, `ATOMIC_LIQUID`, `SOLID` or `SURFACE`.
    reason : str
    bonding : str
        "molecules" that bonds hold together, a "network" that reaches its own images, "both", or "none".
    beside : tuple of int
        Atoms of molecules that are beside a network, or bound to its metals: on a surface, in a pore, linkers, ions of several atoms.
    at_sites : bool
        Whether it is periodic and its atoms stay where they are, those of the network if molecules are beside it; molecules alone may, as
        a crystal's do, but nobody asks.
    """

    name: str
    reason: str
    bonding: str = "none"
    at_sites: bool = False
    beside: tuple[int, ...] = ()

    def describe(self) -> str:
        """Name and reason."""
        return f"{self.name} ({self.reason})"


def kind_of(frames: Sequence[Atoms]) -> SystemKind:
    """The kind of system, from frames of it.

    What is not periodic is a molecule, or several. Else it is a surface if it ends in a direction, by `pbc` or by a vacuum; if
    not, a liquid of molecules, crystals of molecules among these, where bonds hold together pieces of it that are no
    network; else a solid or an atomic liquid, by whether its atoms stay near their mean sites over the frames. Ions of alkali and
    alkaline-earth metals hold a network together where all stays at its sites, and are on their own in an electrolyte or a melt.

    Parameters
    ----------
    frames : sequence of Atoms
        Of one system. Vacuum and network are looked for in the first.

    Returns
    -------
    SystemKind

    Examples
    --------
    >>> from ase.build import bulk, fcc111, molecule
    >>> from stabie_ase.structures.kind import kind_of
    >>> [kind_of([atoms]).name for atoms in (molecule("H2O"), bulk("Cu", cubic=True), fcc111("Cu", (2, 2, 3), vacuum=8.0))]
    ['isolated molecule', 'solid', 'surface']
    """
    if not any(atoms.pbc.any() for atoms in frames):
        return SystemKind(ISOLATED, "not periodic")
    ratio = _lindemann(frames)
    (bonding, beside), end = _bonding(frames, ratio <= MAX_SOLID_LINDEMANN), _where_it_ends(frames[0])
    if beside:
        inside = np.setdiff1d(np.arange(len(frames[0])), beside)
        ratio = _lindemann([atoms[inside] for atoms in frames])
    if bonding == "molecules" and not end:
        return SystemKind(MOLECULAR_LIQUID, "periodic, and bonds make molecules", bonding)
    at_sites = ratio <= MAX_SOLID_LINDEMANN and bonding != "molecules"
    if end:
        return SystemKind(SURFACE, f"{end}, and molecules beside it" if beside else end, bonding, at_sites, beside)
    wander = f"its atoms are {ratio:.2g} of the distance of neighbours from their mean sites"
    if beside:
        return SystemKind(SOLID, "periodic, a network of bonds with molecules in it", bonding, at_sites, beside)
    if at_sites:
        return SystemKind(SOLID, f"periodic, and {wander if len(frames) > 1 else 'one frame shows no motion'}", bonding, at_sites)
    return SystemKind(ATOMIC_LIQUID, f"periodic, no molecules, and {wander}", bonding)


def _bonding(frames: Sequence[Atoms], at_sites: bool) -> tuple[str, tuple[int, ...]]:
    """Bonding, and the atoms beside a network, by the bonds of the first frame; those of ions count where all atoms stay at their sites."""
    some = [frames[k] for k in spread(len(frames), MAX_COMPARED_FRAMES)]
    if _apart_from_images(frames[0], at_sites).all():
        return "molecules" if _lasting(some) else "none", ()
    beside = _molecules_in_network(frames[0])
    same = len({len(atoms) for atoms in some}) == 1
    return ("both", tuple(beside.tolist())) if same and _lasting([atoms[beside] for atoms in some]) else ("network", ())


def _molecules_in_network(atoms: Atoms) -> np.ndarray:
    """Atoms that bonds between nonmetals hold together to pieces of several, what binds these to metals cut, by index."""
    index = np.flatnonzero(np.isin(atoms.numbers, NONMETALS))
    if not len(index):
        return index
    piece = Topology.from_frames([atoms[index]]).molecule.numpy()
    return index[_apart_from_images(atoms[index], False) & (np.bincount(piece)[piece] > 1)]


def _apart_from_images(atoms: Atoms, ionic: bool) -> np.ndarray:
    """Which atoms are of pieces that no bonds hold together with images of themselves, shape (n_atoms,)."""
    times = np.where(atoms.pbc, 2, 1)
    piece = Topology.from_frames([atoms.repeat(times)], ionic).molecule.view(-1, len(atoms)).sort(dim=0).values
    return (piece.diff(dim=0) > 0).all(dim=0).numpy()


def _lasting(frames: Sequence[Atoms]) -> bool:
    """Whether a bond of the first frame is one in the mean of several: two atoms may come close for a moment."""
    if not len(frames[0]):
        return False
    batch, topology = AtomsBatch.from_atoms(frames), Topology.from_frames(frames[:1])
    if not batch.same_composition or not bool(topology.bonded.any()):
        return False
    reach = BOND_FACTOR * covalent_sums(topology.numbers, topology.bonds)
    return bool((pair_distances(batch, topology.bonds).mean(dim=0) < reach).any())


def _where_it_ends(atoms: Atoms) -> str:
    """In which direction a system that is periodic in another one ends, in words; empty if in none."""
    ends = [f"not periodic along {axis}" for axis, periodic in zip("abc", atoms.pbc) if not periodic]
    for k in np.flatnonzero(atoms.pbc):
        height = 1.0 / np.linalg.norm(np.linalg.pinv(atoms.cell.array)[:, k])
        places = np.sort(atoms.get_scaled_positions()[:, k])
        gap = height * float(np.diff(places, append=places[0] + 1.0).max())
        if gap > MIN_VACUUM:
            ends.append(f"a vacuum of {gap:.3g} Å along {'abc'[k]}")
    return ", ".join(ends) if len(ends) < 3 else ""


def _lindemann(frames: Sequence[Atoms]) -> float:
    """Spread of the reference about its mean sites, over the distance of nearest neighbours; infinite where there are no sites."""
    try:
        sites = Sites.from_frames(frames)
    except ValueError:
        return float("inf")
    return sites.spread / sites.spacing
