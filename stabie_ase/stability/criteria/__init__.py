"""Criteria that say when a replica is unstable, one file each, and making them from words."""

from __future__ import annotations

from stabie_ase.stability.criteria.base import Criterion, Verdict
from stabie_ase.stability.criteria.bonds import BondLengthDeviation
from stabie_ase.stability.criteria.contacts import Contacts
from stabie_ase.stability.criteria.energy import EnergyRange
from stabie_ase.stability.criteria.intermolecular import IntermolecularDistance
from stabie_ase.stability.criteria.make import CRITERIA, TRAINING, VERDICT, criteria_from, default_criteria
from stabie_ase.stability.criteria.temperature import KineticTemperature

__all__ = [
    "CRITERIA",
    "IntermolecularDistance",
    "BondLengthDeviation",
    "Contacts",
    "Criterion",
    "EnergyRange",
    "KineticTemperature",
    "Verdict",
    "TRAINING",
    "VERDICT",
    "criteria_from",
    "default_criteria",
]
