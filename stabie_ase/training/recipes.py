"""Recipes: other defaults of the options of fine-tuning. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLISHED: dict[str, Any] = {
    "thermostat": "nose-hoover",
    "window_fs": 1000.0,
    "upper_fraction": 0.75,
    "lower_fraction": 0.0,
    "failure_windows": 1e9,
    "max_learning_windows": 40,
    "gradient_clip": 1.0,
    "near_factor": 1e6,
    "average_fs": 0.0,
    "within_trajectories": False,
    "winsorized": False,
    "fluctuation_floor": 1e6,
}
"""Of Raja et al. (arXiv 2402.13984) for all systems: a learning phase goes on until no replica fails, all frames and bins count alike.

They do not tell a number of windows after which a learning phase ends anyway; 40 is ours, as is `decay` below.
"""

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "natural": {},
    "paper": PUBLISHED
    | {
        "update": "penalized:sgd,learning_rate=1e-3,penalty=10,decay=0.9",
        "observable": "hr",
        "criterion": "bonds:0.25",
        "timestep_fs": 0.5,
        "replicas": 128,
        "sample_every_fs": 50.0,
        "random_resets": 0.05,
    },
    "paper-liquid": PUBLISHED
    | {
        "update": "penalized:sgd,learning_rate=3e-3,penalty=0,decay=0.9",
        "observable": "bond-length",
        "criterion": "intermolecular:1.2",
        "timestep_fs": 1.0,
        "replicas": 8,
        "sample_every_fs": 100.0,
        "random_resets": 0.0,
        "estimator": "molecules",
    },
}
"""By their names: the defaults of this package, and those published for molecules and for water."""

IN_LIQUIDS = {"paper": "paper-liquid"}
"""What a recipe is where frames are periodic."""
