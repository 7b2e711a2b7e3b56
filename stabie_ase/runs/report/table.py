"""The before/after table: what `summaries.summarize` says of some models, side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

WIDTH = 80
"""Columns of a terminal that a table may fill."""

MISSING, NOT_FINITE = "-", "not finite"


def format_table(models: Mapping[str, Mapping[str, Any]], time_ps: float | None = None) -> str:
    """Plain text of at most 80 columns; more models than fit go into further blocks.

    Parameters
    ----------
    models : dict of name to summary
        Summaries as returned by `stabie_ase.runs.summaries.summarize`; any entry may be missing or None.
    time_ps : float, optional
        Length of the test, to say "> 5" of a median that was not reached.

    Returns
    -------
    str
    """
    rows = table_rows(models, time_ps)
    labels = [label for label, _ in rows]
    label_width = max(len(label) for label in labels)
    columns = [_column(name, [cells[k] for _, cells in rows]) for k, name in enumerate(models)]
    return "\n\n".join(_block(labels, label_width, part) for part in _parts(columns, WIDTH - label_width))


def table_rows(
    models: Mapping[str, Mapping[str, Any]], time_ps: float | None = None
) -> list[tuple[str, list[str]]]:
    """The table as (label, one cell a model), units in the labels, "-" for None.

    A label that begins with blanks belongs to the row above it.
    """
    summaries = list(models.values())
    beyond = "not reached" if time_ps is None else f"> {time_ps:g}"

    def row(label, cell):
        return [(label, [cell(summary) for summary in summaries])]

    def told(label, cell):
        """A row of what only some commands can tell: none where nobody told it."""
        return [(label, cells) for label, cells in row(label, cell) if any(cell != MISSING for cell in cells)]

    def single(key, scale=1.0, digits=3):
        return lambda summary: number(summary.get(key), scale, digits)

    def failures(summary):
        return f"{summary.get('n_failed', MISSING)} of {summary.get('n_replicas', MISSING)}"

    def median(summary):
        value = summary.get("median_stable_ps")
        return beyond if value is None else number(value)

    def median_band(summary):
        low, high = summary.get("median_stable_ps_interval") or (None, None)
        if low is None:
            return beyond
        return f"{number(low, digits=2)} to {beyond if high is None else number(high, digits=2)}"

    def hazard_interval(summary):
        low, high = summary.get("hazard_per_ps_interval") or (None, None)
        return MISSING if low is None or high is None else f"{number(low, digits=2)} to {number(high, digits=2)}"

    causes = sorted({cause for summary in summaries for cause in summary.get("failures_by_cause") or {}})

    def by(cause):
        return lambda summary: str((summary.get("failures_by_cause") or {}).get(cause, 0))

    def observable(name):
        key, called = f"{name}_error", CALLED.get(name, name)
        return [
            row(f"{called} error", single(key)),
            row("  standard error", single(f"{key}_standard_error", digits=2)),
            told("  noise floor of the reference", single(f"{key}_floor", digits=2)),
            told(f"{called} error while both are stable", single(f"{key}_while_both_stable")),
            told("  standard error", single(f"{key}_while_both_stable_standard_error", digits=2)),
        ]

    rows = [
        row("replicas failed", failures),
        *(row(f"  {cause}", by(cause)) for cause in causes),
        row("stable replica-ps", single("stable_replica_ps")),
        row("failures per replica-ps", single("hazard_per_ps")),
        row("  95 % interval", hazard_interval),
        *(row(f"  at {name}", partial(_hazard_at, name)) for name in _state_points(summaries)),
        row("median stable time (ps)", median),
        row("  95 % band", median_band),
        *(line for name in _observables(summaries) for line in observable(name)),
        *(told(label, single(key, 1000.0)) for key, label in ERRORS.items()),
    ]
    return [one for part in rows for one in part]


ERRORS = {
    "held_out_force_mae_eV_per_A": "force MAE, held-out (meV/Å)",
    "reference_force_mae_eV_per_A": "force MAE, reference (meV/Å)",
    "held_out_energy_mae_eV": "energy MAE, held-out (meV)",
    "held_out_energy_mae_with_offset_eV": "  with its offset",
    "reference_energy_mae_eV": "energy MAE, reference (meV)",
    "reference_energy_mae_with_offset_eV": "  with its offset",
}
"""Labels by the keys of summaries, in thousandths."""

CALLED = {"hr": "h(r)"}
"""Observables that have a better name for readers."""


def _state_points(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where there are several, those at which failures were counted."""
    return list(dict.fromkeys(name for summary in summaries for name in summary.get("conditions") or {}))


def _hazard_at(name: str, summary: Mapping[str, Any]) -> str:
    """Failures per replica-ps at one of several state points."""
    return number(((summary.get("conditions") or {}).get(name) or {}).get("hazard_per_ps"))


def _observables(summaries: Sequence[Mapping[str, object]]) -> list[str]:
    """Names of the observables whose errors are told, in the order in which they are."""
    keys = dict.fromkeys(key for summary in summaries for key in summary)
    return [key.removesuffix("_error") for key in keys if key.endswith("_error") and not key.endswith("_standard_error")]


def number(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
    """So many significant digits without an exponent, as far as that stays readable; None is told as -."""
    if value is None:
        return MISSING
    value = scale * float(value)
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0.0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _column(name: str, cells: Sequence[str]) -> tuple[list[str], list[str], int]:
    """Header lines, cells and width; a long name (a path, say) is broken over several lines."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    width = max(12, *(len(cell) for cell in cells))
    header = textwrap.wrap(name, width, break_on_hyphens=False) or [""]
    return header, list(cells), width


def _parts(columns: list, width: int) -> list[list]:
    """Columns, each after two blanks, gathered into blocks of at most `width`."""
    parts, free = [], 0
    for column in columns:
        needed = column[2] + 2
        if needed > free:
            parts.append([])
            free = width
        parts[-1].append(column)
        free -= needed
    return parts


def _block(labels: Sequence[str], label_width: int, columns: list) -> str:
    height = max(len(header) for header, _, _ in columns)
    lines = []
    for k in range(height):
        # Names end on the line above the rule.
        heads = [([""] * (height - len(header)) + header)[k].rjust(width) for header, _, width in columns]
        lines.append("  ".join([" " * label_width, *heads]))
    lines.append("-" * (label_width + sum(width + 2 for _, _, width in columns)))
    for k, label in enumerate(labels):
        lines.append("  ".join([label.ljust(label_width), *(cells[k].rjust(width) for _, cells, width in columns)]))
    return "\n".join(line.rstrip() for line in lines)
