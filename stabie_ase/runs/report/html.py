"""report.html of a run directory: one file with everything in it, for finished and unfinished runs."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from stabie_ase.runs.report.causes import broken_in, broken_in_words
from stabie_ase.runs.report.figures import learning_figure, observable_figure, phases_figure, png, stable_time_figure
from stabie_ase.runs.report.table import number, table_rows
from stabie_ase.runs.report.view import TRAJECTORY, gui_argument
from stabie_ase.system.files import replaced
from stabie_ase.system.options import row_of
from stabie_ase.training.options import FinetuneOptions


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write report.html and figures/*.png into a run directory and return the path of the report.

    Both are replaced whole or not at all. Figures that the run has no data for are left out, with a line that says so.
    ValueError where the directory holds no run, or its files are damaged.
    """
    run = RunFiles.read(run_dir)
    figures = {name: png(figure) for name, figure in _draw(run).items() if figure is not None}
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    for name, drawn in figures.items():
        with replaced(folder / f"{name}.png") as temporary:
            temporary.write_bytes(drawn)
    for path in folder.glob("*.png"):  # of an earlier report, with what there was to draw then
        if path.stem not in figures:
            path.unlink()
    path = run.path / "report.html"
    with replaced(path) as temporary:  # a file name need not be valid Unicode
        temporary.write_bytes(_page(run, figures).encode("utf-8", "backslashreplace"))
    return path


@dataclass(frozen=True)
class RunFiles:
    """What a run directory says of itself; `result` is None until the run is finished."""

    path: Path
    about: dict
    records: list[dict]
    result: dict | None

    @classmethod
    def read(cls, run_dir: str | os.PathLike) -> RunFiles:
        """Read config.json, metrics.jsonl and result.json; the last two may be missing."""
        path = Path(run_dir)
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no run directory: it has no config.json")
        result = path / "result.json"
        return cls(
            path.absolute(),
            _read_json(path / "config.json"),
            _read_lines(path / "metrics.jsonl"),
            _read_json(result) if result.is_file() else None,
        )

    @property
    def config(self) -> dict:
        """The options of the loop."""
        config = self.about.get("config") or {}
        return {name: value for name, value in config.items() if not isinstance(value, dict)} | row_of(FinetuneOptions, config)


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: an object was expected, found {type(data).__name__}")
    return data


def _read_lines(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for k, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if k == len(lines):  # the run is writing it, or died while it did
                break
            raise ValueError(f"{path}, line {k} is damaged: {error}") from error
    return records


def _draw(run: RunFiles) -> dict:
    figures = {
        "phases": phases_figure(run.records, run.config),
        "learning": learning_figure(run.records, run.config, run.about.get("start_force_mae_eV_per_A")),
    }
    if run.result is not None:
        curves, models = run.result["curves"], run.result["models"]
        figures["stable_time"] = stable_time_figure(curves, models, run.result["test"].get("time_ps"))
        for name, observed in run.result["observables"].items():
            figures[_file_of(name)] = observable_figure(name, observed, models)
    return figures


def _file_of(observable: str) -> str:
    """Name of an observable's figure: that of the observable where it can be one of a file."""
    return "observable-" + re.sub(r"[^A-Za-z0-9]+", "-", observable)


# -- the page


def _page(run: RunFiles, figures: Mapping[str, bytes]) -> str:
    title = f"StABIE fine-tuning of {Path(str(run.about.get('model', 'a model'))).name}"
    body = [f"<h1>{escape(title)}</h1>", _status(run)]
    if run.result is not None:
        body += [_comparison(run.result, figures)]
    body += [_course(run, figures), _unstable(run), _settings(run)]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""


def _status(run: RunFiles) -> str:
    if run.result is None:
        resume = escape(f"stabie-ase finetune --resume {shlex.quote(str(run.path))}")
        return (
            f'<div class="status open"><strong>Not finished.</strong> {escape(_progress(run))} The comparison with the '
            f"starting model comes at the end. To go on: <code>{resume}</code></div>"
        )
    kind, word = ("gained", "Gained.") if run.result["gained"] else ("same", "Not gained.")
    return (
        f'<div class="status {kind}"><strong>{word}</strong> {escape(str(run.result["message"]))}</div>\n'
        f"<p>{escape(_progress(run))}</p>"
    )


def _progress(run: RunFiles) -> str:
    if not run.records:
        return "No window has been simulated yet."
    last = run.records[-1]
    phases = [record["phase"] for record in run.records]
    updates = max((record.get("updates") or 0 for record in run.records), default=0)
    text = (
        f"{_count(phases.count('simulation'), 'simulation window')} and "
        f"{_count(len(phases) - phases.count('simulation'), 'learning window')}, {_count(updates, 'update')} of the weights, "
        f"{number(last['md_replica_ps'])} ps of dynamics summed over the replicas"
    )
    seconds = last.get("seconds")
    return text + (f", in {number(seconds / 60.0)} min." if seconds else ".")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _comparison(result: Mapping, figures: Mapping[str, bytes]) -> str:
    test, models = result["test"], result["models"]
    heads = "".join(f'<th scope="col">{escape(_titled(name))}</th>' for name in models)
    rows = "\n".join(
        f'<tr{" class=sub" if label.startswith(" ") else ""}><th scope="row">{escape(label.strip())}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for label, cells in table_rows(models, test.get("time_ps"))
    )
    rounds, where = _count(test.get("rounds", 1), "round"), " and at ".join(test.get("at") or ["one temperature"])
    conditions = (
        f"{rounds} of {test['replicas']} replicas of each model at {where} for {test['time_ps']:g} ps at "
        "most, with equal starts, until the answer was known or the time was spent. A replica counts as failed at any of these:"
    )
    criteria = "\n".join(f"<li>{escape(str(line))}</li>" for line in test["criterion"])
    frames = "; ".join(f"{name.replace('_', '-')}: {source}" for name, source in (result.get("frames") or {}).items())
    broke = "; ".join(f"{_titled(name)}: {broken_in_words(m['what_broke'])}" for name, m in models.items() if "what_broke" in m)
    return f"""<h2>Before and after</h2>
<p>{escape(conditions)}</p>
<ul>{criteria}</ul>
<div class="wide"><table class="numbers">
<thead><tr><td></td>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
{f"<p>What broke first: {escape(broke)}.</p>" if broke else ""}
<p class="note">Stable replica-ps: time that all replicas together spent before their first failure; replicas that
outlived the test count with its whole length. The rows below the number of failures tell what was seen first. Errors of
observables: of h(r) &int;|h(r) &minus; h<sub>ref</sub>(r)|dr, of others the mean deviation of their components, over the
frames before failure; the noise floor is what a perfect model would show,
since so few reference frames do not know their own mean; while both are stable: over the time before either model failed
from the same start. MAE: mean absolute error, of energies per frame with the constant offset taken out. {escape(frames)}.</p>
{_figure("stable_time", figures, "Share of the replicas that have not failed yet (Kaplan-Meier) with 95 % bands. "
         "A bar at the end of a line stands for replicas that outlived the test; where a line crosses the dotted one, "
         "half of the replicas have failed.")}
{_observables(result, figures)}"""


def _observables(result: Mapping, figures: Mapping[str, bytes]) -> str:
    return "\n".join(
        _figure(_file_of(name), figures, f"{observed['label']}, averaged over the frames before failure, against the reference "
                "(grey or bars), and the differences from it.", "No model had a frame before its first failure, so there is no "
                f"{name} to show.")
        for name, observed in result["observables"].items()
    )  # fmt: skip


def _titled(name: str) -> str:
    return "StABIE" if name == "stabie" else name


def _course(run: RunFiles, figures: Mapping[str, bytes]) -> str:
    return f"""<h2>Course of the run</h2>
{_figure("phases", figures, "Above: unstable fraction of the replicas at the end of each window. In a simulation phase "
         "(grey, circles) failed replicas wait, so the fraction grows; in a learning phase (blue, hatched, squares) all "
         "are run again from the same states, and the fraction falls if the model learns. Dotted: the fractions that end a "
         "phase. Below: failures per stable replica-ps in each simulation phase (half a failure added).",
         "No window has been simulated yet.")}
{_figure("learning", figures, "After the updates of each learning window: force error on the validation frames with, as a "
         "band, its upper limit; a step that takes that beyond the dotted bound is taken back. Loss of "
         "the observable on the window's samples before the updates, and effective fraction of the samples after them "
         "(Kish); below the dotted line samples are not used again.",
         "The weights have not been updated: no learning window saw enough failures.")}"""


def _figure(name: str, figures: Mapping[str, bytes], caption: str, without: str = "") -> str:
    if name not in figures:
        return f"<p>{escape(without)}</p>"
    data = base64.b64encode(figures[name]).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _unstable(run: RunFiles) -> str:
    path = run.path / TRAJECTORY
    try:
        broke = broken_in(path) if path.is_file() else Counter()
    except ValueError as error:
        return f"<h2>Unstable frames</h2>\n<p>{escape(str(error))}</p>"
    if not broke:
        return "<h2>Unstable frames</h2>\n<p>No replica has failed, so there are none to look at.</p>"
    ours = shlex.join(["stabie-ase", "view", str(run.path)])
    ases = shlex.join(["ase", "gui", gui_argument(path)])
    return f"""<h2>Unstable frames</h2>
<p>{_count(broke.total(), "frame")} from training, each at the moment a replica failed: {escape(broken_in_words(broke))}.
To look at them:</p>
<pre>{escape(ours)}</pre>
<p>or, where only ASE is installed,</p>
<pre>{escape(ases)}</pre>
<p>The atoms to blame have tag 1: choose <em>View &gt; Colors &hellip;</em> (or press C) and there
<em>By tag</em>, which paints them pink and all others green. Page Up and Page Down go through the frames. Cycle,
replica, time in ps, criterion and its value are in <code>atoms.info</code> of each.</p>"""


def _settings(run: RunFiles) -> str:
    about = run.about
    facts = {
        "model": about.get("model"),
        "reference": about.get("reference"),
        "observables": ", ".join(about.get("observable") or ()),
        "criteria in training": "; ".join(about.get("criterion") or ()),
        "command": about.get("command"),
        "hardware": about.get("hardware"),
        "versions": about.get("versions"),
        "run directory": str(run.path),
    }
    facts = {key: value for key, value in facts.items() if value}
    return f"""<h2>What was run</h2>
<div class="wide">{_pairs(facts)}</div>
<h2>Configuration</h2>
<div class="columns">{_pairs(run.config)}</div>"""


def _pairs(values: Mapping) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_plain(value))}</td></tr>'
        for key, value in values.items()
    )
    return f'<table class="pairs"><tbody>\n{rows}\n</tbody></table>'


def _plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return shlex.join(str(item) for item in value)
    return str(value)


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: white; max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
.status { border-left: .5rem solid #777; background: #f4f4f4; padding: .7rem 1rem; }
.status.gained { border-color: #0072b2; background: #eaf3f9; }
.status.same { border-color: #d55e00; background: #fcf1e9; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: normal; }
th, td { padding: .2rem .8rem .2rem 0; vertical-align: top; }
.numbers { overflow-wrap: normal; }
.numbers thead th { font-weight: bold; text-align: right; overflow-wrap: anywhere; }
.numbers th, .numbers td { padding: .25rem 0 .25rem 1.5rem; }
.numbers th[scope=row] { padding-left: 0; }
.numbers td { text-align: right; white-space: nowrap; }
.numbers tbody tr:not(.sub) { border-top: 1px solid #ddd; }
.numbers .sub th { padding-left: 1.2rem; color: #555; }
.numbers .sub td { color: #555; }
.pairs th { color: #555; }
.columns { columns: 2 20rem; }
.columns, .note, figcaption { font-size: .87rem; }
.note, figcaption { color: #444; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
pre { background: #f4f4f4; padding: .6rem .8rem; white-space: pre-wrap; }
@media print {
  body { font-size: 10.5pt; max-width: none; margin: 0; }
  figure, .numbers, .status, pre, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .status, pre { background: none; border: 1px solid #777; border-left-width: .5rem; }
  img { max-height: 11cm; }
  .wide { overflow: visible; }
}
"""
