"""Structures from files named as ASE names them: FILE, FILE@0:200:2, DATABASE@split=train, FOLDER/*.xyz, or several."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.db import connect
from ase.io import iread
from ase.io.formats import filetype, string2index

from stabie_ase.structures.reference.npz import npz_frames
from stabie_ase.structures.reference.unusable import UnusableReference
from stabie_ase.system import files

logger = logging.getLogger(__name__)

FileNames = str | os.PathLike | Sequence[str | os.PathLike]
"""One name of frames or several."""

DATABASES = ("db", "json")
"""ASE's formats whose files are databases."""


def each(names: FileNames) -> list[str]:
    """One name or several as a list."""
    return [os.fspath(name) for name in ([names] if isinstance(names, (str, os.PathLike)) else names)]


def split_name(name: str) -> tuple[str, str | None]:
    """A file or pattern and what is selected from it; an existing file is meant by its whole name, whatever is in that."""
    if os.path.exists(name) or "@" not in os.path.basename(name):
        return name, None
    path, selection = name.rsplit("@", 1)
    return path, selection


def files_of(names: FileNames) -> list[Path]:
    """The files behind names of frames, in order; a name without any stands for itself."""
    found = []
    for name in each(names):
        path, _ = split_name(name)
        is_pattern = has_magic(path) and not os.path.exists(path)
        found += (sorted(filter(os.path.isfile, glob(path, recursive=True))) if is_pattern else None) or [path]
    return [Path(path) for path in found]


def absolute(names: FileNames) -> str | list[str]:
    """The same names from any folder."""
    found = [str(Path(name).absolute()) for name in each(names)]
    return found[0] if isinstance(names, (str, os.PathLike)) else found


def digest(names: FileNames) -> str:
    """SHA-256 of the files and of what is selected from them, to tell later whether frames are still the same."""
    parts = [(files.digest(path), split_name(name)[1] or "") for name in each(names) for path in files_of(name)]
    if len(parts) == 1 and not parts[0][1]:
        return parts[0][0]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_frames(names: FileNames) -> list[Atoms]:
    """Structures in any format ASE knows, or from an archive of MD17 or sGDML (.npz).

    Parameters
    ----------
    names : str or path, or several
        FILE, or FILE@SELECTION with an index or a slice as in Python or, of a database, a query; FILE may be a pattern.

    Returns
    -------
    list of Atoms
        In the order of the names, of a pattern in that of the alphabet. What a row of a database holds beside the
        structure, its pairs and its data, is in `info` and `arrays`.

    Raises
    ------
    UnusableReference
        No such file, nothing selected, no structures, or positions, masses or cells that are not finite.
    """
    return [atoms for _, atoms in named_frames(names)]


def named_frames(names: FileNames) -> list[tuple[str, Atoms]]:
    """Structures as `read_frames` returns them, each with the name to call it by in messages."""
    found = [(f"{source}: frame {k}", atoms) for source, frames in frames_by_file(names) for k, atoms in enumerate(frames)]
    n_dropped = sum(_checked_cell(where, atoms) for where, atoms in found)
    if n_dropped:
        logger.warning(
            "%s: %d frames have a cell that is not finite; they are not periodic there, and it is left out",
            ", ".join(each(names)),
            n_dropped,
        )
    return found


def frames_by_file(names: FileNames) -> list[tuple[str, list[Atoms]]]:
    """Each file with the structures in it, whose numbers may be anything; UnusableReference as of `read_frames` for the rest."""
    found = []
    for name in each(names):
        selection = split_name(name)[1]
        for path in files_of(name):
            source = str(path) if selection is None else f"{path}@{selection}"
            found.append((source, _read(path, selection, source)))
    return found


def spread(n: int, most: int) -> list[int]:
    """Indices of at most so many of n frames in a row, evenly spread, the first and the last among them."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()


def _read(path: Path, selection: str | None, source: str) -> list[Atoms]:
    if not path.exists():
        raise UnusableReference(f"{source}: no such file")
    if path.is_dir():
        raise UnusableReference(f"{source}: is a directory, expected a structure file; for all in it: {path / '*.xyz'}")
    if path.stat().st_size == 0:
        raise UnusableReference(f"{source}: the file is empty")
    frames = []
    try:
        is_archive = path.suffix.lower() == ".npz"
        is_database = not is_archive and filetype(str(path)) in DATABASES
        index: Any = _index(selection, is_database, source)
        if is_archive:
            rows = npz_frames(path, str(path))[index]
        else:
            rows = _rows(path, index) if is_database else iread(str(path), index, do_not_split_by_at_sign=True)
        frames.extend(rows)  # one after the other: after an error their number tells the frame
    except UnusableReference:
        raise
    except Exception as error:  # every ASE reader fails in its own way
        raise UnusableReference(f"{source}: {_why(error, len(frames), selection)}") from error
    if not frames and selection is not None:
        raise UnusableReference(f"{source}: selects no frames; expected some of those in the file, such as @:100")
    if not frames or not all(isinstance(atoms, Atoms) and len(atoms) for atoms in frames):
        raise UnusableReference(f"{source}: holds no frames with atoms")
    return frames


def _index(selection: str | None, is_database: bool, source: str) -> slice | str:
    """What ASE is asked for: a slice, or a query of a database."""
    try:
        index = string2index(":" if selection is None else selection)
    except ValueError:
        index = selection
    if isinstance(index, int):
        return slice(index, index + 1 or None)
    if isinstance(index, str) and not is_database:
        raise UnusableReference(f"{source}: {selection!r} is no selection; expected an index or a slice, as @-1 or @:100")
    if isinstance(index, slice) and index.step == 0:
        raise UnusableReference(f"{source}: a slice cannot go in steps of 0")
    return index


def _rows(path: Path, index: slice | str) -> Iterator[Atoms]:
    """The structures of a database with all that their rows tell of them."""
    with connect(str(path), serial=True) as database:
        if isinstance(index, str):
            yield from map(_from_row, database.select(index))
            return
        chosen = range(database.count())[index]
        if chosen:
            first = min(chosen[0], chosen[-1])
            rows = list(database.select(offset=first, limit=max(chosen[0], chosen[-1]) + 1 - first))
            yield from (_from_row(rows[k - first]) for k in chosen)


def _from_row(row) -> Atoms:
    atoms = row.toatoms()
    for name, value in {**row.key_value_pairs, **row.data}.items():
        if name not in atoms.arrays and _is_by_atom(value, len(atoms)):
            atoms.arrays[name] = np.asarray(value)
        else:
            atoms.info[name] = value
    return atoms


def _is_by_atom(value, n_atoms: int) -> bool:
    """Whether there is a row of numbers for each atom; anything may be in a database."""
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return False
    return array.ndim >= 2 and len(array) == n_atoms


def _why(error: Exception, k: int, selection: str | None) -> str:
    """Why frame k could not be read, in one line."""
    name = error.args[0] if isinstance(error, KeyError) and error.args else None
    if isinstance(name, str) and name.isalnum() and len(name) <= 4 and name not in atomic_numbers:
        heavy = {"D": 2.014, "T": 3.016}.get(name)
        instead = f"write it as H, with {heavy} in a column masses (masses:R:1)" if heavy else "expected the symbol of an element"
        return f"frame {k}: unknown element {name!r}; {instead}"
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    where = f"frame {k}: " if k else ""
    chosen = f", or {selection!r} cannot be selected from it" if selection is not None else ""
    return f"{where}not a structure file that ASE can read{chosen} ({reason})"


def _checked_cell(where: str, atoms: Atoms) -> bool:
    """Leave out lattice vectors that are not finite and not periodic; whether there were any.

    Raises
    ------
    UnusableReference
        Positions, masses or periodic lattice vectors that are not finite.
    """
    masses = atoms.get_masses()
    if not np.isfinite(atoms.positions).all():
        raise UnusableReference(f"{where}: positions are not finite; remove the frame")
    if not (np.isfinite(masses).all() and (masses > 0).all()):
        raise UnusableReference(f"{where}: masses that are not finite and positive; correct or remove the column")
    bad = ~np.isfinite(atoms.cell.array).all(axis=1)
    if (bad & atoms.pbc).any():
        raise UnusableReference(
            f"{where}: periodic (pbc) with a cell that is not finite; give the cell, or set pbc to F F F for an isolated system"
        )
    if bad.any():
        atoms.cell[bad] = 0.0
    return bool(bad.any())
