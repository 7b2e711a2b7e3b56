"""Suites that any potential, observable, criterion or integrator can be put through, also those of other packages.

Each raises AssertionError with what was expected and what was found, so that it can be called in a test of any kind.
"""

from stabie_ase.testing.criteria import check_criterion
from stabie_ase.testing.integrators import check_integrator
from stabie_ase.testing.observables import check_observable
from stabie_ase.testing.potentials import check_potential

__all__ = ["check_criterion", "check_integrator", "check_observable", "check_potential"]
