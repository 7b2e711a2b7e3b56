"""What a run works on: files, code of the user's, versions of packages, so that a resumed run goes on with the same."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import stabie_ase
from stabie_ase.observables import TARGET
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import load_potential
from stabie_ase.runs.directory import UnusableRun
from stabie_ase.structures.reference import Reference, absolute, digest, files_of, read_reference
from stabie_ase.system.options import from_dict, in_a_row
from stabie_ase.system.plugins import file_of
from stabie_ase.system.spec import Spec, parse

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

SPECIFICATIONS = ("observable", "criterion", "check_criterion", "update")
"""Options that may name a class in a file."""


class FromFiles:
    """Inputs some of which are names of files; what every command asks for is there whatever it is called with.

    Attributes
    ----------
    FILES : tuple of str
        The fields that name them.
    """

    FILES: ClassVar[tuple[str, ...]]
    trust_checkpoint: bool = False

    def files(self) -> dict[str, str | list[str]]:
        """What was given as a file, or as several, by the names of the fields."""
        files = {name: getattr(self, name) for name in self.FILES}
        return {name: file for name, file in files.items() if file}

    def absolute(self) -> Self:
        """The same with absolute paths, so that a run can be resumed from another folder."""
        return replace(self, **{name: absolute(file) for name, file in self.files().items()})  # type: ignore[type-var]


class OfAModel(FromFiles):
    """Inputs with a model among them."""

    model: str
    device: str
    dtype: str | None
    head: str | None

    def load_potential(self) -> Potential:
        """The starting model."""
        return load_potential(self.model, self.device, self.dtype, self.trust_checkpoint, self.head)


@dataclass(frozen=True)
class Inputs(OfAModel):
    """What a fine-tuning run was asked to work on, as config.json holds it."""

    FILES = ("model", "reference", "validation")

    model: str
    reference: str | list[str]
    validation: str | None = None
    energy_key: str | None = None
    forces_key: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    head: str | None = None
    trust_checkpoint: bool = False
    compilation: str = "off"

    def read_reference(self) -> Reference:
        """The reference frames."""
        return self._reference

    @cached_property
    def _reference(self) -> Reference:
        return read_reference(self.reference, self.energy_key, self.forces_key, min_frames=10)

    def read_validation(self) -> Reference | None:
        """Frames to judge accuracy by, if a file was given."""
        return read_reference(self.validation, self.energy_key, self.forces_key) if self.validation else None

    def are_periodic(self) -> bool:
        """Whether any reference frame is, to the model: an image that no atom sees is none."""
        reference = self.read_reference()
        if any(atoms.pbc.any() for atoms in reference.frames):
            reference = reference.isolated(self.load_potential().cutoff)
        return any(atoms.pbc.any() for atoms in reference.frames)


def with_absolute_files(config: Any) -> Any:
    """Options with absolute paths of the user's files, so that a run can be resumed from another folder."""
    found: dict[str, Any] = {name: ",".join(str(_absolute(spec)) for spec in specs) for name, specs in _specifications(config).items()}
    several = tuple(with_absolute_files(own) for own in getattr(config, "conditions", ()))
    if several:
        found["conditions"] = several
    if getattr(config, "reference", None):
        found["reference"] = absolute(config.reference)
    return from_dict(type(config), in_a_row(config) | found)


def _parts(config: Any) -> list[Any]:
    """The options of a run, and those of each of its conditions."""
    return [config, *getattr(config, "conditions", ())]


def _specifications(config: Any) -> dict[str, list[Spec]]:
    """By the names of the options, those that have any."""
    row = in_a_row(config)
    return {name: parse(row[name]) for name in SPECIFICATIONS if row.get(name)}


def _absolute(spec: Spec) -> Spec:
    file, target = file_of(spec), spec.options.get(TARGET)
    named = spec if file is None else replace(spec, name=f"{Path(file).absolute()}:{spec.name.rpartition(':')[2]}")
    return named if target is None else replace(named, options={**named.options, TARGET: str(Path(target).absolute())})


def code_files(config: Any) -> list[str]:
    """The user's files that options name classes in."""
    found = (file_of(spec) for part in _parts(config) for specs in _specifications(part).values() for spec in specs)
    return sorted({file for file in found if file})


def target_files(config: Any) -> list[str]:
    """Files, with what is selected from them, that observables are matched to and replicas of single conditions start from."""
    specs = [spec for part in _parts(config) for spec in _specifications(part).get("observable", [])]
    starts = [own.reference for own in getattr(config, "conditions", ()) if own.reference]
    return sorted({*starts, *(spec.options[TARGET] for spec in specs if TARGET in spec.options)})


def digests(inputs: FromFiles, config: Any) -> dict[str, str]:
    """SHA-256 of all files, by what they are: "model", "reference" and so on, or the path of code or of a target."""
    by_path = code_files(config) + target_files(config)
    return {name: digest(file) for name, file in inputs.files().items()} | {file: digest(file) for file in by_path}


def check_unchanged(path: str | os.PathLike, inputs: FromFiles, config: Any, then: Mapping[str, str]) -> None:
    """Raise UnusableRun for a file of the run at `path` that is gone or is not what it was, with its digest `then`."""
    named = [(name, file) for name, names in inputs.files().items() for file in files_of(names)]
    named += [("code", Path(file)) for file in code_files(config)]
    named += [("target", file) for name in target_files(config) for file in files_of(name)]
    for name, file in named:
        if not file.is_file():
            raise UnusableRun(f"the {name} file of {path} is gone: {file}; put it back to go on")
    for name, now in digests(inputs, config).items():
        if now != then.get(name):
            known = inputs.files()
            what = f"{name} file" if name in known else "target" if name in target_files(config) else "code"
            which = f"the {what} of {path}"
            raise UnusableRun(f"{which} has changed since the run began: {known.get(name, name)}; begin a new run")


def warn_of_other_versions(then: dict[str, str]) -> None:
    """Say which packages are of another version than when a run began: it will not end in the same bits."""
    now = versions()
    different = [f"{name} {then[name]} -> {now[name]}" for name in now if name in then and then[name] != now[name]]
    if different:
        logger.warning("versions have changed since the run began, so it will not end in the same bits: %s", ", ".join(different))


def versions() -> dict[str, str]:
    """Of the packages that figures depend on, by name."""
    packages = ("ase", "torch", "torch-geometric", "mace-torch", "numpy", "scipy")
    found = {name: _version(name) for name in packages}
    ours = {"stabie_ase": stabie_ase.__version__, "python": platform.python_version()}
    return {name: number for name, number in found.items() if number} | ours


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
