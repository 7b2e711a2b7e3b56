"""How far the neighbours of an atom reach, as a reference shows it."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d, minimum_filter1d

from stabie_ase.observables.rdf import RadialDistribution
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.chains import bonded_chains
from stabie_ase.structures.elements import pair_name
from stabie_ase.structures.reference.frames import spread
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import BOND_FACTOR, covalent_sums

MAX_FRAMES = 50
"""Reference frames that a first shell is taken from."""

RANGE, BIN_WIDTH = 8.0, 0.05
"""Of the radial distribution function in which a first shell is looked for, in Å."""

SMOOTHING_BINS, WINDOW_BINS = 2.0, 13
"""Standard deviation of the Gaussian that smooths the function, 0.1 Å, and width within which a minimum is the lowest, 0.65 Å."""

LEVEL = 0.02
"""By which the function may rise above its minimum and still be as low: of an empty gap between two shells the middle is taken."""


def first_shell(elements: tuple[int, int], setting: Setting, option: str) -> float:
    """Distance up to which atoms of one element are neighbours of another.

    In a system that is periodic in all directions it is the first minimum of the radial distribution function of its
    reference behind its first maximum above one, the usual end of a first shell (Hansen & McDonald, Theory of Simple Liquids,
    4th ed., section 2.5); of two elements that are bonded that is the end of the bonds. Elsewhere there is no such function, and only
    bonds have an end: `BOND_FACTOR` times the sum of covalent radii, as in a topology.

    Parameters
    ----------
    elements : tuple of int
        Two atomic numbers.
    setting : Setting
        Its reference frames.
    option : str
        The option that may be given instead, for messages.

    Returns
    -------
    float
        In Å.

    Raises
    ------
    ValueError
        No minimum, or no bonds.
    """
    pair = pair_name(elements)
    batch = AtomsBatch.from_atoms([setting.frames[k] for k in spread(len(setting.frames), MAX_FRAMES)])
    if not bool(batch.pbc.all()):
        if not bonded_chains(setting.topology, 2, elements).shape[1]:
            where = "the reference is not periodic in all directions and"
            raise ValueError(f"{where} has no {pair} bonds to tell {option}; give {option}=, in Å")
        return BOND_FACTOR * float(covalent_sums(torch.tensor(elements), torch.tensor([[0], [1]])))
    end = first_minimum(RadialDistribution(elements, RANGE, BIN_WIDTH)(batch).mean(dim=0).numpy())
    if end is None:
        raise ValueError(f"g(r) of {pair} in the reference has no first minimum within {RANGE:g} Å to tell {option}; give {option}=, in Å")
    return end


def first_minimum(g: np.ndarray) -> float | None:
    """Where a radial distribution function on bins of `BIN_WIDTH`, shape (n_bins,), is lowest behind its first maximum, in Å.

    To a hundredth. None where there is none: no maximum above one, or no rise behind the lowest, by more than `LEVEL` each, for what
    is less is noise or rounding.
    """
    g = gaussian_filter1d(g, SMOOTHING_BINS, mode="nearest")
    high = (g > 1.0 + LEVEL) & (g >= -minimum_filter1d(-g, WINDOW_BINS))
    peak = int(high.argmax())
    low = (g <= minimum_filter1d(g, WINDOW_BINS)) & (np.arange(len(g)) > peak)
    low[-(WINDOW_BINS // 2) :] = False
    if not (high.any() and low.any()):
        return None
    first = int(low.argmax())
    above = g[first:] > g[first] + LEVEL
    if not above.any():
        return None
    last = first + int(above.argmax()) - 1
    before = g[peak:first][::-1] > g[first] + LEVEL
    start = first - int(before.argmax())
    return round((0.5 * (start + last) + 0.5) * BIN_WIDTH, 2)
