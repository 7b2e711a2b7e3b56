"""The before/after table, the figures and report.html, from run directories made up here."""

import base64
import io
import json
import os
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from ase import Atoms
from ase.io.trajectory import Trajectory
from PIL import Image

import stabie_ase.runs.report.html
from stabie_ase.runs.report.figures import learning_figure, observable_figure, phases_figure, png, stable_time_figure
from stabie_ase.runs.report.html import write_report
from stabie_ase.runs.report.table import format_table, number, table_rows
from stabie_ase.stability import StabilityStatistics
from stabie_ase.system.options import row_of
from stabie_ase.training.options import FinetuneOptions

TEST_PS = 4.0
GRID = (np.arange(450) + 0.5) * 0.02


def statistics(hazard, n=64, seed=0):
    """Exponential times to failure, cut at TEST_PS."""
    times = np.random.default_rng(seed).exponential(1.0 / hazard, n) if hazard else np.full(n, np.inf)
    return StabilityStatistics(np.minimum(times, TEST_PS), times < TEST_PS)


def summary(outcome, **values):
    median, low, high = outcome.median_ps()
    return {
        "n_replicas": len(outcome.failed),
        "n_failed": outcome.n_failed,
        "stable_replica_ps": outcome.stable_replica_ps,
        "hazard_per_ps": outcome.hazard_per_ps,
        "hazard_per_ps_interval": list(outcome.hazard_interval()),
        "median_stable_ps": median,
        "median_stable_ps_interval": [low, high],
        "held_out_force_mae_eV_per_A": 0.1908,
        "held_out_energy_mae_eV": 0.0612,
        "held_out_energy_mae_with_offset_eV": 1.25,
        "hr_error": 0.0523,
    } | values


def density(shift=0.0, width=0.09):
    """Something like h(r): a few peaks, normalised."""
    centres = np.array([1.1, 1.4, 2.15, 2.5, 2.8, 3.6, 4.3, 5.1, 6.0, 7.2])
    peaks = np.exp(-0.5 * ((GRID[:, None] - centres - shift) / (width * (1 + 0.2 * centres))) ** 2).sum(axis=1)
    return peaks / (peaks.sum() * 0.02)


def curve(outcome):
    times, fraction, low, high = (x.tolist() for x in outcome.survival())
    return {"times_ps": times, "stable_fraction": fraction, "low": low, "high": high}


def a_result(start_hazard=0.6, end_hazard=0.1, gained=True):
    start, end = statistics(start_hazard), statistics(end_hazard, seed=1)
    return {
        "models": {
            "start": summary(start, what_broke={"C-H bond": 9, "energy": 2}),
            "stabie": summary(end, what_broke={}, held_out_force_mae_eV_per_A=0.1886, hr_error=0.021),
        },
        "curves": {
            "start": curve(start),
            "stabie": curve(end),
        },
        "observables": {
            "hr": {
                "axis": GRID.tolist(),
                "axis_label": "r (Å)",
                "names": [],
                "label": "h(r) (1/Å)",
                "reference": density().tolist(),
                "means": {"start": density(0.03, 0.11).tolist(), "stabie": density(0.01, 0.095).tolist()},
            },
        },
        "gained": gained,
        "message": "The model became more stable: 0.6 -> 0.1." if gained else "No gain that can be told from chance.",
        "test": {
            "temperature_K": 500.0,
            "replicas": 64,
            "time_ps": TEST_PS,
            "criterion": ["a bond off its mean length by more than 0.5 Å (21 bonds)"],
        },
    }


def some_records(cycles=4, seed=0):
    """Simulation phases in which the fraction grows, learning phases in which it falls."""
    rng, records, md, updates = np.random.default_rng(seed), [], 0.0, 0
    for cycle in range(cycles):
        fraction, hazard = 0.0, 0.6 * 0.6**cycle
        for window in range(1, 12 + 6 * cycle):
            md += 16.0 * (1 - fraction)
            fraction = min(1.0, fraction + rng.uniform(0.3, 1.0) * hazard * 0.5 * (1 - fraction))
            records.append(
                {"phase": "simulation", "cycle": cycle, "window": window, "md_replica_ps": md, "unstable_fraction": fraction,
                 "hazard_per_ps": hazard, "seconds": 2.0 * md}
            )  # fmt: skip
            if fraction >= 0.5:
                break
        for window in range(1, 7):
            md += 16.0
            updates += 5
            fraction *= rng.uniform(0.6, 0.9)
            records.append(
                {"phase": "learning", "cycle": cycle, "window": window, "md_replica_ps": md, "unstable_fraction": fraction,
                 "seconds": 2.0 * md, "n_samples": 640, "observable_loss": 0.01 * 0.97**updates,
                 "ess_fraction": rng.uniform(0.45, 0.95), "updates": updates, "learning_rate": 1e-4,
                 "force_mae_eV_per_A": 0.19 + 0.002 * np.sin(updates / 20),
                 "force_mae_limit_eV_per_A": 0.195 + 0.002 * np.sin(updates / 20)}
            )  # fmt: skip
    return records


CONFIG = {
    "config": {"observable": "hr", "dynamics": {"temperature_K": 500.0, "replicas": 32},
               "phases": {"window_fs": 500.0, "upper_fraction": 0.5, "lower_fraction": 0.1},
               "estimator": {"min_ess_fraction": 0.5}, "max_cycles": None, "seed": 0},
    "reference": "50 frames of C9H8O4, 500 K, energies and forces",
    "model": "models/aspirin.pt",
    "criterion": ["a bond off its mean length by more than 0.25 Å (21 bonds)"],
    "versions": {"ase": "3.29.0", "torch": "2.13.0", "python": "3.11.7"},
    "hardware": "x86_64, 2 threads, cpu",
    "command": ["stabie-ase", "finetune", "models/aspirin.pt", "--ref", "train set.xyz"],
}  # fmt: skip


def write_run(path, records=(), result=None, n_unstable=0, config=None):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    if records:
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
    if n_unstable:
        with Trajectory(path / "unstable.traj", "w") as frames:
            for k in range(n_unstable):
                frames.write(Atoms("OH", [[0, 0, 0], [0, 0, 1.5 + k]], tags=[1, 1], info={"replica": k, "criterion": "bonds"}))
    return path


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.images, self.words = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.words.append(data)


@pytest.fixture
def no_pixels(monkeypatch):
    """Figures are made but not drawn, which takes most of the time."""
    monkeypatch.setattr(stabie_ase.runs.report.html, "png", lambda figure: b"pixels")


def assert_self_contained(page):
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for source in page.images:
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
        image.load()
        assert image.width >= 900


# -- table


def test_table_says_what_the_summaries_say():
    models = {
        "start": summary(statistics(0.6), n_failed=57, hazard_per_ps=0.61234, hazard_per_ps_interval=[0.464, 0.793],
                         median_stable_ps=1.234, median_stable_ps_interval=[0.9, None]),
        "stabie": summary(statistics(0.0)),
    }  # fmt: skip
    rows = dict(table_rows(models, TEST_PS))
    assert rows["replicas failed"] == ["57 of 64", "0 of 64"]
    assert rows["failures per replica-ps"] == ["0.612", "0"]
    # Garwood's upper end for no event in 256 replica-ps: -ln(0.025)/256
    assert rows["  95 % interval"] == ["0.46 to 0.79", "0 to 0.014"]
    assert rows["median stable time (ps)"] == ["1.23", "> 4"]
    assert rows["  95 % band"] == ["0.90 to > 4", "> 4"]
    assert rows["force MAE, held-out (meV/Å)"] == ["191", "191"]
    assert rows["energy MAE, held-out (meV)"] == ["61.2", "61.2"]
    assert rows["  with its offset"] == ["1250", "1250"]
    assert rows["h(r) error"] == ["0.0523", "0.0523"]


def test_table_is_aligned_and_fits_a_terminal():
    lines = format_table({"start": summary(statistics(0.6)), "stabie": summary(statistics(0.05))}, TEST_PS).splitlines()
    assert max(map(len, lines)) <= 80
    assert len({len(line) for line in lines}) == 1  # right-justified last column
    assert lines[0].split() == ["start", "stabie"]


def test_table_of_three_models_fits_a_terminal():
    models = {name: summary(statistics(0.3, seed=k)) for k, name in enumerate(["start", "control", "stabie"])}
    text = format_table(models, TEST_PS)
    assert "\n\n" not in text and max(map(len, text.splitlines())) <= 80


def test_table_of_many_models_goes_into_blocks():
    names = [f"runs/2024-{k:02d}/aspirin_schnet_long_name.pt" for k in range(7)]
    text = format_table({name: summary(statistics(0.3, seed=k)) for k, name in enumerate(names)})
    assert max(map(len, text.splitlines())) <= 80
    blocks = text.split("\n\n")
    assert len(blocks) > 1
    assert all("replicas failed" in block and "with its offset" in block for block in blocks)
    assert text.count(" of 64") == 7
    # A long name is broken, not cut: its parts stand above each other.
    heads = [[line.split() for line in block.split("\n---")[0].splitlines()] for block in blocks]
    assert ["".join(parts) for head in heads for parts in zip(*head)] == names


def test_table_without_values():
    empty = {"n_replicas": 8, "n_failed": 8, "hazard_per_ps": None, "hr_error": None, "held_out_force_mae_eV_per_A": np.nan}
    rows = dict(table_rows({"model": empty}))
    assert rows["h(r) error"] == ["-"] and rows["failures per replica-ps"] == ["-"]
    assert rows["force MAE, held-out (meV/Å)"] == ["not finite"]
    assert rows["median stable time (ps)"] == ["not reached"]
    assert "8 of 8" in format_table({"model": empty})


def test_names_cannot_steer_the_terminal():
    assert "\x1b" not in format_table({"\x1b[31mred\n": summary(statistics(0.6))})


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (0.05, "0.0500"), (1.0, "1.00"), (123.4, "123"), (1234.5, "1234"), (2e-7, "2.00e-07"),
     (np.inf, "not finite"), (None, "-")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


# -- figures


def test_stable_time_figure_shows_the_curves():
    result = a_result()
    axes = stable_time_figure(result["curves"], result["models"], TEST_PS).axes[0]
    lines = {line.get_label().split()[0]: line for line in axes.lines}
    for label, name in (("start", "start"), ("StABIE", "stabie")):
        given = result["curves"][name]
        np.testing.assert_array_equal(lines[label].get_xdata(), given["times_ps"])
        np.testing.assert_array_equal(lines[label].get_ydata(), given["stable_fraction"])
        assert lines[label].get_drawstyle() == "steps-post"
    assert f"{result['models']['start']['n_failed']} of 64 failed" in lines["start"].get_label()
    assert lines["start"].get_linestyle() != lines["StABIE"].get_linestyle()
    censored = [line for line in axes.lines if line.get_marker() == "|"]
    assert [float(line.get_ydata()[0]) for line in censored] == [c["stable_fraction"][-1] for c in result["curves"].values()]
    bands = [collection.get_datalim(axes.transData) for collection in axes.collections]
    assert bands[0].y0 == pytest.approx(min(result["curves"]["start"]["low"]))


def test_a_curve_that_reaches_zero_has_no_censored_end():
    curves = {"start": {"times_ps": [0, 1, 2], "stable_fraction": [1, 0.5, 0], "low": [None, 0.1, 0], "high": None}}
    axes = stable_time_figure(curves).axes[0]
    assert not [line for line in axes.lines if line.get_marker() == "|"]
    assert not axes.collections


def test_null_entries_of_a_band_are_gaps():
    curves = {"start": {"times_ps": [0, 1, 2], "stable_fraction": [1, 0.9, 0.8], "low": [1, None, 0.5], "high": [1, 1, None]}}
    assert stable_time_figure(curves).axes[0].collections


def test_observable_figure_shows_values_and_residuals():
    result = a_result()
    upper, lower = observable_figure("hr", result["observables"]["hr"], result["models"]).axes
    target = np.array(result["observables"]["hr"]["reference"])
    np.testing.assert_array_equal(upper.lines[0].get_ydata(), target)
    for k, name in enumerate(("start", "stabie"), start=1):
        values = np.array(result["observables"]["hr"]["means"][name])
        np.testing.assert_array_equal(upper.lines[k].get_xdata(), GRID)
        np.testing.assert_array_equal(upper.lines[k].get_ydata(), values)
        np.testing.assert_array_equal(lower.lines[k].get_ydata(), values - target)
    assert (upper.get_ylabel(), lower.get_xlabel()) == ("h(r) (1/Å)", "r (Å)")
    assert "0.0210" in upper.lines[2].get_label()


def test_observable_figure_leaves_out_models_without_one():
    result = a_result()
    result["observables"]["hr"]["means"]["start"] = None
    upper, lower = observable_figure("hr", result["observables"]["hr"]).axes
    assert [line.get_label() for line in upper.lines] == ["reference", "StABIE"]
    assert upper.lines[1].get_color() == "#0072B2"
    result["observables"]["hr"]["means"]["stabie"] = None
    assert observable_figure("hr", result["observables"]["hr"]) is None


def test_phases_figure_shows_every_window():
    records = some_records()
    figure = phases_figure(records, row_of(FinetuneOptions, CONFIG["config"]))
    upper, lower = figure.axes
    phase_lines = [line for line in upper.lines if line.get_marker() in "os"]
    assert len(phase_lines) == 8
    np.testing.assert_array_equal(
        np.concatenate([line.get_xdata() for line in phase_lines]), [r["md_replica_ps"] for r in records]
    )
    np.testing.assert_array_equal(
        np.concatenate([line.get_ydata() for line in phase_lines]), [r["unstable_fraction"] for r in records]
    )
    shades = [patch.get_facecolor() for patch in upper.patches]
    assert len(shades) == 8 and shades[0] != shades[1] and shades[0] == shades[2]
    # The shaded spans follow each other without gaps, from zero to the end.
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in upper.patches]
    assert edges[0][0] == 0 and edges[-1][1] == pytest.approx(records[-1]["md_replica_ps"])
    assert all(a[1] == pytest.approx(b[0]) for a, b in zip(edges, edges[1:]))
    # Where half of the replicas end a simulation, or as many as a tenth of those that failed in it learning.
    ends = [a["unstable_fraction"] for a, b in zip(records, [*records[1:], {"phase": "none"}]) if a["phase"] != b["phase"]]
    bounds = [float(lines.get_segments()[0][0, 1]) for lines in upper.collections]
    assert bounds[0::2] == [0.5] * 4 and bounds[1::2] == pytest.approx([0.1 * min(1.0, failed / 0.5) for failed in ends[0::2]])
    np.testing.assert_allclose(lower.lines[0].get_ydata(), 0.6 * 0.6 ** np.arange(4))


def test_a_new_simulation_phase_without_learning_between_is_a_new_line():
    records = [
        {"phase": "simulation", "cycle": 0, "window": window, "md_replica_ps": 10.0 * k, "unstable_fraction": 0.0,
         "hazard_per_ps": 0.5 / k}
        for k, window in enumerate([1, 2, 1, 2], start=1)
    ]  # fmt: skip
    upper, lower = phases_figure(records).axes
    assert len([line for line in upper.lines if line.get_marker() == "o"]) == 2
    np.testing.assert_array_equal(lower.lines[0].get_xdata(), [20.0, 40.0])


def test_learning_figure_shows_windows_with_updates_only():
    records = some_records()
    learned = [record for record in records if "updates" in record]
    records.append({"phase": "learning", "cycle": 4, "window": 1, "md_replica_ps": 1e3, "unstable_fraction": 0.0})
    panels = learning_figure(records, row_of(FinetuneOptions, CONFIG["config"])).axes
    for axes, key, scale in zip(panels, ("force_mae_eV_per_A", "observable_loss", "ess_fraction"), (1000.0, 1.0, 1.0)):
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), [r["updates"] for r in learned])
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [scale * r[key] for r in learned], rtol=1e-12)
    assert panels[0].get_ylabel() == "force MAE\n(meV/Å)"
    (band,) = panels[0].collections
    limits = [1000.0 * r["force_mae_limit_eV_per_A"] for r in learned]
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(max(limits))


def test_figures_survive_numbers_that_are_none():
    learned = [{"phase": "learning", "cycle": 0, "window": k, "md_replica_ps": float(k), "unstable_fraction": 1.0, "updates": k,
                "force_mae_eV_per_A": value, "observable_loss": value, "ess_fraction": value}
               for k, value in enumerate([None, float("nan"), float("inf"), 0.5], start=1)]  # fmt: skip
    values = learning_figure(learned).axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(np.isfinite(values), [False, False, False, True])


def test_no_figure_without_data():
    assert phases_figure([]) is None
    control = {"phase": "learning", "cycle": 0, "window": 1, "md_replica_ps": 0.0, "updates": 5, "force_mae_eV_per_A": 0.1}
    assert phases_figure([control]) is None and learning_figure([control]) is not None
    assert learning_figure([]) is None
    assert learning_figure([{"phase": "simulation", "cycle": 0, "window": 1, "md_replica_ps": 1, "unstable_fraction": 0}]) is None


# -- report


def test_report_of_a_finished_run(tmp_path):
    run = write_run(tmp_path / "run", some_records(), a_result(), n_unstable=3)
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text
    page = Page(path)
    assert_self_contained(page)
    assert len(page.images) == 4
    assert sorted(p.name for p in (run / "figures").iterdir()) == [
        "learning.png", "observable-hr.png", "phases.png", "stable_time.png"
    ]  # fmt: skip
    embedded = {base64.b64decode(source.split(",", 1)[1]) for source in page.images}
    assert embedded == {p.read_bytes() for p in (run / "figures").iterdir()}
    assert "Gained. The model became more stable: 0.6 -> 0.1." in page.text
    for _, cells in table_rows(a_result()["models"], TEST_PS):
        assert all(cell in page.text for cell in cells)
    for said in ("3.29.0", "window_fs 500.0", "max_cycles none", "train set.xyz", "3 frames from training", "O-H bond 3", "By tag"):
        assert said in page.text
    assert "What broke first: start: C-H bond 9, energy 2; StABIE: nothing." in page.text
    assert f"stabie-ase view {run}" in page.text
    assert f"ase gui {run / 'unstable.traj'}" in page.text
    assert set(os.listdir(run)) == {
        "config.json", "metrics.jsonl", "result.json", "unstable.traj", "report.html", "figures"
    }  # fmt: skip


def test_report_without_gain_says_so(tmp_path, no_pixels):
    page = Page(write_report(write_run(tmp_path / "run", some_records(), a_result(0.6, 0.58, gained=False))))
    assert "Not gained. No gain that can be told from chance." in page.text
    assert "Gained." not in page.text


def test_report_when_nothing_failed(tmp_path):
    records = [{"phase": "simulation", "cycle": 0, "window": k, "md_replica_ps": 16.0 * k, "unstable_fraction": 0.0,
                "hazard_per_ps": 0.5 / (16.0 * k), "seconds": 10.0 * k} for k in range(1, 41)]  # fmt: skip
    result = a_result(0.0, 0.0, gained=False) | {"message": "The starting model did not fail once."}
    page = Page(write_report(write_run(tmp_path / "run", records, result)))
    assert_self_contained(page)
    assert len(page.images) == 3
    assert "0 of 64" in page.text and "> 4" in page.text
    assert "The weights have not been updated" in page.text
    assert "there are none to look at" in page.text


def test_report_of_a_run_without_observable(tmp_path, no_pixels):
    result = a_result()
    result["observables"]["hr"]["means"] = {"start": None, "stabie": None}
    for values in result["models"].values():
        values |= {"hr_error": None, "median_stable_ps": None, "median_stable_ps_interval": [None, None]}
    page = Page(write_report(write_run(tmp_path / "run", some_records(), result)))
    assert len(page.images) == 3
    assert "No model had a frame before its first failure" in page.text


def test_report_of_an_unfinished_run(tmp_path):
    run = write_run(tmp_path / "run", some_records(cycles=1), n_unstable=1)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"phase": "simul')  # the run is just writing it
    page = Page(write_report(run))
    assert_self_contained(page)
    assert "Not finished." in page.text and "--resume" in page.text
    assert "Before and after" not in page.text
    assert len(page.images) == 2
    assert "1 frame from training, each at the moment a replica failed: O-H bond 1." in page.text


def test_report_of_a_run_that_has_just_begun(tmp_path, no_pixels):
    page = Page(write_report(write_run(tmp_path / "run")))
    assert "No window has been simulated yet." in page.text
    assert not page.images


def test_a_resumed_run_leaves_no_old_figures(tmp_path, no_pixels):
    run = write_run(tmp_path / "run", some_records(), a_result())
    write_report(run)
    (run / "result.json").unlink()
    write_report(run)
    assert sorted(p.name for p in (run / "figures").iterdir()) == ["learning.png", "phases.png"]


def test_what_users_write_is_only_text(tmp_path):
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
    result = a_result() | {"message": hostile}
    result["test"]["criterion"] = [hostile]
    result["models"][hostile] = result["models"]["start"]
    result["curves"][hostile + "$x^$"] = result["curves"]["start"]
    config = {"model": "m/" + hostile.replace("/", "_"), "reference": hostile, "criterion": [hostile], "command": hostile,
              "hardware": hostile, "versions": {hostile: hostile}, "config": {hostile: hostile}}  # fmt: skip
    run = write_run(tmp_path / "<script>a b&'\"", some_records(), result, n_unstable=1, config=config)
    page = Page(write_report(run))
    assert_self_contained(page)
    assert len(page.images) == 4
    assert page.text.count(hostile) >= 8
    assert str(run) in page.text


def test_a_path_that_is_not_unicode(tmp_path, no_pixels):
    run = write_run(tmp_path / os.fsdecode(b"run\xff"), some_records(), a_result())
    assert "run\\udcff" in Page(write_report(run)).text


def test_a_failing_report_leaves_the_old_one(tmp_path, no_pixels, monkeypatch):
    run = write_run(tmp_path / "run", some_records(), a_result())
    path = write_report(run)
    before = path.read_bytes()

    def broken(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        write_report(run)
    assert path.read_bytes() == before
    assert not [p for p in run.rglob("*") if p.suffix == ".tmp"]


def test_report_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="no run directory: it has no config.json"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json is damaged: an object was expected, found list"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{}\nnonsense\n{}\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is damaged"):
        write_report(tmp_path)


def test_a_damaged_trajectory_does_not_cost_the_report(tmp_path, no_pixels):
    run = write_run(tmp_path / "run", some_records(), a_result())
    (run / "unstable.traj").write_bytes(b"not a trajectory")
    assert "cannot be read as an ASE trajectory" in Page(write_report(run)).text


def test_drawing_changes_no_global_state():
    before = dict(matplotlib.rcParams)
    assert png(stable_time_figure(a_result()["curves"])).startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("n", [2, 5])
def test_the_legend_lies_within_the_figure(n):
    curves = {name: a_result()["curves"]["start"] for name in ("start", "stabie", "control", "b", "c")[:n]}
    models = {name: summary(statistics(0.6)) for name in curves}
    for figure in (stable_time_figure(curves, models), observable_figure("hr", a_result()["observables"]["hr"], models)):
        figure.draw_without_rendering()
        box, canvas = figure.legends[0].get_window_extent(), figure.bbox
        assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1 and box.y1 <= canvas.y1
