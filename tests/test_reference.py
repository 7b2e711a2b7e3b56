"""Reading reference frames: every place where labels may be, and one line about everything that cannot be used."""

import numpy as np
import pytest
import tiny
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from stabie_ase.structures.reference import MAX_FORCE, UnusableReference, read_reference


def unlabelled(n=3, seed=1):
    """Frames with their labels taken off, and the labels."""
    frames = tiny.frames(n, seed)
    labels = [(atoms.calc.results["energy"], atoms.calc.results["forces"]) for atoms in frames]
    for atoms in frames:
        atoms.calc = None
    return frames, labels


def keyed(tmp_path, energy_key, forces_key, n=3):
    """A file with the labels under other names."""
    frames, labels = unlabelled(n)
    for atoms, (energy, forces) in zip(frames, labels):
        atoms.info[energy_key] = energy
        atoms.arrays[forces_key] = forces
    write(tmp_path / "keyed.xyz", frames)
    return tmp_path / "keyed.xyz", labels


def same_labels(reference, labels):
    np.testing.assert_allclose(reference.energies, [energy for energy, _ in labels], atol=1e-6)
    np.testing.assert_allclose(reference.forces, [forces for _, forces in labels], atol=1e-6)


# -- where the labels are


@pytest.mark.parametrize("name", ["ref.xyz", "ref.extxyz", "ref.traj", "ref.db", "ref.json", "ref.xyz.gz"])
def test_labels_that_ase_moves_into_a_calculator(tmp_path, name):
    frames = tiny.frames(3)
    write(tmp_path / name, frames)
    reference = read_reference(tmp_path / name)
    same_labels(reference, [(a.calc.results["energy"], a.calc.results["forces"]) for a in frames])
    assert f"3 frames of C4 from {name} (energies from 'energy', forces from 'forces'" in reference.source


@pytest.mark.parametrize("keys", [("REF_energy", "REF_forces"), ("dft_energy", "dft_forces"), ("energy", "force")])
def test_usual_names_are_found(tmp_path, keys):
    path, labels = keyed(tmp_path, *keys)
    reference = read_reference(path)
    same_labels(reference, labels)
    assert f"energies from '{keys[0]}', forces from '{keys[1]}'" in reference.source


def test_custom_names_are_given(tmp_path):
    path, labels = keyed(tmp_path, "E_ccsd", "F_ccsd")
    same_labels(read_reference(path, "E_ccsd", "F_ccsd"), labels)


def test_energy_and_forces_come_from_one_calculation(tmp_path):
    """An `energy` of another method beside REF_energy and REF_forces must not be mixed with those forces."""
    frames, labels = unlabelled()
    for atoms, (energy, forces) in zip(frames, labels):
        atoms.info |= {"energy": energy + 100.0, "REF_energy": energy}
        atoms.arrays["REF_forces"] = forces
    write(tmp_path / "two.xyz", frames)
    same_labels(read_reference(tmp_path / "two.xyz"), labels)


def test_a_name_that_all_frames_have_is_preferred(tmp_path):
    frames, labels = unlabelled()
    for k, (atoms, (energy, forces)) in enumerate(zip(frames, labels)):
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = energy, forces
        if k == 0:
            atoms.calc = SinglePointCalculator(atoms, energy=energy + 100.0, forces=forces)
    write(tmp_path / "partly.xyz", frames)
    same_labels(read_reference(tmp_path / "partly.xyz"), labels)


def test_constraints_do_not_change_the_forces(tmp_path):
    from ase.constraints import FixAtoms

    frames = tiny.frames(3)
    labels = [(a.calc.results["energy"], a.calc.results["forces"].copy()) for a in frames]
    for atoms in frames:
        atoms.set_constraint(FixAtoms([0]))
    write(tmp_path / "fixed.traj", frames)
    same_labels(read_reference(tmp_path / "fixed.traj"), labels)


# -- temperature and what is said


@pytest.mark.parametrize("key", ["temperature_K", "temperature"])
def test_temperature_from_the_frames(tmp_path, key):
    frames = tiny.frames(3)
    for atoms in frames:
        del atoms.info["temperature_K"]
        atoms.info[key] = 450.0
    write(tmp_path / "ref.xyz", frames)
    reference = read_reference(tmp_path / "ref.xyz")
    assert reference.temperature_K == 450.0
    assert "450 K" in reference.source


@pytest.mark.parametrize("values", [(300.0, 300.0, None), (300.0, 300.0, 500.0), (300.0, 300.0, "hot"), (None,) * 3])
def test_no_temperature_unless_all_frames_agree(tmp_path, values):
    frames = tiny.frames(3)
    for atoms, value in zip(frames, values):
        del atoms.info["temperature_K"]
        if value is not None:
            atoms.info["temperature_K"] = value
    write(tmp_path / "ref.xyz", frames)
    reference = read_reference(tmp_path / "ref.xyz")
    assert reference.temperature_K is None
    assert "no single temperature" in reference.source


def test_many_compositions_are_counted(tmp_path):
    frames = tiny.label([Atoms("C" * n, np.arange(3 * n).reshape(n, 3) * 1.2) for n in range(2, 10)])
    write(tmp_path / "ref.xyz", frames)
    assert "8 frames of C2, C3, C4, C5, C6 and 3 other compositions" in read_reference(tmp_path / "ref.xyz").source


def test_split_is_a_partition_and_always_the_same():
    reference = tiny.reference()
    for fraction, n in [(None, 8), (0.0, 1), (0.1, 4), (0.9, 36), (1.0, 39)]:
        first, second = reference.split(fraction)
        assert (len(first), len(second)) == (len(reference) - n, n)
        assert sorted([*first.energies, *second.energies]) == sorted(reference.energies)
        assert reference.split(fraction)[1].energies.tolist() == second.energies.tolist()


@pytest.mark.parametrize("size, n", [(10, 2), (50, 10), (200, 40), (300, 40), (1000, 100)])
def test_few_frames_hold_out_more(size, n):
    reference = tiny.reference().subset([0] * size)
    assert len(reference.split()[1]) == n
    assert reference.split(most=5)[1].energies.tolist() == reference.split()[1].energies.tolist()[: min(n, 5)]


# -- what cannot be used


def refusal(path, *arguments, **settings):
    with pytest.raises(UnusableReference) as caught:
        read_reference(path, *arguments, **settings)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def damaged(tmp_path, change, n=3):
    """A file whose frame 1 was changed."""
    frames = tiny.frames(n)
    change(frames[1])
    write(tmp_path / "ref.xyz", frames)
    return tmp_path / "ref.xyz"


def test_no_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "nothing.xyz")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "empty.xyz").touch()
    assert "the file is empty" in refusal(tmp_path / "empty.xyz")


@pytest.mark.parametrize(
    "name, content",
    [
        ("text.txt", b"dear diary\n"),
        ("text.xyz", b"dear diary\n"),
        ("bytes.xyz", bytes(range(128, 256)) * 8),
        ("cut.xyz", b"4\nProperties=species:S:1:pos:R:3\nC 0 0 0\nC 1"),
        ("blank.xyz", b"\n"),
        ("bytes.traj", bytes(range(256)) * 8),
        ("bytes.db", bytes(range(256)) * 8),
        ("script.py", b"raise SystemExit('was run')\n"),
    ],
)
def test_not_a_structure_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    text = refusal(tmp_path / name)
    assert "not a structure file" in text or "no frames" in text


def test_no_labels_names_what_was_found(tmp_path):
    path, _ = keyed(tmp_path, "E_ccsd", "F_ccsd")
    text = refusal(path)
    assert "no energy" in text and "E_ccsd" in text and "F_ccsd" in text and "--energy-key" in text
    text = refusal(path, "E_ccsd")
    assert "no forces" in text and "F_ccsd" in text and "--forces-key" in text
    text = refusal(path, "E_mp2", "F_ccsd")
    assert "no energy under 'E_mp2'" in text and "E_ccsd" in text


def test_no_labels_at_all(tmp_path):
    frames, _ = unlabelled()
    for atoms in frames:
        atoms.info.clear()
    write(tmp_path / "bare.xyz", frames)
    assert "keys found: none" in refusal(tmp_path / "bare.xyz")


@pytest.mark.parametrize("what", ["energy", "forces"])
def test_some_frames_without(tmp_path, what):
    frames = tiny.frames(3)
    del frames[1].calc.results[what]
    path = tmp_path / "ref.traj"
    write(path, frames)
    assert f"1 of 3 frames have no '{what}'" in refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path, value):
    def energy(atoms):
        atoms.calc.results["energy"] = value

    def force(atoms):
        atoms.calc.results["forces"][2, 1] = value

    def position(atoms):
        results = dict(atoms.calc.results)
        atoms.positions[2, 1] = value
        atoms.calc = SinglePointCalculator(atoms, **results)

    for change in (energy, force, position):
        text = refusal(damaged(tmp_path, change))
        assert "frame 1" in text and "not finite" in text


def test_huge_forces(tmp_path):
    def change(atoms):
        atoms.calc.results["forces"][2, 1] = -1.01 * MAX_FORCE

    text = refusal(damaged(tmp_path, change))
    assert "frame 1" in text and "303 eV/Å" in text and "units" in text


@pytest.mark.parametrize("periodic", [False, True])
def test_atoms_on_top_of_each_other(tmp_path, periodic):
    def change(atoms):
        results = dict(atoms.calc.results)
        atoms.positions[3] = atoms.positions[0] + [0.0, 0.0, 0.1]
        if periodic:  # and across the cell's border
            atoms.set_cell([12.0, 12.0, 12.0])
            atoms.pbc = True
            atoms.positions[3, 0] += 12.0
        atoms.calc = SinglePointCalculator(atoms, **results)

    text = refusal(damaged(tmp_path, change))
    assert "frame 1" in text and "0.100 Å apart" in text


def test_wrong_shape(tmp_path):
    frames = tiny.frames(3)
    for atoms in frames:
        atoms.arrays["F"] = np.zeros((4, 2))
    write(tmp_path / "ref.xyz", frames)
    text = refusal(tmp_path / "ref.xyz", "energy", "F")
    assert "frame 0" in text and "shape (4, 2), expected (4, 3)" in text


def test_not_numbers(tmp_path):
    frames = tiny.frames(3)
    for atoms in frames:
        atoms.info["E"] = "minus five"
    write(tmp_path / "ref.xyz", frames)
    assert "not numbers" in refusal(tmp_path / "ref.xyz", "E", "forces")


def test_flat_cell(tmp_path):
    def change(atoms):
        results = dict(atoms.calc.results)
        atoms.set_cell([[5, 0, 0], [0, 5, 0], [5, 5, 0]])
        atoms.pbc = True
        atoms.calc = SinglePointCalculator(atoms, **results)

    text = refusal(damaged(tmp_path, change))
    assert "frame 1" in text and "volume" in text


def test_too_few_frames(tmp_path):
    write(tmp_path / "ref.xyz", tiny.frames(5))
    assert "5 frames, at least 6 are needed" in refusal(tmp_path / "ref.xyz", min_frames=6)
    assert len(read_reference(tmp_path / "ref.xyz", min_frames=5)) == 5
