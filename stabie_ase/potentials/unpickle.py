"""Pickled torch modules taken apart without running anything they name.

A pickle is a program: it names functions and classes and calls them. Here every name is looked up in a closed list and
answered with a class that only writes down what it was called with. Tensors alone are real. A name that is not on the
list ends the reading.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

TRUST_HINT = "If you trust whoever made the file, let it run its code: --trust-checkpoint (in Python trust=True)."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message says why and what to try."""


class Recorded:
    """Stand-in for an object of a pickle: the arguments it was made with and the state it was given.

    Attributes are looked up in that state as `torch.nn.Module` would: plain ones, parameters, buffers, submodules.
    The class bears the name of the original.
    """

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.__dict__.update(args=args, state={})
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.get("state")
        if isinstance(state, dict) and not name.startswith("__"):
            for place in (state, *(state.get(key) for key in ("_parameters", "_buffers", "_modules"))):
                if isinstance(place, dict) and name in place:
                    return place[name]
        raise AttributeError(f"the pickled {type(self).__name__} has no attribute {name!r}")

    def children(self) -> Iterator[tuple[str, Recorded]]:
        """Submodules by name; a `torch.fx` module keeps them in its first argument."""
        members = self.state or (self.args[0] if self.args else {})
        modules = members.get("_modules", {}) if isinstance(members, dict) else {}
        return ((name, module) for name, module in modules.items() if isinstance(module, Recorded))

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Recorded]]:
        """This module and all below it, with their paths, as `torch.nn.Module.named_modules`."""
        yield prefix, self
        for name, module in self.children():
            yield from module.modules(f"{prefix}.{name}" if prefix else name)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by path, as `torch.nn.Module.state_dict`."""
        tensors = {}
        for path, module in self.modules():
            state = module.state if isinstance(module.state, dict) else {}
            buffers = dict(state.get("_buffers", {}))
            for name in state.get("_non_persistent_buffers_set", ()):
                buffers.pop(name, None)
            for name, tensor in {**state.get("_parameters", {}), **buffers}.items():
                if isinstance(tensor, Tensor):
                    tensors[f"{path}.{name}" if path else name] = tensor.detach()
        return tensors


def load_inert(path: str | os.PathLike, classes: Iterable[str]) -> Any:
    """Read a file that `torch.save` wrote; modules come out as `Recorded`.

    Parameters
    ----------
    path : str or path
    classes : iterable of str
        Full names (module.name) that may occur besides torch's own; none of them is ever imported.

    Returns
    -------
    What was saved, with tensors as they were.

    Raises
    ------
    CheckpointError
        Another name occurs, or the pickle is damaged.
    """
    stand_ins = {name: _stand_in(name) for name in (*TORCH_CLASSES, *classes)}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full_name = f"{module}.{name}"
            found = REAL.get(full_name) or stand_ins.get(full_name)
            if found is None:
                raise CheckpointError(
                    f"{path}: asks for {full_name}, which is not among the names known to be harmless; "
                    f"nothing in the file was run. {TRUST_HINT}"
                )
            return found

    inert_pickle = SimpleNamespace(Unpickler=Unpickler, __name__="inert_pickle")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert_pickle)
    except CheckpointError:
        raise
    except Exception as error:  # the opcodes come from a stranger: whatever they break, nothing was run
        raise CheckpointError(f"{path}: damaged, or no torch module ({type(error).__name__}: {error})") from error


def _stand_in(full_name: str) -> type[Recorded]:
    module, _, name = full_name.rpartition(".")
    return type(name, (Recorded,), {"__module__": module})


def _tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> Tensor:
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, bool(requires_grad), OrderedDict())


def _parameter(data: Tensor, requires_grad: bool, hooks: Any) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=bool(requires_grad))


def _bytes(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes; another codec than this one could do anything."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding}")
    return text.encode("latin1")


def _set(items: Iterable = ()) -> set:
    return set(items)


REAL = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "_codecs.encode": _bytes,
    "builtins.set": _set,
    "__builtin__.set": _set,
} | {f"torch.{name}": getattr(torch, name) for name in ("float16", "float32", "float64", "int32", "int64", "bool")}
"""The only names that do something, and what they do here."""

TORCH_CLASSES = (
    "__builtin__.getattr",
    "__builtin__.long",
    "__builtin__.slice",
    "__builtin__.type",
    "_operator.getitem",
    "builtins.getattr",
    "builtins.int",
    "builtins.slice",
    "builtins.type",
    "inspect._empty",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "torch.Tensor",
    "torch._C._VariableFunctionsClass",
    "torch.device",
    "torch.fx._symbolic_trace.Tracer",
    "torch.fx.graph.CodeGen",
    "torch.fx.graph_module.reduce_graph_module",
    "torch.nn.functional.sigmoid",
    "torch.nn.functional.silu",
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.container.ModuleDict",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.ParameterList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.sparse.Embedding",
    "typing.OrderedDict",
    "typing.Union",
)
"""Names that pickled modules of several families contain; each becomes a `Recorded`."""
