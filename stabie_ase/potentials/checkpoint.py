"""Reading and writing potentials in each family's own file format, without running what a file contains."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.family import families, family_of
from stabie_ase.potentials.mace.rebuild import load_default_kept
from stabie_ase.potentials.turns import alone
from stabie_ase.potentials.unpickle import TRUST_HINT, CheckpointError, load_inert

__all__ = ["CheckpointError", "adopt", "load_potential", "save_potential"]

@torch.inference_mode(False)
def load_potential(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    trust: bool = False,
    head: str | None = None,
) -> Potential:
    """Open a checkpoint of any known family; the file tells which.

    Nothing in the file is executed: plain tensors and values are read by torch's restricted reader, a pickled module
    is taken apart into its weights and settings and rebuilt by the family's own constructor.

    Parameters
    ----------
    path : str or path
    device : str or torch.device
    dtype : torch.dtype or str, optional
        The checkpoint's own precision if not given.
    trust : bool
        Run the code that a pickled module carries. Only for files from people you would let run programs as you.
    head : str, optional
        For models with several heads.

    Returns
    -------
    Potential

    Raises
    ------
    CheckpointError
        The file is damaged, of no known family, or cannot be read without running code in it.

    Examples
    --------
    >>> from stabie_ase import load_potential
    >>> potential = load_potential("aspirin_schnet.pt")
    >>> potential.family, potential.cutoff
    ('schnet', 5.0)
    """
    data = _read_trusting(path) if trust else read(path)
    potential = _build(data, path)
    if head is not None:
        potential.choose_head(head)
    elif potential.heads and potential.head is None:
        raise CheckpointError(f"{path}: the model has several heads: choose one of {', '.join(potential.heads)}")
    return potential.to(device=device, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def save_potential(potential: Potential, path: str | os.PathLike) -> None:
    """Write a potential in its family's native format; an existing file is replaced whole or not at all."""
    family = family_of(potential)
    if family is None:
        raise CheckpointError(
            f"{type(potential).__name__} has no file format of its own; potentials of these families do: "
            + ", ".join(families())
        )
    family.save(potential, path)


def adopt(data: Any) -> Potential | None:
    """The potential that a torch module, or what `read` returned, belongs to; None if it is of no known family."""
    family = next((f for f in families().values() if f.recognise(data)), None)
    return family.load(data) if family else None


def read(path: str | os.PathLike) -> Any:
    """What a checkpoint holds, read without running code: plain data, or an inert picture of a pickled module."""
    _check_container(path)
    try:
        # Said explicitly: `import mace` sets an environment variable that turns the default into "run everything".
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path}: not a torch checkpoint, or a pickle in torch's format from before version 1.6, of which "
                f"only plain tensors are read. {TRUST_HINT}"
            ) from error
        return load_inert(path, frozenset().union(*(family.pickled_names for family in families().values())))
    except (EOFError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or not a torch checkpoint ({_in_one_line(error)})") from error


def _read_trusting(path: str | os.PathLike) -> Any:
    _check_container(path)
    try:
        with alone(), load_default_kept():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a foreign pickle can raise anything at all
        raise CheckpointError(f"{path}: loading its code failed: {_in_one_line(error)}") from error


def _build(data: Any, path: str | os.PathLike) -> Potential:
    try:
        potential = adopt(data)
    except Exception as error:  # a file that claims to be of a family can lack anything
        raise CheckpointError(f"{path}: the model could not be rebuilt: {_in_one_line(error)}") from error
    if potential is None:
        known = "; ".join(family.files for family in families().values())
        raise CheckpointError(f"{path}: {_describe(data)}, which is no family known here. Known: {known}")
    return potential


def _check_container(path: str | os.PathLike) -> None:
    """Refuse early, and by name, what is not a file that torch.save wrote."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"PK":
        _check_archive(path)


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: the file is cut short or damaged; copy it again") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path}: a TorchScript archive, whose weights cannot be put back into a trainable model here; "
            "give the checkpoint it was exported from"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote")


def _describe(data: Any) -> str:
    if not isinstance(data, dict):
        return f"an object of type {type(data).__name__}"
    keys = [str(key) for key in data]
    return f"a dictionary with keys {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"


def _in_one_line(error: Exception, longest: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[:longest] + "..."
