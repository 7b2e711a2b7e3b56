"""The figures of a report. Each function takes plain data as the run directory holds it and returns a Figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from stabie_ase.runs.report.table import number
from stabie_ase.training.schedule import fewest_that_teach

# Okabe & Ito's colours, told apart by most colour-blind people; dashes tell the lines apart in grey.
STYLES = {
    "start": {"color": "#D55E00", "linestyle": "--", "zorder": 3},  # above, so that it shows on an equal line
    "stabie": {"color": "#0072B2", "linestyle": "-", "zorder": 2.5},
}
FURTHER_STYLES = (
    {"color": "#009E73", "linestyle": "-."},
    {"color": "#CC79A7", "linestyle": ":"},
    {"color": "#E69F00", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
)
PHASES = {
    "simulation": {"color": "#000000", "marker": "o", "markerfacecolor": "white"},
    "learning": {"color": "#0072B2", "marker": "s", "markerfacecolor": "#0072B2"},
    "matching": {"color": "#0072B2", "marker": "s", "markerfacecolor": "#0072B2"},
}
SHADES = {
    "simulation": {"facecolor": "#EDEDED", "edgecolor": "none"},
    "learning": {"facecolor": "#DCEBF5", "edgecolor": "#B4CFE0", "hatch": "//"},
    "matching": {"facecolor": "#DCEBF5", "edgecolor": "none"},
}
DISPLAY_NAMES = {"stabie": "StABIE"}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def stable_time_figure(
    curves: Mapping[str, Mapping], models: Mapping[str, Mapping] | None = None, time_ps: float | None = None
) -> Figure:
    """Share of replicas that have not failed against time (Kaplan-Meier), with 95 % bands.

    A curve that ends above zero ends with censored replicas, marked by a bar: they outlived the test.
    """
    figure = _figure(3.6)
    axes = figure.add_subplot()
    for name, style in _styles(curves):
        curve = curves[name]
        times, fraction = _numbers(curve["times_ps"]), _numbers(curve["stable_fraction"])
        axes.step(times, fraction, where="post", label=_failure_label(name, models), linewidth=2, **style)
        if curve.get("low") is not None and curve.get("high") is not None:
            axes.fill_between(
                times, _numbers(curve["low"]), _numbers(curve["high"]),
                step="post", color=style["color"], alpha=0.18, linewidth=0,
            )  # fmt: skip
        if fraction[-1] > 0:
            axes.plot(times[-1:], fraction[-1:], "|", color=style["color"], ms=14, mew=2.5, clip_on=False)
    axes.axhline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    end = time_ps or max((max(curve["times_ps"]) for curve in curves.values()), default=1.0)
    # A little room, so that the bars at the end are not cut.
    axes.set(xlim=(0, 1.02 * end), ylim=(0, 1.04), xlabel="time (ps)", ylabel="replicas without failure")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend_above(figure, axes)
    return figure


def observable_figure(name: str, observed: Mapping, models: Mapping[str, Mapping] | None = None) -> Figure | None:
    """An observable before failure against its reference, and the differences below.

    Parameters
    ----------
    name : str
        Of the observable: summaries call its error "{name}_error".
    observed : dict
        As result.json has it under "observables".
    models : dict of str to summary, optional
        For the errors in the legend.

    Returns
    -------
    Figure or None
        None if no model has a frame before its failure.
    """
    shown = {model: mean for model, mean in observed["means"].items() if mean is not None}
    if not shown:
        return None
    figure = _figure(4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    x, target, names = _numbers(observed["axis"]), _numbers(observed["reference"]), observed["names"]
    if names:
        upper.plot(x, target, "_", color="black", markersize=14, markeredgewidth=2, label="reference")
    else:
        upper.plot(x, target, color="black", linewidth=1.2, label="reference")
        upper.fill_between(x, 0.0, target, color="0.88", linewidth=0)
    lower.axhline(0.0, color="black", linewidth=0.8)
    for k, (model, style) in enumerate(_styles(shown)):
        values = _numbers(shown[model])
        error = ((models or {}).get(model) or {}).get(f"{name}_error")
        label = _shown_name(model) + ("" if error is None else f" (error {number(error)})")
        drawn = {"linestyle": "none", "marker": "os^Dv"[k % 5], "color": style["color"]} if names else {"linewidth": 1.3, **style}
        upper.plot(x, values, label=label, **drawn)
        lower.plot(x, values - target, **drawn)
    upper.set(ylabel=observed["label"], xlim=(x[0] - 0.5, x[-1] + 0.5) if names else (0, x[-1]))
    if names:
        upper.margins(y=0.2)
        lower.margins(y=0.2)
    else:
        upper.set_ylim(bottom=0 if np.nanmin(target) >= 0 else None)
    if 0 < len(names) <= MAX_NAMES:
        lower.set_xticks(x, names, rotation=90 if len(names) > 4 else 0)
    lower.set(xlabel=observed["axis_label"], ylabel="minus reference")
    figure.align_ylabels()
    _legend_above(figure, upper)
    return figure


MAX_NAMES = 40
"""Components whose names find room below a figure; of more only their numbers are shown."""


def phases_figure(records: Sequence[Mapping], config: Mapping | None = None) -> Figure | None:
    """Unstable fraction of the replicas over simulated time, window by window, and the hazard; None without windows.

    In a simulation phase replicas that failed stay failed until it ends; in a learning phase all of them are run
    again from the same start in every window (Raja et al., fig. 3a). A control without the observable has neither.
    """
    records = [record for record in records if record.get("unstable_fraction") is not None]
    if not records:
        return None
    config = config or {}
    figure = _figure(4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    size = 4.5 if len(records) < 120 else 2.5
    bounds, start, failed = [config.get(key) for key in ("upper_fraction", "lower_fraction")], 0.0, 0.0
    for phase, run in _runs(records):
        times = _numbers([record["md_replica_ps"] for record in run])
        for axes in (upper, lower):
            axes.axvspan(start, times[-1], linewidth=0, zorder=0, **SHADES[phase])
        fraction = _numbers([record["unstable_fraction"] for record in run])
        upper.plot(times, fraction, markersize=size, linewidth=1.2, **PHASES[phase])
        failed = fraction[-1] if phase == "simulation" else failed
        if None not in bounds:
            bound = bounds[0] if phase == "simulation" else fewest_that_teach(failed, *bounds)
            upper.hlines(bound, start, times[-1], color="0.3", linewidth=0.9, linestyle=":")
        start = times[-1]
    upper.set(ylim=(-0.04, 1.04), ylabel="unstable replicas", xlim=(0, 1.01 * start or 1.0))
    upper.yaxis.set_major_formatter(PercentFormatter(1.0))
    ends = [run[-1] for phase, run in _runs(records) if phase == "simulation"]
    times = _numbers([record["md_replica_ps"] for record in ends])
    hazards = _numbers([record.get("hazard_per_ps") for record in ends])
    lower.plot(times, hazards, color="black", marker="o", markersize=4.5, linewidth=1.2)
    if not _logarithmic_if_wide(lower, hazards):
        lower.set_ylim(0, 1.15 * np.fmax.reduce(hazards, initial=0.0) or 1.0)
    lower.set(xlabel="simulated time of all replicas (replica-ps)", ylabel="failures per\nreplica-ps")
    handles = [
        Patch(label="simulation: failed so far", **SHADES["simulation"] | {"edgecolor": "0.6"}),
        Patch(label="learning: failing in a window", **SHADES["learning"]),
    ]
    figure.align_ylabels()
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def learning_figure(
    records: Sequence[Mapping], config: Mapping | None = None, start_force_mae: float | None = None
) -> Figure | None:
    """Force error on the validation frames, observable loss and effective samples over updates; None before any.

    A band reaches from the force error up to its upper limit, which is held against the bound. With
    the starting model's force error in eV/Å that bound is drawn too.
    """
    learned, config = [record for record in records if record.get("updates") is not None], config or {}
    if not learned:
        return None
    figure = _figure(5.4)
    panels = figure.subplots(3, 1, sharex=True)
    updates = _numbers([record["updates"] for record in learned])
    rows = (
        ("force_mae_eV_per_A", 1000.0, "force MAE\n(meV/Å)", {"color": "#D55E00", "marker": "o"}),
        ("observable_loss", 1.0, "observable\nloss", {"color": "#0072B2", "marker": "s"}),
        ("ess_fraction", 1.0, "effective\nsamples", {"color": "#009E73", "marker": "^"}),
    )
    size = 4.5 if len(learned) < 120 else 2.5
    for axes, (key, scale, label, style) in zip(panels, rows):
        values = scale * _numbers([record.get(key) for record in learned])
        axes.plot(updates, values, markersize=size, linewidth=1.3, **style)
        axes.set_ylabel(label)
        axes.grid(color="0.9")
    limit = 1000.0 * _numbers([record.get("force_mae_limit_eV_per_A") for record in learned])
    panels[0].fill_between(updates, panels[0].lines[0].get_ydata(), limit, color="#D55E00", alpha=0.2, linewidth=0)
    if start_force_mae is not None and config.get("force_error_bound") is not None:
        bound = (1.0 + config["force_error_bound"]) * start_force_mae
        panels[0].axhline(1000.0 * bound, color="0.3", linewidth=0.9, linestyle=":")
    _logarithmic_if_wide(panels[1], panels[1].lines[0].get_ydata())
    panels[2].set_ylim(0, 1.04)
    panels[2].yaxis.set_major_formatter(PercentFormatter(1.0))
    if config.get("min_ess_fraction") is not None:
        panels[2].axhline(config["min_ess_fraction"], color="0.3", linewidth=0.9, linestyle=":")
    panels[2].set_xlabel("updates of the weights")
    panels[2].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels()
    return figure


def _figure(height: float) -> Figure:
    """Without pyplot: no state shared with the program around us and no choice of a backend."""
    return Figure(figsize=(6.4, height), dpi=160, layout="constrained", facecolor="white")


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """Null and infinite entries become gaps."""
    array = np.array([np.nan if value is None else value for value in values], dtype=float)
    array[~np.isfinite(array)] = np.nan
    return array


def _logarithmic_if_wide(axes, values: np.ndarray) -> bool:
    """A logarithmic axis for positive values that differ by more than a factor of 20."""
    values = values[np.isfinite(values)]
    wide = bool(len(values) and values.min() > 0 and values.max() > 20 * values.min())
    if wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return wide


def _styles(curves: Mapping[str, Mapping]) -> list[tuple[str, dict]]:
    """A line style for each name; those of `start` and `stabie` never change."""
    others = [name for name in curves if name not in STYLES]
    further = {name: FURTHER_STYLES[k % len(FURTHER_STYLES)] for k, name in enumerate(others)}
    return [(name, (STYLES | further)[name]) for name in curves]


def _shown_name(name: str) -> str:
    # A dollar sign would begin a formula.
    return DISPLAY_NAMES.get(name, name).replace("$", r"\$")


def _failure_label(name: str, models: Mapping[str, Mapping] | None) -> str:
    summary = (models or {}).get(name) or {}
    if "n_failed" not in summary:
        return _shown_name(name)
    return f"{_shown_name(name)} ({summary['n_failed']} of {summary['n_replicas']} failed)"


def _runs(records: Sequence[Mapping]) -> list[tuple[str, list[Mapping]]]:
    """Windows gathered by phase; windows are counted from 1 in each."""
    runs: list[tuple[str, list[Mapping]]] = []
    for record in records:
        if not runs or runs[-1][0] != record["phase"] or runs[-1][1][-1]["window"] >= record["window"]:
            runs.append((record["phase"], []))
        runs[-1][1].append(record)
    return runs


def _legend_above(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if sum(map(len, labels)) < 60 else 2
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
