"""`stabie-ase observe`: values and errors, frames after a failure, what is written, and bad input in a line."""

import csv
import json
import re

import numpy as np
import pytest
import tiny
import torch
from ase import Atoms, units
from ase.io import read, write
from PIL import Image

import stabie_ase
from stabie_ase.observables import RadialDistribution
from stabie_ase.observables.diffusion import SelfDiffusion
from stabie_ase.observables.dynamical import MeanSquaredDisplacement
from stabie_ase.observables.series import TimeSeries
from stabie_ase.runs.monitor import Monitor
from stabie_ase.stability.criteria.base import OneFrame, Verdict
from stabie_ase.structures.batch import AtomsBatch


def observe(*arguments):
    result = tiny.run("observe", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    result = tiny.run("-q", "observe", *arguments)
    assert result.exit_code not in (0, None)
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    return lines[0]


def gas(n_frames=60, seed=0, interval_fs=50.0):
    """Four argon and four neon atoms that walk at random about a cube of 9 Å, with momenta of 90 K."""
    rng, corners = np.random.default_rng(seed), 4.5 * np.indices((2, 2, 2)).reshape(3, -1).T
    r = corners + np.cumsum(rng.normal(scale=0.05, size=(n_frames, 8, 3)), axis=0)
    images = []
    for k in range(n_frames):
        images.append(Atoms("Ar4Ne4", r[k], cell=9.0 * np.eye(3), pbc=True, info={"time_fs": k * interval_fs, "temperature_K": 90.0}))
        images[-1].set_momenta(rng.normal(size=(8, 3)) * np.sqrt(images[-1].get_masses() * units.kB * 90.0)[:, None])
    return images


def molecule(n_frames=40, breaks_at=None, seed=0):
    """Water that rattles by 0.02 Å and flies apart from some frame on."""
    rng, images = np.random.default_rng(seed), []
    water = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]])
    for k in range(n_frames):
        r = water + rng.normal(scale=0.02, size=(3, 3))
        if breaks_at is not None and k >= breaks_at:
            r[2, 1] -= 0.8 * (k - breaks_at + 1)
        images.append(Atoms("OH2", r, info={"time_ps": 0.01 * k}))
    return images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With trajectories of a gas, and of molecules one of which breaks."""
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        write(f"gas{k}.traj", gas(seed=k))
    write("good.xyz", molecule())
    write("bad.traj", molecule(breaks_at=25, seed=1))
    return tmp_path


# -- values


def test_values_are_those_of_the_observables_themselves(folder):
    table = observe("gas0.traj", "gas1.traj", "--observable", "rdf:Ar-Ne,r_max=4", "--observable", "msd:Ne,diffusion", "--output", "o.json")
    found = json.loads((folder / "o.json").read_text())
    assert list(found) == ["rdf:Ar-Ne", "msd:Ne", "diffusion"]
    images = [gas(seed=k) for k in range(2)]
    rdf = RadialDistribution((18, 10), 4.0)
    values = rdf(AtomsBatch.from_atoms(images[0] + images[1]))
    np.testing.assert_allclose(found["rdf:Ar-Ne"]["value"], values.mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(found["rdf:Ar-Ne"]["axis"], rdf.axis.values)
    replicas = [TimeSeries.from_atoms(part) for part in images]
    for name, observable in [("msd:Ne", MeanSquaredDisplacement(10)), ("diffusion", SelfDiffusion())]:
        expected = observable(replicas)
        np.testing.assert_allclose(found[name]["value"], expected.value, rtol=1e-12)
        np.testing.assert_allclose(found[name]["error"], expected.error, rtol=1e-12)
        assert (found[name]["axis_label"], found[name]["label"]) == (expected.axis.label, expected.label)
    for entry in found.values():
        assert (entry["n_frames"], entry["n_replicas"], entry["n_left_out"]) == (120, 2, 0)
    assert "rdf:Ar-Ne" in table and "fit from 0.25 to 0.5 ps" in table and "Å²" in table
    assert f"{found['diffusion']['value'][0]:.2f}"[:3] in table


def test_a_path_a_list_and_atoms_give_the_same(folder):
    by_path = stabie_ase.observe("gas0.traj", observables="msd")
    for frames in (["gas0.traj"], gas(), [gas()], [read("gas0.traj", ":")]):
        assert stabie_ase.observe(frames, observables=[MeanSquaredDisplacement()])["msd"]["value"] == pytest.approx(by_path["msd"]["value"])


def test_errors_of_static_means_are_those_of_independent_replicas():
    """Bond lengths that are drawn anew in every frame: σ/√n, from one replica of 400 frames by blocks and from eight."""
    for n_replicas, n_frames in [(1, 400), (8, 100)]:
        frames = [molecule(n_frames, seed=k) for k in range(n_replicas)]
        entry = stabie_ase.observe(frames, observables="bond-length")["bond-length"]
        values = np.array([[atoms.get_distance(0, 1), atoms.get_distance(0, 2)] for images in frames for atoms in images])
        np.testing.assert_allclose(entry["value"], values.mean(axis=0), rtol=1e-9)
        np.testing.assert_allclose(entry["error"], values.std(axis=0) / len(values) ** 0.5, rtol=0.6)
        assert entry["names"] == ["O0-H1", "O0-H2"]


def test_few_frames_have_a_value_and_say_that_they_have_no_error(folder):
    table = observe("good.xyz@:3", "--observable", "bond-length", "--output", "o.json")
    entry = json.loads((folder / "o.json").read_text())["bond-length"]
    assert entry["error"] is None and "too few independent frames for an error" in table
    assert entry["note"] in table and entry["n_frames"] == 3


# -- frames that do not count


def test_frames_from_a_failure_on_are_left_out_and_counted(folder):
    table = observe("good.xyz", "bad.traj", "--observable", "bond-length,msd", "--output", "o.json")
    assert "Left out: 15 of 80 frames, at the end of 1 of 2 replicas (bonds 1)" in table
    found = json.loads((folder / "o.json").read_text())
    frames = molecule() + molecule(25, seed=1)
    expected = np.mean([[atoms.get_distance(0, 1), atoms.get_distance(0, 2)] for atoms in frames], axis=0)
    np.testing.assert_allclose(found["bond-length"]["value"], expected, rtol=1e-9)
    assert {(entry["n_frames"], entry["n_left_out"]) for entry in found.values()} == {(65, 15)}
    replicas = [TimeSeries.from_atoms(molecule()), TimeSeries.from_atoms(molecule(25, seed=1))]
    np.testing.assert_allclose(found["msd"]["value"], MeanSquaredDisplacement()(replicas).value, rtol=1e-6)  # digits of xyz


@pytest.mark.parametrize("arguments, n_frames", [
    (["--no-criterion"], 40),
    (["--criterion", "bonds:1.7"], 27),  # 0.8 and 1.6 Å too long are allowed
    (["--ref", "good.xyz"], 25),
    (["--ref", "good.xyz", "--criterion", "bonds:1.7"], 27),
])  # fmt: skip
def test_who_decides_what_a_failure_is(folder, arguments, n_frames):
    observe("bad.traj", "--observable", "msd", "--output", "o.json", *arguments)
    assert json.loads((folder / "o.json").read_text())["msd"]["n_frames"] == n_frames


def test_frames_that_are_not_finite_end_a_replica(folder):
    images = gas()
    images[40].positions[3, 1] = np.nan
    write("nan.traj", images)
    table = observe("nan.traj", "--observable", "rdf:Ar-Ar", "--output", "o.json")
    assert "Left out: 20 of 60 frames, at the end of 1 of 1 replicas (not finite 1)" in table
    expected = stabie_ase.observe(gas()[:40], observables="rdf:Ar-Ar")
    assert json.loads((folder / "o.json").read_text())["rdf:Ar-Ar"]["value"] == pytest.approx(expected["rdf:Ar-Ar"]["value"])


def test_a_hot_frame_ends_a_replica_where_the_temperature_is_known(folder):
    images = gas()
    images[30].set_momenta(10.0 * images[30].get_momenta())
    write("hot.traj", images)
    assert "temperature 1" in observe("hot.traj", "--observable", "vacf")
    for atoms in images:
        del atoms.info["temperature_K"]
    write("hot.traj", images)
    assert "Left out" not in observe("hot.traj", "--observable", "vacf")
    assert "temperature 1" in observe("hot.traj", "--observable", "vacf", "--temperature", "90")


class Third(OneFrame):
    """Unstable at the third look: it has to remember the others."""

    name, unit = "third", ""

    def memory(self, batch):
        return {"third": torch.zeros(batch.n_systems, dtype=torch.int64)}

    def judge(self, state):
        looks = state.extra["third"] + 1
        return Verdict((looks >= 3) * 2.0, looks.double(), looks.new_zeros((len(looks), 0)), {"third": looks})

    def describe(self):
        return "a third look"


def test_a_criterion_remembers_from_frame_to_frame():
    found = stabie_ase.observe([gas(), gas(seed=1)], observables="rdf:Ar-Ar", criteria=[Third()])
    assert (found["rdf:Ar-Ar"]["n_frames"], found["rdf:Ar-Ar"]["n_left_out"]) == (4, 116)


# -- runs of md


@pytest.mark.parametrize("one_file", [False, True])
def test_a_run_of_md_is_its_replicas(here, one_file):
    """Replicas that the run has stopped end there; a last frame off the beat is no frame of a series."""
    made = tiny.run(
        "-q", "md", "model.pt", "--start", "ref.xyz", "--replicas", "6", "--time", "0.105", "--sample-every", "10", "--seed", "4",
        "--output", "run", "--criterion", "bonds:0.4", "--temperature", "1000", *(["--one-file"] if one_file else []),
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    table = observe("run", "--ref", "ref.xyz", "--observable", "hr,vacf,msd", "--criterion", "bonds:9", "--output", "o.json")
    found = json.loads((here / "o.json").read_text())
    files = ["run/frames.traj"] if one_file else sorted((here / "run" / "frames").iterdir())
    images = [atoms for file in files for atoms in read(file, ":")]
    stopped = {atoms.info["replica"]: atoms.info["time_ps"] for atoms in read("run/unstable.traj", ":")}
    assert 0 < len(stopped) <= 6
    good = [a for a in images if a.info["time_ps"] < stopped.get(a.info["replica"], 0.1049)]
    assert found["vacf"]["n_frames"] == found["hr"]["n_frames"] == len(good)
    assert found["vacf"]["n_left_out"] == len(images) - len(good)
    assert found["vacf"]["axis"][1] == pytest.approx(0.01)
    assert f"bonds {len(stopped)}" in table
    by_hand = [TimeSeries.from_atoms([a for a in good if a.info["replica"] == k], 10.0) for k in {a.info["replica"] for a in good}]
    np.testing.assert_allclose(found["msd"]["value"], MeanSquaredDisplacement()(by_hand).value, rtol=1e-9)


def test_a_file_of_several_replicas_is_not_one_of_them(folder):
    images = [atoms for k in range(2) for atoms in gas(seed=k)]
    for k, atoms in enumerate(images):
        atoms.info["replica"] = k // 60
    write("both.traj", images)
    both, apart = (stabie_ase.observe(names, observables="vacf")["vacf"] for names in ("both.traj", ["gas0.traj", "gas1.traj"]))
    assert both == apart and both["n_replicas"] == 2


# -- what is written


def test_csv_has_a_line_for_each_component(folder):
    arguments = ["gas0.traj", "--observable", "rdf:Ar-Ar", "--observable", "diffusion"]
    observe(*arguments, "--output", "o.csv")
    observe(*arguments, "--output", "o.json")
    rows, found = list(csv.DictReader((folder / "o.csv").open())), json.loads((folder / "o.json").read_text())
    for name, entry in found.items():
        mine = [row for row in rows if row["observable"] == name]
        assert [float(row["value"]) for row in mine] == entry["value"]
        assert [float(row["error"]) if row["error"] else None for row in mine] == (entry["error"] or [None] * len(mine))
        assert [float(row["axis"]) for row in mine] == entry["axis"]
        assert {(row["axis_label"], row["label"]) for row in mine} == {(entry["axis_label"], entry["label"])}
    assert len(rows) == sum(len(entry["value"]) for entry in found.values())


def test_figure_has_a_panel_for_each_observable(folder):
    heights = []
    for k, observables in enumerate(["rdf:Ar-Ar", "rdf:Ar-Ar,vacf:Ne,diffusion"]):
        observe("gas0.traj", "--observable", observables, "--output", f"{k}.png")
        image = np.asarray(Image.open(f"{k}.png").convert("RGB")).astype(int)
        assert (np.abs(image - [0, 114, 178]).max(axis=2) < 8).any()
        heights.append(len(image))
    assert heights[1] > 2 * heights[0]


def test_options_come_from_a_config_file_and_the_default_suits_the_system(folder):
    (folder / "o.yaml").write_text("observable: [msd, 'rdf:Ar-Ar']\nno-criterion: true\noutput: o.json\n")
    observe("gas0.traj", "--config", "o.yaml")
    assert list(json.loads((folder / "o.json").read_text())) == ["msd", "rdf:Ar-Ar"]
    assert list(stabie_ase.observe("good.xyz")) == ["hr", "hr:H-H", "hr:H-O"]


def test_progress_is_told():
    told = []

    class Told(Monitor):
        def progress(self, task, done, total, note):
            told.append((done, total, note))

    stabie_ase.observe(gas(300), observables="rdf:Ar-Ar,msd", monitor=Told())
    assert told[0] == (0, 2, "rdf:Ar-Ar") and told[-1] == (2, 2, "") and [t[0] for t in told] == sorted(t[0] for t in told)
    assert any(0 < done < 1 for done, _, _ in told)


# -- bad input


@pytest.mark.parametrize("arguments, words", [
    (["none.traj"], "none.traj: no such file"),
    (["."], "is no run directory: it has no config.json"),
    (["gas0.traj", "--observable", "vcf"], "unknown observable 'vcf'; did you mean 'vacf'?"),
    (["gas0.traj", "--observable", "vacf:O"], "the reference has no O, only Ne, Ar"),
    (["gas0.traj", "--observable", "vacf,x=1"], "unknown option 'x'"),
    (["gas0.traj", "--observable", "vacf,normalised=2"], "normalised='2', expected yes or no"),
    (["gas0.traj", "--observable", "vdos,unit=eV"], "expected one of cm-1, THz"),
    (["gas0.traj", "--observable", "msd,msd"], "'msd' is given twice"),
    (["gas0.traj", "--observable", "rdf:Ar-Ne,rdf:Ne-Ar"], "is given twice"),
    (["gas0.traj", "--observable", "rdf:Ar-Ne,weight=2"], "a weight, which counts in training and evaluate only"),
    (["gas0.traj", "--observable", "density,value=2"], "a value, which counts in training and evaluate only"),
    (["gas0.traj", "--observable", "msd", "--interval", "10"], "given as 10 fs, but the frames tell 50 fs"),
    (["gas0.traj", "--observable", "rdf:Ar-Ar", "--interval", "50"], "none of the observables depends on time"),
    (["gas0.traj", "gas0.traj"], "gas0.traj is given twice"),
    (["gas0.traj", "good.xyz"], "good.xyz: frame 0 is of H2O"),
    (["gas0.traj", "--ref", "good.xyz"], "the reference is of H2O, the frames of Ar4Ne4"),
    (["good.xyz", "--observable", "vacf"], "the frames have no momenta"),
    (["good.xyz", "--observable", "rdf:O-H"], "periodic in all directions"),
    (["good.xyz", "--criterion", "energy"], "'energy' needs the energies of a model"),
    (["good.xyz", "--criterion", "temperature"], "give --temperature in K"),
    (["good.xyz", "--criterion", "bonds:0.5", "--no-criterion"], "contradict each other"),
    (["good.xyz", "--criterion", "bonds:0.0001"], "no frame comes before a failure; --no-criterion"),
    (["gas0.traj@:40:7", "gas1.traj", "--observable", "msd"], "one interval between frames, got 50, 350 fs"),
    (["gas0.traj", "--temperature", "-1"], "temperature_K is -1"),
    (["good.xyz", "--observable", "diffusion,viscosity=1"], "needs a temperature; give --temperature in K"),
    (["untimed.traj", "--observable", "msd"], "do not tell the time between them .*give --interval in fs"),
    ([], "Missing argument 'FILE...'"),
    (["gas0.traj", "--output", "gas0.traj"], "expected a name that ends in .json, .csv, .png"),
    (["gas0.traj", "--output", "there.json"], "there.json exists and is not overwritten"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(folder, arguments, words):
    (folder / "there.json").write_text("")
    write("untimed.traj", [Atoms("Ar2", np.eye(2, 3) * 5.0)] * 20)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    output = [] if "--output" in arguments else ["--output", "new.json"]
    assert re.search(words, refused(*arguments, *output))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_wrapped_frames_of_a_file_diffuse_as_unwrapped_ones(folder):
    images = gas()
    expected = stabie_ase.observe(images, observables="msd")["msd"]["value"]
    for atoms in images:
        atoms.wrap()
    write("wrapped.traj", images)
    assert stabie_ase.observe("wrapped.traj", observables="msd")["msd"]["value"] == pytest.approx(expected)
    far = [Atoms("Ar2", [[0, 0, 0], [4.5, 0, 4.05 * k]], cell=9 * np.eye(3), pbc=True, info={"time_fs": 10 * k}) for k in range(20)]
    for atoms in far:
        atoms.wrap()
    write("far.traj", far)
    assert "about half a cell" in refused("far.traj", "--observable", "msd")


def test_units_of_momenta_are_ases():
    """One atom to and fro at 2 Å/ps each: C(0) = 4 Å²/ps²."""
    images = [Atoms("ArNe", np.eye(2, 3) * 5, info={"time_fs": k}) for k in range(30)]
    for k, atoms in enumerate(images):
        atoms.set_velocities([[0, (-1) ** k * 2.0 / (1000 * units.fs), 0]] * 2)
    found = stabie_ase.observe(images, observables="vacf,normalised=no,remove_drift=no,t_max=0.003")
    (entry,) = found.values()
    np.testing.assert_allclose(entry["value"], [4.0, -4.0, 4.0, -4.0], rtol=1e-9)
