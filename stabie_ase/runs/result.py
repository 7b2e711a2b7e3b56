"""What result.json says beside the summaries of the models."""

from __future__ import annotations

from stabie_ase.observables import Target
from stabie_ase.runs.evaluation import StabilityResult


def price(models: dict[str, dict]) -> str:
    """What a gain was paid with, in words."""
    start, end = models["start"], models["stabie"]

    def change(key, what):
        before, after = start[f"held_out_{key}"], end[f"held_out_{key}"]
        growth = f" ({after / before - 1:+.1%})" if before > 0 else ""
        return f"{what} {1000 * before:.3g} -> {1000 * after:.3g}{growth}"

    forces, energies = change("force_mae_eV_per_A", "force MAE (meV/Å)"), change("energy_mae_eV", "energy MAE (meV)")
    return f" On held-out frames: {forces}, {energies}."


def curves(result: StabilityResult) -> dict[str, list | None]:
    """Kaplan-Meier's estimate with its band, for figures; times in ps."""
    times, fraction, low, high = (x.tolist() for x in result.statistics.survival())
    return {"times_ps": times, "stable_fraction": fraction, "low": low, "high": high}


def observed(target: Target, results: dict[str, StabilityResult]) -> dict[str, object]:
    """An observable's reference and its means in some models, for figures; units in the labels."""
    observable, axis = target.observable, target.observable.axis
    means = {name: result.observed[observable.name].mean() for name, result in results.items()}
    return {
        "axis": axis.values.tolist(),
        "axis_label": axis.label,
        "names": list(axis.names),
        "label": observable.label,
        "reference": target.value.tolist(),
        "means": {name: None if mean is None else mean.tolist() for name, mean in means.items()},
    }
