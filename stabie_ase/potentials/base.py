"""The contract between a machine-learning force field and everything that uses one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from threading import RLock
from typing import Any, ClassVar, NamedTuple

import torch
from ase.calculators.calculator import PropertyNotImplementedError
from ase.data import chemical_symbols
from torch import Tensor, nn

from stabie_ase.potentials.evaluators import Compiled, Evaluator, Plain
from stabie_ase.potentials.inference import leave_inference_mode, usable
from stabie_ase.potentials.turns import alone, together
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import NeighborList

NO_STRESS = "stress needs a system that is periodic in at least one direction, and a cell of three vectors that span a volume"

_freezing = RLock()


class Prediction(NamedTuple):
    """What a potential says about a batch.

    Attributes
    ----------
    energies : Tensor of float64, shape (n_systems,)
        In eV.
    forces : Tensor, shape (n_atoms, 3)
        In eV/Å.
    stress : Tensor or None, shape (n_systems, 3, 3)
        In eV/Å³, positive under tension.
    """

    energies: Tensor
    forces: Tensor
    stress: Tensor | None


class Potential(nn.Module):
    """Base of all potentials. A subclass sets `cutoff` and `numbers`, and implements `inputs` and `evaluate`.

    `inputs` makes tensors of a batch and its neighbour list, trimmed to the cutoff, and `evaluate` energies of these tensors alone,
    so that it can be compiled. A model that builds its own graph overrides `atomic_energies` (per atom) or `energies` (per system)
    instead. All work in the model's own precision, in eV and Å, must be differentiable in positions, cells and parameters, and
    may be given pairs beyond the cutoff. Vectors between atoms are to be taken from `neighbors.vectors(batch)`, which are right
    wherever the atoms are; differences of positions that have been rounded are not.

    Attributes
    ----------
    cutoff : float
        Range of the neighbour list the model needs, in Å.
    numbers : tuple of int or None
        Atomic numbers the model knows; None means any up to `highest_number`.
    highest_number : int
        The last element that the model's tables have a row for.
    family : str
        What this kind of potential is called.
    heads : tuple of str
        Names of the outputs of a model that was fitted to several data sets at once; usually none.
    head : str or None
        The one in use.
    bears_fixed_lists : bool
        Pairs beyond the cutoff contribute nothing even where a list of fixed length keeps them.
    evaluates_atoms : bool
        `evaluate` gives energies per atom, else per system.
    evaluator : Evaluator
        How `evaluate` is carried out. Copies and pickles have the plain one: other code works on the parameters it was made with.
    """

    cutoff: float
    numbers: tuple[int, ...] | None = None
    highest_number: int = len(chemical_symbols) - 1
    family: str = "potential"
    heads: tuple[str, ...] = ()
    head: str | None = None
    bears_fixed_lists: bool = False
    evaluates_atoms: bool = True
    evaluator: Evaluator = Plain()
    _checked: Tensor | None = None
    _n_freezing: int = 0
    _to_thaw: tuple[nn.Parameter, ...] = ()
    _passing: ClassVar[tuple[str, ...]] = ("evaluator", "_checked", "_n_freezing", "_to_thaw")

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles: what belongs to this object alone stays behind."""
        return {name: value for name, value in self.__dict__.items() if name not in self._passing}

    def inputs(self, batch: AtomsBatch, neighbors: NeighborList) -> dict[str, Tensor]:
        """Tensors of any shape, all that `evaluate` is to know of a batch; differentiable in positions and cells, which are in Å."""
        raise NotImplementedError(f"the {self.family} potential has neither inputs and evaluate nor energies of its own")

    def evaluate(self, inputs: dict[str, Tensor]) -> Tensor:
        """Energies in eV, shape (n_atoms,), or (n_systems,) where `evaluates_atoms` is False.

        A function of these tensors and the parameters; no shape in it depends on a value in a tensor.
        """
        raise NotImplementedError(f"the {self.family} potential builds its own graph")

    def _evaluated(self, batch: AtomsBatch, neighbors: NeighborList) -> Tensor:
        inputs, evaluator = self.inputs(batch, neighbors), self.evaluator
        return evaluator(self, inputs) if evaluator.fits(self, inputs) else self.evaluate(inputs)

    def atomic_energies(self, batch: AtomsBatch, neighbors: NeighborList) -> Tensor:
        """Per-atom energies, shape (n_atoms,), in eV; they sum to the energies of the systems."""
        if not self.gives_atomic_energies:
            raise PropertyNotImplementedError(f"the {self.family} potential gives no per-atom energies")
        return self._evaluated(batch, neighbors)

    def energies(self, batch: AtomsBatch, neighbors: NeighborList) -> Tensor:
        """Potential energies, shape (n_systems,), in eV."""
        if self.gives_atomic_energies:
            return batch.sum_over_atoms(self.atomic_energies(batch, neighbors).double())
        return self._evaluated(batch, neighbors)

    @property
    def gives_atomic_energies(self) -> bool:
        """Whether per-atom energies, shape (n_atoms,), can be asked for."""
        own, evaluates = (getattr(type(self), name) is not getattr(Potential, name) for name in ("atomic_energies", "evaluate"))
        return own or (evaluates and self.evaluates_atoms)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters, in which energies in eV are worked out."""
        return self._some_tensor().dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._some_tensor().device

    def _some_tensor(self) -> Tensor:
        tensors = (t for t in chain(self.parameters(), self.buffers()) if t.is_floating_point())
        return next(tensors, torch.zeros((), dtype=torch.float64))

    def forward(self, batch: AtomsBatch, neighbors: NeighborList, of_atoms: bool = False) -> Tensor:
        """Energies with the graph of parameters and positions.

        Parameters
        ----------
        batch : AtomsBatch
        neighbors : NeighborList
        of_atoms : bool
            Of the atoms, not of the systems.

        Returns
        -------
        Tensor of float64, shape (n_systems,) or (n_atoms,)
            In eV.

        Raises
        ------
        ValueError
            Unknown elements.
        """
        if batch.numbers is not self._checked:  # they stay the same tensor while atoms only move
            self.check_numbers(batch.numbers.unique().tolist())
            leave_inference_mode(self)
            self._checked = batch.numbers
        rounded = batch.to(dtype=self.dtype)
        if of_atoms:
            return self.atomic_energies(rounded, neighbors).double()
        energies = self.energies(rounded, neighbors).double()
        # Not a number where a lattice is not finite any more, whatever its empty list makes of the atoms.
        return energies + 0.0 * batch.lattice.detach().sum(dim=(1, 2)) if neighbors.periodic else energies

    def compute(
        self, batch: AtomsBatch, neighbors: NeighborList, stress: bool = False, create_graph: bool = False
    ) -> Prediction:
        """Energies, forces and, if asked for, stress, also within `torch.no_grad` and `torch.inference_mode`.

        Parameters
        ----------
        batch : AtomsBatch
            The systems.
        neighbors : NeighborList
            Complete up to `cutoff`.
        stress : bool
            Also the stress, as (1/V) dE/dε for a symmetric strain ε of positions and cell, with V the volume of the cell as it
            is given: that of a slab depends on how much vacuum is in it.
        create_graph : bool
            Keep the graph, to train on forces. Without it everything returned is detached.

        Returns
        -------
        Prediction

        Raises
        ------
        PropertyNotImplementedError
            Stress where it is not defined (see `has_stress`).
        ValueError
            The batch is on another device, or the model does not know an element.
        RuntimeError
            The energy does not depend on the positions (or the cell) in a way that autograd can follow.
        """
        if stress and not bool(has_stress(batch).all()):
            raise PropertyNotImplementedError(NO_STRESS)
        if batch.device.type != self.device.type:
            raise ValueError(f"the batch is on {batch.device}, the model on {self.device}: move one by .to(device=...)")
        with torch.inference_mode(False), torch.enable_grad(), alone() if self.is_compiled else together():
            batch, neighbors = usable(batch.exact), usable(neighbors)
            positions = batch.positions.detach().requires_grad_(True)
            wanted, strained = [positions], batch.replace(positions=positions)
            if stress:
                strain = positions.new_zeros((batch.n_systems, 3, 3)).requires_grad_(True)
                wanted.append(strain)
                strained = _strain(strained, strain)
            energies = self(strained, neighbors)
            gradients = self._gradients(energies, wanted, create_graph)
            forces = -gradients[0].to(self.dtype)
            volumes = torch.linalg.det(batch.cells).abs()[:, None, None] if stress else None
            virial_stress = (gradients[1] / volumes).to(self.dtype) if stress else None
            return Prediction(energies if create_graph else energies.detach(), forces, virial_stress)

    def _gradients(self, energies: Tensor, wanted: list[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
        gradients = (None,)
        if energies.requires_grad:
            gradients = torch.autograd.grad(energies.sum(), wanted, create_graph=create_graph, allow_unused=True)
        # Even an empty neighbour list leaves a path from positions to energy; without one, atoms would fly free.
        if any(g is None for g in gradients):
            raise RuntimeError(
                f"the energy of the {self.family} potential is not a differentiable function of the positions"
                + (" and the cell" if len(wanted) > 1 else "")
                + ": look for detach(), .item() or no_grad() on the way"
            )
        return gradients  # type: ignore[return-value]

    def compile_network(self) -> None:
        """Carry out `evaluate` by compiled code from now on, where only forces are asked for and parameters are frozen.

        To be called when the potential is where it shall stay. The first call after it takes a minute or so, and says whether the
        code is for single systems or for several (see `Compiled`). Training uses the plain network as before, with the same
        parameters. `potential.evaluator = Plain()` undoes it.

        Raises
        ------
        NotImplementedError
            The family has no `evaluate` that could be compiled.
        """
        self.evaluator = Compiled(self.compilable())

    def compilable(self) -> Callable[[dict[str, Tensor]], Tensor]:
        """What returns the same energies in eV as `evaluate`, of the same parameters, and can be compiled."""
        if type(self).evaluate is Potential.evaluate:
            raise NotImplementedError(f"the {self.family} potential cannot be compiled")
        return self.evaluate

    def use_kernels(self) -> None:
        """Like `compile_network`, by kernels that somebody has written for this family in place of a compiler's.

        They have parameters of their own, which follow those of the network on entering `frozen`.

        Raises
        ------
        NotImplementedError
            There are none, or not for this model.
        ImportError
            They are not installed.
        """
        raise NotImplementedError(f"there are no kernels for the {self.family} potential")

    @property
    def is_compiled(self) -> bool:
        """Whether other code than the plain network is at hand for dynamics."""
        return not isinstance(self.evaluator, Plain)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this block no parameter asks for a gradient: for dynamics, entered once for a block of steps.

        Several threads may be in such blocks of one potential; parameters ask again when the last has left.
        """
        leave_inference_mode(self)
        with _freezing:
            training = [p for p in self.parameters() if p.requires_grad]
            for p in training:
                p.requires_grad_(False)
            self._n_freezing, self._to_thaw = self._n_freezing + 1, (*self._to_thaw, *training)
        try:
            self.evaluator.carry_over()
            yield
        finally:
            with _freezing:
                self._n_freezing -= 1
                if self._n_freezing == 0:
                    for p in self._to_thaw:
                        p.requires_grad_(True)
                    self._to_thaw = ()

    def choose_head(self, head: str) -> None:
        """Use another head from now on; ValueError for a name the model does not have."""
        if head not in self.heads:
            raise ValueError(f"the model has no head {head!r}; it has {', '.join(self.heads) or 'a single output'}")
        self.head = head

    def check_numbers(self, numbers: Iterable[int]) -> None:
        """Raise ValueError for elements the model was not made for, and for what is no element."""
        known = range(1, self.highest_number + 1) if self.numbers is None else [z for z in self.numbers if z > 0]
        unknown = sorted({int(z) for z in numbers}.difference(known))
        if unknown:
            names = ", ".join(map(_name, known)) if self.numbers else f"elements up to {_name(self.highest_number)}"
            raise ValueError(f"the model does not know {', '.join(map(_name, unknown))}; it was made for {names}")


def _name(number: int) -> str:
    """Of an element; atomic numbers that are none, among them the 0 of ASE's placeholder X, are told as numbers too."""
    if 0 < number < len(chemical_symbols):
        return chemical_symbols[number]
    return f"{'X' if number == 0 else 'an element'} (Z = {number})"


def _strain(batch: AtomsBatch, strain: Tensor) -> AtomsBatch:
    symmetric = 0.5 * (strain + strain.transpose(1, 2))
    positions = batch.positions + torch.einsum("nx,nxy->ny", batch.positions, symmetric[batch.system])
    return batch.replace(positions=positions, cells=batch.cells + batch.cells @ symmetric)


def has_stress(batch: AtomsBatch) -> Tensor:
    """Which systems are periodic in some direction and have a cell with a volume, shape (n_systems,).

    One whose cell is not finite any more counts: its stress is not a number.
    """
    return batch.pbc.any(dim=1) & (torch.linalg.det(batch.lattice) != 0)
