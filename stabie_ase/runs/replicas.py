"""Replicas' frames from trajectories and runs of `stabie-ase md`, and those of them that come before a failure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms

from stabie_ase.observables.series import EQUAL, times_fs
from stabie_ase.runs.md import MDDirectory
from stabie_ase.runs.report.view import read_frames
from stabie_ase.stability import VERDICT, BondLengthDeviation, Criterion, EnergyRange, criteria_from, default_criteria
from stabie_ase.stability.frames import first_failure
from stabie_ase.stability.watch import NOT_FINITE
from stabie_ase.structures.reference.frames import UnusableReference, each, frames_by_file
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Topology
from stabie_ase.system.options import BadOption
from stabie_ase.system.spec import parse

OFF_BEAT = "last one at another interval"
"""Why the frame at which `stabie-ase md` has stopped or ended is left out of what needs equal intervals."""


@dataclass(frozen=True)
class Replica:
    """Frames of one replica in the order of time.

    Attributes
    ----------
    name : str
        For messages.
    images : list of Atoms
        Those that count.
    left_out : int
        Frames that do not count any more.
    why : str
        The cause of that; empty if there are none.
    """

    name: str
    images: list[Atoms]
    left_out: int = 0
    why: str = ""

    def before(self, frame: int, why: str) -> Replica:
        """Without the frames from that one on."""
        n = len(self.images) - frame
        return self if n <= 0 else replace(self, images=self.images[:frame], left_out=self.left_out + n, why=self.why or why)

    def on_beat(self) -> Replica:
        """Without a last frame that comes sooner after the one before than the others do."""
        times = times_fs(self.images) if len(self.images) > 2 else None
        if times is None:
            return self
        gaps = np.diff(times)
        early = gaps[-1] < (1.0 - EQUAL) * np.median(gaps[:-1])
        return self.before(len(self.images) - 1, OFF_BEAT) if early else self


Trajectories = str | os.PathLike | Sequence[str] | Sequence[Atoms] | Sequence[Sequence[Atoms]]
"""Names of files or of runs, one replica's frames in memory, or those of several replicas."""


def replicas_of(frames: Trajectories) -> list[Replica]:
    """The replicas in files, runs or memory.

    Parameters
    ----------
    frames : path, several, or frames in memory
        Each file is a replica, or several where its frames' info tells which `replica` they are of, as `stabie-ase md --one-file` writes
        them. A directory is one of `stabie-ase md`, whose replicas end where it has stopped them.

    Returns
    -------
    list of Replica
        All of one system.

    Raises
    ------
    ValueError
        No frames, files that cannot be read, one of them twice, different systems.
    """
    if isinstance(frames, (str, os.PathLike)) or all(isinstance(part, (str, os.PathLike)) for part in frames):
        found = [replica for name in each(frames) for replica in _named(name)]  # type: ignore[arg-type]
    else:
        groups = [frames] if all(isinstance(part, Atoms) for part in frames) else frames
        found = [Replica(f"replica {k}", list(group)) for k, group in enumerate(groups)]  # type: ignore[arg-type]
    found = [replica for replica in found if replica.images]
    if not found:
        raise UnusableReference("there are no frames; expected one trajectory or more")
    _check_one_system(found)
    return found


def _check_one_system(replicas: Sequence[Replica]) -> None:
    names, first = [replica.name for replica in replicas], replicas[0].images[0]
    for name in names:
        if names.count(name) > 1:
            raise UnusableReference(f"{name} is given twice, and would count twice; give it once")
    for replica in replicas:
        for k, atoms in enumerate(replica.images):
            if not np.array_equal(atoms.numbers, first.numbers) or (atoms.pbc != first.pbc).any():
                raise UnusableReference(
                    f"{replica.name}: frame {k} is of {_system(atoms)}, the first one of {_system(first)}; "
                    "expected one system, its atoms in one order"
                )


def _system(atoms: Atoms) -> str:
    return f"{atoms.get_chemical_formula()}, pbc {''.join('FT'[flag] for flag in atoms.pbc.astype(int))}"


def _named(name: str) -> list[Replica]:
    """Those in one file, in all that fit a pattern, or in a run's directory."""
    if os.path.isdir(name):
        return _of_run(name)
    return [replica for source, images in frames_by_file(name) for replica in _by_replica(source, images)]


def _by_replica(source: str, images: list[Atoms]) -> list[Replica]:
    told = [atoms.info.get("replica") for atoms in images]
    if len(set(told)) < 2 or None in told:
        return [Replica(source, images)]
    return [
        Replica(f"{source}: replica {k}", [atoms for atoms, other in zip(images, told) if other == k]) for k in sorted(set(told))
    ]


def _of_run(path: str) -> list[Replica]:
    """Each up to where the run has stopped it."""
    MDDirectory.open(path)  # refuses what is no such run
    directory = MDDirectory(path)
    files = sorted((directory.path / "frames").glob("replica-*.traj")) or [directory.path / "frames.traj"]
    found = [replica for file in files if file.exists() for replica in _by_replica(*frames_by_file(str(file))[0])]
    if not found:
        raise UnusableReference(f"{path} has no frames yet")
    unstable = read_frames(directory.unstable.path) if directory.unstable.path.exists() else []
    stopped = {atoms.info["replica"]: atoms.info for atoms in unstable}
    return [_until(replica, stopped.get(replica.images[0].info["replica"])) for replica in found]


def _until(replica: Replica, failure: dict | None) -> Replica:
    if failure is None:
        return replica
    times = np.array([atoms.info["time_ps"] for atoms in replica.images])
    late = times > failure["time_ps"] - 1e-9
    return replica.before(int(late.argmax()), str(failure["criterion"])) if late.any() else replica


def finite(replica: Replica) -> Replica:
    """Its frames before the first whose positions, momenta or periodic lattice vectors are not finite."""
    for k, atoms in enumerate(replica.images):
        cell = atoms.cell.array[atoms.pbc]
        if not all(np.isfinite(x).all() for x in (atoms.positions, cell, atoms.arrays.get("momenta", 0.0))):
            return replica.before(k, NOT_FINITE)
    return replica


def with_first_bonds(replicas: Sequence[Replica]) -> list[Atoms]:
    """Frames that bonds may be told from: up to the first in each replica that has lost a bond of the first frames of all."""
    topology = Topology.from_frames([replica.images[0] for replica in replicas])
    if not bool(topology.bonded.any()):
        return [atoms for replica in replicas for atoms in replica.images]
    criterion, found = BondLengthDeviation.from_topology(topology, VERDICT), []
    for replica in replicas:
        failure = first_failure(replica.images, [criterion])
        found += replica.images[: failure.frame] if failure else replica.images
    if not found:
        raise UnusableReference("the first frames have no bonds in common; give frames that are known to be good with --ref")
    return found


def criteria_of_frames(text: str | None, setting: Setting, by_reference: bool) -> list[Criterion]:
    """The criteria that suit the system and can be told from frames alone, and those of `text`.

    Parameters
    ----------
    text : str or None
        As `criteria_from` reads it.
    setting : Setting
    by_reference : bool
        The setting is that of a reference; of the frames themselves none is closer than they ever are.

    Returns
    -------
    list of Criterion

    Raises
    ------
    ValueError
        As of `criteria_from`, and a criterion that needs the energies of a model, or a temperature that nobody knows.
    """
    known = bool(np.isfinite(setting.temperature_K))
    unsuited = {"energy"} | (set() if known else {"temperature"}) | (set() if by_reference else {"angles", "contacts", "intermolecular"})
    usual = [str(spec) for spec in parse(default_criteria(setting, VERDICT, chosen=bool(text))) if spec.name not in unsuited]
    found = criteria_from(text or "", setting, ",".join(usual))
    for criterion in found:
        if isinstance(criterion, EnergyRange):
            raise BadOption("the criterion 'energy' needs the energies of a model, which frames do not tell; leave it out")
        if criterion.name == "temperature" and not known:
            raise BadOption("the criterion 'temperature' needs a temperature, which the frames do not tell; give --temperature in K")
    return found


def before_failure(replica: Replica, criteria: Sequence[Criterion], temperature_K: float) -> Replica:
    """Its frames before the first that a criterion calls unstable, with a heat bath of a temperature in K."""
    failure = first_failure(replica.images, criteria, temperature_K) if replica.images and criteria else None
    return replica.before(*failure) if failure else replica


def left_out_in_words(replicas: Sequence[Replica]) -> str:
    """How many frames do not count and why; empty if all do."""
    out = [replica for replica in replicas if replica.left_out]
    if not out:
        return ""
    frames, total = sum(replica.left_out for replica in out), sum(replica.left_out + len(replica.images) for replica in replicas)
    causes = ", ".join(f"{cause} {n}" for cause, n in Counter(replica.why for replica in out).most_common())
    return f"Left out: {frames} of {total} frames, at the end of {len(out)} of {len(replicas)} replicas ({causes})"
