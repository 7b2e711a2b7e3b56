"""Whether labels and a model belong together: units, signs, molecules, levels of theory. Seen before any dynamics are run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError

from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import NeighborList, neighbor_list
from stabie_ase.structures.reference import Reference, spread
from stabie_ase.structures.reference.targets import composition
from stabie_ase.system.options import BadOption
from stabie_ase.training.labels import LabelledFrames, predictions

logger = logging.getLogger(__name__)

MAX_PREDICTED_FRAMES = 50
"""Frames that are predicted."""

MIN_COMPARED_FRAMES = 10
"""Frames of one composition from which on their energies are compared."""

MIN_CORRELATION = 0.9
"""Correlation from which on two calculations are of the same thing: what is left is a factor."""

MAX_UNRELATED_CORRELATION = 0.5
"""Correlation below which two calculations are not of the same thing."""

MAX_LOG_FACTOR = 0.2
"""Logarithm of a factor by which it may be off a known one: forces of a poor model are some 10 % too soft."""

INVERSE_LOG_PENALTY = 0.1
"""Added to that where it is the model that has the unit: data in other units are more common than models trained on them."""

MAX_OFFSET_PER_ATOM = 1.0
"""In eV an atom, between mean energies: cohesive energies of methods do not differ by more, reference energies of atoms do."""

MAX_LOG_RATIO = 0.01
"""Logarithm by which ratios of total energies may differ: by less do total energies of two methods."""

ENERGY_UNITS = {
    "kcal/mol": units.mol / units.kcal,
    "kJ/mol": units.mol / units.kJ,
    "Hartree": 1.0 / units.Hartree,
    "Ry": 1.0 / units.Rydberg,
    "meV": 1e3,
}
"""A value in each of these is so many times the value in eV."""

FORCE_UNITS = {f"{name}/Å": factor for name, factor in ENERGY_UNITS.items()} | {
    f"{name}/Bohr": factor * units.Bohr for name, factor in ENERGY_UNITS.items()
}
"""The same of forces, in eV/Å."""


STRAIN = 1e-4
"""Of lengths, for the finite difference of a stress."""

MAX_STRESS_ERROR = 0.02
"""Fraction by which the finite difference may be off: it is exact to a part in ten thousand in double precision."""


class InconsistentLabels(ValueError):
    """Labels that cannot be those of what a model was made for."""


class Agreement(NamedTuple):
    """Of labels with predictions.

    Attributes
    ----------
    factor : float
        Slope of the labels over the predictions, without its sign. Trained models predict means, so that errors do not bend it.
    correlation : float
        0 where one of them does not vary.
    """

    factor: float
    correlation: float

    @classmethod
    def of(cls, labels: np.ndarray, predicted: np.ndarray) -> Agreement:
        """From arrays of one shape that are zero on average."""
        a, b = np.linalg.norm(labels), np.linalg.norm(predicted)
        if not a > 0 or not b > 0 or not np.isfinite(a * b):
            return cls(np.nan, 0.0)
        correlation = float(np.sum(labels * predicted) / (a * b))
        return cls(abs(correlation) * float(a / b), correlation)


def nearest_unit(factor: float, known: Mapping[str, float]) -> tuple[str, bool] | None:
    """The unit whose factor is the nearest.

    Parameters
    ----------
    factor : float
        Labels over predictions.
    known : mapping of str to float
        As `FORCE_UNITS`.

    Returns
    -------
    (str, bool) or None
        Its name, and whether it is the labels that have it; None if none is near.
    """
    if not factor > 0:
        return None
    log = np.log(factor)
    near = [(abs(log - np.log(value)), name, True) for name, value in known.items()]
    near += [(abs(log + np.log(value)) + INVERSE_LOG_PENALTY, name, False) for name, value in known.items()]
    distance, name, of_labels = min(near)
    return (name, of_labels) if distance < MAX_LOG_FACTOR and distance < abs(log) else None


def check_labels(potential: Potential, labelled: Reference, model: str, what: str) -> None:
    """Hold the labels of some frames against a model's predictions; what is only likely to be wrong is a warning.

    Parameters
    ----------
    potential : Potential
    labelled : Reference
    model : str
        What to call the model.
    what : str
        What to call the frames.

    Raises
    ------
    InconsistentLabels
        Forces or energies are those predicted but for the factor between two units, or forces but for their sign.
    """
    frames = labelled.subset(spread(len(labelled), MAX_PREDICTED_FRAMES))
    energies, forces = (x.cpu().numpy() for x in predictions(potential, LabelledFrames.from_reference(frames, potential.device)))
    if not (np.isfinite(energies).all() and np.isfinite(forces).all()):
        logger.warning("%s predicts numbers that are not finite for %s; is it a model of this system?", model, what)
        return
    labels = np.concatenate(frames.forces)
    follow = _check_forces(labels, forces, model, what)
    _check_energies(frames, energies, follow, model, what)


def _check_forces(labels: np.ndarray, forces: np.ndarray, model: str, what: str) -> bool:
    """Whether the labels follow the predictions."""
    factor, correlation = Agreement.of(labels, forces)
    unit = nearest_unit(factor, FORCE_UNITS)
    suspects = [_in_words(unit, "eV/Å")] if unit and abs(correlation) > MAX_UNRELATED_CORRELATION else []
    suspects += ["they look to be gradients, forces have the opposite sign"] if correlation < -MAX_UNRELATED_CORRELATION else []
    if suspects and abs(correlation) > MIN_CORRELATION:
        raise InconsistentLabels(
            f"the forces of {what} are {np.copysign(factor, correlation):.3g} times those that {model} predicts "
            f"(correlation {correlation:.2f}): {' and '.join(suspects)}; convert them"
        )
    rms, error = (float(np.sqrt(np.mean(np.square(x)))) for x in (labels, labels - forces))
    if suspects or error >= rms:
        suspects = suspects or ["other units, another molecule, --head or level of theory than the model was made for"]
        logger.warning(
            "%s predicts the forces of %s with an error of %.3g eV/Å, they are %.3g eV/Å (root mean squares; correlation %.2f); "
            "first suspect: %s", model, what, error, rms, correlation, " and ".join(suspects),
        )  # fmt: skip
    return correlation > MIN_CORRELATION and error < rms


def _check_energies(frames: Reference, energies: np.ndarray, forces_follow: bool, model: str, what: str) -> None:
    """Hold the differences of energies between frames of one composition against those predicted."""
    formulas = np.array([atoms.get_chemical_formula() for atoms in frames.frames])
    groups = [group for one in np.unique(formulas) if len(group := np.flatnonzero(formulas == one)) >= MIN_COMPARED_FRAMES]
    if not groups:
        return
    factor, correlation = Agreement.of(
        *(np.concatenate([x[group] - x[group].mean() for group in groups]) for x in (frames.energies, energies))
    )
    unit = nearest_unit(factor, ENERGY_UNITS)
    if unit and (correlation > MIN_CORRELATION or _same_ratio(frames.energies, energies, unit)):
        raise InconsistentLabels(
            f"the energies of {what} vary {factor:.3g} times as much as those that {model} predicts (correlation "
            f"{correlation:.2f}): {_in_words(unit, 'eV')}; convert them"
        )
    offset = float(np.mean((frames.energies - energies) / [len(atoms) for atoms in frames.frames]))
    if abs(offset) > MAX_OFFSET_PER_ATOM or (forces_follow and correlation < MAX_UNRELATED_CORRELATION):
        suspect = _in_words(unit, "eV") if unit else "another level of theory than the model's, or another --energy-key"
        logger.warning(
            "the energies of %s are %.3g eV an atom from those that %s predicts, with a correlation of %.2f; first suspect: %s",
            what, offset, model, correlation, suspect,
        )  # fmt: skip


def _same_ratio(labels: np.ndarray, energies: np.ndarray, unit: tuple[str, bool]) -> bool:
    """Whether total energies have the ratio of a unit and eV."""
    name, of_labels = unit
    ratio, factor = labels.mean() / energies.mean(), ENERGY_UNITS[name] ** (1 if of_labels else -1)
    return bool(ratio > 0 and abs(np.log(ratio / factor)) < MAX_LOG_RATIO)


def _in_words(unit: tuple[str, bool], expected: str) -> str:
    name, of_labels = unit
    if of_labels:
        return f"they look to be in {name}, expected {expected}"
    return f"the model looks to be trained in {name}, not {expected}"


def check_same_system(frames: Sequence[Atoms], others: Sequence[Atoms], what: str, than: str) -> None:
    """Raise InconsistentLabels if no composition of one is among those of the other; larger cells of a crystal are the same."""
    of_frames, of_others = ({composition(x): x.get_chemical_formula() for x in images} for images in (frames, others))
    if not of_frames.keys() & of_others.keys():
        shown = [", ".join(list(formulas.values())[:5]) for formulas in (of_frames, of_others)]
        raise InconsistentLabels(f"{what} holds {shown[0]}, but {than} holds {shown[1]}: frames of another system")


def check_stress(potential: Potential, frames: Sequence[Atoms], what: str) -> None:
    """Hold the pressure that a model gives against the change of its energy with the volume, dU/dV by a finite difference.

    Parameters
    ----------
    potential : Potential
    frames : sequence of Atoms
        Of which the first is looked at.
    what : str
        What to call them.

    Raises
    ------
    BadOption
        Frames without a cell, a model without stress.
    InconsistentLabels
        A stress that is not the derivative of the energy.
    """
    atoms = frames[0]
    if not all(one.pbc.all() for one in frames):
        raise BadOption(f"a pressure is given, but {what} is not periodic in all directions; leave it out, or give frames with a cell")
    exact = copy.deepcopy(potential).to(dtype=torch.float64)  # in single precision the difference would drown

    def energy_at(strain: float) -> float:
        return float(exact.compute(*_neighbors_of(atoms, strain, exact)).energies)

    try:
        stress = exact.compute(*_neighbors_of(atoms, 0.0, exact), stress=True).stress
    except PropertyNotImplementedError as error:
        raise BadOption(f"a pressure needs the stress, which the model does not give ({error}); leave the pressure out") from error
    virial = float(stress.diagonal(dim1=1, dim2=2).sum()) * atoms.get_volume()
    difference = (energy_at(STRAIN) - energy_at(-STRAIN)) / (2.0 * STRAIN)
    scale = max(abs(virial), abs(difference), len(atoms) * units.kB * 300.0)
    if not abs(virial - difference) <= MAX_STRESS_ERROR * scale:
        raise InconsistentLabels(
            f"the model's stress is not the derivative of its energy: a relative growth of {what} changes it by {virial:.4g} eV by "
            f"the stress and by {difference:.4g} eV by a finite difference; dynamics at constant pressure would go wrong"
        )


def _neighbors_of(atoms: Atoms, strain: float, potential: Potential) -> tuple[AtomsBatch, NeighborList]:
    """A frame, grown, with its neighbours."""
    grown = atoms.copy()
    grown.set_constraint()
    grown.set_cell(atoms.cell * (1.0 + strain), scale_atoms=True)
    batch = AtomsBatch.from_atoms([grown], device=potential.device)
    return batch, neighbor_list(batch, potential.cutoff)


def check_inputs(potential: Potential, model: str, reference: Reference, validation: Reference | None = None) -> None:
    """Hold a model against the labels of its reference and of the validation frames; InconsistentLabels before a run that goes wrong."""
    check_labels(potential, reference, model, "the reference")
    if validation is not None:
        check_same_system(validation.frames, reference.frames, "--valid", "the reference")
        check_labels(potential, validation, model, "--valid")
