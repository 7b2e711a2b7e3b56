"""Observables of trajectories as a table, a file of numbers and a figure."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stabie_ase.runs.report.table import MISSING, number
from stabie_ase.system.files import as_json, check_new_file, replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".json", ".csv", ".png")

COLUMNS = ("observable", "axis", "name", "value", "error", "axis_label", "label", "n_frames", "n_replicas")

MAX_NAMES = 12
"""Components whose names are told or find room below a figure."""

Entries = Mapping[str, Mapping[str, Any]]
"""By observables' names, as `stabie_ase.observe` returns them."""


def check_output(path: str | os.PathLike) -> None:
    """Raise ValueError unless a new file of a known kind can be made there."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{path} is no file to write observables to; expected a name that ends in {', '.join(SUFFIXES)}")
    check_new_file(path)


def write_observed(entries: Entries, path: str | os.PathLike) -> None:
    """Numbers or a figure, by the end of the file's name; the file is there whole or not at all."""
    suffix = Path(path).suffix
    with replaced(path) as temporary:
        if suffix == ".png":
            from stabie_ase.runs.report.figures import png

            temporary.write_bytes(png(observed_figure(entries)))
        else:
            text = as_json(entries, indent=1) + "\n" if suffix == ".json" else observed_csv(entries)
            temporary.write_text(text, encoding="utf-8")


def observed_csv(entries: Entries) -> str:
    """A line for each component of each observable; what is not known is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for observable, entry in entries.items():
        names = entry["names"] or [""] * len(entry["axis"])
        for x, name, value, error in zip(entry["axis"], names, entry["value"], _errors(entry)):
            told = [repr(float(y)) if np.isfinite(y) else "" for y in (value, error)]
            writer.writerow([observable, repr(x), name, *told, *(entry[key] for key in COLUMNS[5:])])
    return text.getvalue()


def observed_table(entries: Entries) -> str:
    """A line for each observable, or for each of a few components: value, standard error, where, and of how many frames."""
    rows = [["", "value", "error", "", "frames", "replicas"]]
    for observable, entry in entries.items():
        counts = [str(entry["n_frames"]), str(entry["n_replicas"])]
        for k, (value, error, where) in enumerate(_in_short(entry)):
            rows.append([observable if k == 0 else "", number(value), error, where, *(counts if k == 0 else ["", ""])])
        if entry["note"]:
            rows.append([f"  {entry['note']}"])
    widths = [max(len(row[k]) for row in rows if len(row) > 1) for k in range(6)]
    lines = [_line(row, widths) if len(row) > 1 else row[0] for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 10), *lines[1:]])


def _line(row: list[str], widths: list[int]) -> str:
    aligned = [cell.ljust(width) if k in (0, 3) else cell.rjust(width) for k, (cell, width) in enumerate(zip(row, widths))]
    return "  ".join(aligned).rstrip()


def _in_short(entry: Mapping[str, Any]) -> list[tuple[float, str, str]]:
    """Value, error and what that is of: a few components, the mean of many, or the largest of a curve."""
    names, unit = entry["names"], entry["label"]
    values, errors = np.asarray(entry["value"], dtype=float), _errors(entry)

    def shown(k):
        return number(errors[k], digits=2) if np.isfinite(errors[k]) else MISSING

    if names and len(names) <= MAX_NAMES:
        one = len(names) == 1
        return [(values[k], shown(k), unit if one else f"{name}, {unit}") for k, name in enumerate(names)]
    if names:
        return [(float(values.mean()), MISSING, f"mean of {len(names)}, {unit}")]
    if not np.isfinite(values).any():
        return [(float("nan"), MISSING, unit)]
    k = int(np.nanargmax(values))
    name, _, of = entry["axis_label"].partition(" (")
    return [(values[k], shown(k), f"largest {unit}, at {name} = {number(entry['axis'][k])} {of.rstrip(')')}".rstrip())]


def _errors(entry: Mapping[str, Any]) -> np.ndarray:
    """Not a number where there is none."""
    if entry["error"] is None:
        return np.full(len(entry["value"]), np.nan)
    return np.asarray(entry["error"], dtype=float)


def observed_figure(entries: Entries) -> Figure:
    """A panel for each observable: curves with bands of one standard error, components with bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.7 * len(entries) + 0.3), dpi=160, layout="constrained", facecolor="white")
    panels = figure.subplots(len(entries), 1, squeeze=False)[:, 0]
    for axes, (observable, entry) in zip(panels, entries.items()):
        x, y, error = np.asarray(entry["axis"], dtype=float), np.asarray(entry["value"], dtype=float), _errors(entry)
        if entry["names"]:
            axes.errorbar(x, y, np.nan_to_num(error), fmt="o", color="#0072B2", capsize=3)
            if len(x) <= MAX_NAMES:
                axes.set_xticks(x, entry["names"])
            axes.margins(y=0.2)
        else:
            axes.plot(x, y, color="#0072B2", linewidth=1.3)
            axes.fill_between(x, y - error, y + error, color="#0072B2", alpha=0.25, linewidth=0)
            axes.set_xlim(x[0], x[-1] if len(x) > 1 else None)
            if np.nanmin(y) < 0:
                axes.axhline(0.0, color="0.6", linewidth=0.8)
        axes.set(xlabel=entry["axis_label"], ylabel=entry["label"])
        replicas = f"{entry['n_replicas']} replica{'s' if entry['n_replicas'] != 1 else ''}"
        axes.set_title(f"{observable} ({entry['n_frames']} frames, {replicas})".replace("$", r"\$"), fontsize=9)
    figure.align_ylabels()
    return figure
