"""Options as typed dataclasses: one place for the schema, the defaults, the help text and the checks."""

from __future__ import annotations

from dataclasses import Field, field, fields, replace
from types import NoneType
from typing import Any, get_args, get_type_hints

from stabie_ase.system.spec import did_you_mean


class BadOption(ValueError):
    """An option outside of what makes sense."""


def knob(
    default: Any, help: str, low: float | None = None, high: float | None = None, choices: tuple = (), repeats: bool = False
) -> Any:
    """A dataclass field with its help text and the values it may take, limits included.

    What repeats may be given several times on the command line, which is one text with commas.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices, "repeats": repeats})


def check_options(config: Any) -> None:
    """Hold every field of a dataclass against its type and the limits of its `knob`.

    Raises
    ------
    BadOption
    """
    types = get_type_hints(type(config))
    for option in fields(config):
        kinds = get_args(types[option.name]) or (types[option.name],)
        _check(option, kinds, getattr(config, option.name))


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _check(option: Field, kinds: tuple[type, ...], value: Any) -> None:
    if value is None and NoneType in kinds:
        return
    kind = next(k for k in kinds if k is not NoneType)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):  # to Python, true is a whole number
        raise BadOption(f"{option.name} is {value!r}, expected {_KINDS[kind]}")
    low, high, choices = (option.metadata.get(key) for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise BadOption(f"{option.name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = f"between {low:g} and {high:g}" if high is not None else f"of at least {low:g}"
        raise BadOption(f"{option.name} is {value:g}, expected {_KINDS[kind]} {limits}")


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from a dictionary; an unknown key is an error that names the known ones.

    Raises
    ------
    BadOption
    """
    known = [option.name for option in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise BadOption(f"unknown option {', '.join(map(repr, unknown))}; {did_you_mean(unknown[0], known)}")
    return cls(**values)


def with_temperature(config: Any, found: float | None, where: str) -> Any:
    """A config whose temperature (K) is the one found in some frames unless one was given.

    Raises
    ------
    BadOption
        Neither.
    """
    if config.temperature_K is not None:
        return config
    if found is None:
        raise BadOption(f"{where} tells no single temperature (info key temperature_K); give --temperature in K")
    return replace(config, temperature_K=found)


class HasTimestep:
    """Options with a `timestep_fs`."""

    timestep_fs: float

    def steps(self, time_fs: float) -> int:
        """A time as a number of steps, at least one."""
        return max(1, round(time_fs / self.timestep_fs))
