"""StABIE for ASE: machine-learning force fields that stay stable in molecular dynamics."""

from importlib import import_module

__version__ = "0.1.0.dev0"

_HOMES = {
    "AtomsBatch": "structures.batch",
    "NeighborList": "structures.neighbors",
    "VerletList": "structures.neighbors",
    "Curve": "structures.reference",
    "read_curve": "structures.reference",
    "read_reference": "structures.reference",
    "TargetFrames": "structures.reference",
    "Setting": "structures.setting",
    "Groups": "structures.topology",
    "Topology": "structures.topology",
    "Potential": "potentials.base",
    "StABIECalculator": "potentials.calculator",
    "load_potential": "potentials.checkpoint",
    "save_potential": "potentials.checkpoint",
    "Family": "potentials.family",
    "initial_state": "dynamics",
    "Integrator": "dynamics",
    "Langevin": "dynamics",
    "MDState": "dynamics",
    "NoseHooverChain": "dynamics",
    "Observer": "dynamics",
    "PotentialForces": "dynamics",
    "Recorder": "dynamics",
    "simulate": "dynamics",
    "Trajectory": "dynamics",
    "VelocityVerlet": "dynamics",
    "BondLengths": "observables",
    "DistanceDistribution": "observables",
    "Observable": "observables",
    "observables_from": "observables",
    "RadialDistribution": "observables",
    "Target": "observables",
    "Axis": "observables.base",
    "TimeSeries": "observables.series",
    "AngleDeviation": "stability",
    "BondLengthDeviation": "stability",
    "Contacts": "stability",
    "criteria_from": "stability",
    "Criterion": "stability",
    "EnergyRange": "stability",
    "Failures": "stability",
    "KineticTemperature": "stability",
    "Verdict": "stability",
    "Watch": "stability",
    "watched": "stability",
    "accumulate_gradient": "boltzmann",
    "Estimate": "boltzmann",
    "Estimator": "boltzmann",
    "Samples": "boltzmann",
    "StatePoint": "boltzmann",
    "temperature_weights": "boltzmann",
    "Condition": "training.condition",
    "TrainingLoop": "training.loop",
    "UpdateInfo": "training.updates",
    "UpdateRule": "training.updates",
    "evaluate": "runs.live",
    "finetune": "runs.live",
    "FinetuneResult": "runs.live",
    "resume": "runs.live",
    "observe": "runs.observe",
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
