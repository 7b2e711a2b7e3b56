"""A MACE network as a potential."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.evaluators import MAX_ROUNDING_FRACTION, Plain
from stabie_ase.potentials.mace import kernels
from stabie_ase.potentials.mace.rebuild import default_dtype, import_mace, load_default_kept, plain_twin
from stabie_ase.potentials.turns import alone
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import NeighborList, neighbor_list


class MACEPotential(Potential):
    """A MACE model as a potential.

    Energies are sums of the model's per-atom energies in float64. The list is trimmed to the cutoff at every call: two
    of MACE's interaction blocks have no mask beyond it.

    Parameters
    ----------
    network : mace.modules.MACE or mace.modules.ScaleShiftMACE
        Shared, not copied.

    Attributes
    ----------
    head : str or None
        As in MACE's own calculator: the only head, or the one called "default", else to be chosen by `choose_head`.
    """

    family = "mace"
    _fixed: tuple[tuple, dict[str, Tensor]] = (None,), {}
    _passing = (*Potential._passing, "_fixed")

    def __init__(self, network: nn.Module):
        super().__init__()
        if hasattr(network, "joint_embedding"):
            raise ValueError("MACE models that need a total charge or spin as input are not supported")
        _replace_empty_parameters(network)
        self.network = network
        self.cutoff = float(network.r_max)
        self.numbers = tuple(network.atomic_numbers.tolist())
        self.heads = tuple(getattr(network, "heads", None) or ("Default",))
        defaults = [h for h in self.heads if h.lower() == "default"] if len(self.heads) > 1 else self.heads
        self.head = defaults[0] if defaults else None
        self.bears_fixed_lists = not _reaches_beyond_cutoff(network)

    @classmethod
    def build(
        cls,
        reference_energies: Mapping[int, float],
        avg_num_neighbors: float,
        scale: float = 1.0,
        shift: float = 0.0,
        hidden_irreps: str = "32x0e + 32x1o",
        num_interactions: int = 2,
        max_ell: int = 2,
        correlation: int = 2,
        cutoff: float = 5.0,
        radial_mlp: Sequence[int] = (64, 64, 64),
        dtype: torch.dtype | None = None,
    ) -> MACEPotential:
        """A small ScaleShiftMACE with random weights for the elements of `reference_energies`.

        Parameters
        ----------
        reference_energies : mapping of int to float
            Energies of the isolated atoms in eV.
        avg_num_neighbors : float
            Mean number of neighbours within the cutoff in the training set, which normalises the messages.
        scale : float
            Of the learned energy per atom, in eV; the root mean square of the training forces is a good one.
        shift : float
            Of it, in eV.
        hidden_irreps : str
            Features of an atom, as e3nn writes them.
        num_interactions : int
            Message passing steps.
        max_ell : int
            Largest degree of the spherical harmonics of an edge.
        correlation : int
            Order of the products, one less than the body order.
        cutoff : float
            In Å.
        radial_mlp : sequence of int
            Widths of the network's hidden layers that turns distances into weights.
        dtype : torch.dtype, optional
            torch's default if not given.

        Returns
        -------
        MACEPotential
        """
        modules, o3 = import_mace()
        numbers = sorted(reference_energies)
        with default_dtype(dtype or torch.get_default_dtype()):
            network = modules.ScaleShiftMACE(
                r_max=cutoff,
                num_bessel=8,
                num_polynomial_cutoff=5,
                max_ell=max_ell,
                interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
                interaction_cls_first=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
                num_interactions=num_interactions,
                num_elements=len(numbers),
                hidden_irreps=o3.Irreps(hidden_irreps),
                MLP_irreps=o3.Irreps("16x0e"),
                atomic_energies=np.array([reference_energies[z] for z in numbers]),
                avg_num_neighbors=avg_num_neighbors,
                atomic_numbers=numbers,
                correlation=correlation,
                gate=nn.functional.silu,
                radial_MLP=list(radial_mlp),
                atomic_inter_scale=scale,
                atomic_inter_shift=shift,
            )
        return cls(network)

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Pickled as bytes in a pickle: what e3nn does when they are opened concerns the whole process."""
        with alone():
            return _opened, (type(self), pickle.dumps(self.__getstate__()))

    def __deepcopy__(self, memo: dict[int, Any]) -> MACEPotential:
        with alone():
            memo[id(self)] = twin = type(self).__new__(type(self))
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def inputs(self, batch: AtomsBatch, neighbors: NeighborList) -> dict[str, Tensor]:
        """MACE's input; vectors are r_j - r_i + shift for sender i and receiver j, shape (n_pairs, 3), in Å.

        They are given to it whole, as shifts of atoms at the origin: it would take differences of rounded positions.
        """
        near = neighbors.within(batch, self.cutoff)
        return {
            "positions": torch.zeros_like(batch.positions, requires_grad=False),
            "edge_index": near.pairs,
            "shifts": near.vectors(batch),
            "cell": batch.cells.reshape(-1, 3),
            **self._fixed_inputs(batch),
        }

    def evaluate(self, inputs: dict[str, Tensor]) -> Tensor:
        # On a CPU TorchScript's optimiser gains nothing, and its first calls differ from later ones in the last bits: a
        # resumed run would not end as an uninterrupted one.
        with torch.jit.optimized_execution(inputs["positions"].device.type != "cpu"):
            return _per_atom(self.network, inputs)

    def compilable(self) -> Callable[[dict[str, Tensor]], Tensor]:
        """`evaluate` without TorchScript; energies in eV."""
        with alone():
            return partial(_per_atom, plain_twin(self.network))

    def use_kernels(self) -> None:
        """Evaluate forces in dynamics by NVIDIA's cuequivariance; taken only if it gives the same on a few atoms."""
        self.evaluator = Plain()
        batch = self._some_atoms()
        neighbors = neighbor_list(batch, self.cutoff)
        with self.frozen():
            expected = self.compute(batch, neighbors).forces
            # Which basis a file's couplings are in depends on what was installed where the model was made.
            for reduced in (True, False):
                try:
                    self.evaluator = kernels.Kernels(self.network, reduced)
                    difference = float((self.compute(batch, neighbors).forces - expected).abs().max())
                except (NotImplementedError, RuntimeError, KeyError):
                    continue
                if difference <= MAX_ROUNDING_FRACTION * float(expected.abs().max()):
                    return
        self.evaluator = Plain()
        raise NotImplementedError("cuequivariance has no kernels for this MACE, or gives other forces than it")

    def _some_atoms(self) -> AtomsBatch:
        """Two clusters with all elements and distances of all lengths up to the cutoff."""
        numbers = np.resize(self.numbers, max(8, len(self.numbers)))
        edge = 0.5 * self.cutoff * len(numbers) ** (1 / 3)
        places = np.random.default_rng(0).uniform(0.0, edge, (2, len(numbers), 3))
        return AtomsBatch.from_atoms([Atoms(numbers, x) for x in places], self.device)

    def _fixed_inputs(self, batch: AtomsBatch) -> dict[str, Tensor]:
        """What does not change while the atoms only move; kept from call to call."""
        key = (batch.numbers, batch.system, batch.dtype, self.head)
        kept_for, fixed = self._fixed  # both at once: another thread may put its own there at any time
        if any(new is not old for new, old in zip(key, kept_for)):
            self.check_numbers(batch.numbers.tolist())
            with torch.inference_mode(False):
                known = torch.tensor(self.numbers, device=batch.device)
                fixed = {
                    "node_attrs": (batch.numbers[:, None] == known).to(batch.dtype),
                    "batch": batch.system,
                    "ptr": nn.functional.pad(torch.cumsum(batch.counts, 0), (1, 0)),
                    "head": torch.full((batch.n_systems,), self._head_index(), device=batch.device),
                }
            self._fixed = key, fixed
        return fixed

    def _head_index(self) -> int:
        if self.head is None:
            raise ValueError(f"the model has several heads: choose one of {', '.join(self.heads)}")
        return self.heads.index(self.head)


def _opened(cls: type[MACEPotential], state: bytes) -> MACEPotential:
    with alone(), load_default_kept():
        potential = cls.__new__(cls)
        potential.__setstate__(pickle.loads(state))
    return potential


def _per_atom(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return network(inputs, compute_force=False)["node_energy"].double()


def _replace_empty_parameters(network: nn.Module) -> None:
    """Give MACE's fixed zeros the class they have after saving and opening; their own cannot be copied."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if type(parameter).__name__ == "EmptyParam":
                module._parameters[name] = nn.Parameter(parameter.data, requires_grad=False)


def _reaches_beyond_cutoff(network: nn.Module) -> bool:
    """Whether pairs that no envelope has masked have a weight, which their biased radial networks give them."""
    blocks = {type(block).__name__ for block in network.interactions}
    return "RealAgnosticAttResidualInteractionBlock" in blocks or (
        "RealAgnosticResidualNonLinearInteractionBlock" in blocks and getattr(network, "apply_cutoff", True)
    )
