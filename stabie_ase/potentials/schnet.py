"""SchNet (Schütt et al., J. Chem. Phys. 148, 241722, 2018), in torch-geometric's parametrisation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.family import Family
from stabie_ase.potentials.turns import alone
from stabie_ase.potentials.unpickle import Recorded
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import NeighborList
from stabie_ase.structures.reference import Reference, interaction_energy, reference_energies
from stabie_ase.system.files import write_atomically

logger = logging.getLogger(__name__)

FORMAT = "stabie_ase.schnet"
VERSION = 1
PICKLED_NAMES = frozenset(
    {
        "torch_geometric.inspector.Inspector",
        "torch_geometric.inspector.Parameter",
        "torch_geometric.inspector.Signature",
        "torch_geometric.nn.aggr.basic.MeanAggregation",
        "torch_geometric.nn.aggr.basic.SumAggregation",
        "torch_geometric.nn.models.schnet.CFConv",
        "torch_geometric.nn.models.schnet.GaussianSmearing",
        "torch_geometric.nn.models.schnet.InteractionBlock",
        "torch_geometric.nn.models.schnet.RadiusInteractionGraph",
        "torch_geometric.nn.models.schnet.SchNet",
        "torch_geometric.nn.models.schnet.ShiftedSoftplus",
    }
)
"""Names in pickled torch-geometric models; they are recorded, never imported (see `unpickle`)."""
HYPER_PARAMETERS = ("hidden_channels", "num_filters", "num_interactions", "num_gaussians", "cutoff")


UNTOLD = (
    "a bare state dict of a SchNet does not tell mean, std and readout: taken as mean=None, std=None and readout='add', with "
    "the cutoff of %g Å where its last Gaussian is. If the network was made with others, its energies and forces are wrong: "
    "give the network itself, torch.save(network, file), or in Python StABIECalculator(network)"
)


class SchNetPotential(Potential):
    """torch-geometric's SchNet as a potential.

    Its cosine envelope, ½ (cos(π r / r_c) + 1), is not masked and grows again beyond the cutoff, so the list is
    trimmed to the cutoff at every call, or the distances are where its length is fixed. Its graph builder's
    `max_num_neighbors` is not applied: a capped list is not symmetric, and forces derived from it are not those of the
    energy. Filters depend on the distance alone and are evaluated once for both directions of a pair.

    Parameters
    ----------
    network : torch_geometric.nn.models.SchNet
        With `readout="add"` and without dipole.
    reference_energies : mapping of int to float
        Energy of each element in eV, added in float64, so that large offsets cost no precision. Empty when the
        network carries its own.
    """

    family = "schnet"
    bears_fixed_lists = True

    def __init__(self, network: nn.Module, reference_energies: Mapping[int, float] | None = None):
        super().__init__()
        if network.dipole or network.scale is not None or type(network.readout).__name__ != "SumAggregation":
            raise ValueError(
                "a SchNet potential needs readout='add', dipole=False and no scale: its atomic energies are summed"
            )
        self.network = network
        self.cutoff = float(network.cutoff)
        self.highest_number = network.embedding.num_embeddings - 1
        self.check_numbers(reference_energies or ())
        self.numbers = tuple(sorted(reference_energies)) if reference_energies else None
        table = torch.zeros(network.embedding.num_embeddings, dtype=torch.float64)
        for number, energy in (reference_energies or {}).items():
            table[number] = energy
        self.register_buffer("reference_energies", table)

    @classmethod
    def build(
        cls,
        reference_energies: Mapping[int, float],
        hidden_channels: int = 64,
        num_filters: int = 64,
        num_interactions: int = 3,
        num_gaussians: int = 50,
        cutoff: float = 5.0,
    ) -> SchNetPotential:
        """A SchNet with random weights for the elements of `reference_energies`."""
        from torch_geometric.nn.models import SchNet

        with alone():  # its constants have torch's default precision, which another thread may change while it makes a MACE
            network = SchNet(
                hidden_channels=hidden_channels,
                num_filters=num_filters,
                num_interactions=num_interactions,
                num_gaussians=num_gaussians,
                cutoff=cutoff,
            )
        return cls(network, reference_energies)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network's weights; energies are in eV whatever it is."""
        return self.network.lin1.weight.dtype

    def _apply(self, fn, recurse: bool = True) -> SchNetPotential:
        table = self.reference_energies
        super()._apply(fn, recurse)
        # A cast of the model must not round the reference energies; only their device follows.
        self.reference_energies = table.to(self.reference_energies.device)
        return self

    def inputs(self, batch: AtomsBatch, neighbors: NeighborList) -> dict[str, Tensor]:
        """Numbers, shape (n_atoms,), pairs in both directions, (2, 2 n), and the distances of the first half of them, (n,), in Å."""
        half = neighbors.half
        distances = half.vectors(batch).norm(dim=1)
        if neighbors.fixed_length:  # at the cutoff the envelope is zero
            return {"numbers": batch.numbers, "pairs": neighbors.pairs, "distances": distances.clamp(max=self.cutoff)}
        near = (distances.detach() < self.cutoff).nonzero()[:, 0]
        return {"numbers": batch.numbers, "pairs": half.select(near).full.pairs, "distances": distances.index_select(0, near)}

    def evaluate(self, inputs: dict[str, Tensor]) -> Tensor:
        numbers, pairs, distances = inputs["numbers"], inputs["pairs"], inputs["distances"]
        net = self.network
        envelope = 0.5 * (torch.cos(distances * (torch.pi / self.cutoff)) + 1.0)
        expansion = _gaussians(net.distance_expansion, distances)
        h = net.embedding(numbers)
        for block in net.interactions:
            filters = block.mlp(expansion) * envelope[:, None]
            h = h + block.lin(block.act(_convolve(block.conv, h, pairs, filters)))
        energies = net.lin2(net.act(net.lin1(h)))[:, 0].double()
        if net.mean is not None and net.std is not None:
            energies = energies * net.std + net.mean
        if net.atomref is not None:
            energies = energies + net.atomref(numbers)[:, 0]
        return energies + self.reference_energies[numbers]


def _gaussians(expansion: nn.Module, distances: Tensor) -> Tensor:
    """torch-geometric's Gaussian smearing without denormal numbers, which slow a CPU down several times."""
    exponents = expansion.coeff * (distances[:, None] - expansion.offset).square()
    return torch.exp(exponents.clamp(min=-60.0))


def _convolve(conv: nn.Module, h: Tensor, pairs: Tensor, filters: Tensor) -> Tensor:
    """Continuous-filter convolution with one filter for a pair and its reverse."""
    x = conv.lin1(h)
    receivers, senders = pairs
    messages = x.index_select(0, senders).view(2, *filters.shape) * filters
    return conv.lin2(torch.zeros_like(x).index_add(0, receivers, messages.flatten(0, 1)))


def to_data(potential: SchNetPotential) -> dict[str, Any]:
    """What a SchNet checkpoint holds: tensors and plain values only."""
    net = potential.network
    numbers = potential.numbers or ()
    return {
        "format": FORMAT,
        "version": VERSION,
        "hyper_parameters": {name: getattr(net, name) for name in HYPER_PARAMETERS}
        | {"mean": net.mean, "std": net.std, "atomref": net.atomref is not None},
        "reference_energies": {z: float(potential.reference_energies[z]) for z in numbers},
        "state_dict": {name: t.detach().cpu() for name, t in net.state_dict().items()},
    }


def recognises(data: Any) -> bool:
    """Whether this is a SchNet: our file's data, a bare torch-geometric state dict, or the module itself."""
    if isinstance(data, dict):
        return data.get("format") == FORMAT or _bare_state_dict(data)
    return (type(data).__module__, type(data).__name__) == ("torch_geometric.nn.models.schnet", "SchNet")


def from_data(data: Any) -> SchNetPotential:
    """Make a potential of `to_data`'s dictionary, of a bare torch-geometric state dict or pickle, or of a module.

    What a bare state dict leaves open is taken as torch-geometric's defaults, with a warning in the log.
    """
    if isinstance(data, nn.Module):
        return SchNetPotential(data)
    from torch_geometric.nn.models import SchNet

    if isinstance(data, Recorded):
        data = _data_of_pickle(data)
    if _bare_state_dict(data):
        logger.warning(UNTOLD, float(data["distance_expansion.offset"][-1]))
        data = {"hyper_parameters": _infer_hyper_parameters(data), "reference_energies": {}, "state_dict": data}
    elif data.get("version") != VERSION:
        raise ValueError(f"SchNet checkpoint of version {data.get('version')}, this package reads version {VERSION}")
    hyper = dict(data["hyper_parameters"])
    atomref = torch.zeros(100, 1) if hyper.pop("atomref", False) else None
    state = data["state_dict"]
    with alone():
        network = SchNet(**hyper, atomref=atomref).to(state["lin1.weight"].dtype)
    network.load_state_dict(state)
    offset = network.distance_expansion.offset
    network.distance_expansion.coeff = -0.5 / float(offset[1] - offset[0]) ** 2  # in the checkpoint's precision
    return SchNetPotential(network, data["reference_energies"])


def _data_of_pickle(module: Recorded) -> dict[str, Any]:
    if module.dipole or module.scale is not None or type(module.readout).__name__ != "SumAggregation":
        raise ValueError("only SchNets with readout='add', dipole=False and no scale can be used")
    names = (*HYPER_PARAMETERS, "mean", "std")
    return {
        "version": VERSION,
        "hyper_parameters": {name: getattr(module, name) for name in names} | {"atomref": module.atomref is not None},
        "reference_energies": {},
        "state_dict": module.state_dict(),
    }


def _bare_state_dict(data: dict[str, Any]) -> bool:
    return "distance_expansion.offset" in data and "interactions.0.conv.lin1.weight" in data


def _infer_hyper_parameters(state: dict[str, Tensor]) -> dict[str, Any]:
    offset = state["distance_expansion.offset"]
    blocks = {name.split(".")[1] for name in state if name.startswith("interactions.")}
    return {
        "hidden_channels": state["embedding.weight"].shape[1],
        "num_filters": state["interactions.0.conv.lin1.weight"].shape[0],
        "num_interactions": len(blocks),
        "num_gaussians": offset.shape[0],
        "cutoff": round(float(offset[-1]), 5),  # 5.2 was stored as a float32
        "atomref": "atomref.weight" in state,
    }


def save(potential: SchNetPotential, path: str | Path) -> None:
    """Write a checkpoint whole or not at all."""
    write_atomically(to_data(potential), path)


def build(reference: Reference) -> SchNetPotential:
    """A SchNet of 3 interactions and 64 channels with random weights."""
    energies = reference_energies(reference)
    potential = SchNetPotential.build(energies)
    nn.init.constant_(potential.network.lin2.bias, interaction_energy(reference, energies))
    return potential


FAMILY = Family(
    "schnet",
    "SchNet (this package's file, or a torch-geometric SchNet: its state dict or the pickled module)",
    PICKLED_NAMES,
    recognises,
    from_data,
    save,
    build=build,
)
