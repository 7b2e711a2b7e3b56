"""Energies of the elements, as a reference tells them."""

from __future__ import annotations

import numpy as np

from stabie_ase.structures.reference.reading import Reference


def reference_energies(reference: Reference) -> dict[int, float]:
    """Energy of each element in eV: that of the isolated atom where the reference has it.

    Those of the other elements are by least squares over the frames' compositions, the smallest solution where it is open.
    """
    known, elements = reference.atom_energies, {int(z) for atoms in reference.frames for z in atoms.numbers}
    fitted = sorted(elements - known.keys())
    counts = np.array([[np.count_nonzero(atoms.numbers == z) for z in fitted] for atoms in reference.frames], dtype=float)
    rest = reference.energies - [sum(known.get(int(z), 0.0) for z in atoms.numbers) for atoms in reference.frames]
    solution = np.linalg.lstsq(counts, rest, rcond=None)[0] if fitted else []
    return {z: known[z] for z in sorted(elements & known.keys())} | {z: float(energy) for z, energy in zip(fitted, solution)}


def interaction_energy(reference: Reference, energies: dict[int, float]) -> float:
    """Mean energy an atom in eV beyond the energies of the elements: where those are of isolated atoms, what binds them."""
    rest = reference.energies - [sum(energies[int(z)] for z in atoms.numbers) for atoms in reference.frames]
    return float(np.mean(rest / [len(atoms) for atoms in reference.frames])) if reference.atom_energies else 0.0
