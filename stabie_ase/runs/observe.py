"""Observables of trajectories that are there already."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ase import Atoms

from stabie_ase.observables import OBSERVABLES, TARGET, VALUE, Observable, default_observable, observables_from
from stabie_ase.observables.averages import SlicedMeans
from stabie_ase.observables.dynamical import DYNAMICAL, Dynamical
from stabie_ase.observables.errors import mean_errors
from stabie_ase.observables.observed import Observed
from stabie_ase.observables.series import TimeSeries, interval_of, times_fs
from stabie_ase.observables.target import energetics_of
from stabie_ase.runs.monitor import Monitor
from stabie_ase.runs.objects import Frames, texts_and_objects
from stabie_ase.runs.options import ObserveOptions
from stabie_ase.runs.replicas import (
    Replica,
    Trajectories,
    before_failure,
    criteria_of_frames,
    finite,
    left_out_in_words,
    replicas_of,
    with_first_bonds,
)
from stabie_ase.runs.report.observed import check_output, write_observed
from stabie_ase.stability import Criterion
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import UnusableReference, common_temperature, read_frames
from stabie_ase.structures.setting import Setting
from stabie_ase.system import plugins
from stabie_ase.system.options import BadOption, from_dict
from stabie_ase.system.spec import BadSpec, parse

MAX_SLICES = 1024
"""Stretches of time of each replica whose means are kept for the error."""

FRAMES_AT_ONCE = 256
"""Whose static observables are worked out together."""

Quantity = Observable | Dynamical


def observe(
    frames: Trajectories,
    *,
    observables: str | Sequence[str | Quantity] | None = None,
    reference: Frames | None = None,
    criteria: str | Sequence[str | Criterion] | None = None,
    interval_fs: float | None = None,
    temperature_K: float | None = None,
    output: str | os.PathLike | None = None,
    monitor: Monitor | None = None,
) -> dict[str, dict[str, Any]]:
    """Observables of trajectories, up to the first failure of each replica; `stabie-ase observe` is this function.

    Parameters
    ----------
    frames : path, several, or frames in memory
        See `replicas_of`: trajectories, a run of `stabie-ase md`, atoms of one replica or a sequence of them for each.
    observables : str, or sequence of str or of objects, optional
        As on the command line, or made already: any `Observable` and, of frames at equal intervals, any of
        `stabie_ase.observables.dynamical.DYNAMICAL`; what suits the system if not given.
    reference : path, several, or frames in memory, optional
        That observables and criteria are laid out for; those of `frames` themselves if not given.
    criteria : str, or sequence of str or of objects, optional
        That end a replica, beside those that suit the system and need no energies; an empty sequence for none at all.
    interval_fs : float, optional
        Time between two frames, in fs; as their info tells it if not given.
    temperature_K : float, optional
        As their info tells it if not given.
    output : path, optional
        A new file to write to, .json, .csv or .png.
    monitor : Monitor, optional
        Told in words what is left out, and how far the work has come.

    Returns
    -------
    dict of str to dict
        By the observables' names, as `Observed.as_dict` has it, with the frames left out.

    Raises
    ------
    ValueError
        In one line, what was given, what was expected and what to try; nothing has been written.

    Examples
    --------
    >>> import stabie_ase
    >>> found = stabie_ase.observe("aspirin.xyz", observables="hr,bond-length:C-O")
    >>> found["bond-length:C-O"]["label"], found["hr"]["n_frames"]
    ('bond length (Å)', 50)
    """
    monitor = monitor or Monitor()
    if output is not None:
        check_output(output)
    texts, live = texts_and_objects(observables=observables, criteria=criteria)
    config = from_dict(ObserveOptions, texts | {"interval_fs": interval_fs, "temperature_K": temperature_K})
    replicas = [finite(replica) for replica in replicas_of(frames)]
    is_judged = criteria is None or bool(len(criteria))
    setting = _setting(replicas, reference, config, is_judged)
    quantities = _quantities(live.observables, config.observable, setting)
    if is_judged:
        judges = live.criteria + criteria_of_frames(config.criterion, setting, reference is not None)
        replicas = [before_failure(replica, judges, setting.temperature_K) for replica in replicas]
        monitor.message(f"Unstable: {'; '.join(judge.describe() for judge in judges) or 'only what is not finite'}")
    if any(isinstance(quantity, Dynamical) for quantity in quantities):
        replicas = [replica.on_beat() for replica in replicas]
    if any(replica.left_out for replica in replicas):
        monitor.message(left_out_in_words(replicas))
    found = _observed([replica for replica in replicas if replica.images], quantities, config, monitor)
    left_out = sum(replica.left_out for replica in replicas)
    result = {name: observed.as_dict() | {"n_left_out": left_out} for name, observed in found.items()}
    if output is not None:
        write_observed(result, output)
    return result


def _setting(replicas: Sequence[Replica], reference: Frames | None, config: ObserveOptions, is_judged: bool) -> Setting:
    """Of a reference, or of the frames themselves, those before bonds break if that shall be judged."""
    begun = [replica for replica in replicas if replica.images]
    if not begun:
        raise UnusableReference("no frame is finite")
    everything = [atoms for replica in begun for atoms in replica.images]
    temperature = config.temperature_K or common_temperature(everything) or math.nan
    if reference is None:
        return Setting(with_first_bonds(begun) if is_judged else everything, temperature, common_temperature(everything))
    known = _reference_frames(reference)
    for atoms in known:
        if atoms.numbers.tolist() != everything[0].numbers.tolist():
            raise UnusableReference(
                f"the reference is of {atoms.get_chemical_formula()}, the frames of {everything[0].get_chemical_formula()}; "
                "expected one system, its atoms in one order"
            )
    return Setting(known, temperature, common_temperature(known))


def _reference_frames(reference: Frames) -> list[Atoms]:
    if not isinstance(reference, (str, os.PathLike)) and all(isinstance(atoms, Atoms) for atoms in reference):
        return list(reference)  # type: ignore[arg-type]
    return read_frames(reference)  # type: ignore[arg-type]


def _quantities(objects: Sequence[Quantity], text: str | None, setting: Setting) -> list[Quantity]:
    """All that is to be observed, in the order in which it is given, objects first."""
    if text is None and not objects:
        text = default_observable(setting)
    wanted = parse(text or "")
    for spec in wanted:
        for name in ("weight", TARGET, VALUE):
            if name in spec.options:
                raise BadSpec(f"{str(spec)!r} has a {name}, which counts in training and evaluate only; leave it out")
    classes = [plugins.find(spec, "observable", "stabie_ase.observables", {**OBSERVABLES, **DYNAMICAL}) for spec in wanted]
    static = [str(spec) for spec, cls in zip(wanted, classes) if not issubclass(cls, Dynamical)]
    made = iter(observables_from(static, setting) if static else [])
    found = [*objects, *(cls.from_spec(spec, setting) if issubclass(cls, Dynamical) else next(made) for spec, cls in zip(wanted, classes))]
    names = [quantity.name for quantity in found]
    for name in names:
        if names.count(name) > 1:
            raise BadSpec(f"observable {name!r} is given twice; name each once")
    return found


def _observed(
    replicas: Sequence[Replica], quantities: Sequence[Quantity], config: ObserveOptions, monitor: Monitor
) -> dict[str, Observed]:
    """Each quantity by its name."""
    if not replicas:
        raise UnusableReference("no frame comes before a failure; --no-criterion has all count that are finite")
    moving = [quantity for quantity in quantities if isinstance(quantity, Dynamical)]
    if config.interval_fs is not None and not moving:
        raise BadOption("interval_fs is given, but none of the observables depends on time; leave out --interval")
    series = _series(replicas, config.interval_fs) if moving else []
    found = {}
    for k, quantity in enumerate(quantities):

        def progress(done: float, k: int = k, name: str = quantity.name) -> None:
            monitor.progress("observe", k + done, len(quantities), name)

        progress(0.0)
        found[quantity.name] = quantity(series) if isinstance(quantity, Dynamical) else _mean(quantity, replicas, progress)
    monitor.progress("observe", len(quantities), len(quantities), "")
    return found


def _series(replicas: Sequence[Replica], interval_fs: float | None) -> list[TimeSeries]:
    """Of a replica of one frame, which tells no interval, that of the longest one."""
    usual = interval_of(max(replicas, key=lambda replica: len(replica.images)).images, interval_fs)
    return [
        TimeSeries.from_atoms(r.images, interval_fs if len(r.images) > 1 and times_fs(r.images) else usual) for r in replicas
    ]


def _mean(observable: Observable, replicas: Sequence[Replica], progress: Callable[[float], None]) -> Observed:
    """The mean of a static observable over all frames; `progress` is told the fraction that is done."""
    lengths = [len(replica.images) for replica in replicas]
    longest, n = max(lengths), sum(lengths)
    size = math.ceil(longest / MAX_SLICES)
    shape = (len(replicas), math.ceil(longest / size))
    means = SlicedMeans.none(*shape, observable.width)
    for k, replica in enumerate(replicas):
        for first in range(0, len(replica.images), FRAMES_AT_ONCE):
            images = replica.images[first : first + FRAMES_AT_ONCE]
            frame = first + torch.arange(len(images))
            values = observable.sample(AtomsBatch.from_atoms(images), None, energetics_of(observable, images))
            means = means + SlicedMeans.collect(values, torch.full_like(frame, k), frame // size, *shape)
            progress((sum(lengths[:k]) + first) / n)
    statistic = observable.statistic
    value, errors = statistic(means.sums.sum(dim=(0, 1)) / n), mean_errors(means, statistic)
    return Observed(observable.axis, value, errors, observable.label, n, len(replicas))
