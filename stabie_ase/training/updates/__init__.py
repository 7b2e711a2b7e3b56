"""Update rules: how samples become a change of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

from stabie_ase.boltzmann import Grouping
from stabie_ase.system import plugins, spec
from stabie_ase.training.options import FinetuneOptions
from stabie_ase.training.schedule import STABILITY
from stabie_ase.training.updates.base import UpdateInfo, UpdateRule, Windows, Work
from stabie_ase.training.updates.labels_only import LabelsOnly
from stabie_ase.training.updates.natural import NaturalGradient
from stabie_ase.training.updates.penalized import PenalizedGradient
from stabie_ase.training.updates.regression import Regression

UPDATES = {
    "natural": "stabie_ase.training.updates.natural:NaturalGradient",
    "labels-only": "stabie_ase.training.updates.labels_only:LabelsOnly",
    "regression": "stabie_ase.training.updates.regression:Regression",
    "penalized": "stabie_ase.training.updates.penalized:PenalizedGradient",
}
"""By their names; those of other packages are entry points of the group "stabie_ase.updates"."""

__all__ = [
    "UPDATES",
    "LabelsOnly",
    "NaturalGradient",
    "PenalizedGradient",
    "Regression",
    "UpdateInfo",
    "UpdateRule",
    "Windows",
    "Work",
    "chosen_rule",
    "ignored",
    "rule_class",
    "usual_rule",
]


def usual_rule(groupings: Sequence[Grouping], goal: str) -> str:
    """The update rule where none is asked for.

    Parameters
    ----------
    groupings : sequence of Grouping
        Of all conditions.
    goal : str

    Returns
    -------
    str
        "regression" for liquids of molecules: the natural gradient of a liquid raises what is cheapest and leaves other failures
        where they are. Else, and for observables that are matched, "natural".
    """
    of_molecules = all(grouping.conformers is not None or grouping.blamed is not None for grouping in groupings)
    return "regression" if of_molecules and goal == STABILITY else "natural"


def chosen_rule(config: FinetuneOptions, groupings: Sequence[Grouping]) -> str:
    """The update rule that options ask for, or the usual one.

    Parameters
    ----------
    config : FinetuneOptions
    groupings : sequence of Grouping
        Of all conditions.

    Returns
    -------
    str
        As `rule_class` reads it.
    """
    return usual_rule(groupings, config.goal) if config.update.rule is None else config.update.rule


def ignored(rule: str, config: FinetuneOptions) -> list[str]:
    """Options of updates and labels that are given and that a rule has no use for.

    Parameters
    ----------
    rule : str
        As `rule_class` reads it.
    config : FinetuneOptions

    Returns
    -------
    list of str
        Their names.
    """
    given = [name for own in (config.update, config.labels) for name, x in vars(own).items() if x != getattr(type(own)(), name)]
    return [name for name in given if name in rule_class(rule)[0].unused]


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
