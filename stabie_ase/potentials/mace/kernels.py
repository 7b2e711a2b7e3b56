"""A MACE evaluated by NVIDIA's cuequivariance, where that is installed. What is trained and saved stays MACE's own network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor, nn

from stabie_ase.potentials.evaluators import Evaluated, asks_for_forces
from stabie_ase.potentials.mace.rebuild import default_dtype

PACKAGES = {"cpu": ("cuequivariance_torch",), "cuda": ("cuequivariance_torch", "cuequivariance_ops_torch")}
"""What has to be there for a kind of device: the kernels themselves are for GPUs, and there is a slow way for others."""

INSTALL = "pip install 'stabie_ase[cuequivariance]', and for a GPU also cuequivariance-ops-torch-cu12 (or -cu13)"


class Kernels:
    """Evaluator of a MACE: the twin of its network that calls cuequivariance.

    Its weights are those of the network in another arrangement, as it was when they were last carried over.

    Parameters
    ----------
    network : mace.modules.ScaleShiftMACE
        On the device where it shall stay.
    reduced : bool
        Whether the network's couplings are the basis that mace-torch chooses with cuequivariance installed, or without.

    Raises
    ------
    ImportError
        A package is missing.
    NotImplementedError, RuntimeError, KeyError
        MACE has no such twin for this network.
    """

    def __init__(self, network: nn.Module, reduced: bool):
        device = network.r_max.device.type
        _check_installed(PACKAGES[device])
        from mace.modules.wrapper_ops import CuEquivarianceConfig
        from mace.tools.scripts_utils import extract_config_mace_model

        config = extract_config_mace_model(network)
        if "error" in config:
            raise NotImplementedError(config["error"])
        config["use_reduced_cg"] = reduced
        config["cueq_config"] = CuEquivarianceConfig(
            enabled=True, layout="ir_mul", group="O3_e3nn", optimize_all=True, conv_fusion=device == "cuda"
        )
        self.dtype = network.r_max.dtype
        with default_dtype(self.dtype), torch.random.fork_rng(devices=[]):
            self.twin = type(network)(**config).to(network.r_max.device).requires_grad_(False)
        self.network, self.config, self.carried = network, config, None
        self.carry_over()

    def fits(self, potential: Evaluated, inputs: dict[str, Tensor]) -> bool:
        """Whether only forces in eV/Å are asked for."""
        return asks_for_forces(potential, inputs)

    def __call__(self, potential: Evaluated, inputs: dict[str, Tensor]) -> Tensor:
        """Per-atom energies, shape (n_atoms,), float64, in eV."""
        return self.twin(inputs, compute_force=False)["node_energy"].double()

    def carry_over(self) -> None:
        """Give the twin the network's weights, if these have changed."""
        from mace.cli.convert_e3nn_cueq import transfer_weights

        now = [(p.data_ptr(), p._version) for p in self.network.parameters()]
        if now == self.carried:
            return
        with default_dtype(self.dtype), torch.no_grad():
            transfer_weights(
                self.network,
                self.twin,
                num_product_irreps=len(self.config["hidden_irreps"].slices()) - 1,
                correlation=self.config["correlation"],
                num_layers=self.config["num_interactions"],
                use_reduced_cg=self.config["use_reduced_cg"],
                keep_last_layer_irreps=self.config.get("keep_last_layer_irreps", False),
            )
        self.carried = now


def _check_installed(packages: Sequence[str]) -> None:
    """Raise ImportError unless all can be imported: cuequivariance itself goes on without kernels that do not load, and MACE then fails."""
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise ImportError(f"cuequivariance is not installed: {INSTALL} ({error})") from error
        except (ImportError, OSError) as error:  # its libraries are of another version of CUDA or torch
            raise ImportError(f"{package} is installed but does not load ({str(error).splitlines()[0]}): {INSTALL}") from error
