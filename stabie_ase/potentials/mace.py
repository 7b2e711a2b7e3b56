"""MACE (Batatia et al., NeurIPS 2022), from mace-torch."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from stabie_ase.batch import AtomsBatch
from stabie_ase.neighbors import NeighborList, neighbor_list
from stabie_ase.potentials import cueq
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.inert import Recorded, load_inert
from stabie_ase.potentials.turns import alone

CHECKPOINTS = "MACE (the .model file that mace-torch writes, of class MACE or ScaleShiftMACE)"

PICKLED_CLASSES = (
    "e3nn.math._normalize_activation.normalize2mom",
    "e3nn.nn._activation.Activation",
    "e3nn.nn._fc.FullyConnectedNet",
    "e3nn.nn._fc._Layer",
    "e3nn.o3._irreps.Irrep",
    "e3nn.o3._irreps.Irreps",
    "e3nn.o3._irreps._MulIr",
    "e3nn.o3._linear.Instruction",
    "e3nn.o3._linear.Linear",
    "e3nn.o3._spherical_harmonics.SphericalHarmonics",
    "e3nn.o3._tensor_product._instruction.Instruction",
    "e3nn.o3._tensor_product._sub.FullyConnectedTensorProduct",
    "e3nn.o3._tensor_product._tensor_product.TensorProduct",
    "mace.modules.blocks.AtomicEnergiesBlock",
    "mace.modules.blocks.EquivariantProductBasisBlock",
    "mace.modules.blocks.LinearNodeEmbeddingBlock",
    "mace.modules.blocks.LinearReadoutBlock",
    "mace.modules.blocks.NonLinearBiasReadoutBlock",
    "mace.modules.blocks.NonLinearReadoutBlock",
    "mace.modules.blocks.RadialEmbeddingBlock",
    "mace.modules.blocks.RealAgnosticAttResidualInteractionBlock",
    "mace.modules.blocks.RealAgnosticDensityInteractionBlock",
    "mace.modules.blocks.RealAgnosticDensityResidualInteractionBlock",
    "mace.modules.blocks.RealAgnosticInteractionBlock",
    "mace.modules.blocks.RealAgnosticResidualInteractionBlock",
    "mace.modules.blocks.RealAgnosticResidualNonLinearInteractionBlock",
    "mace.modules.blocks.ScaleShiftBlock",
    "mace.modules.gate.GatedEquivariantBlock",
    "mace.modules.irreps_tools.reshape_irreps",
    "mace.modules.models.MACE",
    "mace.modules.models.ScaleShiftMACE",
    "mace.modules.radial.AgnesiTransform",
    "mace.modules.radial.BesselBasis",
    "mace.modules.radial.ChebychevBasis",
    "mace.modules.radial.GaussianBasis",
    "mace.modules.radial.PolynomialCutoff",
    "mace.modules.radial.RadialMLP",
    "mace.modules.radial.SoftTransform",
    "mace.modules.radial.ZBLBasis",
    "mace.modules.symmetric_contraction.Contraction",
    "mace.modules.symmetric_contraction.SymmetricContraction",
    "mace.modules.wrapper_ops.CuEquivarianceConfig",
    "mace.modules.wrapper_ops.OEQConfig",
)
"""Names in pickled MACE models; they are recorded, never imported (see `inert`)."""

MODELS = ("MACE", "ScaleShiftMACE")
RADIAL_TYPES = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
TRANSFORMS = {"AgnesiTransform": "Agnesi", "SoftTransform": "Soft"}
OPTIONS = (
    "apply_cutoff",
    "heads",
    "use_agnostic_product",
    "use_edge_irreps_first",
    "use_last_readout_only",
    "use_reduced_cg",
    "use_so3",
)
"""Settings that newer models keep under the constructor's own names."""

UNUSED = ("pair_repulsion_fn.cutoff", "pair_repulsion_fn.r_max")
"""Parts that mace-torch before 0.3.10 saved and never read."""

SAME_FORCES = 1e-3
"""Largest difference of two forces, as a share of the largest force, that is put down to the order of single-precision sums."""

GATES = {"silu": nn.functional.silu, "tanh": torch.tanh, "abs": torch.abs}


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
        scale, shift : float
            Of the learned energy per atom, in eV; the root mean square of the training forces is a good scale.
        dtype : torch.dtype, optional
            torch's default if not given.
        """
        modules, o3 = _import_mace()
        numbers = sorted(reference_energies)
        with _default_dtype(dtype or torch.get_default_dtype()):
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

    def atomic_energies(self, batch: AtomsBatch, neighbors: NeighborList) -> Tensor:
        near = neighbors.within(batch, self.cutoff)
        return self._network_for(self._evaluate, batch, near.n_pairs)(self._graph(batch, near))

    def _evaluate(self, graph: dict[str, Tensor]) -> Tensor:
        # On a CPU TorchScript's optimiser gains nothing, and its first calls differ from later ones in the last bits: a
        # resumed run would not end as an uninterrupted one.
        with torch.jit.optimized_execution(graph["positions"].device.type != "cpu"):
            return self.network(graph, compute_force=False)["node_energy"].double()

    def _compilable(self) -> Callable[..., Tensor]:
        network = _plain_twin(self.network)
        return lambda graph: network(graph, compute_force=False)["node_energy"].double()

    def use_kernels(self) -> None:
        """Evaluate forces in dynamics by NVIDIA's cuequivariance; taken only if it gives the same on a few atoms."""
        self._compiled = self._compiled_for_many = None
        batch = self._some_atoms()
        neighbors = neighbor_list(batch, self.cutoff)
        with self.frozen():
            expected = self.compute(batch, neighbors).forces
            # Which basis a file's couplings are in depends on what was installed where the model was made.
            for reduced in (True, False):
                try:
                    with _default_dtype(self.dtype):
                        self._compiled = cueq.Kernels(self.network, reduced)
                    difference = float((self.compute(batch, neighbors).forces - expected).abs().max())
                except (NotImplementedError, RuntimeError, KeyError):
                    continue
                if difference <= SAME_FORCES * float(expected.abs().max()):
                    return
        self._compiled = None
        raise NotImplementedError("cuequivariance has no kernels for this MACE, or gives other forces than it")

    def _carry_over(self) -> None:
        if isinstance(self._compiled, cueq.Kernels):
            with _default_dtype(self.dtype):
                self._compiled.carry_over()

    def _some_atoms(self) -> AtomsBatch:
        """Two clusters with all elements and distances of all lengths up to the cutoff."""
        numbers = np.resize(self.numbers, max(8, len(self.numbers)))
        edge = 0.5 * self.cutoff * len(numbers) ** (1 / 3)
        places = np.random.default_rng(0).uniform(0.0, edge, (2, len(numbers), 3))
        return AtomsBatch.from_atoms([Atoms(numbers, x) for x in places], self.device)

    def _graph(self, batch: AtomsBatch, near: NeighborList) -> dict[str, Tensor]:
        """MACE's input; vectors are r_j - r_i + shift for sender i and receiver j.

        They are given to it whole, as shifts of atoms at the origin: it would take differences of rounded positions.
        """
        return {
            "positions": torch.zeros_like(batch.positions, requires_grad=False),
            "edge_index": near.pairs,
            "shifts": near.vectors(batch),
            "cell": batch.cells.reshape(-1, 3),
            **self._fixed_inputs(batch),
        }

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


CLASS = MACEPotential


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


def recognises(data: Any) -> bool:
    """Whether this is a MACE model: the module itself, or what `inert` recorded of it."""
    return type(data).__module__ == "mace.modules.models" and type(data).__name__ in MODELS


def from_data(data: nn.Module | Recorded) -> MACEPotential:
    """Make a potential around a module, or of what was recorded of a pickled one."""
    return MACEPotential(data if isinstance(data, nn.Module) else _rebuild(data))


def to_data(potential: MACEPotential) -> nn.Module:
    """What MACE itself saves: the module, on the CPU and trainable."""
    return copy.deepcopy(potential.network).cpu().requires_grad_(True)


@contextmanager
def load_default_kept() -> Iterator[None]:
    """Undo what `import mace` does to the process: it makes plain `torch.load` calls run the code in any file."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _import_mace():
    try:
        # It greets on standard output where cuequivariance is missing.
        with alone(), load_default_kept(), redirect_stdout(io.StringIO()):
            # mace first: e3nn 0.4 can be imported only after what mace sets up
            from mace import modules  # isort: skip
            from e3nn import o3  # isort: skip
    except ImportError as error:
        raise ImportError("MACE models need mace-torch: pip install 'stabie_ase[mace]'") from error
    return modules, o3


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    with alone():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _plain_twin(network: nn.Module) -> nn.Module:
    """The same network, with the same parameters, without the TorchScript that cannot be compiled once more."""
    from mace.tools.compile import disable_e3nn_codegen, simplify

    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    with disable_e3nn_codegen():
        twin = simplify(_rebuild(load_inert(file, PICKLED_CLASSES))).to(network.r_max.device)
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(twin.get_submodule(path), name, parameter)
    return twin


def _rebuild(picture: Recorded) -> nn.Module:
    """Construct the model anew from its settings and load its weights."""
    modules, o3 = _import_mace()
    weights = {name: tensor for name, tensor in picture.state_dict().items() if not name.startswith(UNUSED)}
    with _default_dtype(weights["node_embedding.linear.weight"].dtype), torch.random.fork_rng(devices=[]):
        network = getattr(modules, type(picture).__name__)(**_settings(picture, modules, o3))
    _fit_shapes(network, weights)
    # Constants that older files lack, or that compiled parts keep to themselves, are those just made; parameters are
    # all in the file.
    parameters = dict(network.named_parameters())
    constants = {name: tensor for name, tensor in network.state_dict().items() if name not in parameters}
    network.load_state_dict(constants | weights, strict=True)
    _adjust(network, picture)
    return network


def _settings(model: Recorded, modules, o3) -> dict[str, Any]:
    """The constructor's arguments, read off what the model's parts remember of them."""
    interactions, products, readouts = (
        [module for _, module in part.children()] for part in (model.interactions, model.products, model.readouts)
    )
    first, last, radial = interactions[0], interactions[-1], model.radial_embedding
    settings = {
        "r_max": float(model.r_max),
        "num_bessel": radial.out_dim,
        "num_polynomial_cutoff": int(radial.cutoff_fn.p),
        "max_ell": model.spherical_harmonics._lmax,
        "interaction_cls": _block(modules, last),
        "interaction_cls_first": _block(modules, first),
        "num_interactions": len(interactions),
        "num_elements": len(model.atomic_numbers),
        "hidden_irreps": o3.Irreps(_irreps(first.hidden_irreps)),
        "atomic_energies": model.atomic_energies_fn.atomic_energies.numpy(),
        "avg_num_neighbors": _number(first.avg_num_neighbors),
        "atomic_numbers": model.atomic_numbers.tolist(),
        "correlation": [_correlation(product) for product in products],
        "radial_type": RADIAL_TYPES[type(radial.bessel_fn).__name__],
    }
    settings |= {name: getattr(model, name) for name in OPTIONS if hasattr(model, name)}
    settings |= _readout_settings(readouts[-1], len(getattr(model, "heads", ["Default"])), modules, o3)
    if hasattr(first, "radial_MLP"):
        settings["radial_MLP"] = list(first.radial_MLP)
    if hasattr(radial, "distance_transform"):
        settings["distance_transform"] = TRANSFORMS[type(radial.distance_transform).__name__]
    if hasattr(model, "pair_repulsion_fn"):
        settings["pair_repulsion"] = True
    if getattr(model, "edge_irreps", None) is not None:
        settings["edge_irreps"] = o3.Irreps(_irreps(model.edge_irreps))
    if len(interactions) > 1 and "+" in _irreps(last.hidden_irreps):
        settings["keep_last_layer_irreps"] = True
    if hasattr(model, "scale_shift"):
        settings["atomic_inter_scale"] = model.scale_shift.scale.numpy()
        settings["atomic_inter_shift"] = model.scale_shift.shift.numpy()
    return settings


def _readout_settings(readout: Recorded, n_heads: int, modules, o3) -> dict[str, Any]:
    if not hasattr(readout, "non_linearity"):  # a single layer has no non-linear readout
        return {"MLP_irreps": o3.Irreps("1x0e"), "gate": None}
    gates = [gate for _, gate in readout.non_linearity.acts.children()]
    return {
        # What is remembered is n_heads times what was given.
        "MLP_irreps": o3.Irreps([(mul // n_heads, ir) for mul, ir in o3.Irreps(_irreps(readout.hidden_irreps))]),
        "gate": GATES[_function_name(gates[0].f)] if gates else None,
        "readout_cls": _block(modules, readout),
    }


def _block(modules, part: Recorded) -> type[nn.Module]:
    name = type(part).__name__
    if f"mace.modules.blocks.{name}" not in PICKLED_CLASSES:
        raise ValueError(f"a {name} where a block of MACE should be")
    return getattr(modules.blocks, name)


def _correlation(product: Recorded) -> int:
    _, contraction = next(product.symmetric_contractions.contractions.children())
    return contraction.correlation


def _irreps(recorded: Recorded | str) -> str:
    """Notation of recorded irreps: groups of a multiplicity and a pair of degree and parity."""
    if isinstance(recorded, str):
        return recorded
    groups = [(mul, *irrep.args[0]) for mul, irrep in (group.args[0] for group in recorded.args[0])]
    return "+".join(f"{mul}x{degree}{'e' if parity == 1 else 'o'}" for mul, degree, parity in groups)


def _function_name(recorded: Any) -> str:
    """Name of a pickled function; C functions are pickled as getattr(owner, name)."""
    return recorded.args[1] if isinstance(recorded, Recorded) else recorded.__name__


def _number(recorded: Any) -> float:
    """A number that may have been a NumPy scalar, which is pickled as its dtype and its bytes."""
    if isinstance(recorded, Recorded):
        dtype, data = recorded.args
        return float(np.frombuffer(data, dtype=np.dtype(str(dtype.args[0])), count=1)[0])
    return float(recorded)


def _fit_shapes(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Accept another basis of couplings: a model made with cuequivariance installed has fewer per order."""
    for name, tensor in network.state_dict(keep_vars=True).items():
        if ".symmetric_contractions." in name and name in weights and weights[name].shape != tensor.shape:
            tensor.data = torch.empty_like(weights[name])


def _adjust(network: nn.Module, picture: Recorded) -> None:
    """Take over plain numbers (some are Monte Carlo estimates); whole numbers and words must agree as they are."""
    for path, recorded in picture.modules():
        if path.startswith(UNUSED):
            continue
        attributes = vars(network.get_submodule(path))
        for name, value in recorded.state.items():
            if name not in attributes or name == "training":
                continue
            if isinstance(value, float):
                attributes[name] = value
            elif isinstance(value, (int, str)) and not name.startswith("_") and attributes[name] != value:
                raise ValueError(
                    f"settings not understood: {path}.{name} is {attributes[name]!r} after rebuilding and {value!r} in "
                    "the file"
                )
