"""Update rules: how samples become a change of the parameters."""

from __future__ import annotations

from stabie_ase.system import plugins, spec
from stabie_ase.training.updates.base import UpdateInfo, UpdateRule, Windows, Work
from stabie_ase.training.updates.labels_only import LabelsOnly
from stabie_ase.training.updates.natural import NaturalGradient
from stabie_ase.training.updates.penalized import PenalizedGradient

UPDATES = {
    "natural": "stabie_ase.training.updates.natural:NaturalGradient",
    "labels-only": "stabie_ase.training.updates.labels_only:LabelsOnly",
    "penalized": "stabie_ase.training.updates.penalized:PenalizedGradient",
}
"""By their names; those of other packages are entry points of the group "stabie_ase.updates"."""

__all__ = ["UPDATES", "LabelsOnly", "NaturalGradient", "PenalizedGradient", "UpdateInfo", "UpdateRule", "Windows", "Work", "rule_class"]


def rule_class(text: str) -> tuple[type[UpdateRule], spec.Spec]:
    """The update rule that is asked for.

    Parameters
    ----------
    text : str
        A name, or FILE.py:CLASS, with options.

    Returns
    -------
    rule : type
        Of `UpdateRule`.
    asked : Spec
        All that was asked of it.

    Raises
    ------
    BadSpec
        None, several, or one that there is not.
    """
    wanted = spec.parse(text)
    if len(wanted) != 1:
        raise spec.BadSpec(f"expected one update rule, got {text!r}; known: {', '.join(UPDATES)}")
    return plugins.find(wanted[0], "update rule", "stabie_ase.updates", UPDATES), wanted[0]
