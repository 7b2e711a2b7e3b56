"""Frames by their names: ASE's selections, patterns, databases; and what of a file is kept, left out or refused."""

import json
import shutil

import numpy as np
import pytest
import tiny
from ase import Atoms
from ase.constraints import FixAtoms, FixBondLength, FixCartesian
from ase.db import connect
from ase.io import read, write

from stabie_ase.structures.reference import UnusableReference, absolute, digest, files_of, read_frames, read_reference, spread


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Ten frames told apart by their first coordinate, in several forms, in the working directory."""
    frames = tiny.frames(10)
    for k, atoms in enumerate(frames):
        atoms.positions[0, 0] += 10.0 * k
        atoms.calc = None
    monkeypatch.chdir(tmp_path)
    write("all.xyz", frames)
    write("all.traj", frames)
    (tmp_path / "frames").mkdir()
    for k, atoms in enumerate(frames):
        write(f"frames/{k}.xyz", atoms)
    with connect("all.db") as database:
        for k, atoms in enumerate(frames):
            database.write(atoms, part="train" if k < 7 else "test", number=k)
    return tmp_path


def numbers(names):
    """Which of the ten frames there are."""
    return [round(atoms.positions[0, 0] / 10.0) for atoms in read_frames(names)]


def refusal(names, *arguments):
    with pytest.raises(UnusableReference) as caught:
        read_reference(names, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- names


@pytest.mark.parametrize("file", ["all.xyz", "all.traj", "all.db"])
@pytest.mark.parametrize("index", [":", ":3", "2:9:3", "-3:", "::-4", "4", "-1", "8:100"])
def test_selections_are_those_of_python(files, file, index):
    expected = eval(f"list(range(10))[{index}]")
    assert numbers(f"{file}@{index}") == (expected if isinstance(expected, list) else [expected])


def test_queries_of_a_database(files):
    assert numbers("all.db@part=train") == list(range(7))
    assert numbers("all.db@part=test,number>7") == [8, 9]


def test_patterns_and_several_names(files):
    assert numbers("frames/*.xyz") == list(range(10))
    assert numbers("frames/[3-5].xyz") == [3, 4, 5]
    assert numbers("**/7.xyz") == [7]
    assert numbers(["all.xyz@8:", "all.db@:2", "frames/5.xyz"]) == [8, 9, 0, 1, 5]
    assert numbers([files / "all.xyz"]) == list(range(10))


@pytest.mark.parametrize("name", ["run@300K.xyz", "run@:3", "set[1].xyz", "what?.xyz"])
def test_an_existing_file_is_meant_by_its_whole_name(files, name):
    shutil.copy("frames/6.xyz", name)
    assert numbers(name) == [6]
    assert [path.name for path in files_of(name)] == [name]


@pytest.mark.parametrize(
    "name, words",
    [
        ("no.xyz@:3", ["no.xyz@:3: no such file"]),
        ("no/*.xyz", ["no/*.xyz: no such file"]),
        ("all.xyz@20:", ["all.xyz@20:", "selects no frames"]),
        ("all.xyz@20", ["selects no frames"]),
        ("all.db@part=nothing", ["all.db@part=nothing", "selects no frames"]),
        ("all.xyz@::0", ["steps of 0"]),
        ("all.xyz@part=train", ["'part=train' is no selection", "@:100"]),
        ("all.xyz@", ["'' is no selection"]),
        ("all.xyz@1:b", ["'1:b' is no selection"]),
        ("all.db@part==train", ["cannot be selected"]),
        (["all.xyz", "no.xyz"], ["no.xyz: no such file"]),
    ],
)
def test_names_that_name_nothing(files, name, words):
    with pytest.raises(UnusableReference) as caught:
        read_frames(name)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_digests_tell_files_and_selections_apart(files, monkeypatch):
    names = ["all.xyz", "all.xyz@:3", "all.xyz@:4", "frames/*.xyz", ["all.xyz", "all.traj"], ["all.traj", "all.xyz"]]
    digests = [digest(name) for name in names]
    assert len(set(digests)) == len(names)
    there = [absolute(name) for name in names]
    monkeypatch.chdir("/")
    assert [digest(name) for name in there] == digests
    write(files / "frames" / "10.xyz", Atoms("C"))
    assert digest(there[3]) != digests[3]


# -- labels in databases


def labelled_database(path, write_row, n=12):
    frames = tiny.frames(n)
    with connect(path) as database:
        for atoms in frames:
            write_row(database, Atoms(atoms.symbols, atoms.positions), **atoms.calc.results)
    return [atoms.calc.results for atoms in frames]


def same_labels(reference, results):
    np.testing.assert_allclose(reference.energies, [r["energy"] for r in results], atol=1e-9)
    np.testing.assert_allclose(reference.forces, [r["forces"] for r in results], atol=1e-9)


@pytest.mark.parametrize("energy", [float, lambda e: np.array([e]), lambda e: [e]])
@pytest.mark.parametrize("keys", [("energy", "forces"), ("REF_energy", "REF_forces")])
def test_labels_among_the_data_of_a_database(tmp_path, energy, keys):
    path = tmp_path / "data.db"
    results = labelled_database(
        path, lambda db, atoms, **r: db.write(atoms, data={keys[0]: energy(r["energy"]), keys[1]: r["forces"]})
    )
    same_labels(read_reference(path), results)


def test_labels_among_the_pairs_of_a_database_and_temperature(tmp_path):
    path = tmp_path / "pairs.json"
    results = labelled_database(
        path, lambda db, atoms, **r: db.write(atoms, dft_e=r["energy"], temperature=450.0, data={"dft_f": r["forces"]})
    )
    reference = read_reference(path, "dft_e", "dft_f")
    same_labels(reference, results)
    assert reference.temperature_K == 450.0
    text = refusal(path)
    assert "keys found: dft_e, dft_f, temperature" in text and "--energy-key" in text


def test_anything_may_be_among_the_data_of_a_database(tmp_path):
    path = tmp_path / "data.db"
    odd = {"ragged": [[1.0, 2.0], [3.0]], "text": "by hand", "nothing": None, "nested": {"a": 1}, "positions": np.zeros((4, 3))}
    results = labelled_database(path, lambda db, atoms, **r: db.write(atoms, data=r | odd))
    reference = read_reference(path)
    same_labels(reference, results)
    np.testing.assert_allclose(reference.frames[0].positions, tiny.frames(12)[0].positions)


def test_a_database_that_declares_other_units(tmp_path):
    path = tmp_path / "data.db"
    labelled_database(path, lambda db, atoms, **r: db.write(atoms, data=r))
    for units, words in [
        ({"energy": "kcal/mol", "forces": "kcal/mol/Ang"}, "'energy' in kcal/mol"),
        ({"energy": "eV", "forces": "Hartree/Bohr"}, "'forces' in Hartree/Bohr"),
    ]:
        with connect(path) as database:
            database.metadata = {"_property_unit_dict": units, "_distance_unit": "Ang"}
        assert words in refusal(path)
    with connect(path) as database:
        database.metadata = {"_property_unit_dict": {"energy": "eV", "forces": "eV/Ang"}, "_distance_unit": "Ang"}
    assert len(read_reference(path)) == 12


# -- files that are not as they should be


@pytest.mark.parametrize("symbol, hint", [("D", "2.014 in a column masses"), ("T", "3.016"), ("Q9", "symbol of an element")])
def test_unknown_elements_are_named_with_their_frame(tmp_path, symbol, hint):
    good, bad = "2\n\nH 0 0 0\nO 0 0 1\n", f"2\n\nO 0 0 0\n{symbol} 0 0 1\n"
    (tmp_path / "heavy.xyz").write_text(good + bad)
    with pytest.raises(UnusableReference, match=f"heavy.xyz: frame 1: unknown element '{symbol}'.*{hint}"):
        read_frames(tmp_path / "heavy.xyz")


def test_deuterium_as_a_mass_is_read(tmp_path):
    (tmp_path / "heavy.xyz").write_text("1\nProperties=species:S:1:pos:R:3:masses:R:1\nH 0 0 0 2.014\n")
    assert read_frames(tmp_path / "heavy.xyz")[0].get_masses() == [2.014]


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_cells_that_are_not_finite(tmp_path, value, caplog):
    atoms = Atoms("C4", tiny.TETRAHEDRON, cell=np.diag([8.0, 9.0, value]), pbc=[True, True, False])
    write(tmp_path / "cell.traj", [Atoms("C"), atoms])
    frames = read_frames(tmp_path / "cell.traj")
    assert np.array_equal(frames[1].cell.array, np.diag([8.0, 9.0, 0.0])) and frames[1].pbc.tolist() == [True, True, False]
    assert "1 frames have a cell that is not finite" in caplog.text
    atoms.pbc = True
    write(tmp_path / "cell.traj", [Atoms("C"), atoms])
    with pytest.raises(UnusableReference, match="frame 1: periodic .pbc. with a cell that is not finite.*F F F"):
        read_frames(tmp_path / "cell.traj")


def test_infinite_cell_changes_nothing_in_dynamics(here):
    frames = read("ref.xyz", ":3")
    write("plain.xyz", frames)
    text = (here / "plain.xyz").read_text().replace("Properties", 'Lattice="inf 0 0 0 inf 0 0 0 inf" Properties')
    (here / "cell.xyz").write_text(text)
    for name in ("plain", "cell"):
        result = tiny.run("md", "model.pt", "--start", f"{name}.xyz", "--time", "0.005", "--replicas", "2", "--output", name)
        assert result.exit_code == 0 and ("not finite" in result.output) == (name == "cell"), result.output
    assert (here / "plain" / "thermo.csv").read_text() == (here / "cell" / "thermo.csv").read_text()


@pytest.mark.parametrize("what, words", [("positions", "positions are not finite"), ("masses", "masses that are not finite")])
def test_numbers_that_are_not_finite(tmp_path, what, words):
    atoms = Atoms("C4", tiny.TETRAHEDRON, masses=[12.0] * 4)
    atoms.arrays[what][2] = np.nan
    write(tmp_path / "bad.xyz", [Atoms("C", masses=[12.0]), atoms], columns=["symbols", "positions", "masses"])
    with pytest.raises(UnusableReference, match=f"bad.xyz: frame 1: {words}"):
        read_frames(tmp_path / "bad.xyz")


# -- what references hold beside energies and forces


def changed(path, change, n=12):
    frames = tiny.frames(n)
    for k, atoms in enumerate(frames):
        change(k, atoms)
    write(path, frames)
    return path


@pytest.mark.parametrize("constraint", [FixAtoms([0]), FixBondLength(0, 1), FixCartesian(0, [True, False, False])])
def test_constraints_play_no_part(tmp_path, constraint):
    path = changed(tmp_path / "ref.traj", lambda k, atoms: atoms.set_constraint(constraint if k else None))
    reference = read_reference(path)
    assert not any(atoms.constraints for atoms in reference.frames)
    assert f"constraints of 11 frames ({type(constraint).__name__}) play no part" in reference.source
    np.testing.assert_allclose(reference.forces[1][0], tiny.frames(12)[1].calc.results["forces"][0])


def test_evaluation_moves_atoms_that_the_reference_holds(here):
    """And production dynamics from the same file hold them."""
    changed("fixed.traj", lambda k, atoms: atoms.set_constraint(FixAtoms([0, 1, 2])))
    arguments = ("evaluate", "model.pt", "--time", "0.2", "--replicas", "4", "--timestep", "1", "--criterion", "bonds:0.3")
    results = [tiny.run(*arguments, "--ref", name, "--output", f"{name}.json") for name in ("fixed.traj", "ref.xyz")]
    assert all(result.exit_code == 0 for result in results), results[0].output
    assert json.loads((here / "fixed.traj.json").read_text())["model.pt"]["n_failed"] > 0
    result = tiny.run("md", "model.pt", "--start", "fixed.traj@0", "--time", "0.01", "--replicas", "1", "--output", "held")
    assert result.exit_code == 0, result.output
    held = read("held/frames/replica-0000.traj", "-1")
    np.testing.assert_allclose(held.positions[:3], read("fixed.traj", "0").positions[:3])


@pytest.mark.parametrize(
    "name, value, said",
    [("charge", -1, "charges"), ("total_charge", 0, None), ("spin", 3, "spins"), ("multiplicity", 1, None), ("charge", "no", None)],
)
def test_what_the_model_cannot_use_is_said(tmp_path, name, value, said):
    source = read_reference(changed(tmp_path / "ref.xyz", lambda k, atoms: atoms.info.update({name: value}))).source
    assert (f"{said} of the frames are not used" in source) if said else "not used" not in source


def test_atomic_charges_are_said_not_to_be_used(tmp_path):
    def charged(k, atoms):
        results = atoms.calc.results
        atoms.set_initial_charges([0.1, -0.1, 0.0, 0.0])
        atoms.calc = tiny.SinglePointCalculator(atoms, **results)

    assert "charges of the frames are not used" in read_reference(changed(tmp_path / "ref.traj", charged)).source


def test_free_energies(tmp_path):
    """Energy and forces of a smeared calculation; and a file with the free energy alone."""

    def smeared(k, atoms):
        atoms.calc.results["free_energy"] = atoms.calc.results["energy"] - 0.01 * k

    reference = read_reference(changed(tmp_path / "both.traj", smeared))
    assert "'energy' is used, not 'free_energy', which differs by up to 0.11 eV" in reference.source
    free = read_reference(tmp_path / "both.traj", energy_key="free_energy")
    np.testing.assert_allclose(free.energies, reference.energies - 0.01 * np.arange(12))

    def only_free(k, atoms):
        smeared(k, atoms)
        del atoms.calc.results["energy"]

    alone = read_reference(changed(tmp_path / "free.traj", only_free))
    np.testing.assert_allclose(alone.energies, free.energies)
    assert "energies from 'free_energy'" in alone.source
    same = read_reference(changed(tmp_path / "same.traj", lambda k, a: a.calc.results.update(free_energy=a.calc.results["energy"])))
    assert "free_energy" not in same.source


@pytest.mark.parametrize("keys", [("temperature_K",), ("temperature",), ("temp",), ("T",), ("temperature_K", "T")])
def test_temperature_keys(tmp_path, keys):
    def told(k, atoms):
        del atoms.info["temperature_K"]
        atoms.info |= dict.fromkeys(keys, 450.0)

    assert read_reference(changed(tmp_path / "ref.xyz", told)).temperature_K == 450.0


def test_frames_may_tell_the_temperature_by_different_keys(tmp_path):
    def told(k, atoms):
        atoms.info["T" if k % 2 else "temperature"] = atoms.info.pop("temperature_K")

    assert read_reference(changed(tmp_path / "ref.xyz", told)).temperature_K == 600.0


def test_two_temperatures_of_a_frame_are_refused(tmp_path):
    path = changed(tmp_path / "ref.xyz", lambda k, atoms: atoms.info.update(T=300.0) if k == 4 else None)
    text = refusal(path)
    assert "ref.xyz: frame 4 tells two temperatures" in text and "temperature_K=600" in text and "T=300" in text


# -- molecules in a periodic box


def boxed(path, box=12.0, shift=(0.0, 0.0, 0.0), wrap=True, pbc=True):
    def change(k, atoms):
        results = atoms.calc.results
        atoms.set_cell(box * np.array([[1.0, 0.0, 0.0], [0.2, 1.0, 0.0], [0.0, 0.3, 1.0]]))
        atoms.pbc = pbc
        atoms.positions += shift
        if wrap:
            atoms.wrap()
        atoms.calc = tiny.SinglePointCalculator(atoms, **results)

    return changed(path, change)


@pytest.mark.parametrize("pbc", [True, [True, False, True]])
@pytest.mark.parametrize("shift", [(6.0, 6.0, 6.0), (0.0, 0.0, 0.0), (12.0, 1.0, -40.0)])
def test_a_molecule_in_a_box_is_isolated_and_whole(tmp_path, shift, pbc):
    reference = read_reference(boxed(tmp_path / "ref.traj", shift=shift, pbc=pbc)).isolated(6.0)
    assert not any(atoms.pbc.any() for atoms in reference.frames)
    for atoms, other in zip(reference.frames, tiny.frames(12)):
        np.testing.assert_allclose(atoms.get_all_distances(), other.get_all_distances(), atol=1e-9)
    assert "12 in a periodic box taken as isolated: no image is within 6 Å" in reference.source


@pytest.mark.parametrize("cutoff", [11.0, np.inf])
def test_images_within_the_cutoff_keep_a_system_periodic(tmp_path, cutoff):
    reference = read_reference(boxed(tmp_path / "ref.traj"))
    assert reference.isolated(cutoff) is reference


def test_fragments_too_far_apart_stay_periodic(tmp_path):
    """Nothing tells where in the box they belong."""

    def apart(k, atoms):
        results = atoms.calc.results
        atoms.positions[0] += 8.0
        atoms.set_cell([30.0] * 3)
        atoms.pbc = True
        atoms.calc = tiny.SinglePointCalculator(atoms, **results)

    reference = read_reference(changed(tmp_path / "ref.traj", apart))
    assert reference.isolated(5.0) is reference


def test_evaluation_of_a_molecule_in_a_box(here):
    boxed("box.traj")
    figures = []
    for name in ("box.traj", "ref.xyz@:12"):
        result = tiny.run("evaluate", "model.pt", "--ref", name, "--time", "0.01", "--replicas", "3", "--output", f"{name}.json")
        assert result.exit_code == 0, result.output
        assert ("taken as isolated" in result.output) == (name == "box.traj")
        figures.append(json.loads((here / f"{name}.json").read_text())["model.pt"])
    assert figures[0]["reference_force_mae_eV_per_A"] == pytest.approx(figures[1]["reference_force_mae_eV_per_A"], rel=1e-5)


# -- the commands


def refused(*arguments):
    result = tiny.run(*arguments)
    lines = result.output.splitlines()
    assert result.exit_code != 0 and len(lines) == 1 and "Traceback" not in result.output, result.output
    return lines[0]


EVALUATE = ("evaluate", "model.pt", "--time", "0.005", "--replicas", "2")


def test_every_command_takes_selections(here):
    write("more.traj", tiny.frames(5, seed=2))
    told = tiny.run(*EVALUATE, "--ref", "ref.xyz@:7", "--ref", "more.traj").output
    assert "12 frames of C4 from ref.xyz@:7, more.traj" in told
    assert tiny.run("bench", "model.pt", "--ref", "ref.xyz@3", "--replicas", "1", "--seconds", "0.01").exit_code == 0
    made = tiny.run("pretrain", "--model", "schnet", "--ref", "ref.xyz@:7", "--ref", "more.traj", "-o", "new.pt", "--epochs", "1")
    assert made.exit_code == 0 and "12 frames" in made.output, made.output
    assert "no.xyz@3: no such file" in refused("md", "model.pt", "--start", "no.xyz@3", "--temperature", "300")


@pytest.mark.parametrize(
    "arguments, option",
    [
        ((*EVALUATE, "--ref", "ref.xyz", "--temperature", "300", "--temperature", "500"), "--temperature is given 2 times"),
        (("finetune", "model.pt", "--ref", "ref.xyz", "--valid", "a.xyz", "--valid", "b.xyz"), "--valid is given 2 times"),
        (("finetune", "model.pt", "--ref", "ref.xyz", "--cross-fit", "--no-cross-fit"), "--cross-fit/--no-cross-fit is given 2"),
        (("md", "model.pt", "--start", "ref.xyz", "--start", "ref.xyz", "--start", "ref.xyz"), "--start is given 3 times"),
        (("pretrain", "--model", "mace", "--ref", "ref.xyz", "-o", "a", "--output", "b"), "-o/--output is given 2 times"),
        (("bench", "model.pt", "--ref", "ref.xyz", "--seconds=1", "--seconds=1"), "--seconds is given 2 times"),
        (("demo", "--seed", "1", "--seed", "2"), "--seed is given 2 times"),
    ],
)
def test_options_that_hold_one_value_are_not_repeated(here, arguments, option):
    assert option in refused(*arguments)
    assert sorted(path.name for path in here.iterdir()) == ["model.pt", "ref.xyz"]


def test_a_switch_may_be_repeated(here):
    assert tiny.run(*EVALUATE, "--ref", "ref.xyz", "--trust-checkpoint", "--trust-checkpoint").exit_code == 0


def test_runs_know_their_frames_again(here, monkeypatch):
    """From another folder; and not where one of several files, or the files that a pattern names, have changed."""
    from stabie_ase.runs.directory import UnusableRun
    from stabie_ase.runs.finetune import Finetuning, Inputs

    (here / "parts").mkdir()
    for k in range(3):
        write(f"parts/{k}.xyz", tiny.frames(8, seed=k))
    run = here / "run"
    Finetuning.begin(run, Inputs("model.pt", ["ref.xyz@:10", "parts/*.xyz"]), tiny.config())
    monkeypatch.chdir("/")
    inputs = Finetuning.opened(run)[1]
    assert inputs.reference == [str(here / "ref.xyz@:10"), str(here / "parts" / "*.xyz")]
    assert len(inputs.read_reference()) == 34
    Finetuning.resume(run)
    write(here / "parts" / "1.xyz", tiny.frames(8, seed=5))
    with pytest.raises(UnusableRun, match="reference file of .* has changed"):
        Finetuning.resume(run)
    (here / "ref.xyz").unlink()
    with pytest.raises(UnusableRun, match="reference file of .* is gone: .*ref.xyz"):
        Finetuning.resume(run)


def test_dynamics_go_on_from_a_selection(here, monkeypatch):
    run = ("md", "model.pt", "--start", "ref.xyz@2:4", "--time", "0.005", "--replicas", "2", "--output", "run")
    assert tiny.run(*run).exit_code == 0
    monkeypatch.chdir("/")
    assert tiny.run("md", "--resume", here / "run", "--time", "0.01").exit_code == 0
    write(here / "ref.xyz", tiny.frames(7))
    assert "the start file" in refused("md", "--resume", here / "run", "--time", "0.02")


def test_pretraining_does_not_go_on_with_other_frames(here, monkeypatch):
    monkeypatch.setattr("stabie_ase.runs.pretrain.SAVE_EVERY", -1.0)
    monkeypatch.setattr("stabie_ase.runs.pretrain.save_potential", lambda *arguments: 1 / 0)
    pretrain = ("pretrain", "--model", "schnet", "-o", "new.pt", "--epochs", "1", "--ref")
    tiny.run(*pretrain, "ref.xyz@:20")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert "another reference" in refused(*pretrain, "ref.xyz@:30")
    assert "Going on after epoch 1" in tiny.run(*pretrain, "ref.xyz@:20").output


@pytest.mark.parametrize("n, most, expected", [(5, 9, [0, 1, 2, 3, 4]), (11, 3, [0, 5, 10]), (1, 4, [0]), (7, 1, [0])])
def test_frames_are_evenly_spread(n, most, expected):
    assert spread(n, most) == expected
    many = spread(1000, 50)
    assert many[0] == 0 and many[-1] == 999 and len(set(many)) == 50
    assert max(b - a for a, b in zip(many, many[1:])) - min(b - a for a, b in zip(many, many[1:])) <= 1
