"""Frames from archives of MD17 and sGDML: units by what they tell, and nothing that could run code."""

import re

import numpy as np
import pytest
import tiny
from ase import units

from stabie_ase.structures.reference import UnusableReference, read_frames, read_reference

KCAL = units.kcal / units.mol


def arrays(n=12, energy=1.0, length=1.0):
    """The tiny reference in other units."""
    frames = tiny.frames(n)
    return {
        "R": np.array([atoms.positions for atoms in frames]) / length,
        "z": frames[0].numbers,
        "E": np.array([atoms.calc.results["energy"] for atoms in frames]) / energy,
        "F": np.array([atoms.calc.results["forces"] for atoms in frames]) / energy * length,
    }


@pytest.mark.parametrize(
    ("e_unit", "r_unit", "energy", "length"),
    [("eV", "Ang", 1.0, 1.0), ("kcal/mol", "Ang", KCAL, 1.0), ("Hartree", "bohr", units.Hartree, units.Bohr)],
)
@pytest.mark.parametrize("keys", [{}, {"R": "coords", "z": "nuclear_charges", "E": "energies", "F": "forces"}])
def test_archives_are_converted_by_the_units_they_tell(tmp_path, e_unit, r_unit, energy, length, keys):
    given = {keys.get(name, name): x for name, x in arrays(energy=energy, length=length).items()}
    np.savez(tmp_path / "md17.npz", **given, e_unit=e_unit, r_unit=r_unit, name="four carbons")
    found, expected = read_reference(tmp_path / "md17.npz"), arrays()
    np.testing.assert_allclose([atoms.positions for atoms in found.frames], expected["R"], atol=1e-10)
    np.testing.assert_allclose(found.energies, expected["E"], atol=1e-9)
    np.testing.assert_allclose(found.forces, expected["F"], atol=1e-9)
    assert "12 frames of C4 from md17.npz" in found.source
    assert (f"converted to eV and Å from {e_unit} and {r_unit}" in found.source) == (energy != 1.0)


def test_selections_and_shapes_of_energies(tmp_path):
    given = arrays()
    given["E"] = given["E"][:, None]
    np.savez(tmp_path / "a.npz", **given, e_unit="eV", r_unit="Ang")
    assert len(read_frames(f"{tmp_path}/a.npz@::3")) == 4 and len(read_frames(f"{tmp_path}/a.npz@-1")) == 1
    np.testing.assert_allclose(read_reference(f"{tmp_path}/a.npz@2:4").energies, arrays()["E"][2:4])
    np.savez(tmp_path / "b.npz", R=given["R"], z=given["z"], e_unit="eV", r_unit="Ang")
    assert read_frames(tmp_path / "b.npz")[3].calc is None
    with pytest.raises(UnusableReference, match="no energy"):
        read_reference(tmp_path / "b.npz")


TOLD = {"e_unit": "eV", "r_unit": "Ang"}
BAD = {
    "no units": ({}, {}, "tells no e_unit, and archives come in several (MD17 and rMD17 in kcal/mol and Ang); add it: np.savez("),
    "one unit": ({}, {"e_unit": "eV"}, "tells no r_unit"),
    "unknown unit": ({}, TOLD | {"e_unit": "K"}, "e_unit is 'K', expected one of ev, kcal/mol"),
    "no positions": ({"R": None}, TOLD, "no positions under R or coords; keys found: z, E, F, e_unit, r_unit"),
    "no numbers": ({"z": None}, TOLD, "no numbers under z or nuclear_charges"),
    "shapes": ({"E": np.zeros(3)}, TOLD, "energies (3,)"),
    "one frame": ({"R": np.zeros((4, 3))}, TOLD, "positions (4, 3)"),
    "objects": ({"z": np.array([6, None], dtype=object)}, TOLD, "no archive of plain arrays (ValueError: Object arrays cannot be loaded"),
    "text": ({"z": np.array(["C"] * 4)}, TOLD, "numbers of the shapes"),
    "a cell": ({}, TOLD | {"lattice": np.eye(3)}, "periodic archives (lattice) are not read"),
}


@pytest.mark.parametrize("case", BAD)
def test_archives_that_cannot_be_used(tmp_path, case):
    changes, told, words = BAD[case]
    given = {name: x for name, x in (arrays() | changes).items() if x is not None}
    np.savez(tmp_path / "a.npz", **given, **told)
    with pytest.raises(UnusableReference, match=re.escape(words)) as refused:
        read_reference(tmp_path / "a.npz")
    assert "a.npz" in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_are_no_archives(tmp_path):
    (tmp_path / "a.npz").write_text("no archive")
    with pytest.raises(UnusableReference, match=r"a.npz: no archive of plain arrays"):
        read_frames(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UnusableReference, match=r"b.npz: no archive of plain arrays"):
        read_frames(tmp_path / "b.npz")


def test_the_missing_units_are_added_as_the_message_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("md17.npz", **arrays(energy=KCAL))
    with pytest.raises(UnusableReference) as refused:
        read_reference("md17.npz")
    command = re.search(r"np\.savez.*\)$", str(refused.value))[0]
    exec(command, {"np": np, "FILE": "told.npz"})
    np.testing.assert_allclose(read_reference("told.npz").energies, arrays()["E"], atol=1e-9)


def test_every_command_takes_an_archive(here):
    np.savez("ref.npz", **arrays(40, KCAL), e_unit="kcal/mol", r_unit="Ang")
    result = tiny.run(
        "evaluate", "model.pt", "--ref", "ref.npz", "--temperature", "600", "--time", "0.01", "--replicas", "2", "--timestep", "1"
    )
    assert result.exit_code == 0 and "converted to eV and Å from kcal/mol and Ang" in result.output, result.output
