"""StABIE for ASE: machine-learning force fields that stay stable in molecular dynamics."""

from importlib import import_module

__version__ = "0.1.0.dev0"

_HOMES = {
    "AtomsBatch": "structures.batch",
    "NeighborList": "structures.neighbors",
    "VerletList": "structures.neighbors",
    "Potential": "potentials.base",
    "load_potential": "potentials.checkpoint",
    "save_potential": "potentials.checkpoint",
    "StABIECalculator": "potentials.calculator",
    "Langevin": "dynamics",
    "NoseHooverChain": "dynamics",
    "VelocityVerlet": "dynamics",
    "PotentialForces": "dynamics",
    "Recorder": "dynamics",
    "initial_state": "dynamics",
    "simulate": "dynamics",
    "BondLengths": "observables",
    "DistanceDistribution": "observables",
    "Observable": "observables",
    "RadialDistribution": "observables",
    "Target": "observables",
    "observables_from": "observables",
    "BondLengthDeviation": "stability",
    "Contacts": "stability",
    "EnergyRange": "stability",
    "KineticTemperature": "stability",
    "criteria_from": "stability",
    "watched": "stability",
    "Estimator": "boltzmann",
    "Samples": "boltzmann",
    "StatePoint": "boltzmann",
    "accumulate_gradient": "boltzmann",
    "Groups": "structures.topology",
    "Setting": "structures.setting",
    "Topology": "structures.topology",
    "read_reference": "structures.reference",
    "finetune": "runs.live",
    "resume": "runs.live",
    "evaluate": "runs.live",
    "Monitor": "runs.monitor",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Public names are looked up when first used, so that `stabie-ase --help` need not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(f"stabie_ase.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'stabie_ase' has no attribute {name!r}")


def __dir__():
    return __all__
