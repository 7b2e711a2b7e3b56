"""What result.json says beside the summaries of the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from stabie_ase.runs.comparison import Results, Trial, together
from stabie_ase.runs.summaries import describe_stability, label_errors, observable_errors
from stabie_ase.stability import StabilityStatistics
from stabie_ase.training.labels import QMErrors


def price(models: dict[str, dict]) -> str:
    """What a gain was paid with, in words."""
    start, end = models["start"], models["stabie"]

    def change(key, what):
        before, after = start[f"held_out_{key}"], end[f"held_out_{key}"]
        growth = f" ({after / before - 1:+.1%})" if before > 0 else ""
        return f"{what} {1000 * before:.3g} -> {1000 * after:.3g}{growth}"

    forces, energies = change("force_mae_eV_per_A", "force MAE (meV/Å)"), change("energy_mae_eV", "energy MAE (meV)")
    return f" On held-out frames: {forces}, {energies}."


def curves(statistics: StabilityStatistics) -> dict[str, list | None]:
    """Kaplan-Meier's estimate with its band, for figures; times in ps."""
    times, fraction, low, high = (x.tolist() for x in statistics.survival())
    return {"times_ps": times, "stable_fraction": fraction, "low": low, "high": high}


def observed(trials: Sequence[Trial], results: Mapping[str, Results]) -> dict[str, dict[str, object]]:
    """References of all observables and their means in some models, for figures; units in the labels."""
    found: dict[str, dict[str, object]] = {}
    for trial in trials:
        for target in trial.yardstick.targets:
            observable, axis = target.observable, target.observable.axis
            raw = {name: of_model[trial.name].observed[observable.name].mean() for name, of_model in results.items()}
            means = {name: None if mean is None else observable.statistic(mean) for name, mean in raw.items()}
            found[_at(trials, trial, observable.name)] = {
                "axis": axis.values.tolist(),
                "axis_label": axis.label,
                "names": list(axis.names),
                "label": observable.label,
                "reference": (target.value if target.known is None else target.value.masked_fill(~target.known, torch.nan)).tolist(),
                "means": {name: None if mean is None else mean.tolist() for name, mean in means.items()},
            }
    return found


def _at(trials: Sequence[Trial], trial: Trial, name: str) -> str:
    """An observable's name, with that of the trial where there are several."""
    return name if len(trials) == 1 else f"{name} at {trial.name}"


def summaries_together(
    trials: Sequence[Trial],
    results: Results,
    others: Results,
    held_out: QMErrors | None,
    reference: QMErrors,
) -> dict[str, object]:
    """What result.json says of one model: stability over all trials and in each, observables of each, errors (`summarize`).

    Parameters
    ----------
    trials : sequence of Trial
    results : mapping of str to StabilityResult
        By trial.
    others : mapping of str to StabilityResult
        Of another model from the same starts.
    held_out : QMErrors or None
        As `summarize` takes it.
    reference : QMErrors

    Returns
    -------
    dict of str to object
        Plain values with units in the names.
    """
    whole = describe_stability(*together(results), [atoms for result in results.values() for atoms in result.unstable])
    each = {}
    for trial in trials:
        result, other = results[trial.name], others[trial.name]
        each[trial.name] = describe_stability(result.statistics, result.causes, result.unstable)
        for target in trial.yardstick.targets:
            whole |= observable_errors(target, result, other, _at(trials, trial, target.observable.name))
    if len(trials) > 1:
        whole["conditions"] = each
    return whole | label_errors(held_out, reference)
