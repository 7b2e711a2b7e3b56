"""What dynamics have told: frames, the energies that drove them, and observables of groups of their atoms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabie_ase.dynamics import Trajectory
from stabie_ase.observables import Observable
from stabie_ase.structures.batch import AtomsBatch
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
    """

    frames: AtomsBatch
    groups: Groups
    values: Mapping[str, Tensor]
    energies: Tensor
    severity: Tensor
    frame: Tensor
    replica: Tensor

    @classmethod
    def from_trajectory(
        cls, trajectory: Trajectory, observables: Sequence[Observable], groups_of: GroupsOf = Groups.systems
    ) -> Samples:
        """All frames of a trajectory whose energies and observables are finite."""
        frames, frame, replica = trajectory.frames()
        energies, severity = trajectory.potential_energy[frame, replica], trajectory.columns.get("severity")
        severity = torch.zeros_like(energies) if severity is None else severity[frame, replica]
        groups = groups_of(frames)
        values = {o.name: o(frames, groups) if len(replica) else energies.new_zeros((0, len(o.measure))) for o in observables}
        everything = cls(frames, groups, values, energies, severity, frame, replica)
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
            **{name: getattr(self, name)[index] for name in ("energies", "severity", "frame", "replica")},
        )

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
            There are several groups in a frame, of which nobody knows which is which in the next.
        """
        if half_width == 0:
            return self
        if len(self) != len(self.replica):
            raise ValueError("values are averaged along trajectories of whole systems only")
        averages = {name: trajectory_averages(x, self.frame, self.replica, half_width) for name, x in self.values.items()}
        return replace(self, values=averages)


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
