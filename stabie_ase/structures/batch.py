"""Many atomic systems as one set of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

Record = TypeVar("Record")

ATOMS_AT_ONCE, MOST_ATOMS_AT_ONCE = {"cpu": 1024}, 4096
"""Whose energies and gradients are worked out together, by the type of the device, and elsewhere: what a network makes of them should
stay in a CPU's cache. The gradient of 64 frames of 64 water molecules by a SchNet of 64 channels takes 4.6 s at once, 1.5 s by twos."""


def per_atom() -> Any:
    """A field with a row for each atom."""
    return field(metadata={"per": "atom"})


def per_system(default: Any = MISSING) -> Any:
    """A field with a row for each system."""
    return field(default=default, metadata={"per": "system"})


@cache
def rows_of(cls: type) -> dict[str, str]:
    """The fields of a record that have a row for each "atom" or for each "system", by name."""
    return {f.name: f.metadata["per"] for f in fields(cls) if "per" in f.metadata}


def changed(record: Record, changes: dict[str, Any]) -> Record:
    """What `dataclasses.replace` makes, and cached properties with it, in a tenth of the time: a step makes many."""
    unknown = changes.keys() - record.__dataclass_fields__.keys()  # type: ignore[attr-defined]
    if unknown:
        raise TypeError(f"{type(record).__name__} has no field {', '.join(sorted(unknown))}")
    new = object.__new__(type(record))
    new.__dict__.update(record.__dict__, **changes)
    return new


@dataclass(frozen=True)
class AtomsBatch:
    """Atoms of several systems, concatenated; systems may differ in size, cell and composition.

    Attributes
    ----------
    positions : Tensor, shape (n_atoms, 3)
        Cartesian coordinates in Å, never wrapped into the cell.
    numbers : Tensor of int64, shape (n_atoms,)
        Atomic numbers.
    masses : Tensor, shape (n_atoms,)
        In amu.
    cells : Tensor, shape (n_systems, 3, 3)
        Lattice vectors in Å as rows, as in ASE; zero where there is no cell (see `lattice`).
    pbc : Tensor of bool, shape (n_systems, 3)
        Periodic directions.
    system : Tensor of int64, shape (n_atoms,)
        The system each atom belongs to, sorted.
    n_systems : int
        Kept as a number, so that asking for it never waits for a device.
    """

    positions: Tensor = per_atom()
    numbers: Tensor = per_atom()
    masses: Tensor = per_atom()
    cells: Tensor = per_system()
    pbc: Tensor = per_system()
    system: Tensor = field()  # type: ignore[misc]
    n_systems: int = field()  # type: ignore[misc]

    @classmethod
    def from_atoms(
        cls, atoms: Atoms | Sequence[Atoms], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float64
    ) -> AtomsBatch:
        """Collect ASE atoms. Their cells are those of `lattice`.

        Parameters
        ----------
        atoms : Atoms or sequence of Atoms
            One makes a batch of one system.
        device : str or torch.device
            Where tensors shall be.
        dtype : torch.dtype
            Of positions (Å), cells (Å) and masses (u).

        Returns
        -------
        AtomsBatch

        Examples
        --------
        >>> from ase.build import molecule
        >>> from stabie_ase import AtomsBatch
        >>> batch = AtomsBatch.from_atoms([molecule("H2O"), molecule("CH4")])
        >>> batch.sizes
        [3, 5]
        """
        images = [atoms] if isinstance(atoms, Atoms) else list(atoms)
        if not images:
            raise ValueError("a batch needs at least one Atoms object, got none")
        sizes = [len(image) for image in images]

        def real(arrays):
            return torch.as_tensor(np.concatenate(arrays), dtype=dtype, device=device)

        batch = cls(
            positions=real([image.positions for image in images]).reshape(-1, 3),
            numbers=torch.as_tensor(
                np.concatenate([image.numbers for image in images]), dtype=torch.int64, device=device
            ),
            masses=real([image.get_masses() for image in images]),
            cells=real([image.cell.array[None] for image in images]),
            pbc=torch.as_tensor(np.stack([image.pbc for image in images]), device=device),
            system=torch.as_tensor(np.repeat(np.arange(len(images)), sizes), dtype=torch.int64, device=device),
            n_systems=len(images),
        )
        return batch.replace(cells=batch.lattice)

    def to_atoms(self) -> list[Atoms]:
        """Turn each system back into ASE atoms (numbers, positions, masses, cell, pbc)."""
        numbers, positions, masses = (
            np.split(x.detach().cpu().double().numpy(), np.cumsum(self.sizes)[:-1])
            for x in (self.numbers, self.positions, self.masses)
        )
        cells, pbc = self.cells.detach().cpu().double().numpy(), self.pbc.cpu().numpy()
        return [
            Atoms(numbers=numbers[k].astype(int), positions=positions[k], masses=masses[k], cell=cells[k], pbc=pbc[k])
            for k in range(self.n_systems)
        ]

    @property
    def n_atoms(self) -> int:
        """Atoms of all systems together."""
        return self.numbers.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.positions.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of positions, cells and masses."""
        return self.positions.dtype

    @cached_property
    def counts(self) -> Tensor:
        """Atoms in each system, shape (n_systems,)."""
        return torch.bincount(self.system, minlength=self.n_systems)

    @cached_property
    def sizes(self) -> list[int]:
        """Atoms in each system as plain numbers (waits for the device once)."""
        return self.counts.tolist()

    @property
    def lattice(self) -> Tensor:
        """The cells in Å, with zero for a vector that is not finite in a direction that is not periodic: it plays no part."""
        absent = ~self.pbc & ~torch.isfinite(self.cells).all(dim=2)
        return torch.where(absent[:, :, None], 0.0, self.cells)

    def check_cells(self) -> None:
        """Raise ValueError for a system that is periodic along a vector that is not finite."""
        bad = ~torch.isfinite(self.lattice).flatten(1).all(dim=1)
        if bad.any():
            k = int(bad.nonzero()[0])
            raise ValueError(
                f"system {k} has pbc={self.pbc[k].tolist()} and the cell {self.cells[k].tolist()}: every periodic direction "
                "needs a finite lattice vector; set pbc to False where the system ends"
            )

    @property
    def same_composition(self) -> bool:
        """Whether all systems hold the same elements in the same order."""
        if len(set(self.sizes)) != 1:
            return False
        numbers = self.numbers.view(self.n_systems, -1)
        return bool((numbers == numbers[0]).all())

    @cached_property
    def index_in_system(self) -> Tensor:
        """Running number of each atom within its system, shape (n_atoms,)."""
        starts = torch.cumsum(self.counts, 0) - self.counts
        return torch.arange(self.n_atoms, device=self.device) - starts[self.system]

    @property
    def exact(self) -> AtomsBatch:
        """What `to` has rounded to this, else the batch itself: differences of positions are taken before they are rounded."""
        return self.__dict__.get("_exact", self)

    def replace(self, **changes) -> AtomsBatch:
        """Copy with some fields changed; what was worked out from an unchanged `system` goes along."""
        new = changed(self, changes)
        new.__dict__.pop("_exact", None)
        if changes.keys() & {"system", "n_systems"}:
            for name in ("counts", "sizes", "index_in_system"):
                new.__dict__.pop(name, None)
        return new

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> AtomsBatch:
        """Move to a device and cast the real-valued fields (see `exact`); returns itself when nothing changes."""
        device, dtype = self.device if device is None else torch.device(device), dtype or self.dtype
        if device == self.device and dtype == self.dtype:
            return self
        moved = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device, dtype if value.is_floating_point() else None)
        new = replace(self, **moved)
        if dtype.itemsize < self.exact.dtype.itemsize:
            new.__dict__["_exact"] = self.exact.to(device)
        return new

    def sum_over_atoms(self, values: Tensor) -> Tensor:
        """Sum per-atom values, shape (n_atoms, ...), into per-system ones, shape (n_systems, ...)."""
        return values.new_zeros((self.n_systems, *values.shape[1:])).index_add(0, self.system, values)

    def all_atoms(self, flags: Tensor) -> Tensor:
        """Whether a per-atom flag, shape (n_atoms, ...), holds for every atom (and column) of each system."""
        bad = (~flags).reshape(self.n_atoms, -1).any(dim=1)
        return self.sum_over_atoms(bad.to(torch.int32)) == 0

    def atom_index(self, systems: Tensor) -> Tensor:
        """Indices of the atoms of the chosen systems, in the order the systems are given, shape (n_chosen_atoms,)."""
        starts = torch.cumsum(self.counts, 0) - self.counts
        counts = self.counts[systems]
        first = torch.repeat_interleave(starts[systems] - (torch.cumsum(counts, 0) - counts), counts)
        return first + torch.arange(first.shape[0], device=self.device)

    def select(self, systems: Tensor | Sequence[int]) -> AtomsBatch:
        """Pick systems by index, shape (n,); an index may occur more than once."""
        systems = torch.as_tensor(systems, dtype=torch.int64, device=self.device)
        index = {"atom": self.atom_index(systems), "system": systems}
        n = systems.shape[0]
        return AtomsBatch(
            **{name: getattr(self, name)[index[per]] for name, per in rows_of(AtomsBatch).items()},
            system=torch.repeat_interleave(torch.arange(n, device=self.device), self.counts[systems]),
            n_systems=n,
        )

    def systems_of(self, n_atoms: int) -> int:
        """As many systems as have some `n_atoms` atoms together, or one that has more."""
        return max(1, n_atoms * self.n_systems // max(self.n_atoms, 1))

    @property
    def systems_at_once(self) -> int:
        """As many as have some `ATOMS_AT_ONCE` atoms."""
        return self.systems_of(ATOMS_AT_ONCE.get(self.device.type, MOST_ATOMS_AT_ONCE))

    def chunks(self, size: int | None = None) -> Iterator[Tensor]:
        """Indices of all systems, `size` at a time, or `systems_at_once`."""
        yield from torch.arange(self.n_systems, device=self.device).split(size or self.systems_at_once)

    def repeat(self, n: int) -> AtomsBatch:
        """The whole batch, n times over."""
        return self.select(torch.arange(self.n_systems, device=self.device).repeat(n))
