"""When a replica counts as unstable, and the statistics of it."""

from stabie_ase.stability.criteria import (
    TRAINING,
    VERDICT,
    BondLengthDeviation,
    Contacts,
    Criterion,
    EnergyRange,
    IntermolecularDistance,
    KineticTemperature,
    Verdict,
    criteria_from,
    default_criteria,
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
    "TRAINING",
    "VERDICT",
    "criteria_from",
    "default_criteria",
    "look",
    "stability_statistics",
    "watched",
    "with_memory",
]
