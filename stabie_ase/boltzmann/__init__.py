"""Boltzmann estimators: the gradient of an observable's mean with respect to a potential's parameters, from samples."""

from stabie_ase.boltzmann.estimate import Estimate, Estimator, fluctuation_weights
from stabie_ase.boltzmann.gradient import accumulate, accumulate_gradient, accumulate_stress_gradient, group_energies, of_present
from stabie_ase.boltzmann.grouping import WHOLE, Grouping, choose_grouping, grouping_from
from stabie_ase.boltzmann.reweighting import PoorOverlap, temperature_weights
from stabie_ase.boltzmann.samples import Samples
from stabie_ase.boltzmann.state_point import StatePoint
from stabie_ase.boltzmann.targets import targets_at

__all__ = [
    "WHOLE",
    "Estimate",
    "Estimator",
    "Grouping",
    "PoorOverlap",
    "Samples",
    "StatePoint",
    "accumulate",
    "accumulate_gradient",
    "accumulate_stress_gradient",
    "choose_grouping",
    "fluctuation_weights",
    "group_energies",
    "grouping_from",
    "of_present",
    "targets_at",
    "temperature_weights",
]
