"""What is given as objects in memory: made into the texts and files that a run keeps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from torch import nn

from stabie_ase.potentials.checkpoint import save_potential
from stabie_ase.potentials.family import family_of
from stabie_ase.potentials.module import as_potential
from stabie_ase.runs.finetune_directory import RunDirectory
from stabie_ase.runs.run import Live
from stabie_ase.structures.reference import Reference, reference_of

Frames = str | os.PathLike | Sequence[Atoms] | Sequence[str]
"""One name of frames, as ASE knows them, or several, or frames in memory with energies and forces."""


def texts_and_objects(**given: str | Sequence | None) -> tuple[dict[str, str], Live]:
    """Options as text, and what was made already."""
    texts, objects = {}, {}
    for name, value in given.items():
        option = {"observables": "observable", "criteria": "criterion"}[name]
        parts = [value] if isinstance(value, str) else list(value or ())
        objects[name] = [part for part in parts if not isinstance(part, str)]
        words = ",".join(part for part in parts if isinstance(part, str))
        if words:
            texts[option] = words
    return texts, Live(**objects)


class InputsOf:
    """The files of a run: paths as they are, live objects saved in a folder of the run's, which goes again on an error."""

    def __init__(self, output: Path, model, frames, validation, keys):
        self.output, self.made, self.keys = output, not output.exists(), keys
        self.model, self.frames = model, {"reference": frames, "validation": validation}

    def __enter__(self) -> dict[str, str | list[str]]:
        try:
            return self._files()
        except BaseException:
            self._remove()
            raise

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.output if self.made else self.output / RunDirectory.INPUTS, ignore_errors=True)

    def _files(self) -> dict[str, str | list[str]]:
        folder = self.output / RunDirectory.INPUTS
        files: dict[str, str | list[str]] = {}
        if isinstance(self.model, nn.Module):
            folder.mkdir(parents=True, exist_ok=True)
            potential = as_potential(self.model)
            family = family_of(potential)
            files["model"] = str(folder / (f"start{family.suffix if family else '.pt'}"))
            save_potential(potential, files["model"])
        else:
            files["model"] = os.fspath(self.model)
        for name, frames in self.frames.items():
            if frames is None:
                continue
            if isinstance(frames, (str, os.PathLike)):
                files[name] = os.fspath(frames)
            elif frames and all(isinstance(atoms, Atoms) for atoms in frames):
                labelled = _with_results(reference_of(frames, *self.keys))
                folder.mkdir(parents=True, exist_ok=True)
                files[name] = str(folder / f"{name}.traj")
                write(files[name], labelled)
            else:
                files[name] = [os.fspath(path) for path in frames]
        return files


def _with_results(reference: Reference) -> list[Atoms]:
    """The frames with their labels where every format of ASE keeps them."""
    frames = []
    for atoms, energy, forces in zip(reference.frames, reference.energies, reference.forces):
        frames.append(atoms.copy())
        frames[-1].calc = SinglePointCalculator(frames[-1], energy=float(energy), forces=forces)
    return frames
