"""What observables are matched to at a temperature: the reference, or data of their own, reweighted where they are of another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from stabie_ase.boltzmann.reweighting import PoorOverlap, temperature_weights
from stabie_ase.boltzmann.samples import GroupsOf
from stabie_ase.observables import Observable, Target
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import Curve, Number, Reference, TargetFrames
from stabie_ase.structures.reference.targets import composition
from stabie_ase.structures.setting import same_temperature
from stabie_ase.structures.topology import Groups

logger = logging.getLogger(__name__)

MAX_REFERENCE_DISTANCE = 30.0
"""Times the floor of a curve, beyond which it is doubted that a curve and a reference are of one quantity: frames of water by a
poor model are some ten away from experiment, a curve of another pair of elements a hundred."""


def targets_at(
    observables: Sequence[Observable],
    reference: Reference | TargetFrames,
    temperature_K: float,
    reweight: bool = True,
    strict: bool = False,
    groups_of: GroupsOf = Groups.systems,
) -> list[Target]:
    """Targets of observables for dynamics at a temperature.

    An observable with data of its own is matched to these, the others to the reference. Frames of another temperature are reweighted
    by their own energies (`temperature_weights`); within 5 % they are taken as they are, since the weights would cost more than
    they correct.

    Parameters
    ----------
    observables : sequence of Observable
    reference : Reference or TargetFrames
        With the temperature of its frames, if that is known, and their energies.
    temperature_K : float
        Of the dynamics.
    reweight : bool
        Otherwise frames of another temperature are taken as they are.
    strict : bool
        Refuse data of another temperature that cannot be reweighted; otherwise they are taken as they are, with a warning.
    groups_of : callable
        Groups of atoms that are samples; whole frames by default.

    Returns
    -------
    list of Target
        One for each observable; `source` tells what it was made of if that is not the reference as it is.

    Raises
    ------
    ValueError
        What `Target` refuses; and with `strict` a PoorOverlap.
    """
    weighted: dict[int, tuple[Tensor | None, str]] = {}  # by the data: several observables share those of the reference
    found = []
    for observable in observables:
        data = reference if observable.data is None else observable.data
        if id(data) not in weighted:
            weighted[id(data)] = _at(data, data is reference, temperature_K, reweight, strict)
        weights, note = weighted[id(data)]
        source = "; ".join(filter(None, [_name(data, data is reference) if note or data is not reference else "", note]))
        if isinstance(data, Curve):
            found.append(_of_curve(observable, data, reference))
        elif isinstance(data, Number):
            found.append(Target.from_number(observable, data))
        else:
            found.append(Target.from_frames(observable, data.frames, groups_of, weights, source, data.energies))
    return found


def _of_curve(observable: Observable, curve: Curve, reference: Reference | TargetFrames) -> Target:
    """The target, and how far the reference is from it: what the two count differently, as bonds may be, is seen by that."""
    target = Target.from_curve(observable, curve)
    mean = observable(AtomsBatch.from_atoms(reference.frames)).mean(dim=0)
    away = float((target.measure * (mean - target.value).abs()).sum())
    n, d = int(target.known.sum()), len(target.value)
    if target.floor and away > MAX_REFERENCE_DISTANCE * target.floor:
        logger.warning(
            "%s of the reference is %.2g away from %s, %.0f times what its errors explain; are they of one quantity?",
            observable.name, away, curve.source, away / target.floor,
        )  # fmt: skip
    return replace(target, source=f"{curve.source}, {n} of {d} bins; the reference is {away:.2g} away from it")


def _name(data: Curve | Reference | TargetFrames, is_reference: bool) -> str:
    return "the reference" if is_reference else data.source


def _at(
    data: Curve | Reference | TargetFrames, is_reference: bool, temperature_K: float, reweight: bool, strict: bool
) -> tuple[Tensor | None, str]:
    """Weights of frames, None where all count alike, and what to say of them."""
    told = data.temperature_K
    if same_temperature(told, temperature_K):
        return None, ""
    try:
        weights, effective = _weights(data, told, temperature_K, reweight)
    except PoorOverlap as error:
        why = f"{_name(data, is_reference)} is of {told:g} K, the dynamics are of {temperature_K:g} K: {error}"
        if strict:
            raise PoorOverlap(f"{why}; match observables to it as it is with --no-reweight, or choose another --temperature") from None
        logger.warning("%s; observables are matched to it as it is, and their errors hold the difference of the temperatures", why)
        return None, ""
    return weights, f"reweighted from {told:g} to {temperature_K:g} K, {effective:.3g} of {len(weights)} frames count effectively"


def _weights(data: Curve | Reference | TargetFrames, told: float, temperature_K: float, reweight: bool) -> tuple[Tensor, float]:
    """As of `temperature_weights`; PoorOverlap where there can be none."""
    if not reweight:
        raise PoorOverlap("reweighting was not asked for")
    if isinstance(data, Curve):
        raise PoorOverlap("a curve cannot be reweighted")
    if data.energies is None:
        raise PoorOverlap("its frames have no energies that would reweight them")
    if len({composition(atoms) + str(len(atoms)) for atoms in data.frames}) > 1:
        raise PoorOverlap("its frames are of several sizes or compositions, whose energies cannot be compared")
    return temperature_weights(data.energies, told, temperature_K)
