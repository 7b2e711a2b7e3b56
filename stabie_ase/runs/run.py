"""Long work on disk: begun once all that can be wrong has been looked at, and gone on with exactly where it stood."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from stabie_ase.observables import Observable, Target, default_observable, observables_from
from stabie_ase.runs.directory import UnusableRun, WorkDirectory, in_words
from stabie_ase.runs.inputs import FromFiles, check_unchanged, digests, versions, warn_of_other_versions, with_absolute_files
from stabie_ase.runs.monitor import Monitor
from stabie_ase.stability import Criterion, criteria_from, default_criteria
from stabie_ase.structures.setting import Setting
from stabie_ase.system.options import BadOption, from_dict
from stabie_ase.system.spec import parse

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Live:
    """What was given as objects and is in no file: a run with any of it is resumed from Python only."""

    observables: list[Observable] = field(default_factory=list)
    criteria: list[Criterion] = field(default_factory=list)

    def names(self) -> list[str]:
        """Of all objects, with the weights of observables."""
        return [x.describe() for x in self.observables] + [x.name for x in self.criteria]

    def resolved(
        self, config: Any, setting: Setting, tolerance: float, verdict: bool = False
    ) -> tuple[Any, list[Observable], list[Criterion]]:
        """All observables and criteria of a command: these, those that its options name, and what suits the system where there are none.

        Parameters
        ----------
        config : dataclass
            With `observable` and `criterion` as text.
        setting : Setting
            The system.
        tolerance : float
            In Å, of criteria that nobody has chosen.
        verdict : bool
            Criteria that suit the system count beside the chosen ones, where they have other names.

        Returns
        -------
        config : dataclass
            With the text of what suits the system where nothing was chosen.
        observables : list of Observable
        criteria : list of Criterion

        Raises
        ------
        BadOption, BadSpec, ValueError
            Two of one name, or what `observables_from` and `criteria_from` refuse.
        """
        if not (config.observable or self.observables):
            config = replace(config, observable=default_observable(setting))
        chosen = bool(config.criterion or self.criteria)
        usual = default_criteria(setting, tolerance, windows=verdict and setting.one_temperature, chosen=chosen)
        if not chosen:
            config = replace(config, criterion=usual)
        others = parse(usual) if verdict else []
        made = [criterion.name for criterion in self.criteria]
        beside = ",".join(str(spec) for spec in others if spec.name not in made)
        observables = [*self.observables, *(observables_from(config.observable, setting) if config.observable else [])]
        criteria = [*self.criteria, *criteria_from(config.criterion or "", setting, beside)]
        _check_names("observables", [observable.name for observable in observables])
        _check_names("criteria", [criterion.name for criterion in criteria])
        return config, observables, criteria


def tell_targets(targets: Sequence[Target], monitor: Monitor) -> None:
    """What observables are matched to, where that is not the reference as it is."""
    for target in targets:
        if target.source:
            floor = "" if target.floor is None else f"; its noise floor is {target.floor:.2g}"
            monitor.message(f"{target.observable.name} is matched to {target.source}{floor}")


def _check_names(what: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise BadOption(f"two {what} have one name among {', '.join(names)}; results are told by name, give each its own")


class Opened(NamedTuple):
    """What a run's config.json tells, and its directory."""

    directory: Any
    inputs: Any
    config: Any
    description: dict[str, Any]


class Run:
    """Work that a command begins and goes on with. A subclass names its directory, inputs and options, and fills in the methods.

    Attributes
    ----------
    directory : WorkDirectory
        There once the run has begun.
    inputs : FromFiles
    config : dataclass
    """

    directory_class: ClassVar[type[WorkDirectory]]
    inputs_class: ClassVar[type[FromFiles]]
    config_class: ClassVar[type]
    directory: Any
    inputs: Any
    config: Any

    @classmethod
    def set_up(cls, inputs: Any, config: Any, monitor: Monitor, live: Live) -> Self:
        """Everything that can be wrong, looked at before anything is written."""
        raise NotImplementedError

    def settle(self, monitor: Monitor) -> None:
        """Find out what a resumed run must not find out again, and put it among the inputs."""

    def described(self) -> dict[str, Any]:
        """What config.json tells beside inputs and options."""
        return {}

    def arrange(self) -> None:
        """Make ready what the directory holds."""

    def restore(self, state: dict) -> None:
        """Go on from what state.pt holds."""
        raise NotImplementedError

    @property
    def resume_command(self) -> str:
        """What to type to go on."""
        return self.directory.resume_command + (" --trust-checkpoint" if self.inputs.trust_checkpoint else "")

    @property
    def onwards(self) -> str:
        """How to go on with interrupted work, in words."""
        return f"go on with: {self.resume_command}"

    @classmethod
    def begin(
        cls,
        path: str | os.PathLike,
        inputs: Any,
        config: Any,
        monitor: Monitor | None = None,
        live: Live | None = None,
        own: Collection[str] = (),
    ) -> Self:
        """Begin in a directory that is new or empty; on an error nothing has been written.

        Parameters
        ----------
        path : path
            The directory.
        inputs : FromFiles
            What to work on, of the class that the run names.
        config : dataclass
            How, likewise.
        monitor : Monitor, optional
            Told in words what is found on the way.
        live : Live, optional
            Objects that no file holds.
        own : collection of str
            What the directory may hold already.

        Returns
        -------
        Run
            Ready to go from its start.

        Raises
        ------
        ValueError
            In one line, what was given, what was expected and what to try.
        """
        monitor, live = monitor or Monitor(), live or Live()
        cls.directory_class.check_free(path, own)
        run = cls.set_up(inputs, with_absolute_files(config), monitor, live)
        run.settle(monitor)
        about = {
            "config": asdict(run.config),
            "inputs": asdict(run.inputs.absolute()),
            "digests": digests(run.inputs, run.config),
            "versions": versions(),
            "live": live.names(),
        }
        directory = cls.directory_class.create(path, about | run.described())
        directory.claim()
        run._work_in(directory, monitor)
        return run

    @classmethod
    def opened(cls, path: str | os.PathLike) -> Opened:
        """A run's directory and what it was begun with; UnusableRun if it is none, or damaged."""
        directory, description = cls.directory_class.open(path)
        try:
            inputs, config = from_dict(cls.inputs_class, description["inputs"]), from_dict(cls.config_class, description["config"])
            description["digests"].items()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UnusableRun(f"{directory.config_path} is damaged ({in_words(error)})") from error
        return Opened(directory, inputs, config, description)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike,
        monitor: Monitor | None = None,
        live: Live | None = None,
        trust_checkpoint: bool = False,
        **changes: Any,
    ) -> Self:
        """Take a run up where its last saved state stands.

        Parameters
        ----------
        path : path
            The directory.
        monitor : Monitor, optional
            Told in words what is found on the way.
        live : Live, optional
            What was given as objects when it began has to be given again.
        trust_checkpoint : bool
            The directory may be someone else's: trust is given anew each time.
        **changes
            Options that may become others on the way, as a later end may.

        Returns
        -------
        Run
            Ready to go on.

        Raises
        ------
        UnusableRun
            The directory cannot be gone on with; the message says why.
        """
        monitor, live = monitor or Monitor(), live or Live()
        directory, inputs, config, description = cls.opened(path)
        begun = description.get("live", [])
        if live.names() != begun:
            raise UnusableRun(
                f"{path} was begun in Python with these objects: {', '.join(begun) or 'none'}; go on there with the same, "
                "stabie_ase.resume(..., observables=..., criteria=...)"
            )
        if inputs.trust_checkpoint and not trust_checkpoint:
            raise UnusableRun(f"{path} was begun with --trust-checkpoint; give it again if you still trust the model")
        check_unchanged(path, inputs, config, description["digests"])
        directory.claim()
        warn_of_other_versions(description.get("versions", {}))
        if trust_checkpoint != inputs.trust_checkpoint:
            inputs = replace(inputs, trust_checkpoint=trust_checkpoint)
        run = cls.set_up(inputs, replace(config, **changes), monitor, live)
        run.settle(monitor)
        run._work_in(directory, monitor)
        return run

    def _work_in(self, directory: WorkDirectory, monitor: Monitor) -> None:
        """From the last state that the directory holds, or from the start."""
        self.directory = directory
        self.arrange()
        saved = directory.load()
        if saved is not None:
            try:
                self.restore(saved["state"])
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise directory.damaged_state(error) from error
        directory.cut_to(saved)
        monitor.began(directory.path, self.onwards)
