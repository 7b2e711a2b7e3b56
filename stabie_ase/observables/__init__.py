"""Observables: vectors computed from frames and compared with a reference."""

from stabie_ase.observables.base import Observable
from stabie_ase.observables.distances import DistanceDistribution

OBSERVABLES: dict[str, type] = {DistanceDistribution.name: DistanceDistribution}
"""By their names on the command line."""

__all__ = ["OBSERVABLES", "DistanceDistribution", "Observable"]
