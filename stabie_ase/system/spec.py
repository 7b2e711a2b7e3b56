"""What is wanted in one string: `rdf:O-O,r_max=6`, `bonds:0.25`, `mine.py:Gyration`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any


class BadSpec(ValueError):
    """A specification that says nothing that can be made."""


@dataclass(frozen=True)
class Spec:
    """A name, an argument and options, as text.

    Attributes
    ----------
    name : str
        Of a class known here, or FILE.py:CLASS, or MODULE:CLASS.
    argument : str or None
        What follows the name behind a colon.
    options : dict of str to str
    taken : tuple of str
        Further options there are, which have been read already.
    """

    name: str
    argument: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    taken: tuple[str, ...] = ()

    def __str__(self) -> str:
        colon = [] if self.argument is None else [self.argument]
        return ",".join([":".join([self.name, *colon]), *(f"{k}={v}" for k, v in self.options.items())])

    def read(self, readers: Mapping[str, Callable[[str], Any]], argument: str | None = None) -> dict[str, Any]:
        """The options as values.

        Parameters
        ----------
        readers : mapping of str to callable
            From text to the value of each option there is; they raise ValueError.
        argument : str, optional
            The option that the argument stands for; without it none is taken.

        Returns
        -------
        dict of str to object
            Of the options that are given.

        Raises
        ------
        BadSpec
            An unknown option, one that is no such value, or an argument that is not expected.
        """
        given = dict(self.options)
        if self.argument is not None:
            if argument is None:
                raise BadSpec(f"{self.name!r} takes no argument, got {str(self)!r}; write {self.name}")
            if argument in given:
                raise BadSpec(f"{str(self)!r} gives {argument} twice; give it once")
            given = {argument: self.argument} | given
        values = {}
        for key, text in given.items():
            if key not in readers:
                known = [*readers, *self.taken]
                raise BadSpec(f"{str(self)!r} has an unknown option {key!r}; {did_you_mean(key, known, 'no options')}")
            values[key] = self._value(key, text, readers[key])
        return values

    def take(self, key: str, reader: Callable[[str], Any], otherwise: Any) -> tuple[Any, Spec]:
        """The value of one option, or another if it is not given, and the specification without it."""
        text = self.options.get(key)
        value = otherwise if text is None else self._value(key, text, reader)
        options = {k: v for k, v in self.options.items() if k != key}
        return value, replace(self, options=options, taken=(*self.taken, key))

    def _value(self, key: str, text: str, reader: Callable[[str], Any]) -> Any:
        try:
            return reader(text)
        except ValueError as error:
            reason = str(error) if reader not in (int, float) else f"expected {KINDS[reader]}"
            raise BadSpec(f"{str(self)!r} has {key}={text!r}, {reason}") from None


KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}

CLASS = re.compile(r"^(?P<name>[^:,=]+(?:\.py|\.[A-Za-z_]\w*)?:[A-Z]\w*)(?::(?P<argument>.*))?$")
"""FILE.py:CLASS or MODULE:CLASS; classes begin with a capital, elements too, so that a file or a dotted module is asked for."""


def parse(text: str) -> list[Spec]:
    """Specifications separated by commas.

    Parameters
    ----------
    text : str
        A part with an equals sign is an option of the specification before it.

    Returns
    -------
    list of Spec

    Raises
    ------
    BadSpec
        An empty part, or an option before any name.
    """
    found: list[Spec] = []
    for part in text.split(",") if text else ():
        part = part.strip()
        key, equals, value = part.partition("=")
        if not part:
            raise BadSpec(f"{text!r} has an empty part; expected NAME, NAME:ARGUMENT or OPTION=VALUE between commas")
        if equals and found:
            last = found[-1]
            if key in last.options:
                raise BadSpec(f"{text!r} gives {key} twice; give it once")
            found[-1] = Spec(last.name, last.argument, {**last.options, key: value})
        elif equals:
            raise BadSpec(f"{text!r} begins with an option; expected a name before it, as in rdf:O-O,r_max=6")
        else:
            found.append(_named(part))
    return found


def _named(part: str) -> Spec:
    match = CLASS.match(part)
    if match and is_class(match["name"]):
        return Spec(match["name"], match["argument"])
    name, colon, argument = part.partition(":")
    return Spec(name, argument if colon else None)


def is_class(name: str) -> bool:
    """Whether a name is that of a class in a file or a module, FILE.py:CLASS or MODULE.SUBMODULE:CLASS."""
    where, colon, _ = name.rpartition(":")
    return bool(colon) and (where.endswith(".py") or "." in where)


def did_you_mean(word: str, known: Mapping | list | tuple, nothing: str = "") -> str:
    """What there is instead of an unknown word, the nearest one first."""
    names = list(known)
    if not names:
        return f"there are {nothing}"
    near = get_close_matches(word, names, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(names)}"
