"""`stabie-ase md`: what it writes is what the engine did, restarts go on exactly, bad input is one line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixBondLength
from ase.io import read, write
from helpers import crystal, schnet

import stabie_ase.runs.inputs as inputs_module
import stabie_ase.runs.md as production_module
from stabie_ase.potentials.calculator import StABIECalculator
from stabie_ase.potentials.checkpoint import load_potential, save_potential
from stabie_ase.runs.report.view import count_frames, find_trajectory
from stabie_ase.structures.reference import common_temperature


def asked(time="0.1", replicas="3"):
    """The command that most tests begin with."""
    return ("md", "model.pt", "--start", "ref.xyz", "--replicas", replicas, "--time", time, "--sample-every", "10", "--seed", "4")


RUN = asked()


def run(*arguments):
    result = tiny.run("-q", *map(str, arguments))
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments):
    result = tiny.run(*map(str, arguments))
    assert result.exit_code not in (0, None)
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    return lines[0]


def thermo(path):
    return np.genfromtxt(path / "thermo.csv", delimiter=",", names=True)


def unstable(path):
    """Frames at failures."""
    return read(path / "unstable.traj", ":") if (path / "unstable.traj").exists() else []


def same(a, b):
    """Two runs end in the same bits, and tell the same on the way."""
    assert (a / "thermo.csv").read_text() == (b / "thermo.csv").read_text()
    states = [torch.load(path / "state.pt", weights_only=True)["state"] for path in (a, b)]
    assert states[0]["done"] == states[1]["done"] and torch.equal(states[0]["failed_step"], states[1]["failed_step"])
    for one, other in zip(unstable(a), unstable(b), strict=True):
        assert one == other and one.info == other.info and np.array_equal(one.get_momenta(), other.get_momenta())
    for name, x in states[0]["replicas"].items():
        assert torch.equal(x, states[1]["replicas"][name]), name
    for file in sorted((a / "frames").iterdir()):
        for one, other in zip(read(file, ":"), read(b / "frames" / file.name, ":"), strict=True):
            assert np.array_equal(one.positions, other.positions)


def test_frames_and_log_are_those_of_the_model(here):
    run(*RUN)
    log = thermo(here / "model-md")
    assert len(log) == 3 * 11
    for k in range(3):
        frames = read(here / "model-md" / "frames" / f"replica-{k:04d}.traj", ":")
        mine = log[log["replica"] == k]
        assert np.allclose([atoms.info["time_ps"] for atoms in frames], np.arange(11) * 0.01)
        assert np.allclose(mine["time_ps"], np.arange(11) * 0.01)
        for atoms, line in zip(frames[::5], mine[::5], strict=True):
            told, forces = atoms.get_potential_energy(), atoms.get_forces()
            assert line["potential_energy_eV"] == pytest.approx(told, rel=1e-7)
            assert line["kinetic_energy_eV"] == pytest.approx(atoms.get_kinetic_energy(), rel=1e-6)
            measured = pytest.approx(atoms.get_temperature() * 12 / 9, rel=1e-5)  # 3N - 3 momenta
            assert line["kinetic_temperature_K"] == measured and atoms.info["kinetic_temperature_K"] == measured
            assert line["temperature_K"] == atoms.info["temperature_K"] == tiny.TEMPERATURE
            atoms.calc = StABIECalculator("model.pt")
            assert atoms.get_potential_energy() == pytest.approx(told, abs=1e-5)
            np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-5)


BREAKING = ("--criterion", "bonds:0.4", "--temperature", "1000")


@pytest.mark.parametrize("breaking", [(), BREAKING], ids=["stable", "with failures"])
def test_an_interrupted_run_goes_on_exactly(here, monkeypatch, breaking):
    whole = run(*asked(replicas="6"), *breaking, "--output", "whole")
    n_before = sum(atoms.info["time_ps"] <= 0.04 for atoms in unstable(here / "whole"))
    assert not breaking or 0 < n_before < len(unstable(here / "whole")), "failures on both sides of the interruption"
    monkeypatch.setattr(production_module, "SAVE_EVERY", 0.0)
    real, calls = production_module.watched, []

    def watched(*arguments, **settings):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(production_module, "watched", watched)
    result = tiny.run(*asked(replicas="6"), *breaking, "--output", "broken")
    assert result.exit_code == 130 and "stabie-ase md --resume broken" in result.output
    assert len(unstable(here / "broken")) == n_before
    (here / "broken" / "thermo.csv").open("a").write("half a li")  # as a killed process leaves it
    if breaking:
        write(here / "broken" / "unstable.traj", unstable(here / "broken")[-1], append=True)
    resumed = run("md", "--resume", "broken")
    same(here / "whole", here / "broken")
    assert resumed.output == whole.output.replace("whole", "broken")  # rate, median and causes among it


def test_a_longer_time_continues_to_the_requested_total(here):
    run(*RUN, "--output", "whole")
    run(*asked("0.06"), "--output", "parts")
    run("md", "--resume", "parts", "--time", "0.1")
    same(here / "whole", here / "parts")
    run("md", "--resume", "parts")  # there is nothing left to do, and it asks for the first total
    same(here / "whole", here / "parts")


def test_a_criterion_stops_replicas(here):
    result = run(*asked("1"), "--criterion", "bonds:0.2", "--temperature", "3000", "--one-file")
    assert "stopped before" in result.output
    log = thermo(here / "model-md")
    last = [log["time_ps"][log["replica"] == k].max() for k in range(3)]
    assert min(last) < 1.0
    assert len(read(here / "model-md" / "frames.traj", ":")) == len(log)


def test_what_failed_is_told_and_kept_to_look_at(here):
    """Each failure's frame is the last of its replica, the bond to blame is tagged and as far off as is told."""
    result = run(*asked("0.05", "6"), *BREAKING)
    failed = unstable(here / "model-md")
    assert f"{len(failed)} of 6 replicas failed: " in result.output and "95 % interval" in result.output
    assert "Median stable time: " in result.output and f"What broke: C-C bond {len(failed)}\n" in result.output
    assert "stabie-ase view model-md" in result.output and count_frames(find_trajectory(here / "model-md")) == len(failed)
    length = np.mean([atoms.get_all_distances()[np.triu_indices(4, 1)] for atoms in read("ref.xyz", ":")], axis=0)
    for atoms in failed:
        last = read(here / "model-md" / "frames" / f"replica-{atoms.info['replica']:04d}.traj", -1)
        np.testing.assert_allclose(atoms.positions, last.positions)
        np.testing.assert_allclose(atoms.get_momenta(), last.get_momenta())
        assert atoms.info["time_ps"] == pytest.approx(last.info["time_ps"]) and atoms.info["criterion"] == "bonds"
        off = np.abs(atoms.get_all_distances()[np.triu_indices(4, 1)] - length)
        assert atoms.info["value"] == pytest.approx(off.max(), abs=1e-5) and atoms.info["value"] > 0.4
        assert np.flatnonzero(atoms.get_tags()).tolist() == [k[off.argmax()] for k in np.triu_indices(4, 1)]


def test_the_rate_counts_failures_per_stable_time(here):
    result = run(*asked("0.05", "6"), *BREAKING)
    failed, n = unstable(here / "model-md"), 6
    stable_ps = sum(atoms.info["time_ps"] for atoms in failed) + 0.05 * (n - len(failed))
    rate = float(re.search(r"failed: ([\d.]+) failures per replica-ps", result.output)[1])
    assert rate == pytest.approx(len(failed) / stable_ps, rel=5e-3)
    more = run("md", "--resume", "model-md", "--time", "0.1")
    assert unstable(here / "model-md")[: len(failed)] == failed and "replicas failed" in more.output


def test_runs_without_failures_say_so_where_they_were_asked_for(here):
    assert "0 of 3 replicas failed: 0 failures per replica-ps" in run(*RUN, "--criterion", "bonds:9").output
    assert not (here / "model-md" / "unstable.traj").exists()
    assert "failed" not in run(*RUN, "--output", "other").output


def test_a_replica_without_a_finite_energy_has_failed_at_the_start(here, monkeypatch):
    real = production_module.start
    dead = torch.tensor([True, False, True])
    monkeypatch.setattr(production_module, "start", lambda *arguments: real(*arguments).replace(alive=dead))
    result = run(*asked("0.01"))
    assert "1 of 3 replicas failed" in result.output and "What broke: not finite 1" in result.output
    (atoms,) = unstable(here / "model-md")
    assert atoms.info["time_ps"] == 0.0 and atoms.info["criterion"] == "not finite"
    assert run("md", "--resume", "model-md").output == result.output


def test_constant_pressure_tells_volume_and_pressure(here):
    save_potential(schnet(), here / "crystal.pt")
    write(here / "crystal.xyz", crystal(4))
    run("md", "crystal.pt", "--start", "crystal.xyz", "--ensemble", "npt-flexible", "--temperature", "100", "--replicas", "2",
        "--time", "0.01", "--sample-every", "5", "--pressure", "1", "--pressure-relaxation-time", "100")  # fmt: skip
    log = thermo(here / "crystal-md")
    assert len(np.unique(log["volume_A3"])) == 5 and np.isfinite(log["pressure_GPa"]).all()  # both began with one cell
    atoms = read(here / "crystal-md" / "frames" / "replica-0001.traj", -1)
    assert log["volume_A3"][-1] == pytest.approx(atoms.get_volume(), rel=1e-5)
    inner = -atoms.get_stress(include_ideal_gas=True)[:3].mean() / tiny.units.GPa
    assert log["pressure_GPa"][-1] == pytest.approx(inner, abs=1e-5)


def test_atoms_that_the_file_holds_stay(here):
    frames = read("ref.xyz", ":3")
    for atoms in frames:
        atoms.set_constraint(FixAtoms([1]))
    write("held.traj", frames)
    run("md", "model.pt", "--start", "held.traj", "--temperature", "600", "--replicas", "2", "--time", "0.02")
    path = read(here / "model-md" / "frames" / "replica-0000.traj", ":")
    moved = np.abs(path[-1].positions - path[0].positions).max(axis=1)
    assert moved[1] == 0.0 and (np.delete(moved, 1) > 0.0).all()


def test_frames_tell_the_temperature_that_was_asked_for(here):
    """So that they can be a reference; at constant energy there is no such temperature, and the measured one is no substitute."""
    for ensemble in ("nvt", "nvt-nose-hoover", "nvt-rescaling"):
        run(*RUN, "--ensemble", ensemble, "--temperature", "298.15", "--output", ensemble, "--one-file")
        frames = read(here / ensemble / "frames.traj", ":")
        assert common_temperature(frames) == 298.15
        assert len({atoms.info["kinetic_temperature_K"] for atoms in frames}) == len(frames)
    run(*RUN, "--ensemble", "nve", "--temperature", "298.15", "--output", "nve", "--one-file")
    frames = read(here / "nve" / "frames.traj", ":")
    assert common_temperature(frames) is None and all(atoms.info["kinetic_temperature_K"] > 0 for atoms in frames)
    log = thermo(here / "nve")
    assert np.isnan(log["temperature_K"]).all() and np.isfinite(log["kinetic_temperature_K"]).all()


def test_drift_is_no_heat(here):
    """Momenta of a file that drift at constant energy: kept, and not counted as temperature."""
    frames = with_momenta(read("ref.xyz", ":1"), 50.0)
    rest = at_rest(frames[0])
    frames[0].set_momenta(rest + 10.0 * frames[0].get_masses()[:, None])
    write("moving.traj", frames)
    (first,), _ = started("nve", "--replicas", "1")
    np.testing.assert_allclose(first.get_momenta(), frames[0].get_momenta(), rtol=1e-5)
    kinetic = 0.5 * (rest**2 / first.get_masses()[:, None]).sum()
    assert first.info["kinetic_temperature_K"] == pytest.approx(2.0 * kinetic / (9 * tiny.units.kB), rel=1e-3)
    again, said = started("nve", "--replicas", "9")
    at = float(re.search(r"with new ones at ([\d.]+) K", said)[1])
    assert at == pytest.approx(2.0 * kinetic / (9 * tiny.units.kB), rel=1e-4)
    assert all(abs(atoms.get_momenta().sum()) < 1e-4 for atoms in again[1:])


def centre_moved(*arguments):
    """How far the centre of mass went in 0.1 ps, in Å, and how far a single atom."""
    shutil.rmtree("model-md", ignore_errors=True)
    run(*RUN, *arguments)
    first, *_, last = read("model-md/frames/replica-0000.traj", ":")
    return np.linalg.norm(last.get_center_of_mass() - first.get_center_of_mass()), np.abs(last.positions - first.positions).max()


@pytest.mark.parametrize("ensemble", ["nve", "nvt", "nvt-nose-hoover", "nvt-rescaling"])
def test_the_centre_of_mass_rests(here, ensemble):
    centre, atom = centre_moved("--ensemble", ensemble)
    assert centre < 1e-4 < 0.1 < atom


def test_the_centre_of_mass_moves_where_it_may(here):
    assert centre_moved("--no-fix-com")[0] > 0.01
    assert "--fix-com" in refused("md", "--resume", "model-md", "--fix-com")
    for ensemble in ("nve", "nvt-nose-hoover", "nvt-rescaling"):
        assert f"{ensemble} dynamics do not move the centre of mass" in refused(*RUN, "--ensemble", ensemble, "--no-fix-com")


@pytest.mark.parametrize("ensemble, given", [
    ("nve", ("--friction", "0.1")),
    ("nvt", ("--pressure", "1")),
    ("nvt", ("--relaxation-time", "20")),
    ("nvt-nose-hoover", ("--friction", "0.1")),
    ("nvt-rescaling", ("--compressibility", "1")),
    ("npt", ("--relaxation-time", "20")),
    ("nve", ("--pressure-relaxation-time", "500")),
])  # fmt: skip
def test_what_an_ensemble_does_not_use_is_refused(here, ensemble, given):
    """It would be ignored; at its default it may be named, as a run's own config.json does."""
    assert f"which {ensemble} dynamics would ignore; leave it out" in refused(*RUN, "--ensemble", ensemble, *given)



def test_a_ramp_ends_where_it_should(here):
    run(*RUN, "--temperature", "10", "--end-temperature", "900", "--friction", "0.2")
    state = torch.load(here / "model-md" / "state.pt", weights_only=True)["state"]["replicas"]
    assert float(state["temperature"][0]) == pytest.approx(10.0 + 890.0 * 199 / 200)
    frames = read(here / "model-md" / "frames" / "replica-0000.traj", ":")
    expected = [10.0] + [10.0 + 890.0 * (20 * k - 1) / 200 for k in range(1, 11)]
    np.testing.assert_allclose([atoms.info["temperature_K"] for atoms in frames], expected, rtol=1e-5)
    assert common_temperature(frames) is None
    assert "--end-temperature" in refused("md", "--resume", "model-md", "--time", "1")


def test_bad_input_is_one_line_and_leaves_nothing(here):
    frames = read("ref.xyz", ":2")
    frames[0].set_constraint(FixBondLength(0, 1))
    write("bonds.traj", frames)
    frames[1].positions[2] = np.nan
    write("nan.traj", frames)
    before = sorted(p.name for p in here.iterdir())
    assert "FixBondLength" in refused("md", "model.pt", "--start", "bonds.traj", "--temperature", "300")
    assert "nan.traj: frame 1: positions are not finite" in refused("md", "model.pt", "--start", "nan.traj")
    assert "periodic in all three directions" in refused(*RUN, "--ensemble", "npt")
    assert "no thermostat" in refused(*RUN, "--ensemble", "nve", "--end-temperature", "3")
    assert "no such file" in refused("md", "model.pt", "--start", "nothing.xyz")
    assert "not a structure file" in refused("md", "model.pt", "--start", "model.pt")
    assert "give MODEL and --start" in refused("md", "model.pt")
    assert "sample_every_fs" in refused(*RUN, "--timestep", "20")
    assert "no such directory" in refused("md", "--resume", "nothing")
    assert sorted(p.name for p in here.iterdir()) == before


def test_what_a_run_was_begun_with_is_kept(here):
    run(*RUN)
    assert "--ensemble" in refused("md", "--resume", "model-md", "--ensemble", "nve")
    assert "--compile" in refused("md", "--resume", "model-md", "--compile", "on")
    assert "--dtype" in refused("md", "--resume", "model-md", "--dtype", "float64")
    assert "belongs to stabie-ase md" in refused("finetune", "--resume", "model-md")
    assert "not an empty directory" in refused(*RUN)
    with open("ref.xyz", "a") as file:
        file.write("\n")
    assert "start file" in refused("md", "--resume", "model-md")


def test_a_long_time_step_is_told(here):
    result = tiny.run(*RUN, "--timestep", "8")
    assert "a time step of 8 fs is long for atoms of 12 amu" in result.output


def test_a_directory_from_someone_else_is_not_trusted(here, monkeypatch):
    """Trust that its config.json claims is no trust: the flag has to be given with --resume again."""
    run(*RUN)
    path = here / "model-md" / "config.json"
    config = json.loads(path.read_text())
    config["inputs"]["trust_checkpoint"] = True
    path.write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr(inputs_module, "load_potential", lambda *a: asked.append(a[3]) or load_potential(*a))
    assert "was begun with --trust-checkpoint; give it again" in refused("md", "--resume", "model-md")
    run("md", "--resume", "model-md", "--trust-checkpoint")
    assert asked == [True]


# -- momenta in the starting file


def with_momenta(frames, temperature):
    """The same atoms with drifting momenta, and no temperature told."""
    images = []
    for k, atoms in enumerate(frames):
        atoms = Atoms(atoms.symbols, positions=atoms.positions)
        sigma = np.sqrt(atoms.get_masses() * tiny.units.kB * temperature)
        atoms.set_momenta(np.random.default_rng(k).normal(size=(len(atoms), 3)) * sigma[:, None])
        images.append(atoms)
    return images


def started(ensemble, *arguments):
    """First frames of a short run from moving.traj, and what was said."""
    shutil.rmtree("run", ignore_errors=True)
    result = tiny.run("md", "model.pt", "--start", "moving.traj", "--ensemble", ensemble, "--time", "0.002", "--output", "run", *arguments)
    assert result.exit_code == 0, result.output
    return [read(path, 0) for path in sorted(Path("run", "frames").iterdir())], result.output


def at_rest(atoms):
    momenta = atoms.get_momenta()
    return momenta - atoms.get_masses()[:, None] * momenta.sum(axis=0) / atoms.get_masses().sum()


@pytest.mark.parametrize("ensemble", ["nve", "nvt", "nvt-nose-hoover", "nvt-rescaling"])
def test_dynamics_start_with_the_momenta_of_the_file(here, ensemble):
    """Each frame's own, drift included at constant energy; a frame used again gets new ones."""
    frames = with_momenta(read("ref.xyz", ":2"), 50.0)
    write("moving.traj", frames)
    bath = () if ensemble == "nve" else ("--temperature", "50")
    first, said = started(ensemble, "--replicas", "3", *bath)
    assert "2 of 3 replicas start with those in the file, the others" in said and "not used" not in said
    expected = [atoms.get_momenta() if ensemble == "nve" else at_rest(atoms) for atoms in frames]
    which = [int(np.argmin([np.abs(one.positions - atoms.positions).max() for atoms in frames])) for one in first]
    assert sorted(which[:2]) == [0, 1]
    for atoms, k in zip(first[:2], which):
        np.testing.assert_allclose(atoms.get_momenta(), expected[k], atol=1e-5)
    assert np.abs(first[2].get_momenta() - expected[which[2]]).max() > 0.1
    again, said = started(ensemble, "--replicas", "2", "--new-momenta", "--temperature", "300")
    assert "momenta" not in said.lower().replace("--new-momenta", "")
    assert all(np.abs(atoms.get_momenta() - expected[k]).max() > 0.1 for atoms, k in zip(again, which))


def test_a_temperature_that_is_not_used_is_told(here):
    write("moving.traj", with_momenta(read("ref.xyz", ":2"), 50.0))
    _, said = started("nve", "--replicas", "2", "--temperature", "300")
    assert "--temperature 300 is not used for the momenta in the file" in said
    _, said = started("nvt", "--replicas", "2", "--temperature", "300")
    assert "2 of 2 replicas start with those in the file\n" in said and "not used" not in said
    assert "give --temperature" in refused("md", "model.pt", "--start", "moving.traj")  # a bath has to be told its temperature
    assert "give --temperature" in refused("md", "model.pt", "--start", "moving.traj", "--ensemble", "nve", "--new-momenta")


def test_frames_without_momenta_and_held_atoms(here):
    """Zeros count as none, as some formats write them; an atom that is held has none whatever the file says."""
    frames = with_momenta(read("ref.xyz", ":3"), 50.0)
    del frames[0].arrays["momenta"]
    frames[1].set_momenta(np.zeros((4, 3)))
    frames[2].set_constraint(FixAtoms([1]))
    write("moving.traj", frames)
    first, said = started("nve", "--replicas", "3")
    assert "1 of 3 replicas start with those in the file, the others" in said
    assert all(np.abs(atoms.get_momenta()).max() > 0.1 for atoms in first)
    (held,) = [atoms for atoms in first if not atoms.get_momenta()[1].any()]
    rest = [0, 2, 3]
    np.testing.assert_allclose(held.get_momenta()[rest], frames[2].arrays["momenta"][rest], atol=1e-5)
    frames[2].arrays["momenta"][0, 0] = np.nan
    write("moving.traj", frames)
    assert "momenta of the starting frames are not finite" in refused("md", "model.pt", "--start", "moving.traj", "--ensemble", "nve")


def test_constant_energy_goes_on_from_frames_of_md(here):
    """As if it had not stopped, and through a resume too."""
    run(*asked(replicas="1"), "--ensemble", "nve", "--output", "whole")
    frames = read(here / "whole" / "frames" / "replica-0000.traj", ":")
    write("middle.traj", frames[5])
    run("md", "model.pt", "--start", "middle.traj", "--ensemble", "nve", "--replicas", "1", "--time", "0.02", "--output", "on")
    run("md", "--resume", "on", "--time", "0.05")
    last = read(here / "on" / "frames" / "replica-0000.traj", -1)
    np.testing.assert_allclose(last.positions, frames[10].positions, atol=1e-4)
    np.testing.assert_allclose(last.get_momenta(), frames[10].get_momenta(), atol=1e-3)
