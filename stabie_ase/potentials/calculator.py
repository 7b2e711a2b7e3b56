"""Any potential as an ASE calculator."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import (
    CalculationFailed,
    Calculator,
    CalculatorSetupError,
    InputError,
    PropertyNotImplementedError,
    all_changes,
)
from ase.stress import full_3x3_to_voigt_6_stress
from torch import nn

from stabie_ase.potentials.base import NO_STRESS, Potential, has_stress
from stabie_ase.potentials.checkpoint import load_potential
from stabie_ase.potentials.module import as_potential
from stabie_ase.potentials.turns import together
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import VerletList


class StABIECalculator(Calculator):
    """ASE calculator of a checkpoint, a `Potential` or a bare torch module.

    Parameters
    ----------
    model : path, Potential or torch.nn.Module
        A model given as an object is used as it is and left as it was; with `device` or `dtype` a copy is used.
    device : str or torch.device, optional
        The CPU for files.
    dtype : torch.dtype or str, optional
        The model's own precision if not given.
    head : str, optional
        For models with several heads.
    trust : bool
        Run the code that a pickled checkpoint carries (see `load_potential`).
    skin : float
        The neighbour list is kept until an atom has moved by half of this, in Å.
    cutoff : float, optional
        Range in Å of a module that is of no known family.

    Notes
    -----
    `energies` are there when the model gives them. `stress` needs a system that is periodic in at least one direction and
    has a cell of three vectors, by whose volume it is divided, and is computed once it has been asked for.

    Examples
    --------
    >>> from ase.io import read
    >>> from stabie_ase import StABIECalculator
    >>> atoms = read("aspirin.xyz")
    >>> atoms.calc = StABIECalculator("aspirin_schnet.pt")
    >>> atoms.get_forces().shape
    (21, 3)
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]

    def __init__(
        self,
        model: str | os.PathLike | Potential | nn.Module,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        head: str | None = None,
        trust: bool = False,
        skin: float = 1.0,
        cutoff: float | None = None,
    ):
        super().__init__()
        if isinstance(model, (str, os.PathLike)):
            self.potential = load_potential(model, device or "cpu", dtype, trust, head)
            self.potential.requires_grad_(False)
        else:
            self.potential = _own(as_potential(model, cutoff), device, dtype, head)
        self._neighbors = VerletList(self.potential.cutoff, skin)
        self._stress_wanted = False
        self._batch: AtomsBatch | None = None
        self._kind: tuple[bytes, bytes] | None = None
        if not self.potential.gives_atomic_energies:
            self.implemented_properties = [p for p in self.implemented_properties if p != "energies"]

    def calculate(
        self, atoms: Atoms | None = None, properties: Sequence[str] = ("energy",), system_changes=all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        self._check()
        try:
            # What is kept from call to call is of use outside of inference mode, too.
            with torch.inference_mode(False):
                results = self._evaluate(properties)
        except ValueError as error:
            raise CalculatorSetupError(str(error)) from error
        _check_finite(results)
        self.results = results

    def _evaluate(self, properties: Sequence[str]) -> dict:
        potential = self.potential
        potential.check_numbers(self.atoms.numbers)  # before masses are looked up
        batch = self._current_batch()
        with_stress = self._gives_stress(batch, "stress" in properties)
        batch.check_cells()
        neighbors = self._neighbors(batch)
        prediction = potential.compute(batch, neighbors, stress=with_stress)
        energy = float(prediction.energies)
        results = {"energy": energy, "free_energy": energy, "forces": _array(prediction.forces)}
        if with_stress:
            results["stress"] = full_3x3_to_voigt_6_stress(_array(prediction.stress)[0])
        if "energies" in properties:
            with torch.no_grad(), together():
                results["energies"] = _array(potential.atomic_energies(batch.to(dtype=potential.dtype), neighbors))
        return results

    def _current_batch(self) -> AtomsBatch:
        """The atoms as tensors; those that did not change stay the same objects, which others take for granted."""
        new = AtomsBatch.from_atoms(self.atoms, device=self.potential.device)
        # Not told by system_changes, which leave out what changed in a call that failed.
        kind = (self.atoms.numbers.tobytes(), self.atoms.pbc.tobytes())
        if kind == self._kind:
            new = self._batch.replace(positions=new.positions, cells=new.cells)
        self._batch, self._kind = new, kind
        return new

    def _check(self) -> None:
        """Refuse what cannot be computed before computing."""
        if len(self.atoms) == 0:
            raise CalculatorSetupError("there are no atoms to calculate")
        if not np.isfinite(self.atoms.positions).all():
            raise InputError("positions that are not finite: has the simulation blown up?")

    def _gives_stress(self, batch: AtomsBatch, asked: bool) -> bool:
        """Whether to compute the stress: once it has been asked for, where there is one; asked for where there is none, it is refused."""
        if not (asked or self._stress_wanted):
            return False
        defined = bool(has_stress(batch).all())
        if asked and not defined:
            pbc, cell = self.atoms.pbc.tolist(), self.atoms.cell.tolist()
            raise PropertyNotImplementedError(f"{NO_STRESS}; got pbc={pbc} and the cell {cell}")
        self._stress_wanted = True
        return defined


def _own(potential: Potential, device, dtype, head: str | None) -> Potential:
    """The potential itself, or a changed copy of it: a shared model is never altered."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if device is None and dtype is None and head is None:
        return potential
    potential = copy.deepcopy(potential).requires_grad_(False).to(device=device, dtype=dtype)
    if head is not None:
        potential.choose_head(head)
    return potential


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _check_finite(results: dict) -> None:
    bad = [name for name, value in results.items() if not np.isfinite(value).all()]
    if bad:
        raise CalculationFailed(
            f"the model gave values that are not finite ({', '.join(bad)}): "
            "are atoms on top of each other, or has the simulation blown up?"
        )
