"""What observables are matched to: other files than the reference, and other temperatures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from ase.build import bulk, molecule
from ase.db import connect
from ase.io import write

import stabie_ase
from stabie_ase.boltzmann import Estimator, PoorOverlap, Samples, targets_at, temperature_weights
from stabie_ase.observables import DistanceDistribution, Target, observables_from
from stabie_ase.runs.finetune import Finetuning
from stabie_ase.runs.inputs import Inputs
from stabie_ase.runs.run import Live
from stabie_ase.stability import criteria_from
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import Curve, TargetFrames, UnusableReference
from stabie_ase.structures.setting import Setting
from stabie_ase.training.loop import TrainingLoop
from stabie_ase.training.schedule import LEARNING

SHORT = {"max_cycles": 1, "seed": 3}
HR = "hr,r_max=4,bin_width=0.05"


def hr():
    return DistanceDistribution(4.0, 0.05)


def mean_of(frames):
    return hr()(AtomsBatch.from_atoms(frames)).mean(dim=0)


def write_curve(path, factor=1.0, header=""):
    """The mean h(r) of the tiny reference as a curve with errors, to 3 Å."""
    axis, value = hr().axis.values[:60], factor * mean_of(tiny.frames())[:60]
    rows = "".join(f"{r:.6f},{h:.6f},{0.02 + 0.1 * h:.6f}\n" for r, h in zip(axis.tolist(), value.tolist()))
    path.write_text(f"{header}r (Å),h (1/Å),error\n{rows}")


# -- at another temperature


def test_a_reference_of_another_temperature_is_reweighted_by_its_own_energies():
    reference = tiny.reference()
    (found,) = targets_at([hr().weighted(3.0)], reference, 700.0)
    weights, effective = temperature_weights(reference.energies, 600.0, 700.0)
    expected = Target.from_frames(hr(), reference.frames, weights=weights)
    torch.testing.assert_close(found.value, expected.value)
    assert found.floor == expected.floor and found.n_frames == pytest.approx(effective) and found.weight == 3.0
    assert found.source == f"the reference; reweighted from 600 to 700 K, {effective:.3g} of 40 frames count effectively"
    assert not torch.allclose(found.value, mean_of(reference.frames), atol=1e-3)


@pytest.mark.parametrize("temperature_K", [600.0, 620.0])
def test_at_the_same_temperature_frames_count_alike(temperature_K, caplog):
    reference = tiny.reference()
    (found,) = targets_at([hr()], reference, temperature_K)
    assert torch.equal(found.value, mean_of(reference.frames)) and found.source == "" and not caplog.messages


def test_data_of_its_own_are_reweighted_by_their_own_energies():
    """Beside an observable that is matched to the reference, which is of the right temperature."""
    reference, others = tiny.reference(), tiny.frames(30, seed=5)
    energies = np.array([atoms.calc.results["energy"] for atoms in others])
    own = TargetFrames(others, energies, 500.0, "others.xyz")
    found = targets_at([hr(), hr().matched_to(own)], reference, 600.0)
    assert torch.equal(found[0].value, mean_of(reference.frames))
    expected = Target.from_frames(hr(), others, weights=temperature_weights(energies, 500.0, 600.0)[0]).value
    torch.testing.assert_close(found[1].value, expected)
    assert found[1].source.startswith("others.xyz; reweighted from 500 to 600 K")


FRAMES = tiny.frames(40)
WIDE = np.random.default_rng(0).normal(scale=2.0, size=40)
IRREDUCIBLE = {
    "collapsed": (TargetFrames(FRAMES, WIDE, 300.0, "f.xyz"), "f.xyz is of 300 K, the dynamics are of 600 K: of 40 frames"),
    "no energies": (TargetFrames(FRAMES, None, 300.0, "f.xyz"), "its frames have no energies"),
    "sizes": (TargetFrames([*FRAMES, molecule("H2")], np.zeros(41), 300.0, "f.xyz"), "several sizes or compositions"),
    "a curve": (Curve([0.0, 4.0], [0.0, 1.0], None, None, 300.0, source="c.csv"), "c.csv is of 300 K, .*a curve cannot be reweighted"),
}


@pytest.mark.parametrize("case", IRREDUCIBLE)
def test_what_cannot_be_reweighted_is_refused_or_warned_of(case, caplog):
    data, words = IRREDUCIBLE[case]
    with pytest.raises(PoorOverlap, match=words) as refused:
        targets_at([hr().matched_to(data)], tiny.reference(), 600.0, strict=True)
    assert "--no-reweight" in str(refused.value) and "\n" not in str(refused.value) and not caplog.messages
    if case != "sizes":
        (found,) = targets_at([hr().matched_to(data)], tiny.reference(), 600.0)
        assert re.search(words, caplog.text) and "matched to it as it is" in caplog.text
        assert case == "a curve" or torch.equal(found.value, mean_of(FRAMES))


def test_without_reweighting_frames_are_taken_as_they_are(caplog):
    reference = tiny.reference()
    (found,) = targets_at([hr()], reference, 900.0, reweight=False)
    assert torch.equal(found.value, mean_of(reference.frames))
    assert "the reference is of 600 K, the dynamics are of 900 K: reweighting was not asked for" in caplog.text


# -- files


@pytest.fixture()
def files(tmp_path, monkeypatch):
    """Thirty other frames in several formats, and a curve."""
    monkeypatch.chdir(tmp_path)
    frames = tiny.frames(30, seed=5)
    write("other.xyz", frames)
    write("other.traj", frames)
    bare = [atoms.copy() for atoms in frames]
    write("bare.xyz", bare)
    with connect("other.db") as database:
        for k, atoms in enumerate(frames):
            database.write(atoms, split="train" if k < 20 else "test")
    np.savez("other.npz", R=[atoms.positions for atoms in frames], z=frames[0].numbers, e_unit="eV", r_unit="Ang")
    write_curve(tmp_path / "curve.csv")
    return frames


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("other.xyz", slice(None)),
        ("other.traj@5:", slice(5, None)),
        ("bare.xyz@::2", slice(None, None, 2)),
        ("other.db@split=train", slice(20)),
        ("other.npz@:7", slice(7)),
    ],
)
def test_an_observable_is_matched_to_other_frames(files, name, chosen):
    (found,) = observables_from(f"{HR},target={name},weight=2", Setting(tiny.frames(), 600.0))
    assert found.weight == 2.0 and found.describe().startswith("hr (weight 2, matched to ") and name in found.describe()
    (target,) = targets_at([found], tiny.reference(), 600.0)
    torch.testing.assert_close(target.value, mean_of(files[chosen]), rtol=1e-5, atol=1e-5)  # xyz has eight digits
    has_energies = found.data.energies is not None
    assert has_energies == (not name.startswith(("bare", "other.npz")))


def test_an_observable_is_matched_to_a_curve(files):
    (found,) = observables_from(f"{HR},target=curve.csv,above=1.0", Setting(tiny.frames(), 600.0))
    (target,) = targets_at([found], tiny.reference(), 600.0)
    assert target.source.startswith("curve.csv, 38 of 80 bins; the reference is 0.0")
    assert target.known.nonzero()[:, 0].tolist() == list(range(21, 59))  # between 1.025 and 2.975 Å
    smooth = torch.nn.functional.avg_pool1d(mean_of(tiny.frames())[None], 3, 1, 1)[0]  # of one bin and its neighbours
    inside = slice(25, 55)
    between = torch.stack([smooth, mean_of(tiny.frames())]).sort(dim=0).values
    assert ((target.value >= between[0] - 1e-6) & (target.value <= between[1] + 1e-6))[inside].all()


def test_an_observable_is_matched_to_a_number(files):
    """Its floor is the mean of |δ| of a Gaussian error δ; nothing is asked of the reference."""
    known, bare = observables_from(["gyration,value=0.9,error=0.1", "potential-energy,value=-2"], Setting(tiny.frames(), 600.0))
    assert known.describe() == "gyration (matched to 0.9 ± 0.1)" and bare.describe() == "potential-energy (matched to -2)"
    exact, vague = targets_at([bare, known], tiny.reference(), 600.0)
    assert exact.value.tolist() == [-2.0] and exact.floor is None and vague.floor == pytest.approx(0.1 * (2 / np.pi) ** 0.5)
    draws = 0.9 + 0.1 * torch.randn((20_000, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float((draws - vague.value).abs().mean()) == pytest.approx(vague.floor, rel=0.02)


BAD = {
    "hr,target=none.xyz": "none.xyz: no such file",
    "hr,target=none.csv": "none.csv: no such file",
    "hr,target=water.xyz": "2 frames of water.xyz: frame 0 is of H2O, but the reference holds C4; expected frames of the same system",
    "hr,target=curve.csv,column=g": "no column 'g'; known: h (1/Å), error",
    "hr,target=curve.csv,above=9": "nothing is left above 9 Å",
    "hr,target=curve.csv,above=far": "above='far', expected a number",
    "hr,target=other.xyz,column=g": "other.xyz: column is for curves, and these are frames; leave it out",
    "hr,target=other.xyz@90:": "selects no frames",
    "hr,column=g": "unknown option 'column'",
    "hr,tarhet=curve.csv": "did you mean 'target'",
    "hr,target=a.csv,target=b.csv": "gives target twice",
    "gyration,value=1.0,target=curve.csv": "gives both a target and a value",
    "gyration,value=heavy": "value='heavy', expected a number",
    "gyration,value=nan": "a value of nan, expected a finite number",
    "gyration,value=1.0,error=-1": "an error of -1; expected a standard error",
    "hr,value=1.0": "components, and one value is given; name a file by target=FILE",
}


@pytest.mark.parametrize("text", BAD)
def test_targets_that_cannot_be_used(files, text):
    write("water.xyz", [molecule("H2O")] * 2)
    with pytest.raises(ValueError, match=re.escape(BAD[text])) as refused:
        observables_from(text, Setting(tiny.frames(), 600.0))
    assert "\n" not in str(refused.value)


def test_larger_cells_of_the_same_liquid_are_the_same_system():
    argon, neon = (bulk(symbol, "fcc", a=5.3, cubic=True) for symbol in ("Ar", "Ne"))
    TargetFrames([argon.repeat(2)]).check_system([argon])
    benzene, boxed = molecule("C6H6"), molecule("C6H6", cell=[20] * 3, pbc=True)
    TargetFrames([boxed]).check_system([benzene])
    TargetFrames([benzene]).check_system([boxed])
    with pytest.raises(UnusableReference, match="expected frames of the same system"):
        TargetFrames([molecule("C2H2")]).check_system([benzene])
    with pytest.raises(UnusableReference, match="expected frames of the same system"):
        TargetFrames([argon, neon]).check_system([argon])


# -- the commands


def begun(here, *arguments, **options):
    """The target of a run of finetune that has been set up."""
    result = tiny.run("finetune", "model.pt", "--ref", "ref.xyz", "--output", "run", *tiny.flags(**SHORT, **options), *arguments)
    assert result.exit_code == 0, result.output
    return result, json.loads((here / "run" / "result.json").read_text())


def test_finetune_learns_and_judges_by_a_curve(here):
    write_curve(here / "curve.csv")
    result, found = begun(here, "--observable", f"{HR},target=curve.csv,bond-length")
    told = next(line for line in result.output.splitlines() if line.startswith("hr is matched to"))
    assert re.fullmatch(r"hr is matched to curve.csv, 58 of 80 bins; the reference is 0\.\d+ away from it; its noise floor is 0\.\d+", told)
    shown = found["observables"]["hr"]["reference"]
    assert shown[-1] is None and shown[30] > 0  # beyond the curve nothing is known, and nothing is drawn
    assert found["models"]["start"]["hr_error"] > 0 and found["models"]["start"]["hr_error_floor"] > 0
    config = json.loads((here / "run" / "config.json").read_text())
    assert f"target={here}/curve.csv" in config["config"]["observable"]
    assert str(here / "curve.csv") in config["digests"] and "matched to curve.csv" in config["observable"][0]


def test_a_run_for_observables_alone(here):
    """Every window teaches, and the verdict is of the observable; its report is written."""
    write_curve(here / "curve.csv")
    result, found = begun(here, "--observable", f"{HR},target=curve.csv", "--goal", "observables")
    records = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["phase"] for record in records} == {"matching"} and all("observable_loss" in record for record in records)
    assert "nearer to" in found["message"] and found["message"] in " ".join(result.output.split())
    assert 0 <= found["p_value"] <= 1 and (here / "run" / "report.html").exists()


def test_the_natural_gradient_counts_bins_by_the_errors_of_the_curve(here):
    """Its loss is that of the target as it is: fluctuations of the samples take no part in it."""
    write_curve(here / "curve.csv", factor=1.5)
    config, reference = tiny.config(), tiny.reference()
    setting = Setting(reference.frames, 600.0)
    observables, criteria = observables_from(f"{HR},target=curve.csv", setting), criteria_from(config.criterion, setting)
    training = TrainingLoop.from_reference(tiny.model(), reference, observables, criteria, config)
    while training.progress.phase != LEARNING:
        training.step()
    (pool,) = training.pools
    (target,) = pool.condition.targets
    samples = Samples.from_trajectory(pool.learn()[1], observables)
    expected = Estimator(pool.condition.point)(samples, [target]).loss
    info = training.rule.apply_([(pool.condition, samples)])
    assert info.figures["observable_loss"] == pytest.approx(expected, rel=1e-9) and expected > 0


@pytest.mark.parametrize("rule", ["penalized"])
def test_every_rule_takes_a_curve(here, rule):
    write_curve(here / "curve.csv")
    _, found = begun(here, "--observable", f"{HR},target=curve.csv", "--update", rule)
    assert "hr" in found["observables"]


def test_training_and_verdict_have_the_same_reweighted_targets(here):
    inputs = Inputs("model.pt", "ref.xyz")
    told = []
    monitor = stabie_ase.Monitor()
    monitor.message = told.append
    run = Finetuning.set_up(inputs, tiny.config(temperature_K=700.0), monitor, Live())
    (judged,), (trained,) = run.plans[0].yardstick.targets, run.training.pools[0].condition.targets
    assert torch.equal(judged.value, trained.value) and judged.floor == trained.floor
    assert any("hr is matched to the reference; reweighted from 600 to 700 K" in line for line in told)
    expected = Target.from_frames(
        judged.observable, run.reference.frames, weights=temperature_weights(run.reference.energies, 600.0, 700.0)[0]
    )
    torch.testing.assert_close(judged.value, expected.value)


def test_a_temperature_out_of_reach(here):
    """finetune would learn the wrong thing and refuses; what evaluate measures is worth having all the same, and is warned of."""
    hot = [*tiny.flags(**SHORT), "--temperature", "6000"]
    refused = tiny.run("finetune", "model.pt", "--ref", "ref.xyz", "--output", "run", *hot)
    assert refused.exit_code == 1 and "count effectively at 6000 K" in refused.stderr and "the nearest temperature" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1 + refused.stderr.count("warning") and not (here / "run").exists()
    short = ("--time", "0.01", "--replicas", "2", "--timestep", "1", "--temperature", "6000")
    found = tiny.run("evaluate", "model.pt", "--ref", "ref.xyz", *short)
    assert found.exit_code == 0 and "observables are matched to it as it is" in found.output
    taken = tiny.run("finetune", "model.pt", "--ref", "ref.xyz", "--output", "run", *hot, "--no-reweight")
    assert taken.exit_code == 0 and "reweighting was not asked for" in taken.output, taken.output


def test_bad_targets_leave_nothing(here):
    (here / "curve.csv").write_text("r (nm),g\n1,2\n2,3\n")
    refused = tiny.run("finetune", "model.pt", "--ref", "ref.xyz", "--output", "run", "--observable", "hr,target=curve.csv")
    assert refused.exit_code == 1 and "curve.csv: r is in nm, expected Å" in refused.stderr and not (here / "run").exists()
    refused = tiny.run("evaluate", "model.pt", "--ref", "ref.xyz", "--observable", "bond-length,target=curve.csv", "--output", "a.json")
    assert refused.exit_code == 1 and "r is in nm" in refused.stderr and not (here / "a.json").exists()
    write_curve(here / "curve.csv")
    refused = tiny.run("evaluate", "model.pt", "--ref", "ref.xyz", "--observable", "bond-length,target=curve.csv")
    assert refused.exit_code == 1 and "bond-length has no axis of distances" in refused.stderr


@pytest.mark.parametrize("name", ["curve.csv", "other.xyz@:20"])
def test_a_run_is_resumed_with_the_target_it_began_with(here, monkeypatch, name):
    """From another folder; not if the file has changed or is gone."""
    write_curve(here / "curve.csv")
    write("other.xyz", tiny.frames(30, seed=5))

    class Stop(Exception):
        pass

    def stop(record):
        raise Stop

    with pytest.raises(Stop):
        stabie_ase.finetune(
            "model.pt", "ref.xyz", observables=f"{HR},target={name}", output="run", on_window=stop, **tiny.FAST, **SHORT,
        )  # fmt: skip
    file = here / name.split("@")[0]
    original = file.read_text()
    file.write_text(original + original.splitlines()[-1] + "\n" if name == "curve.csv" else original.replace("C ", "C  ", 1))
    refused = tiny.run("finetune", "--resume", "run")
    assert refused.exit_code == 1 and f"the target of run has changed since the run began: {here / name}" in refused.stderr
    file.unlink()
    assert f"the target file of run is gone: {file}" in tiny.run("finetune", "--resume", "run").stderr
    file.write_text(original)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    resumed = tiny.run("finetune", "--resume", "../run")
    assert resumed.exit_code == 0, resumed.output


def test_objects_are_matched_to_data_in_memory(here):
    """As an observable of Python that is matched to frames or a curve."""
    frames = tiny.frames(30, seed=5)
    options = {"time_ps": 0.01, "replicas": 2, "timestep_fs": 1.0}
    found = stabie_ase.evaluate(tiny.model(), tiny.reference().frames, observables=[hr().matched_to(TargetFrames(frames))], **options)
    as_it_is = stabie_ase.evaluate(tiny.model(), tiny.reference().frames, observables=[hr()], **options)
    assert found["model"]["hr_error"] != as_it_is["model"]["hr_error"]
    write("other.xyz", frames)
    from_file = stabie_ase.evaluate(tiny.model(), tiny.reference().frames, observables=f"{HR},target=other.xyz", **options)
    assert from_file["model"]["hr_error"] == pytest.approx(found["model"]["hr_error"], rel=1e-4)


def test_a_curve_of_something_else_is_doubted(files, caplog):
    rows = "".join(f"{r:.3f},40.0,0.02\n" for r in hr().axis.values[:60].tolist())
    Path("far.csv").write_text(f"r (Å),h (1/Å),error\n{rows}")
    (found,) = observables_from(f"{HR},target=far.csv", Setting(tiny.frames(), 600.0))
    targets_at([found], tiny.reference(), 600.0)
    assert "times what its errors explain; are they of one quantity?" in caplog.text
