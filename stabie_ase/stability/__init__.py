"""When a replica counts as unstable, and the statistics of it."""

from stabie_ase.stability.criteria import (
    BondLengthDeviation,
    Contacts,
    Criterion,
    EnergyRange,
    IntermolecularDistance,
    KineticTemperature,
    Verdict,
    criteria_from,
)
from stabie_ase.stability.survival import StabilityStatistics, stability_statistics
from stabie_ase.stability.watch import Failures, Look, OnLook, Watch, look, watched, with_memory

__all__ = [
    "BondLengthDeviation",
    "Contacts",
    "Criterion",
    "EnergyRange",
    "Failures",
    "IntermolecularDistance",
    "KineticTemperature",
    "Look",
    "OnLook",
    "StabilityStatistics",
    "Verdict",
    "Watch",
    "criteria_from",
    "look",
    "stability_statistics",
    "watched",
    "with_memory",
]
