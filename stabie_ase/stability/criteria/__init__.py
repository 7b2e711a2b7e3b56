"""Criteria that say when a replica is unstable, one file each, and making them from words."""

from __future__ import annotations

from stabie_ase.stability.criteria.angles import AngleDeviation
from stabie_ase.stability.criteria.base import Criterion, Verdict
from stabie_ase.stability.criteria.bonds import BondLengthDeviation
from stabie_ase.stability.criteria.contacts import Contacts
from stabie_ase.stability.criteria.coordination import Coordination
from stabie_ase.stability.criteria.energy import EnergyRange
from stabie_ase.stability.criteria.energy_spike import EnergySpike
from stabie_ase.stability.criteria.intermolecular import IntermolecularDistance
from stabie_ase.stability.criteria.lindemann import Lindemann
from stabie_ase.stability.criteria.lost_hydrogen import LostHydrogen
from stabie_ase.stability.criteria.make import CRITERIA, TRAINING, VERDICT, criteria_from, default_criteria
from stabie_ase.stability.criteria.rdf import RDFDeviation
from stabie_ase.stability.criteria.temperature import KineticTemperature

__all__ = [
    "CRITERIA",
    "AngleDeviation",
    "IntermolecularDistance",
    "BondLengthDeviation",
    "Contacts",
    "Coordination",
    "Criterion",
    "EnergyRange",
    "EnergySpike",
    "KineticTemperature",
    "Lindemann",
    "LostHydrogen",
    "RDFDeviation",
    "Verdict",
    "TRAINING",
    "VERDICT",
    "criteria_from",
    "default_criteria",
]
