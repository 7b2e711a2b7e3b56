"""What dynamics have told: frames, the energies that drove them, and observables of groups of their atoms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabie_ase.dynamics import Trajectory
from stabie_ase.observables import Observable, Target
from stabie_ase.observables.energetics import Energetics
from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.conformers import Conformers
from stabie_ase.structures.topology import Groups

GroupsOf = Callable[[AtomsBatch], Groups]
"""The groups of atoms of some frames that are samples of their own."""


@dataclass(frozen=True)
class Samples:
    """Groups of atoms of some frames. By default each frame is one group: all tensors have a row a group.

    Attributes
    ----------
    frames : AtomsBatch
    groups : Groups
    values : dict of str to Tensor of float64, shape (n_groups, d)
        Each observable g by its name.
    energies : Tensor of float64, shape (n_frames,)
        In eV, by the potential that drove the dynamics.
    severity : Tensor of float64, shape (n_frames,)
        By the criterion that finds most fault with a frame; above 1 it is unstable. Zero where nobody has judged.
    frame, replica : Tensor of int64, shape (n_frames,)
        Which frame of which replica each is.
    group_energies : Tensor of float64, shape (n_groups,), or None
        In eV, by that potential; None of whole frames, and until somebody has worked them out.
    log_weights : Tensor of float64, shape (n_groups,), or None
        Logarithms of what groups count for, up to a constant, where some were favoured; None where all count alike.
    energetics : Energetics or None
        What the potential says of the frames, where observables are made of that.
    conformers : Conformers or None
        Where they are given, the energy of a group, a molecule, is that of its frame less that of the frame with the molecule put into
        a sound conformation (`gradient.group_energies`).
    """

    frames: AtomsBatch
    groups: Groups
    values: Mapping[str, Tensor]
    energies: Tensor
    severity: Tensor
    frame: Tensor
    replica: Tensor
    group_energies: Tensor | None = None
    log_weights: Tensor | None = None
    energetics: Energetics | None = None
    conformers: Conformers | None = None

    @classmethod
    def from_trajectory(
        cls,
        trajectory: Trajectory,
        observables: Sequence[Observable],
        groups_of: GroupsOf = Groups.systems,
        potential: Potential | None = None,
        conformers: Conformers | None = None,
    ) -> Samples:
        """All frames of a trajectory whose energies and observables are finite.

        Parameters
        ----------
        trajectory : Trajectory
        observables : sequence of Observable
        groups_of : callable
            Groups of atoms that are samples; whole frames by default.
        potential : Potential, optional
            That drove the dynamics, for observables that need its stress.
        conformers : Conformers, optional
            By which the energies of groups are told.

        Returns
        -------
        Samples
        """
        frames, frame, replica = trajectory.frames()
        energies, severity = trajectory.potential_energy[frame, replica], trajectory.columns.get("severity")
        severity = torch.zeros_like(energies) if severity is None else severity[frame, replica]
        groups = groups_of(frames)
        found = _energetics(frames, observables, energies, potential) if len(replica) else None
        values = {o.name: o.sample(frames, groups, found) if len(replica) else energies.new_zeros((0, o.width)) for o in observables}
        everything = cls(frames, groups, values, energies, severity, frame, replica, energetics=found, conformers=conformers)
        bad = torch.stack([~torch.isfinite(x).all(dim=1) for x in values.values()]).any(dim=0)
        bad_frames = torch.zeros_like(energies).index_add(0, groups.system, bad.double()) > 0
        return everything.select((torch.isfinite(energies) & ~bad_frames).nonzero()[:, 0])

    def __len__(self) -> int:
        return self.groups.n_groups

    def select(self, index: Tensor) -> Samples:
        """Some of the frames by index, shape (n,), in increasing order, with their groups."""
        chosen = torch.zeros(self.frames.n_systems, dtype=torch.bool, device=index.device)
        chosen[index] = True
        kept = chosen[self.groups.system].nonzero()[:, 0]
        return replace(
            self,
            frames=self.frames.select(index),
            groups=self.groups.of_systems(index, self.frames),
            values={name: x[kept] for name, x in self.values.items()},
            **self._rows_of_groups(kept),
            energetics=None if self.energetics is None else self.energetics.select(index),
            **{name: getattr(self, name)[index] for name in ("energies", "severity", "frame", "replica")},
        )

    def _rows_of_groups(self, chosen: Tensor) -> dict[str, Tensor]:
        """What is known of some groups and may be None, by name."""
        known = {name: getattr(self, name) for name in ("group_energies", "log_weights")}
        return {name: x[chosen] for name, x in known.items() if x is not None}

    @property
    def parts(self) -> Groups | None:
        """The groups; None where each frame is one, whose energy needs no energies of atoms."""
        whole = len(self) == self.frames.n_systems and torch.equal(self.groups.group, self.frames.system)
        return None if whole else self.groups

    def favouring(self, deviation: Tensor, n: int, seed: int, n_bins: int = 10, apart: Tensor | None = None) -> Samples:
        """Some of the groups, rare deviations among them as often as common ones, and weights that make good for it.

        The range of deviations is cut into bins of one width, and as many groups are drawn of each as there are to be had (Raja et al.,
        arXiv 2402.13984). One of N_b groups of which n_b are drawn counts N_b/n_b times, so that a weighted mean has the
        expectation of the mean over all groups, exactly; what is a ratio of means, as a covariance is, has it to O(1/n).

        Parameters
        ----------
        deviation : Tensor, shape (n_groups,)
            Of each group from what is expected, such as of an observable from its target, in any unit.
        n : int
            Groups to be drawn.
        seed : int
        n_bins : int
        apart : Tensor of bool, shape (n_groups,), optional
            Which groups have bins of their own. Of halves that were drawn from as one, neither has the number of each bin that the weights
            are of.

        Returns
        -------
        Samples
            Of the frames that hold any of them.

        Raises
        ------
        ValueError
            More groups than there are, or fewer than bins that hold any.
        """
        bins = _bins(deviation.double(), n_bins)
        if apart is not None:
            bins, n_bins = bins + n_bins * apart, 2 * n_bins
        sizes = torch.bincount(bins, minlength=n_bins)
        if not int((sizes > 0).sum()) <= n <= len(self):
            raise ValueError(
                f"{n} of {len(self)} groups are to be drawn, expected no more than there are and one or more from each of "
                f"{int((sizes > 0).sum())} bins of the deviation; try fewer bins"
            )
        drawn = _evenly(sizes, n)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).to(bins.device)
        order = order[bins[order].argsort(stable=True)]  # shuffled within each bin
        rank = torch.arange(len(self), device=bins.device) - (sizes.cumsum(0) - sizes)[bins[order]]
        chosen = order[rank < drawn[bins[order]]].sort().values
        return self._of_groups(chosen, (sizes.double() / drawn).log()[bins[chosen]])

    def _of_groups(self, chosen: Tensor, log_weights: Tensor) -> Samples:
        """Some of the groups by index, in increasing order, that count for more or less than they did."""
        rows = self._rows_of_groups(chosen)
        rows["log_weights"] = rows.get("log_weights", 0.0) + log_weights
        values = {name: x[chosen] for name, x in self.values.items()}
        rest = replace(self, groups=self.groups.select(chosen), values=values, **rows)
        return rest.select(rest.groups.system.unique())

    def by_energies(self, targets: Sequence[Target]) -> list[tuple[Samples, list[Target]]]:
        """Some targets, each with the energies that it is a matter of: conditional ones, where there are conformers, if it is internal."""
        if self.conformers is None:
            return [(self, list(targets))]
        parts = [(self, [t for t in targets if t.observable.internal])]
        parts.append((replace(self, conformers=None), [t for t in targets if not t.observable.internal]))
        return [part for part in parts if part[1]]

    def within(self, severity: float) -> Samples:
        """Those of frames of at most this severity (dimensionless), by every criterion; within 1 they are stable."""
        return self.select((self.severity <= severity).nonzero()[:, 0])

    def half(self, half: int | None) -> Tensor:
        """Which groups are of every second replica, or all of them, shape (n_groups,), bool."""
        replica = self.replica[self.groups.system]
        return torch.ones_like(replica, dtype=torch.bool) if half is None else replica % 2 == half

    def averaged(self, half_width: int) -> Samples:
        """Values averaged along trajectories over `half_width` frames to either side.

        The mean is that of the values but for the ends; fast vibrations are gone, and a frame on its way out counts as what it is
        about to become.

        Parameters
        ----------
        half_width : int
            Frames to either side; with none the samples themselves.

        Returns
        -------
        Samples

        Raises
        ------
        ValueError
            The groups of a frame are not those of the next, as neighbourhoods are not.
        """
        if half_width == 0 or not len(self):
            return self
        if not self._groups_a_frame():
            raise ValueError("values are averaged along trajectories of groups that keep their atoms; those of these frames differ")
        frame, trajectory = self.frame[self.groups.system], self.trajectory
        averages = {name: trajectory_averages(x, frame, trajectory, half_width) for name, x in self.values.items()}
        return replace(self, values=averages)

    @property
    def trajectory(self) -> Tensor:
        """Which trajectory each group is of, shape (n_groups,): its own, or the replica where groups do not keep their atoms."""
        n, replica = self._groups_a_frame(), self.replica[self.groups.system]
        return replica * n + torch.arange(len(self), device=replica.device) % n if n else replica

    def _groups_a_frame(self) -> int:
        """How many, where they are of the same atoms in every frame; else 0."""
        n_frames, groups = self.frames.n_systems, self.groups
        members = torch.stack([self.frames.index_in_system[groups.atoms], groups.group])
        same = len(self) % n_frames == 0 == members.shape[1] % n_frames
        if same:
            members = members.view(2, n_frames, -1)
            members[1] -= members[1, :, :1].clone()
            same = bool((members == members[:, :1]).all()) and bool((groups.system.bincount() == len(self) // n_frames).all())
        return len(self) // n_frames if same else 0


def _energetics(
    frames: AtomsBatch, observables: Sequence[Observable], energies: Tensor, potential: Potential | None
) -> Energetics | None:
    """What a potential says of frames, as far as observables need that."""
    needs = frozenset().union(*(observable.needs for observable in observables))
    if not needs:
        return None
    if potential is None:
        return Energetics.of_batch(frames, energies)
    return Energetics.by(potential, frames, energies, "stress" in needs)


def _bins(deviation: Tensor, n_bins: int) -> Tensor:
    """The bin of each, of one width from the smallest to the largest, shape (n,)."""
    low, high = deviation.min(), deviation.max()
    fraction = (deviation - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    return (fraction * n_bins).long().clamp(max=n_bins - 1)


def _evenly(sizes: Tensor, n: int) -> Tensor:
    """How many of each of some bins, shape (n_bins,), so that they are n in all: as evenly as their sizes allow."""
    drawn, left = torch.zeros_like(sizes), n
    order = sizes.argsort()
    for k, b in enumerate(order.tolist()):
        drawn[b] = min(int(sizes[b]), left // (len(order) - k))
        left -= int(drawn[b])
    return drawn


def trajectory_averages(values: Tensor, frame: Tensor, replica: Tensor, half_width: int) -> Tensor:
    """Centred moving averages along each replica's trajectory, over the frames that there are.

    Parameters
    ----------
    values : Tensor, shape (n_samples, d)
    frame : Tensor of int64, shape (n_samples,)
        Number of the frame that each sample is.
    replica : Tensor of int64, shape (n_samples,)
        Whose frame it is; each pair of a frame and a replica once.
    half_width : int
        Frames to either side; with none the values themselves.

    Returns
    -------
    Tensor of float64, shape (n_samples, d)
    """
    if half_width == 0 or not len(values):
        return values.double()
    n_frames, n_replicas = int(frame.max()) + 1, int(replica.max()) + 1
    sums = values.new_zeros((n_frames + 1, n_replicas, values.shape[1] + 1), dtype=torch.float64)
    sums[frame + 1, replica] = torch.cat([values.double(), torch.ones_like(values[:, :1], dtype=torch.float64)], dim=1)
    sums = sums.cumsum(dim=0)
    first, last = (frame - half_width).clamp(min=0), (frame + half_width + 1).clamp(max=n_frames)
    sums = sums[last, replica] - sums[first, replica]
    return sums[:, :-1] / sums[:, -1:]


def in_a_row(samples: Samples, targets: Sequence[Target]) -> Tensor:
    """Values of all targets' observables, shape (n_groups, Σ width)."""
    values = [samples.values[target.observable.name].double() for target in targets]
    return values[0] if len(values) == 1 else torch.cat(values, dim=1)


def row_parts(row: Tensor, targets: Sequence[Target]) -> tuple[Tensor, ...]:
    """What belongs to each target, shape (..., width)."""
    return row.split([target.observable.width for target in targets], dim=-1)
