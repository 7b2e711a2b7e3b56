"""What `evaluate --output` and result.json say of one model: plain values with units in the names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ase import Atoms

from stabie_ase.observables import Target
from stabie_ase.runs.evaluation import StabilityResult, Yardstick
from stabie_ase.stability import StabilityStatistics
from stabie_ase.stability.causes import broken
from stabie_ase.training.labels import QMErrors


def observable_errors(target: Target, result: StabilityResult, other: StabilityResult | None, called: str) -> dict[str, float | None]:
    """Distance of an observable from its target, its standard error and its floor, in the observable's unit.

    Their keys in a summary begin with what it is called.
    """
    name, observed = f"{called}_error", result.observed[target.observable.name]
    error, standard_error = target.distance(observed)
    found = {name: error, f"{name}_standard_error": standard_error, f"{name}_floor": target.floor}
    if other is not None:
        common, common_error = target.distance(observed.keep(result.whole & other.whole))
        found |= {f"{name}_while_both_stable": common, f"{name}_while_both_stable_standard_error": common_error}
    return found


def describe_stability(statistics: StabilityStatistics, causes: Mapping[str, int], unstable: Sequence[Atoms]) -> dict[str, object]:
    """Failures, their causes and what broke; plain values with units in the names."""
    median, low, high = statistics.median_ps()
    return {
        "n_replicas": len(statistics.failed),
        "n_failed": statistics.n_failed,
        "failures_by_cause": dict(sorted(causes.items())),
        "what_broke": dict(broken(unstable).most_common()),
        "stable_replica_ps": statistics.stable_replica_ps,
        "hazard_per_ps": statistics.hazard_per_ps,
        "hazard_per_ps_interval": list(statistics.hazard_interval()),
        "median_stable_ps": median,
        "median_stable_ps_interval": [low, high],
    }


def label_errors(held_out: QMErrors | None, reference: QMErrors) -> dict[str, float]:
    """Errors of energies and forces where there are any; units in the names."""
    found = {}
    for where, errors in (("held_out", held_out), ("reference", reference)):
        if errors is not None:
            found |= {
                f"{where}_force_mae_eV_per_A": errors.force_mae_eV_per_A,
                f"{where}_energy_mae_eV": errors.energy_mae_offset_removed_eV,
                f"{where}_energy_mae_with_offset_eV": errors.energy_mae_eV,
            }
    return found


def summarize(
    result: StabilityResult, yardstick: Yardstick, held_out: QMErrors | None, reference: QMErrors, other: StabilityResult | None = None
) -> dict[str, object]:
    """What `evaluate --output` and result.json say of one model; plain values with units in the names.

    Parameters
    ----------
    result : StabilityResult
    yardstick : Yardstick
    held_out : QMErrors or None
        On frames that the model has not seen, if there are any that it surely has not.
    reference : QMErrors
        On the reference.
    other : StabilityResult, optional
        Of another model from the same starts: observables are also given over the time in which both are stable.

    Returns
    -------
    dict of str to object
    """
    summary = describe_stability(result.statistics, result.causes, result.unstable)
    for target in yardstick.targets:
        summary |= observable_errors(target, result, other, target.observable.name)
    return summary | label_errors(held_out, reference)
