"""Options as typed dataclasses: one place for the schema, the defaults, the help text and the checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass, replace
from types import NoneType
from typing import Any, get_args, get_type_hints

from stabie_ase.system.spec import did_you_mean


class BadOption(ValueError):
    """An option outside of what makes sense."""


def option(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple = (),
    repeats: bool = False,
    name: str | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """A dataclass field with its help text and the values it may take, limits included.

    What repeats may be given several times on the command line, which is one text with commas. A `name` takes the place of the
    field's own where options stand in one row, as on the command line. The values of an option with `presets` each stand for other
    defaults of the options that these name in one row; `from_dict` puts them where nothing is given.
    """
    choices = tuple(presets) if presets else choices
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "repeats": repeats, "name": name, "presets": presets or {}}
    return field(default=default, metadata=metadata)


def section(cls: type, prefix: str = "") -> Any:
    """A dataclass field that holds options of its own, whose names in one row begin with the prefix."""
    return field(default_factory=cls, metadata={"section": cls, "prefix": prefix and prefix + "_"})


def rows(cls: type) -> Any:
    """A dataclass field that holds any number of dataclasses, each with options of its own; none by default."""
    return field(default=(), metadata={"rows": cls})


@dataclass(frozen=True)
class Leaf:
    """One option, wherever it stands.

    Attributes
    ----------
    name : str
        Where all options stand in one row, such as "check_replicas".
    path : tuple of str
        The fields that lead to it, such as ("check", "replicas").
    option : Field
    kind : type
        Of its values, where there are any.
    optional : bool
        None is a value too.
    """

    name: str
    path: tuple[str, ...]
    option: Field
    kind: type
    optional: bool


def leaves(cls: type) -> Iterator[Leaf]:
    """All options of a dataclass, those of its sections included, in order; not those of its rows, which have no names of their own."""
    types = get_type_hints(cls)
    for option in (one for one in fields(cls) if "rows" not in one.metadata):
        inner = option.metadata.get("section")
        if inner is None:
            kinds = get_args(types[option.name]) or (types[option.name],)
            kind = next(k for k in kinds if k is not NoneType)
            yield Leaf(option.metadata.get("name") or option.name, (option.name,), option, kind, NoneType in kinds)
        else:
            for leaf in leaves(inner):
                yield replace(leaf, name=option.metadata["prefix"] + leaf.name, path=(option.name, *leaf.path))


def in_a_row(config: Any) -> dict[str, Any]:
    """The values of all options by their names in one row, and what it has rows of as they are."""
    several = {one.name: getattr(config, one.name) for one in fields(config) if "rows" in one.metadata}
    return row_of(type(config), asdict(config)) | several


def row_of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a dictionary in sections, as `asdict` makes it; what it lacks is left out."""
    found = {}
    for leaf in leaves(cls):
        inner: Any = values
        for part in leaf.path[:-1]:
            inner = inner.get(part, {})
        if leaf.path[-1] in inner:
            found[leaf.name] = inner[leaf.path[-1]]
    return found


def check_options(config: Any, prefix: str = "") -> None:
    """Hold every field of a dataclass, whose section has this prefix, against its type and the limits of its `option`, or BadOption."""
    for leaf in leaves(type(config)):
        if len(leaf.path) == 1:  # a section has checked its own
            _check(prefix + leaf.name, leaf, getattr(config, leaf.option.name))


def check_unused(config: Any, names: Sequence[str], user: str) -> None:
    """BadOption where one of some options is not at its default, though what was chosen (`user`, in words) does not use it."""
    for leaf in (leaf for leaf in leaves(type(config)) if leaf.name in names):
        value = getattr(config, leaf.name)
        if value != leaf.option.default:
            raise BadOption(f"{leaf.name} is {value:g}, which {user} would ignore; leave it out")


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _check(name: str, leaf: Leaf, value: Any) -> None:
    if value is None and leaf.optional:
        return
    kind = leaf.kind
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):  # to Python, true is a whole number
        raise BadOption(f"{name} is {value!r}, expected {_KINDS[kind]}")
    low, high, choices = (leaf.option.metadata.get(key) for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise BadOption(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        within = f"between {low:g} and {high:g}" if high is not None else f"of at least {low:g}"
        raise BadOption(f"{name} is {value:g}, expected {_KINDS[kind]} {within}")


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from options that stand in one row or in the sections that they belong to, and presets for those that are not given.

    Parameters
    ----------
    cls : type
    values : mapping of str to values, or of the name of a section to a mapping of its own

    Returns
    -------
    A `cls`.

    Raises
    ------
    BadOption
        An unknown name, which tells the known ones; an option that is given in a row and in its section.
    """
    found: dict[tuple[str, ...], Any] = {}
    for path, name, value in _with_paths(cls, values):
        if path in found:
            raise BadOption(f"{name} is given twice, in its section and beside it; give it once")
        found[path] = value
    return _made(cls, _presets(cls, found) | found)


def _presets(cls: type, given: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """The defaults by their paths that options with presets stand for, whether by a value that is given or by their own default."""
    known = {leaf.name: leaf for leaf in leaves(cls)}
    chosen = (
        preset
        for leaf in known.values()
        for value, preset in leaf.option.metadata.get("presets", {}).items()
        if value == given.get(leaf.path, leaf.option.default)
    )
    return {known[name].path: default for preset in chosen for name, default in preset.items()}


def _with_paths(cls: type, values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Path, name and value of all options in a dictionary."""
    known = {leaf.name: leaf.path for leaf in leaves(cls)}
    several = {one.name: one.metadata["rows"] for one in fields(cls) if "rows" in one.metadata}
    sections = {option.name: option.metadata["section"] for option in fields(cls) if "section" in option.metadata}
    for name, value in values.items():
        if name in sections and (isinstance(value, Mapping) or is_dataclass(value)):
            inner = value if isinstance(value, Mapping) else asdict(value)  # type: ignore[arg-type]
            own = {**{leaf.name: leaf.path for leaf in leaves(sections[name])}, **{o.name: (o.name,) for o in fields(sections[name])}}
            for key, inner_value in inner.items():
                if key not in own:
                    raise BadOption(f"unknown option {key!r} in {name}; {did_you_mean(key, list(own))}")
                yield (name, *own[key]), f"{name}: {key}", inner_value
        elif name in known:
            yield known[name], name, value
        elif name in several:
            yield (name,), name, _rows(several[name], name, value)
        elif name in sections:
            raise BadOption(f"{name} is {value!r}, expected options by their names")
        else:
            raise BadOption(f"unknown option {name!r}; {did_you_mean(name, [*known, *several, *sections])}")


def _rows(cls: type, name: str, values: Any) -> tuple:
    """Dataclasses from a list of mappings, or as they are."""
    if isinstance(values, (str, Mapping)) or not all(isinstance(value, (cls, Mapping)) for value in values):
        raise BadOption(f"{name} is {values!r}, expected a list, each with options by their names")
    try:
        return tuple(value if isinstance(value, cls) else from_dict(cls, value) for value in values)
    except BadOption as error:
        raise BadOption(f"{name}: {error}") from error


def _made(cls: type, values: Mapping[tuple[str, ...], Any]) -> Any:
    """A dataclass from values by their paths."""
    own = {path[0]: value for path, value in values.items() if len(path) == 1}
    for option in fields(cls):
        inner = {path[1:]: value for path, value in values.items() if len(path) > 1 and path[0] == option.name}
        if inner:
            own[option.name] = _made(option.metadata["section"], inner)
    return cls(**own)


def with_temperature(config: Any, found: float | None, where: str) -> Any:
    """A config whose temperature (K) is the one found in some frames unless one was given; BadOption if there is neither."""
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
