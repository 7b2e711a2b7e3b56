"""Reference frames and curves: what was read is counted and can be printed; what cannot be used is refused in one line."""

from stabie_ase.structures.reference.curve_files import is_curve, read_curve
from stabie_ase.structures.reference.curves import Curve
from stabie_ase.structures.reference.elements import interaction_energy, reference_energies
from stabie_ase.structures.reference.frames import UnusableReference, absolute, digest, files_of, read_frames, spread
from stabie_ase.structures.reference.labels import common_temperature
from stabie_ase.structures.reference.reading import MAX_FORCE, MIN_DISTANCE, Reference, read_reference, reference_of
from stabie_ase.structures.reference.targets import Number, TargetFrames, read_target

__all__ = [
    "MAX_FORCE",
    "MIN_DISTANCE",
    "Curve",
    "Reference",
    "Number",
    "TargetFrames",
    "UnusableReference",
    "absolute",
    "common_temperature",
    "digest",
    "files_of",
    "interaction_energy",
    "is_curve",
    "read_curve",
    "read_frames",
    "read_reference",
    "read_target",
    "reference_energies",
    "reference_of",
    "spread",
]
