"""Potentials with exact answers, for tests and for examples that run anywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import NeighborList


class Harmonic(Potential):
    """Independent isotropic wells at the origin, U = Σ_a ½ k |r_a|².

    With it ⟨x²⟩ = k_B T / k and ∂⟨x²⟩/∂k = -k_B T / k² for every coordinate.

    Parameters
    ----------
    k : float
        Force constant in eV/Å²; the one trainable parameter.
    dtype : torch.dtype
        Of the parameter.
    """

    family = "harmonic"

    def __init__(self, k: float = 1.0, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.cutoff = 1.0
        self.k = nn.Parameter(torch.tensor(float(k), dtype=dtype))

    def inputs(self, batch: AtomsBatch, neighbors: NeighborList) -> dict[str, Tensor]:
        return {"positions": batch.positions}

    def evaluate(self, inputs: dict[str, Tensor]) -> Tensor:
        return 0.5 * self.k * inputs["positions"].square().sum(dim=1)


class PairPotential(Potential):
    """Base of pair potentials: `pair_energies(distances)` within the cutoff, half to each of the two atoms."""

    def pair_energies(self, distances: Tensor) -> Tensor:
        """Energies of pairs, shape (n_pairs,), in eV, from their distances in Å."""
        raise NotImplementedError

    def inputs(self, batch: AtomsBatch, neighbors: NeighborList) -> dict[str, Tensor]:
        half = neighbors.half
        vectors = half.vectors(batch)
        near = (vectors.detach().square().sum(dim=1) < self.cutoff**2).nonzero()[:, 0]
        distances = vectors.index_select(0, near).norm(dim=1)
        return {"numbers": batch.numbers, "pairs": half.pairs.index_select(1, near), "distances": distances}

    def evaluate(self, inputs: dict[str, Tensor]) -> Tensor:
        energies = 0.5 * self.pair_energies(inputs["distances"])
        i, j = inputs["pairs"]
        zeros = energies.new_zeros(inputs["numbers"].shape[0])
        return zeros.index_add(0, i, energies).index_add(0, j, energies)


class LennardJones(PairPotential):
    """U(r) = 4ε[(σ/r)¹² - (σ/r)⁶], shifted to zero at the cutoff, as ASE's `LennardJones`.

    The minimum lies at r = 2^(1/6) σ. The force jumps at the cutoff, by 24ε/r_c (2(σ/r_c)¹² - (σ/r_c)⁶).

    Parameters
    ----------
    epsilon : float
        In eV.
    sigma : float
        In Å.
    cutoff : float, optional
        In Å; 3σ if not given.
    dtype : torch.dtype
        Of the parameters.
    """

    family = "Lennard-Jones"

    def __init__(
        self, epsilon: float = 1.0, sigma: float = 1.0, cutoff: float | None = None, dtype: torch.dtype = torch.float64
    ):
        super().__init__()
        self.cutoff = 3.0 * sigma if cutoff is None else cutoff
        self.epsilon = nn.Parameter(torch.tensor(float(epsilon), dtype=dtype))
        self.sigma = nn.Parameter(torch.tensor(float(sigma), dtype=dtype))

    def pair_energies(self, distances: Tensor) -> Tensor:
        def energy(ratio):
            # Products, not a power: vectorised and single powers differ in the last bit, and with them pairs by their place.
            square = ratio * ratio
            sixth = square * square * square
            return 4.0 * self.epsilon * (sixth * sixth - sixth)

        return energy(self.sigma / distances) - energy(self.sigma / self.cutoff)


class Morse(PairPotential):
    """U(r) = D [(1 - exp(-a (r - r0)))² - 1], without shift at the cutoff.

    Parameters
    ----------
    depth : float
        D in eV.
    a : float
        In 1/Å; the force constant at r0 is 2 D a².
    r0 : float
        In Å.
    cutoff : float
        In Å; infinite by default, which suits molecules.
    dtype : torch.dtype
        Of the parameters.
    """

    family = "Morse"

    def __init__(
        self,
        depth: float = 1.0,
        a: float = 1.0,
        r0: float = 1.0,
        cutoff: float = math.inf,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__()
        self.cutoff = cutoff
        self.depth, self.a, self.r0 = (nn.Parameter(torch.tensor(float(x), dtype=dtype)) for x in (depth, a, r0))

    def pair_energies(self, distances: Tensor) -> Tensor:
        return self.depth * ((1.0 - torch.exp(-self.a * (distances - self.r0))).square() - 1.0)
