"""Curves from files: columns r, value and error of csv, json or text."""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import units

from stabie_ase.structures.reference.curves import Curve
from stabie_ase.structures.reference.unusable import UnusableReference
from stabie_ase.system.spec import did_you_mean

SUFFIXES = (".csv", ".tsv", ".txt", ".dat")
"""Of files that hold curves; a .json file does if it has a list of distances."""

DISTANCES = ("r", "d", "distance", "radius")
"""What the column of distances may be called, in small letters and without its unit."""

ANGSTROM = ("å", "a", "ang", "angstrom", "angstroms", "ångström", "ångstrom")

OTHER_LENGTHS = {"nm": 10.0, "pm": 0.01, "bohr": units.Bohr, "a0": units.Bohr, "au": units.Bohr}
"""Å of each: distances in them are refused, since a density over them would have to be converted as well."""

ERRORS = ("error", "err", "sigma", "std", "stderr", "uncertainty")
"""How names of columns of errors begin or end."""

PRESSURES = {"GPa": 1.0, "MPa": 1e-3, "kPa": 1e-6, "Pa": 1e-9, "bar": 1e-4, "atm": 1.01325e-4}
"""In GPa."""

TOLD = re.compile(r"^(temperature_k|temperature|temp|t|pressure_gpa|pressure|p|source|reference)\s*[:=]\s*(\S.*)$", re.IGNORECASE)
"""A comment that tells one of these."""

NUMBER = re.compile(r"^([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*)$")


class Table(NamedTuple):
    """What a file holds: numbers by column, the columns' names if it tells them, and what else it says."""

    names: list[str] | None
    columns: np.ndarray
    told: dict[str, str]
    comments: list[str]


def is_curve(name: str | os.PathLike) -> bool:
    """Whether a file is read as a curve and not as frames, by its suffix; a json file by what is in it."""
    path = Path(name)
    if path.suffix.lower() in SUFFIXES:
        return True
    return path.suffix.lower() == ".json" and path.is_file() and any(_distance(key)[0] for key in _loaded(path, strict=False))


def read_curve(name: str | os.PathLike, column: str | None = None, error: str | None = None) -> Curve:
    """Read a curve from columns separated by commas, semicolons or blanks, or from the lists of a json file.

    Parameters
    ----------
    name : path
        A file with a column r in Å. A header names the columns, each with its unit if it likes, as "r (Å)", "r/Å" or "r_A";
        without one two columns are r and value, three r, value and error. Comments behind # may tell "temperature: 298 K",
        "pressure: 1 bar" and "source: ...".
    column : str, optional
        The values, as they are named in the header, where there are several; dashes and capitals do not matter.
    error : str, optional
        Their errors, where they are not called as the values with "error", "sigma" or the like before or behind.

    Returns
    -------
    Curve

    Raises
    ------
    UnusableReference
        In one line, what of it cannot be used.
    """
    path = Path(name)
    if not path.is_file():
        raise UnusableReference(f"{path}: no such file")
    table = _json_table(path) if path.suffix.lower() == ".json" else _text_table(path)
    r, values, errors = _chosen(path, table, column, error)
    names = table.names or ["r", "value", "error"]
    base, unit = _split(names[values])
    where = f"{path.name}, column {base}" if len(names) > 3 else path.name
    about = table.told.get("source") or "; ".join(table.comments)
    return Curve(
        table.columns[r],
        table.columns[values],
        None if errors is None else table.columns[errors],
        unit,
        _temperature(path, table.told.get("temperature")),
        _pressure(path, table.told.get("pressure")),
        f"{where} ({about})" if about else where,
    )


def _text_table(path: Path) -> Table:
    names, comments, rows, told = None, [], [], {}
    for k, line in enumerate(_text(path).splitlines(), 1):
        line = line.strip()
        if line.startswith(("#", "%", "!")):
            comments.append(line.lstrip("#%! "))
        elif line:
            fields = _fields(line)
            bad = [field for field in fields if not _is_number(field)]
            if bad and not rows and names is None:
                names = fields
            elif bad:
                raise UnusableReference(f"{path}: line {k}: {bad[0]!r} is no number")
            elif rows and len(fields) != len(rows[0]):
                raise UnusableReference(f"{path}: line {k} has {len(fields)} columns, those before have {len(rows[0])}")
            else:
                rows.append([float(field) for field in fields])
    if not rows:
        raise UnusableReference(f"{path}: holds no rows of numbers; expected columns r (Å), value and, if known, error")
    for comment in list(comments):
        match, fields = TOLD.match(comment), _fields(comment)
        if match:
            told[_plain(match[1])] = match[2]
        elif names is None and len(fields) == len(rows[0]) and any(_distance(field)[0] for field in fields):
            names = fields
        else:
            continue
        comments.remove(comment)
    return Table(names, np.array(rows).T, _renamed(told), [comment for comment in comments if comment])


def _json_table(path: Path) -> Table:
    content = _loaded(path)
    lists = {name: x for name, x in content.items() if isinstance(x, list)}
    try:
        columns = np.array([[float(number) for number in x] for x in lists.values()])
    except (TypeError, ValueError):
        lengths = {name: len(x) for name, x in lists.items()}
        raise UnusableReference(f"{path}: expected lists of numbers of one length, got {lengths}") from None
    told = {_plain(name): str(x) for name, x in content.items() if not isinstance(x, (list, dict))}
    return Table(list(lists), columns, _renamed(told), [])


def _renamed(told: dict[str, str]) -> dict[str, str]:
    """What was told by the names temperature, pressure and source."""
    known = {"temperaturek": "temperature", "temp": "temperature", "t": "temperature", "pressuregpa": "pressure", "p": "pressure"}
    units = {"temperaturek": " K", "pressuregpa": " GPa"}
    found = {(known | {"reference": "source"}).get(name, name): f"{text}{units.get(name, '')}" for name, text in told.items()}
    return {name: text for name, text in found.items() if name in ("temperature", "pressure", "source")}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableReference(f"{path}: is no text in UTF-8, expected a curve in columns") from None


def _loaded(path: Path, strict: bool = True) -> dict[str, Any]:
    """A dictionary from a json file; if that is not asked for strictly, an empty one where it is none."""
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        if strict:
            raise UnusableReference(f"{path}: is no json ({error})") from None
        content = {}
    if strict and not isinstance(content, dict):
        raise UnusableReference(f"{path}: expected lists of numbers by name, as {{'r': [...], 'value': [...]}}")
    return content if isinstance(content, dict) else {}


def _fields(line: str) -> list[str]:
    for separator in (";", ","):
        if separator in line:
            return [field.strip() for field in next(csv.reader([line], delimiter=separator))]
    return re.sub(r"\s+([(\[])", r"\1", line).split()  # a unit belongs to the name before it


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# -- which columns


def _split(name: str) -> tuple[str, str | None]:
    """A name and its unit, of "h(r) (1/Å)" and the like; the r of g(r) is none."""
    match = re.match(r"^(.+?)\s*[(\[]([^()\[\]]*)[)\]]$", name) or re.match(r"^([^/]+)/\s*([^/]+)$", name)
    if match is None or match[2].strip().lower() in DISTANCES:
        return name.strip(), None
    return match[1].strip(), unicodedata.normalize("NFKC", match[2].strip())


def _distance(name: str) -> tuple[bool, str | None]:
    """Whether a column is of distances, and their unit where the name tells it."""
    base, unit = _split(unicodedata.normalize("NFKC", name))
    head, _, tail = base.rpartition("_")
    if head.lower() in DISTANCES and tail.lower() in (*ANGSTROM, *OTHER_LENGTHS):
        base, unit = head, tail
    return base.lower() in DISTANCES, unit


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", _split(name)[0].lower())


def _chosen(path: Path, table: Table, column: str | None, error: str | None) -> tuple[int, int, int | None]:
    """Indices of the columns of distances, of values and of errors."""
    n = len(table.columns)
    if table.names is None:
        if n not in (2, 3) or column or error:
            raise UnusableReference(f"{path}: {n} columns and no header; expected r, value and error, or a header that names them")
        return 0, 1, 2 if n == 3 else None
    names = table.names
    if len(names) != n:
        raise UnusableReference(f"{path}: the header names {len(names)} columns ({', '.join(names)}), the rows have {n}")
    r = [k for k, name in enumerate(names) if _distance(name)[0]]
    if len(r) != 1:
        raise UnusableReference(f"{path}: {len(r) or 'no'} columns of distances among {', '.join(names)}; expected one, as r (Å)")
    _check_length(path, _distance(names[r[0]])[1])
    others = [k for k in range(n) if k != r[0]]
    is_error = {k: _plain(names[k]).startswith(ERRORS) or _plain(names[k]).endswith(ERRORS) for k in others}
    values = [k for k in others if not is_error[k]]
    if column is None and len(values) != 1:
        raise UnusableReference(f"{path}: {len(values) or 'no'} columns of values among {', '.join(names)}; name one by column=NAME")
    value = values[0] if column is None else _named(path, names, others, column)
    errors = [k for k in others if is_error[k] and k != value]
    if error is not None:
        return r[0], value, _named(path, names, others, error)
    own = {x for word in ERRORS for x in (_plain(names[value]) + word, word + _plain(names[value]))}
    mine = [k for k in errors if _plain(names[k]) in own] or (errors if len(values) == 1 else [])
    if len(mine) > 1:
        raise UnusableReference(f"{path}: several columns of errors, {', '.join(names[k] for k in mine)}; name one by error=NAME")
    return r[0], value, mine[0] if mine else None


def _named(path: Path, names: Sequence[str], among: Sequence[int], wanted: str) -> int:
    """The column of a name, exactly so or but for dashes and capitals."""
    for matches in ([k for k in among if names[k] == wanted], [k for k in among if _plain(names[k]) == _plain(wanted)]):
        if len(matches) == 1:
            return matches[0]
    raise UnusableReference(f"{path}: no column {wanted!r}; {did_you_mean(wanted, [names[k] for k in among])}")


def _check_length(path: Path, unit: str | None) -> None:
    """Without a unit r is taken to be in Å."""
    if unit is None or unit.lower() in ANGSTROM:
        return
    factor = OTHER_LENGTHS.get(unit.lower())
    how = f"multiply it by {factor:g}, and divide a density by as much" if factor else "convert it"
    raise UnusableReference(f"{path}: r is in {unit}, expected Å; {how}")


def _temperature(path: Path, text: str | None) -> float | None:
    if text is None:
        return None
    match = NUMBER.match(text)
    if match is None or match[2] not in ("", "K", "kelvin") or not float(match[1]) > 0:
        raise UnusableReference(f"{path}: tells the temperature {text!r}, expected one in K, as 298 K")
    return float(match[1])


def _pressure(path: Path, text: str | None) -> float | None:
    if text is None:
        return None
    match = NUMBER.match(text)
    if match is None or match[2] not in PRESSURES:
        raise UnusableReference(f"{path}: tells the pressure {text!r}, expected one in {', '.join(PRESSURES)}, as 0.1 GPa")
    return float(match[1]) * PRESSURES[match[2]]
