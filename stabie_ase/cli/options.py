"""Click options made from the dataclasses that hold them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from functools import partial
from typing import Any

import click

from stabie_ase.cli.config_file import config_option
from stabie_ase.system.options import Leaf, from_dict, in_a_row, leaves

FLAGS = {"compilation": "--compile"}
"""Flags that are not the field's name without its unit."""

UNIT = re.compile(r"_(per_fs|per_GPa|GPa|K|fs|ps|min)$")

METAVARS = {"GPa": "GPa", "K": "K", "fs": "FS", "ps": "PS", "min": "MIN", int: "N", float: "X", str: "TEXT"}
"""By unit, else by kind."""


def flag(name: str) -> str:
    """The flag of a field: its name without the unit at the end."""
    return FLAGS.get(name, "--" + UNIT.sub("", name).replace("_", "-"))


def options_from(cls: type):
    """Decorator: one option for each field of a dataclass, absent (None) unless given."""
    def decorate(command):
        for leaf in reversed(list(leaves(cls))):
            command = _option(leaf)(command)
        return command

    return decorate


class ConfigOption(click.Option):
    """An option that stands in a section of a config file, or in none."""

    def __init__(self, *args, path: tuple[str, ...], **settings):
        super().__init__(*args, **settings)
        self.path = path


def _option(leaf: Leaf):
    option, kind = leaf.option, leaf.kind
    unit = UNIT.search(leaf.name)
    unit = unit[1].replace("per_", "1/") if unit else None
    default = "" if option.default in (None, MISSING) or kind is bool else f" [default: {option.default}]"
    help = option.metadata["help"]
    help = help[0].upper() + help[1:] + (f", in {unit}" if unit else "") + default
    name, choices = flag(leaf.name), option.metadata["choices"]
    make = partial(click.option, cls=ConfigOption, path=leaf.path)
    if kind is bool:
        return make(f"{name}/--no-{name[2:]}", leaf.name, default=None, help=help)
    if option.metadata["repeats"]:
        return make(name, leaf.name, multiple=True, callback=_joined, help=help + "; may be repeated", metavar=METAVARS[kind])
    kind = click.Choice(choices) if choices else kind
    metavar = None if choices else METAVARS.get(unit) or METAVARS[kind]
    return make(name, leaf.name, type=kind, default=None, help=help, metavar=metavar)


def _joined(context, parameter, texts: tuple[str, ...]) -> str | None:
    """Several of them are one text with commas."""
    return ",".join(texts) if texts else None


class Command(click.Command):
    """A command that takes options from a file, and refuses one given twice of which only the last would count."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        if any(isinstance(parameter, click.Option) for parameter in self.params):
            self.params.append(config_option())

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        for option, n in Counter(self.make_parser(context).parse_args(args=list(args))[2]).items():
            if n > 1 and isinstance(option, click.Option) and not (option.multiple or option.count or _is_switch(option)):
                raise click.UsageError(f"{'/'.join(option.opts + option.secondary_opts)} is given {n} times, expected once", context)
        return super().parse_args(context, args)


def _is_switch(option: click.Option) -> bool:
    """Whether it says the same however often it is given."""
    return option.is_flag and not option.secondary_opts


def reference_option(help: str, required: bool = True):
    """Decorator: `--ref`, which may be given several times."""
    return click.option(
        "--ref", "reference", multiple=True, required=required, metavar="FILE", callback=_one_or_several,
        help=f"{help}; FILE@0:100, FILE.db@QUERY and patterns as ASE knows them; may be repeated",
    )  # fmt: skip


def _one_or_several(context, parameter, names: tuple[str, ...]) -> str | list[str] | None:
    """As a run's config.json holds them."""
    return names[0] if len(names) == 1 else list(names) or None


class Sectioned(Command):
    """A command whose help lists its options under headings.

    Parameters
    ----------
    *args
        Of click's command.
    sections : dict of str to sequence of str
        Heading to names of parameters; what is in none of them comes under the last.
    **settings
        Of click's command.
    """

    def __init__(self, *args, sections: Mapping[str, Sequence[str]], **settings):
        super().__init__(*args, **settings)
        self.sections = sections

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        heading_of = {name: heading for heading, names in self.sections.items() for name in names}
        rest = list(self.sections)[-1]
        rows = {heading: [] for heading in self.sections}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record and isinstance(parameter, click.Option):
                rows[heading_of.get(parameter.name, rest)].append(record)
        for heading, records in rows.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def build(cls: type, given: Mapping[str, Any], instead: Mapping[str, Any] | None = None):
    """A dataclass from the options that were given, and other defaults than its own for some of the rest."""
    return from_dict(cls, dict(instead or {}) | {name: value for name, value in given.items() if value is not None})


def changed(saved: Any, given: Mapping[str, Any]) -> list[str]:
    """Flags that were given with another value than a dataclass holds."""
    values = in_a_row(saved)
    return [flag(name) for name, value in given.items() if value is not None and values.get(name) != value]
