"""MACE's own network from a pickled one, taken apart and made anew by MACE's constructor."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabie_ase.potentials.turns import alone
from stabie_ase.potentials.unpickle import Recorded, load_inert

PICKLED_NAMES = frozenset(
    {
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
    }
)
"""Names in pickled MACE models; they are recorded, never imported (see `unpickle`)."""

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

GATES = {"silu": nn.functional.silu, "tanh": torch.tanh, "abs": torch.abs}



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


def import_mace() -> tuple[ModuleType, ModuleType]:
    """`mace.modules` and `e3nn.o3`; ImportError where they are not installed."""
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
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this block torch makes tensors in this precision: for the whole process, so that no other thread works meanwhile."""
    with alone():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def plain_twin(network: nn.Module) -> nn.Module:
    """The same network, with the same parameters, without the TorchScript that cannot be compiled once more."""
    from mace.tools.compile import disable_e3nn_codegen, simplify

    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    with disable_e3nn_codegen():
        twin = simplify(rebuild(load_inert(file, PICKLED_NAMES))).to(network.r_max.device)
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(twin.get_submodule(path), name, parameter)
    return twin


def rebuild(picture: Recorded) -> nn.Module:
    """Construct the model anew from its settings and load its weights."""
    modules, o3 = import_mace()
    weights = {name: tensor for name, tensor in picture.state_dict().items() if not name.startswith(UNUSED)}
    with default_dtype(weights["node_embedding.linear.weight"].dtype), torch.random.fork_rng(devices=[]):
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
    if f"mace.modules.blocks.{name}" not in PICKLED_NAMES:
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
