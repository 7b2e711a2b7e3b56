"""Click options made from the dataclasses that hold them."""

from __future__ import annotations

import re
import typing
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import click

from stabie_ase.training.config import BadOption, from_dict

UNITS = {"K": "K", "fs": "fs", "ps": "ps", "min": "min"}


def flag(name: str) -> str:
    """The flag of a field: its name without the unit at the end."""
    stem = re.sub(r"_(per_fs|K|fs|ps)$", "", name)
    return "--" + ("max-time" if stem == "max_time_min" else stem.replace("_", "-"))


def options_from(cls: type, only: tuple[str, ...] = ()):
    """Decorator: one option for each field of a dataclass, absent (None) unless given."""
    types = typing.get_type_hints(cls)

    def decorate(command):
        for option in reversed(fields(cls)):
            if only and option.name not in only:
                continue
            kind = next((t for t in typing.get_args(types[option.name]) if t is not type(None)), types[option.name])
            default = "" if option.default in (None, MISSING) else f" [default: {option.default}]"
            unit = re.search(r"_(per_fs|K|fs|ps|min)$", option.name)
            help = option.metadata["help"] + (f", in {unit[1].replace('per_fs', '1/fs')}" if unit else "") + default
            names = [flag(option.name), option.name]
            if kind is bool:
                names[0] += "/--no-" + names[0][2:]
                command = click.option(*names, default=None, help=help)(command)
            else:
                command = click.option(*names, type=kind, default=None, help=help, metavar=_metavar(kind, unit))(command)
        return command

    return decorate


def _metavar(kind: type, unit: re.Match | None) -> str:
    if unit and unit[1] in UNITS:
        return UNITS[unit[1]].upper() if unit[1] != "K" else "K"
    return {int: "N", float: "X", str: "TEXT"}[kind]


def build(cls: type, given: dict, config_file: str | None = None):
    """A dataclass from a config file (JSON, as config.json's "config") and the flags that were given, which win."""
    values = {}
    if config_file:
        values = _read_config(config_file)
    return from_dict(cls, values | {name: value for name, value in given.items() if value is not None})


def changed(config, given: dict) -> list[str]:
    """Flags that were given with another value than a config holds."""
    values = asdict(config)
    return [flag(name) for name, value in given.items() if value is not None and values.get(name) != value]


def _read_config(path: str) -> dict:
    import json

    try:
        data = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadOption(f"--config {path}: not a JSON file that can be read ({error})") from error
    data = data.get("config", data) if isinstance(data, dict) else data
    if not isinstance(data, dict):
        raise BadOption(f"--config {path}: expected an object of options, got {type(data).__name__}")
    return data
