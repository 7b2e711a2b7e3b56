"""Radial distribution functions that, averaged over a window of time, are not those of the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from stabie_ase.dynamics import MDState
from stabie_ase.potentials.base import Potential
from stabie_ase.stability.criteria.base import Verdict, check_tolerance
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.elements import check_known, element_pair, pair_name
from stabie_ase.structures.radial import Shells, radial_distributions
from stabie_ase.structures.setting import Setting
from stabie_ase.system.spec import BadSpec, Spec

MOLECULAR_TOLERANCE, ATOMIC_TOLERANCE = 3.0, 1.0
"""In Å, of water and of a solid with a mobile element in the source (see `RDFDeviation`); of all liquids of molecules and of all else."""

MARGIN_FACTOR = 1.25
"""Times the largest deviation of a single reference frame: no window that visits the like of them deviates as much. Of each pair of
elements by itself: that of two ions, noisy because they are few, is no measure of the solvent."""

WINDOW_FS, R_MAX, BIN_WIDTH = 1000.0, 6.0, 0.05
"""fs; Å; Å."""

MAX_BLOCKS = 10
"""Parts of a window; it slides by one of them."""

MAX_FRAMES_PER_BLOCK = 5
"""More would be much alike, and counting neighbours is not free."""

FRAMES_AT_ONCE = 32
"""Reference frames whose functions are worked out together."""


@dataclass(frozen=True)
class RDFDeviation:
    """Unstable once the radial distribution functions of a window of time are off the reference's.

    The value is the largest over the pairs of elements of ∫ |⟨g(r)⟩_window - ⟨g(r)⟩_ref| dr from 0 to `r_max`, in Å (Fu et al., Trans.
    Mach. Learn. Res. 2023, arXiv 2210.07237: windows of 1 ps, 3.0 for water, 1.0 for LiPS; Raja et al., arXiv 2402.13984). They call this
    a mean absolute error; it is not divided by the range. The mean over 6 Å could not reach 3.0: all the first peak of O-H in
    water, gone, has ∫ g dr = 2.3 Å, which would be a mean of 0.4.

    A window is the last `n_blocks` whole blocks of time; it is judged when it is full, and moves on by a block. What is told of a
    replica in between is of its last window. Each block keeps the sum of g over at most a few frames, so that
    memory does not grow. A frame that is not finite is left out.

    Parameters
    ----------
    kinds : list of tuple of int
        Pairs of atomic numbers.
    shells : Shells
    target : Tensor of float64, shape (n_kinds, n_shells)
        ⟨g⟩_ref.
    tolerances : Tensor of float64, shape (n_kinds,)
        In Å.
    block_steps : int
        Length of a block, in steps.
    n_blocks : int
    timestep_fs : float
    """

    kinds: list[tuple[int, int]]
    shells: Shells
    target: Tensor
    tolerances: Tensor
    block_steps: int
    n_blocks: int
    timestep_fs: float
    name, unit = "rdf", "Å"

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> RDFDeviation:
        """`rdf:3.0`, in Å; `window_fs`, `r_max` and `bin_width` (Å), and `pairs`, as in pairs=O-O+O-H, all if not given.

        Without a tolerance it is that of the source, or more for a pair of elements of which single frames of the reference
        deviate so much that a window may reach it. ValueError for what is not periodic, and where the time step is not known.
        """
        given = spec.read({"tolerance": float, "window_fs": float, "r_max": float, "bin_width": float, "pairs": _pairs}, "tolerance")
        batch = AtomsBatch.from_atoms(setting.frames)
        if not bool(batch.pbc.all()):
            raise ValueError("rdf needs a reference that is periodic in all directions; bonds and contacts are for molecules")
        if batch.n_systems < 2:
            raise ValueError("rdf needs several reference frames for a mean, got 1; leave it out, or give frames of a trajectory")
        shells = Shells.up_to(given.get("r_max", R_MAX), given.get("bin_width", BIN_WIDTH))
        block_steps, n_blocks, timestep_fs = _blocks(spec, given.get("window_fs"), setting)
        kinds = given.get("pairs") or _all_pairs(batch)
        _check_pairs(kinds, batch, spec)
        parts = [batch.select(part) for part in batch.chunks(FRAMES_AT_ONCE)]
        samples = torch.cat([radial_distributions(part, kinds, shells) for part in parts])
        usual = MOLECULAR_TOLERANCE if setting.kind.bonding == "molecules" else ATOMIC_TOLERANCE
        tolerance = given.get("tolerance", usual)
        check_tolerance(tolerance, "the tolerance of rdf")
        same = torch.full((len(kinds),), tolerance, dtype=torch.float64)
        made = cls(kinds, shells, samples.mean(dim=0), same, block_steps, n_blocks, timestep_fs)
        if "tolerance" in given:
            return made
        return replace(made, tolerances=torch.maximum(same, MARGIN_FACTOR * made.deviation(samples).amax(dim=0)))

    @property
    def span_ps(self) -> float:
        """The length of a window, in ps: before the first is full nothing is judged."""
        return self.n_blocks * self.block_steps * self.timestep_fs / 1000.0

    def deviation(self, functions: Tensor) -> Tensor:
        """∫ |g - g_ref| dr of each pair of elements, shape (..., n_kinds), in Å, of g, shape (..., n_kinds, n_shells)."""
        return self.shells.width * (functions - self.target.to(functions.device)).abs().sum(dim=-1)

    def memory(self, batch: AtomsBatch) -> dict[str, Tensor]:
        """Sums of g and numbers of frames in the block that is being filled and in those before it; -1 for one that is not there."""
        sums = torch.zeros((batch.n_systems, 1 + self.n_blocks, *self.target.shape), dtype=torch.float64, device=batch.device)
        counts = torch.full(sums.shape[:2], -1, device=batch.device)
        counts[:, 0] = 0
        steps = torch.full((batch.n_systems, 2), -1, device=batch.device)
        return {"rdf sums": sums, "rdf counts": counts, "rdf steps": steps}

    def judge(self, state: MDState) -> Verdict:
        """The pair of elements that is farthest off in the last whole window, by its tolerance; 0 before there is one."""
        sums, counts, steps = (state.extra[name].clone() for name in ("rdf sums", "rdf counts", "rdf steps"))
        steps = torch.where(steps < 0, state.step[:, None], steps)
        fresh = (counts <= 0).all(dim=1)
        due = state.alive & (fresh | (state.step - steps[:, 1] >= max(1, self.block_steps // MAX_FRAMES_PER_BLOCK)))
        if bool(due.any()):
            self._count(state.batch, due, sums, counts)
            steps[:, 1] = torch.where(due, state.step, steps[:, 1])
        full = state.step - steps[:, 0] >= self.block_steps
        steps[:, 0] = torch.where(full, state.step, steps[:, 0])
        sums, counts = (torch.where(full.view(-1, *[1] * (x.dim() - 1)), _next_block(x), x) for x in (sums, counts))
        values = self._of_windows(sums[:, 1:], counts[:, 1:])
        severity, worst = (values / self.tolerances.to(values.device)).max(dim=1)
        nobody = state.step.new_zeros((state.n_systems, 0))
        memory = {"rdf sums": sums, "rdf counts": counts, "rdf steps": steps}
        return Verdict(severity, values.gather(1, worst[:, None])[:, 0], nobody, memory)

    def _count(self, batch: AtomsBatch, due: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Add g of some replicas to the block that is being filled."""
        chosen = due.nonzero()[:, 0]
        functions = radial_distributions(batch.select(chosen), self.kinds, self.shells)
        finite = torch.isfinite(functions).flatten(1).all(dim=1)
        sums[chosen[finite], 0] += functions[finite]
        counts[chosen[finite], 0] += 1

    def _of_windows(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Deviations over all blocks of each replica, shape (n_systems, n_kinds), in Å."""
        n_frames = counts.sum(dim=1)
        there = (counts >= 0).all(dim=1) & (n_frames > 0)
        means = sums.sum(dim=1) / n_frames.clamp(min=1)[:, None, None]
        return torch.where(there[:, None], self.deviation(means), 0.0)

    def for_model(self, potential: Potential) -> RDFDeviation:
        """Itself."""
        return self

    def describe(self) -> str:
        alike: dict[str, list[str]] = {}
        for kind, tolerance in zip(self.kinds, self.tolerances.tolist()):
            alike.setdefault(f"{tolerance:.3g}", []).append(pair_name(kind))
        most = ", ".join(f"{', '.join(names)} by more than {tolerance} Å" for tolerance, names in alike.items())
        window = self.block_steps * self.n_blocks * self.timestep_fs
        return f"g(r) off the reference's over a window of {window:g} fs: {most} (∫|Δg|dr to {self.shells.reach:g} Å)"


def _pairs(text: str) -> list[tuple[int, int]]:
    return [element_pair(part) for part in text.split("+")]


def _all_pairs(batch: AtomsBatch) -> list[tuple[int, int]]:
    """Of the elements of some systems; an element of which there is one atom has no pair with itself."""
    pairs = combinations_with_replacement(sorted(set(batch.numbers.tolist())), 2)
    return [pair for pair in pairs if pair[0] != pair[1] or _several(pair[0], batch)]


def _several(z: int, batch: AtomsBatch) -> bool:
    return int((batch.numbers == z).sum()) > batch.n_systems


def _check_pairs(kinds: list[tuple[int, int]], batch: AtomsBatch, spec: Spec) -> None:
    """BadSpec for pairs that the reference does not have."""
    check_known(tuple({z for kind in kinds for z in kind}), batch.numbers, spec)
    alone = [a for a, b in kinds if a == b and not _several(a, batch)]
    if alone or not kinds:
        which = pair_name(alone[:1] or batch.numbers[:1].tolist())
        raise BadSpec(f"{str(spec)!r}: the reference has one atom of {which}, which makes no pair {which}-{which}")


def _blocks(spec: Spec, window_fs: float | None, setting: Setting) -> tuple[int, int, float]:
    """Steps of a block, blocks of a window, and the time step; BadSpec for a window shorter than the time between two looks."""
    timestep_fs, look_fs = setting.timestep_fs, setting.check_every_fs
    if timestep_fs is None:
        raise ValueError("rdf judges windows of time and has to know the time step: Setting(frames, temperature_K, timestep_fs=0.5)")
    look_fs = max(look_fs or timestep_fs, timestep_fs)
    window_fs = max(WINDOW_FS, look_fs) if window_fs is None else window_fs
    if not look_fs <= window_fs < math.inf:
        raise BadSpec(
            f"{str(spec)!r} has window_fs={window_fs:g}, expected at least the {look_fs:g} fs between two looks; see --check-every"
        )
    n_blocks = max(1, min(MAX_BLOCKS, int(window_fs / look_fs + 1e-9)))
    return max(1, round(window_fs / timestep_fs / n_blocks)), n_blocks, timestep_fs


def _next_block(x: Tensor) -> Tensor:
    """The block that was filled is the newest of those before, the oldest is gone, and an empty one is being filled."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
