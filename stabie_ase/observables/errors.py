"""Standard errors of means over frames, which are correlated in time, and of what is computed from such means."""

from __future__ import annotations

import torch
from torch import Tensor

from stabie_ase.observables.averages import MIN_GROUPS, SlicedMeans, Statistic, jackknife_errors, linearised, unchanged


def blocking_errors(values: Tensor) -> tuple[Tensor, Tensor]:
    """Standard errors of a mean over samples in a row, by blocks that are long against their correlation time.

    The variance of the means of blocks of B samples, over their number, grows with B until it is that of the mean of all (Flyvbjerg
    and Petersen, J. Chem. Phys. 91, 461, 1989). Of the lengths B = 1, 2, 4, ... the first with B³ > 2 n (s_B² / s_1²)² is
    taken, s_B² being that estimate and n the samples: there the error that is left by correlations is less than that of the
    estimate itself (Wolff, Comput. Phys. Commun. 156, 143, 2004; Lee et al., Phys. Rev. E 83, 066706, 2011).

    Parameters
    ----------
    values : Tensor of float64, shape (n_rows, n, d)
        Rows are independent of each other; a row that is shorter than others ends in what is not a number.

    Returns
    -------
    errors : Tensor, shape (d,)
        Not a number where no B leaves `MIN_GROUPS` blocks.
    lengths : Tensor of int64, shape (d,)
        B; n where there is none.
    """
    n_samples, d = int(torch.isfinite(values[..., 0]).sum()), values.shape[2]
    errors, lengths = values.new_full((d,), torch.nan), torch.full((d,), values.shape[1])
    size, first = 1, None
    while True:
        blocks = _blocks(values, size)
        if len(blocks) < MIN_GROUPS:
            return errors, lengths
        squared = blocks.var(dim=0) / len(blocks)
        first = squared if first is None else first
        growth = torch.where(first > 0, squared / first, 0.0)
        found = torch.isnan(errors) & (size**3 > 2.0 * n_samples * growth.square())
        errors, lengths = torch.where(found, squared.sqrt(), errors), torch.where(found, size, lengths)
        size *= 2


def _blocks(values: Tensor, size: int) -> Tensor:
    """Means of all whole blocks of so many samples, shape (n_blocks, d)."""
    means = values.unfold(1, size, size).mean(dim=3).flatten(0, 1) if size <= values.shape[1] else values[:0, 0]
    return means[torch.isfinite(means[:, 0])]


def mean_errors(observed: SlicedMeans, statistic: Statistic = unchanged) -> Tensor | None:
    """Standard errors of a statistic of the mean of all frames, shape (m,): from the replicas if enough, else by blocks of slices.

    None where the frames tell no error of any component; not a number for those of which they do not.
    """
    errors = jackknife_errors(observed.sums.sum(dim=1), observed.counts.sum(dim=1)[:, None], statistic)
    if errors is None:
        whole, mean = observed.keep(observed.counts == observed.counts.max()), observed.mean()  # the last slice may be shorter
        assert mean is not None
        errors, _ = blocking_errors(linearised(statistic, mean, whole.means))
    return errors if bool(torch.isfinite(errors).any()) else None
