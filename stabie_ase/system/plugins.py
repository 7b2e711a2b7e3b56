"""Classes by name: those of the package, those that other packages bring by entry points, and those in a user's file."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from stabie_ase.system.spec import BadSpec, Spec, did_you_mean, is_class

logger = logging.getLogger(__name__)


@cache
def others(group: str) -> dict[str, str]:
    """Entry points of other packages, "module:Class" by name."""
    return {point.name: point.value for point in entry_points(group=group)}


def find(spec: Spec, what: str, group: str, own: Mapping[str, str]) -> Any:
    """The class that a specification names.

    Parameters
    ----------
    spec : Spec
    what : str
        It is, for messages: "observable".
    group : str
        Of entry points, as "stabie_ase.observables".
    own : mapping of str to str
        The package's "module:Class" by name.

    Returns
    -------
    type

    Raises
    ------
    BadSpec
        No such class, with the names there are.
    """
    if is_class(spec.name):
        return _imported(spec.name)
    known = {**others(group), **own}
    if spec.name not in known:
        raise BadSpec(f"unknown {what} {spec.name!r}; {did_you_mean(spec.name, sorted(known))}, or FILE.py:CLASS")
    return _imported(known[spec.name])


def named(name: str) -> Any:
    """What "module:attribute" names; whatever its import raises is passed on."""
    where, _, attribute = name.rpartition(":")
    return getattr(importlib.import_module(where), attribute)


def _imported(name: str) -> Any:
    where, _, attribute = name.rpartition(":")
    try:
        module = _from_file(where) if where.endswith(".py") else importlib.import_module(where)
        return getattr(module, attribute)
    except AttributeError:
        there = [n for n, x in vars(module).items() if isinstance(x, type) and x.__module__ == module.__name__]
        raise BadSpec(f"{where} has no {attribute}; {did_you_mean(attribute, there, 'no classes in it')}") from None
    except FileNotFoundError:
        raise BadSpec(f"{where}: no such file") from None
    except Exception as error:  # somebody else's module may raise anything
        raise BadSpec(f"{where} cannot be imported: {type(error).__name__}: {error}") from error


@cache
def _from_file(path: str):
    """A module from a file, made once in a process so that its classes stay the same."""
    file = Path(path).absolute()
    if not file.is_file():
        raise FileNotFoundError(path)
    name = f"stabie_ase_user_{file.stem}_{abs(hash(file))}"
    made = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(made)
    sys.modules[name] = module
    try:
        made.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def file_of(spec: Spec) -> str | None:
    """The user's file that a specification names, if it does."""
    where, colon, _ = spec.name.rpartition(":")
    return where if colon and where.endswith(".py") else None
