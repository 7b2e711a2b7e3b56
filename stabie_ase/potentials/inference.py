"""Tensors that were made in `torch.inference_mode` cannot be kept for a gradient; copies of them can."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

Record = TypeVar("Record")


def usable(record: Record) -> Record:
    """The same dataclass, with copies in the place of such tensors."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}  # type: ignore[arg-type]
    copies = {name: x.clone() for name, x in values.items() if isinstance(x, Tensor) and x.is_inference()}
    return replace(record, **copies) if copies else record  # type: ignore[type-var]


@torch.inference_mode(False)
def leave_inference_mode(network: nn.Module) -> None:
    """Put copies in the place of such parameters and buffers; those that modules share stay shared."""
    copies: dict[Tensor, Tensor] = {}
    for module in network.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_inference():
                if tensor not in copies:
                    copy, parameter = tensor.clone(), isinstance(tensor, nn.Parameter)
                    copies[tensor] = nn.Parameter(copy, tensor.requires_grad) if parameter else copy
                setattr(module, name, copies[tensor])
