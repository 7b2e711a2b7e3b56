"""What one sample of the estimator is, from words: a whole system, a molecule, a neighbourhood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from stabie_ase.boltzmann.samples import GroupsOf
from stabie_ase.observables import Observable, Target
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.conformers import Conformers
from stabie_ase.structures.kind import MOLECULAR_LIQUID
from stabie_ase.structures.neighbourhoods import centre_distances, formulas, nearest, units, within
from stabie_ase.structures.reference import spread
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups
from stabie_ase.system.spec import BadSpec, did_you_mean, parse

MAX_DEFAULT_NEAREST = 12
"""Atoms around each in a system without molecules: the first shell of close-packed crystals and of simple liquids, first and second
of diamond's structure. An atom's energy is for the most part that of its pairs with these, and fewer would leave most pairs of a group
half outside."""

MAX_TRIED_FRAMES = 50
"""Reference frames whose groups are looked at before a run."""


MOST_CONDITIONAL = 256
"""Samples that stand for all where energies are conditional: each takes a system, and its frame one more."""


@dataclass(frozen=True)
class Grouping:
    """Which groups of atoms are samples of their own.

    Attributes
    ----------
    name : str
        As `grouping_from` reads it.
    of : callable
        From frames to their groups.
    lasting : bool
        Groups are of the same atoms in every frame, so that each has a trajectory.
    reason : str
        Why this one, in words.
    conformers : Conformers or None
        Where energies of groups are conditional, see `group_energies`.
    blamed : Grouping or None
        Molecules of a liquid, of any kind, where energies of the samples are not conditional: some of them fail, not all of a frame.
    """

    name: str
    of: GroupsOf
    lasting: bool = True
    reason: str = "as asked for"
    conformers: Conformers | None = None
    blamed: Grouping | None = None

    @property
    def whole(self) -> bool:
        """Whether each frame is one sample."""
        return self.of == WHOLE.of

    @property
    def drawn(self) -> int | None:
        """How many samples are to stand for all (`Estimator`); None where all do for themselves."""
        return None if self.conformers is None else MOST_CONDITIONAL

    def __call__(self, batch: AtomsBatch) -> Groups:
        """The groups of some frames."""
        return self.of(batch)

    def describe(self) -> str:
        """The name and the reason."""
        return f"{self.name} ({self.reason})"


WHOLE = Grouping("global", Groups.systems)
"""Each frame is one sample."""


def grouping_from(text: str, setting: Setting) -> Grouping:
    """Groups from words, as on the command line.

    Parameters
    ----------
    text : str
        "global", "molecules", "conditional" for molecules by their conditional energies (`group_energies`), "nearest:K" for each molecule
        with its K nearest, or "radius:R" for each with those within R Å; but for "conditional" atoms take the place of molecules where
        there are none.
    setting : Setting
        The system.

    Returns
    -------
    Grouping

    Raises
    ------
    BadSpec, ValueError
        Unknown words; groups that are the whole system or single molecules where they should not be; molecules of several kinds,
        which are not samples of one distribution.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from stabie_ase import Setting
    >>> from stabie_ase.boltzmann.grouping import grouping_from
    >>> grouping_from("nearest:4", Setting([bulk("Si", cubic=True)], 300.0)).name
    'nearest:4'
    """
    name, given = _read(text)
    if name == "global":
        return replace(WHOLE, blamed=_molecules(setting))
    topology = setting.topology
    makers: dict[str, Callable[..., Groups]] = {
        "molecules": Groups.molecules, "conditional": Groups.molecules, "nearest": nearest, "radius": within
    }  # fmt: skip
    of = partial(makers[name], topology=topology, **given)
    _check_sizes(text, of, setting, **given)
    kinds = sorted(set(formulas(topology)))
    if len(kinds) > 1:
        raise ValueError(
            f"--estimator {text} makes groups around molecules or atoms that differ ({', '.join(kinds[:4])}), which are not samples of "
            "one distribution; give --estimator global"
        )
    if name != "conditional":
        return Grouping(text, of, name == "molecules", blamed=_molecules(setting))
    if int(topology.molecule.max()) + 1 == len(topology.molecule):
        raise ValueError("--estimator conditional is for conformations of molecules, and these are atoms; give --estimator nearest:K")
    return Grouping(text, of, conformers=Conformers.of(setting.frames, topology))


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of one estimator."""
    readers: dict[str, Mapping[str, Callable]] = {
        "global": {}, "molecules": {}, "conditional": {}, "nearest": {"k": int}, "radius": {"radius": _positive}
    }  # fmt: skip
    wanted = parse(text)
    if len(wanted) != 1 or wanted[0].name not in readers:
        name = text if len(wanted) != 1 else wanted[0].name
        raise BadSpec(f"expected one estimator, got {text!r}; {did_you_mean(name, list(readers))}")
    spec = wanted[0]
    expected = readers[spec.name]
    given = spec.read(expected, next(iter(expected), None))
    if len(given) < len(expected):
        raise BadSpec(f"{text!r} gives no number, expected one as in nearest:{MAX_DEFAULT_NEAREST} or, in Å, radius:4")
    return spec.name, given


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise ValueError("expected a positive distance in Å")
    return value


def _check_sizes(text: str, of: GroupsOf, setting: Setting, radius: float | None = None, **_: Any) -> None:
    """Raise ValueError where groups of the reference are no neighbourhoods."""
    batch, n_atoms = _some_frames(setting), len(setting.topology.numbers)
    if radius is not None:
        _check_radius(text, radius, batch, setting)
    sizes = of(batch).group.bincount()
    if int(sizes.max()) == n_atoms:
        raise ValueError(f"--estimator {text} makes a group of all {n_atoms} atoms; make it smaller, or give --estimator global")


def _check_radius(text: str, radius: float, batch: AtomsBatch, setting: Setting) -> None:
    """Raise ValueError for a radius that reaches the images of its centre half-way, or nobody."""
    if bool(batch.pbc.all()):
        half_width = 0.5 / float(torch.linalg.inv(batch.cells.double()).norm(dim=1).max())
        if radius > half_width:
            raise ValueError(
                f"--estimator {text} reaches beyond half the width of the cell, {half_width:.3g} Å; give a smaller radius, or "
                "--estimator global"
            )
    shortest = min(_shortest(batch.select([k]), setting) for k in range(batch.n_systems))
    if radius <= shortest:
        raise ValueError(
            f"--estimator {text} finds nobody beside the centre: the smallest distance of two centres is {shortest:.3g} Å; give a larger "
            "radius, or --estimator nearest:K or molecules"
        )


def _shortest(batch: AtomsBatch, setting: Setting) -> float:
    distances = centre_distances(batch, units(setting.topology))
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return float(distances.min())


def _some_frames(setting: Setting) -> AtomsBatch:
    return AtomsBatch.from_atoms([setting.frames[k] for k in spread(len(setting.frames), MAX_TRIED_FRAMES)])


def suggested_grouping(setting: Setting) -> tuple[str, str]:
    """The estimator that suits a system, as `grouping_from` reads it, and why.

    Parameters
    ----------
    setting : Setting
        The system.

    Returns
    -------
    (str, str)
        Of an isolated system "global". Of a liquid or solid of molecules that are all alike "conditional"; of one of single atoms of
        one element "nearest" with `MAX_DEFAULT_NEAREST` of them, or so few that no group holds more than half of the atoms.
    """
    if not any(atoms.pbc.any() for atoms in setting.frames):
        return "global", "the system is not periodic"
    try:
        found = formulas(setting.topology)
    except ValueError:
        return "global", "the reference has no one set of bonds"
    n, kinds = len(found), sorted(set(found))
    if len(kinds) > 1:
        return "global", f"molecules or atoms that differ ({', '.join(kinds[:4])}) are not samples of one distribution"
    if n < len(setting.topology.numbers):
        return "conditional", f"the system is {n} molecules {kinds[0]}"
    k = min(MAX_DEFAULT_NEAREST, n // 2 - 1)
    return (f"nearest:{k}", f"the system is {n} atoms {kinds[0]}") if k > 0 else ("global", "the system has few atoms")


def choose_grouping(text: str | None, setting: Setting, observables: Sequence[Observable], potential: Potential) -> Grouping:
    """What is asked for, or else what suits the system, the potential and the observables.

    Parameters
    ----------
    text : str or None
        See `grouping_from`; None for what suits.
    setting : Setting
    observables : sequence of Observable
        Of which the mean over molecules has to be that of the whole.
    potential : Potential
        Which has to give energies of atoms.

    Returns
    -------
    Grouping

    Raises
    ------
    BadSpec, ValueError
        What is asked for there is not, or not for this system, these observables or this potential.
    """
    suggested, reason = suggested_grouping(setting)
    if text is not None:
        grouping = grouping_from(text, setting)
        if text == suggested:  # as a run that goes on asks for what it once chose
            grouping = replace(grouping, reason=reason)
        if _needs_atoms(grouping, observables) and not potential.gives_atomic_energies:
            raise ValueError(
                f"--estimator {text} needs energies of atoms, and the {potential.family} potential gives none; give --estimator global"
            )
        return grouping
    text = suggested
    if text == "global":
        return replace(grouping_from(text, setting), reason=reason)
    if text == "conditional" and not any(observable.internal for observable in observables):
        text, reason = "molecules", f"{reason}, and nothing that is matched is of their conformations"
    grouping = replace(grouping_from(text, setting), reason=reason)
    if _needs_atoms(grouping, observables) and not potential.gives_atomic_energies:
        reason = f"{text} would suit, but the {potential.family} potential gives no energies of atoms"
        return replace(grouping_from("global", setting), reason=reason)
    unfit = next((name for name in (_unfit(observable, grouping, setting) for observable in observables) if name), None)
    return grouping if unfit is None else replace(grouping_from("global", setting), reason=f"{text} would suit, but {unfit}")


def _molecules(setting: Setting) -> Grouping | None:
    """Those of a liquid, alike or not, by their conditional energies; None of other systems, and of a single molecule."""
    if setting.kind.name != MOLECULAR_LIQUID or not setting.bonds_last or len(setting.topology.members) < 2:
        return None
    of = partial(Groups.molecules, topology=setting.topology)
    return Grouping("molecules", of, conformers=Conformers.of(setting.frames, setting.topology))


def _needs_atoms(grouping: Grouping, observables: Sequence[Observable]) -> bool:
    """Whether energies of some groups are sums over their atoms, see `Samples.by_energies`."""
    conditional = grouping.conformers is not None and all(observable.internal for observable in observables)
    return not (grouping.whole or conditional)


def _unfit(observable: Observable, grouping: Grouping, setting: Setting) -> str | None:
    """Why an observable has no meaning for some groups, or another one; None where it has."""
    if observable.needs:
        return f"{observable.name} is of whole systems"
    frames = _some_frames(setting).to_atoms()
    try:
        own, whole = (Target.from_frames(observable, frames, of).value for of in (grouping, Groups.systems))
    except ValueError as error:
        return f"not for {observable.name}: {error}"
    near = own.shape == whole.shape and torch.allclose(own, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))
    return None if near or not grouping.lasting else f"{observable.name} of the system is not a mean over molecules"
