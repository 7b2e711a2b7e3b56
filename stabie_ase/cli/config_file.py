"""`--config FILE` of every command: options in YAML or JSON by the names of their flags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from stabie_ase.system.options import BadOption
from stabie_ase.system.spec import did_you_mean

META = "stabie_ase.config_file"
"""Where a context remembers the file."""

OTHERS = ("model", "reference", "validation", "trust_checkpoint")
"""Of another run's inputs: its files are not this one's, and trust is given anew each time."""


def config_option() -> click.Option:
    """The option, which takes effect by itself: values in the file stand in for the flags that are not given."""
    return click.Option(
        ["--config"], metavar="FILE", is_eager=True, expose_value=False, callback=_take,
        help="Options in YAML or JSON by the names of the flags, or a run's config.json; flags win",
    )  # fmt: skip


def _take(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    context.meta[META] = path
    where = f"--config {path}"
    known, sections = _by_flag(context.command.params)
    values: dict[str, Any] = {}
    for name, value in _options_of(_read(path, where), where).items():
        if name in sections and (isinstance(value, dict) or name not in known):
            if not isinstance(value, dict):
                raise BadOption(f"{where}: {name} is {value!r}, expected options by their names")
            _take_row(value, sections[name], values, f"{where}: {name}")
        else:
            _take_row({name: value}, known, values, where, list(sections))
    context.default_map = {**(context.default_map or {}), **values}


Known = dict[str, tuple[click.Parameter, bool]]
"""Parameters by their names; False: the flag of that name switches it off."""


def _take_row(given: Mapping[str, Any], known: Known, values: dict[str, Any], where: str, besides: Sequence[str] = ()) -> None:
    """Put options that stand side by side among the values."""
    for name, value in given.items():
        flag = name.replace("_", "-")
        if flag not in known and name not in known:
            names = sorted({*besides, *(p for p in known if "_" not in p)})
            raise BadOption(f"{where}: unknown option {name!r}; {did_you_mean(flag, names)}")
        option, on = known.get(flag) or known[name]
        if option.name in values:
            raise BadOption(f"{where}: {name} is given twice; give it once")
        if value is not None:
            values[option.name] = _value(option, on, value, f"{where}: {name}")


def _by_flag(parameters: Sequence[click.Parameter]) -> tuple[Known, dict[str, Known]]:
    """Parameters by their flags without dashes and by the names that a run's config.json has, and the same of each section."""
    known: Known = {}
    sections: dict[str, Known] = {}
    for parameter in parameters:
        if not parameter.expose_value:
            continue
        own: Known = {parameter.name: (parameter, True), parameter.human_readable_name.lower(): (parameter, True)}
        own |= {flag.lstrip("-"): (parameter, True) for flag in parameter.opts}
        own |= {flag.lstrip("-"): (parameter, False) for flag in parameter.secondary_opts}
        known |= own
        *section, name = getattr(parameter, "path", ("",))
        if section:
            short = {flag.removeprefix(f"{section[0]}-"): both for flag, both in own.items()}
            sections.setdefault(section[0], {}).update({name: (parameter, True), **own, **short})
    return known, sections


def _read(path: str, where: str) -> Any:
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(f"{where}: {getattr(error, 'strerror', None) or 'no text'}") from error
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where))
    except BadOption:
        raise
    except ValueError as error:
        if path.endswith(".json"):
            raise BadOption(f"{where}: not JSON: {error}") from error
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            return _once(self.construct_pairs(node, deep=True), where)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, Loader.construct_mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise BadOption(f"{where}: neither JSON nor YAML: {' '.join(str(error).split())}") from error


def _once(pairs: list[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    """A mapping of pairs; to the parsers the last of two of one name would count, and nobody would know."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise BadOption(f"{where}: {name} is given twice; give it once")
        found[name] = value
    return found


def _options_of(data: Any, where: str) -> Mapping[str, Any]:
    """The options that a file holds; of a run's config.json those that suit another run."""
    if isinstance(data, dict) and isinstance(data.get("config"), dict):
        inputs = data.get("inputs") or {}
        data = data["config"] | {name: value for name, value in inputs.items() if name not in OTHERS}
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise BadOption(f"{where}: expected options and their values, as in 'max-time: 15'")
    return data


def _value(option: click.Parameter, on: bool, value: Any, where: str) -> Any:
    """A value as the command line would have it, or as it is where no flag could hold it."""
    if option.type is click.UNPROCESSED:
        return value
    is_flag = isinstance(option, click.Option) and option.is_flag
    if isinstance(value, dict) or isinstance(value, bool) != is_flag:
        raise BadOption(f"{where} is {value!r}, expected {'true or false' if is_flag else 'a value, as behind the flag'}")
    if is_flag:
        return value == on
    if isinstance(option, click.Option) and option.multiple:
        return [str(x) for x in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        raise BadOption(f"{where} is {value!r}, expected one value")
    return str(value)  # read as behind the flag: 3.5 is no whole number
