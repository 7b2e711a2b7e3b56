"""What steps for the observables have lifted, so that steps on energies and forces do not let it sink again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabie_ase.boltzmann import Estimate, Samples
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch, rows_of
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.reference import spread

MAX_FRAMES = 64
"""Of one window; the rest is much like them."""

LOWEST_PART = 0.5
"""Of groups in one frame those are held whose weight is at least so much of the most negative one's."""


@dataclass(frozen=True)
class Lifted:
    """Unstable frames, and energies below which theirs shall not fall.

    Labels say nothing of such frames, and what fits labels better mostly puts the hole back that a step for the observables has filled.

    Attributes
    ----------
    frames : AtomsBatch
    atoms : Tensor of bool, shape (n_atoms,)
        Those whose energies count: of whole frames all, else the groups that are to become rarer.
    energies : Tensor of float64, shape (n_frames,)
        In eV, of these atoms, on the scale of the labels: less as much for each atom as energies of labelled frames were off. Or of the
        frames beside those at rest.
    at_rest : AtomsBatch or None
        The same frames with these atoms in a sound conformation or where they were when sound, where energies are told beside it.
    """

    frames: AtomsBatch
    atoms: Tensor
    energies: Tensor
    at_rest: AtomsBatch | None = None

    @classmethod
    def of(cls, potential: Potential, estimate: Estimate, offset: float = 0.0, candidates: Tensor | None = None) -> Lifted | None:
        """Frames of an estimate that are unstable and to become rarer, at the energies that they have now; None where there are none.

        Of samples that were drawn each counts as itself, not as those it stands for: a sound one stands for thousands.

        Parameters
        ----------
        potential : Potential
        estimate : Estimate
        offset : float
            By how much energies of labelled frames are off, in eV for each atom (`energy_offset`).
        candidates : Tensor of bool, shape (n_groups,), optional
            Samples that may be held; all by default.

        Returns
        -------
        Lifted or None
        """
        samples, held = estimate.samples, _failing(estimate, candidates)
        if not bool(held.any()):
            return None
        if samples.conformers is None:
            chosen = _spread(samples.groups.system[held].unique())
            return cls._at_present(potential, samples.frames.select(chosen), _atoms_of(samples, held, chosen), offset=offset)
        groups = samples.groups.select(_spread(held.nonzero()[:, 0]))
        frames, own = groups.apart(samples.frames)
        atoms = own.spread(estimate.weights.new_ones(own.n_groups), frames) > 0
        return cls._at_present(potential, frames, atoms, samples.conformers.at_rest(samples.frames, groups))

    @classmethod
    def beside_before(cls, potential: Potential, estimate: Estimate, n_frames: int, candidates: Tensor | None = None) -> Lifted | None:
        """The frames of `of`, whose atoms to blame are at rest where they were when the same trajectory was soundest, shortly before.

        All other atoms are where they are. No force depends on how a potential parts its energy among atoms, and what is raised of some
        of them may be moved to others.

        Parameters
        ----------
        potential : Potential
        estimate : Estimate
        n_frames : int
            How many frames before at most.
        candidates : Tensor of bool, shape (n_groups,), optional
            Samples that may be held; all by default.

        Returns
        -------
        Lifted or None
            None where no frame has a sound one so shortly before it.
        """
        samples, known, held = estimate.samples, estimate.all_samples, _failing(estimate, candidates)
        chosen = samples.groups.system[held].unique()
        age = samples.frame[chosen][:, None] - known.frame
        before = (known.replica == samples.replica[chosen][:, None]) & (age > 0) & (age <= n_frames)
        severity, soundest = torch.where(before, known.severity, math.inf).min(dim=1)
        with_sound = _spread((severity <= 1.0).nonzero()[:, 0])
        if not len(with_sound):
            return None
        chosen, then = chosen[with_sound], known.frames.select(soundest[with_sound])
        frames, atoms = samples.frames.select(chosen), _atoms_of(samples, held, chosen)
        at_rest = frames.replace(positions=torch.where(atoms[:, None], then.positions, frames.positions))
        return cls._at_present(potential, frames, atoms, at_rest)

    @classmethod
    def _at_present(
        cls, potential: Potential, frames: AtomsBatch, atoms: Tensor, at_rest: AtomsBatch | None = None, offset: float = 0.0
    ) -> Lifted:
        """At the energies that they have now."""
        some = cls(frames, atoms, frames.cells.new_zeros(frames.n_systems, dtype=torch.float64), at_rest)
        with torch.no_grad():
            energies = [some.select(part)._now(potential, offset) for part in frames.chunks()]
        return replace(some, energies=torch.cat(energies))

    def __len__(self) -> int:
        return self.frames.n_systems

    def select(self, systems: Tensor) -> Lifted:
        """Some of the frames by index, shape (n,)."""
        at_rest = None if self.at_rest is None else self.at_rest.select(systems)
        return Lifted(self.frames.select(systems), self.atoms[self.frames.atom_index(systems)], self.energies[systems], at_rest)

    def sunk(self, potential: Potential, offset: float | Tensor = 0.0) -> Tensor:
        """Mean over frames of max(0, U* - U)²/N in eV², with its graph: U* the energies, N the number of atoms that count."""
        return ((self.energies - self._now(potential, offset)).clamp(min=0.0).square() / self._counts()).mean()

    def _counts(self) -> Tensor:
        return self.frames.sum_over_atoms(self.atoms.double())

    def _now(self, potential: Potential, offset: float | Tensor) -> Tensor:
        neighbors = neighbor_list(self.frames, potential.cutoff)
        if self.at_rest is not None:
            return potential(self.frames, neighbors) - potential(self.at_rest, neighbor_list(self.at_rest, potential.cutoff))
        if bool(self.atoms.all()):
            return potential(self.frames, neighbors) - offset * self._counts()
        return self.frames.sum_over_atoms((potential(self.frames, neighbors, of_atoms=True) - offset) * self.atoms)

    def tensors(self) -> dict[str, Tensor]:
        """All there is, by name, to be saved (`restored` is the way back)."""
        of_frames = {name: getattr(self.frames, name) for name in rows_of(AtomsBatch)}
        there = {} if self.at_rest is None else {"at_rest": self.at_rest.positions}
        return of_frames | {"system": self.frames.system, "atoms": self.atoms, "energies": self.energies} | there

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Lifted:
        """What `tensors` returned."""
        known = {name: x.to(device) for name, x in tensors.items()}
        atoms, energies, positions = known.pop("atoms"), known.pop("energies"), known.pop("at_rest", None)
        frames = AtomsBatch(**known, n_systems=len(energies))
        return cls(frames, atoms, energies, None if positions is None else frames.replace(positions=positions))


def _failing(estimate: Estimate, candidates: Tensor | None) -> Tensor:
    """Which samples are unstable and to become rarer, of one frame those that weigh most, shape (n_groups,), bool."""
    samples, weights = estimate.samples, estimate.weights
    if samples.log_weights is not None:
        weights = weights / samples.log_weights.exp()
    system = samples.groups.system
    may = (samples.severity > 1.0)[system] & (weights < 0.0)
    may = may if candidates is None else may & candidates
    lowest = weights.new_zeros(samples.frames.n_systems).scatter_reduce(0, system, weights.where(may, 0.0), "amin")
    # With equal weights of all their atoms whole frames are groups like any other.
    return may & (weights <= LOWEST_PART * lowest[system])


def _atoms_of(samples: Samples, held: Tensor, chosen: Tensor) -> Tensor:
    """Which atoms of some frames are of groups that are held, shape (n_atoms,), bool."""
    return samples.groups.spread(held.double(), samples.frames)[samples.frames.atom_index(chosen)] > 0


def _spread(chosen: Tensor) -> Tensor:
    """At most `MAX_FRAMES` of some indices, shape (n,), all over them."""
    return chosen[spread(len(chosen), MAX_FRAMES)]
