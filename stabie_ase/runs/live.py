"""The commands as functions of Python: `finetune`, `resume` and `evaluate`, on paths or on live objects."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from stabie_ase.observables import Observable
from stabie_ase.potentials.base import Potential
from stabie_ase.runs.directory import UnusableRun
from stabie_ase.runs.evaluate import Evaluation
from stabie_ase.runs.finetune import Finetuning, model_path
from stabie_ase.runs.finetune_directory import RunDirectory
from stabie_ase.runs.inputs import Inputs
from stabie_ase.runs.monitor import Monitor
from stabie_ase.runs.objects import Frames, InputsOf, texts_and_objects
from stabie_ase.runs.options import EvaluationOptions
from stabie_ase.runs.report.html import write_report
from stabie_ase.stability import Criterion
from stabie_ase.system.files import check_new_file
from stabie_ase.system.options import BadOption, from_dict
from stabie_ase.training.options import FinetuneOptions
from stabie_ase.training.recipes import IN_LIQUIDS


@dataclass(frozen=True)
class FinetuneResult:
    """What a run has come to.

    Attributes
    ----------
    potential : Potential or None
        With the weights of the result: those of the start if no gain could be told from chance. None if it was not opened.
    details : dict
        All that result.json holds; units are in the names.
    path, model_path, report_path : Path or None
        The run directory, the checkpoint and the report in it, if a directory was asked for.
    """

    potential: Potential | None
    details: dict[str, Any]
    path: Path | None = None
    model_path: Path | None = None
    report_path: Path | None = None

    @property
    def gained(self) -> bool:
        """Whether the result is more stable than the start by more than chance, and accurate enough."""
        return self.details["gained"]

    @property
    def message(self) -> str:
        """The verdict in a sentence."""
        return self.details["message"]

    @property
    def models(self) -> dict[str, dict]:
        """Summaries of "start" and "stabie"."""
        return self.details["models"]


def finetune(
    model: str | os.PathLike | nn.Module,
    frames: Frames,
    *,
    observables: str | Sequence[str | Observable] | None = None,
    criteria: str | Sequence[str | Criterion] | None = None,
    validation: Frames | None = None,
    output: str | os.PathLike | None = None,
    monitor: Monitor | None = None,
    on_window: Callable[[dict], None] | None = None,
    **options: Any,
) -> FinetuneResult:
    """Make a model stable without new quantum calculations; `stabie-ase finetune` is this function.

    Parameters
    ----------
    model : path, Potential or torch module
        A checkpoint, or a model in memory, which is copied and left as it is.
    frames : path, several, or frames in memory
        With energies (eV) and forces (eV/Å).
    observables : str, or sequence of str or of objects, optional
        As on the command line, or made already; what suits the system if not given.
    criteria : str, or sequence of str or of objects, optional
        Of stability, in the same way.
    validation : as `frames`, optional
        Unseen frames to judge accuracy by.
    output : path, optional
        Run directory; live objects are saved there too, so that the run can be resumed. None is kept without it.
    monitor : Monitor, optional
        Told in words what is found on the way, and how far the work has come.
    on_window : callable, optional
        Told the record of each window.
    **options
        Any of `FinetuneOptions`, side by side or in their sections, and of `Inputs`: device, dtype, head, energy_key, forces_key,
        trust_checkpoint, compilation. A `recipe` stands for other defaults of those that are not given.

    Returns
    -------
    FinetuneResult

    Raises
    ------
    ValueError
        In one line, what was given, what was expected and what to try; nothing has been written.

    Examples
    --------
    >>> import stabie_ase
    >>> result = stabie_ase.finetune(
    ...     "aspirin_schnet.pt", "aspirin.xyz", replicas=4, window_fs=20.0, max_updates=1,
    ...     check={"replicas": 4, "time_ps": 0.02, "rounds": 1},
    ... )
    >>> sorted(result.models)
    ['stabie', 'start']
    """
    texts, live = texts_and_objects(observables=observables, criteria=criteria)
    about_inputs = {name: options.pop(name) for name in list(options) if name in Inputs.__dataclass_fields__}
    given = {name: None for name, made in (("observable", live.observables), ("criterion", live.criteria)) if made} | options | texts
    from_dict(FinetuneOptions, given)  # a typo is told before any file is read
    kept = Path(output) if output is not None else Path(tempfile.mkdtemp(prefix="stabie-run-"))
    RunDirectory.check_free(kept)
    keys = (about_inputs.get("energy_key"), about_inputs.get("forces_key"))
    try:
        with InputsOf(kept, model, frames, validation, keys) as files:
            inputs = Inputs(**files, **about_inputs)
            config = from_dict(FinetuneOptions, _suited(given, inputs))
            run = Finetuning.begin(kept, inputs, config, monitor, live, own=[RunDirectory.INPUTS])
        return _to_end(run, output is not None, monitor, on_window)
    finally:
        if output is None:
            shutil.rmtree(kept, ignore_errors=True)


def _suited(given: Mapping[str, Any], inputs: Inputs) -> Mapping[str, Any]:
    """The options with the recipe that suits the reference."""
    liquid = IN_LIQUIDS.get(given.get("recipe", ""))
    return {**given, "recipe": liquid} if liquid and inputs.are_periodic() else given


def resume(
    path: str | os.PathLike,
    *,
    observables: str | Sequence[str | Observable] | None = None,
    criteria: str | Sequence[str | Criterion] | None = None,
    monitor: Monitor | None = None,
    on_window: Callable[[dict], None] | None = None,
    trust_checkpoint: bool = False,
) -> FinetuneResult:
    """Take up a run of `finetune` where it stands, as `stabie-ase finetune --resume` does.

    Parameters
    ----------
    path : path
        The run directory.
    observables : sequence of Observable, optional
        Those that the run was begun with; what was given as text is in the directory.
    criteria : sequence of Criterion, optional
        The same.
    monitor : Monitor, optional
        Told in words what is found on the way, and how far the work has come.
    on_window : callable, optional
        Told the record of each window.
    trust_checkpoint : bool
        Run code that a pickled checkpoint carries.

    Returns
    -------
    FinetuneResult
        Also of a run that is finished.

    Raises
    ------
    ValueError
        The directory cannot be gone on with; the message says why.
    """
    texts, live = texts_and_objects(observables=observables, criteria=criteria)
    if texts:
        raise BadOption(f"what a run was begun with as text is in {path}: give objects only, not {', '.join(texts.values())}")
    directory, inputs, _, _ = Finetuning.opened(path)
    if directory.complete:
        about = replace(inputs, model=str(model_path(directory, inputs)), trust_checkpoint=trust_checkpoint)
        return result_of(directory, inputs, about.load_potential())
    return _to_end(Finetuning.resume(path, monitor, live, trust_checkpoint), True, monitor, on_window)


def _to_end(
    run: Finetuning, keep: bool, monitor: Monitor | None, on_window: Callable[[dict], None] | None
) -> FinetuneResult:
    details = run.run(monitor, on_window)
    if not keep:
        return FinetuneResult(run.training.potential, details)
    return result_of(run.directory, run.inputs, run.training.potential, details)


def result_of(
    directory: RunDirectory, inputs: Inputs, potential: Potential | None = None, details: dict[str, Any] | None = None
) -> FinetuneResult:
    """What a run that is finished has come to; its report is written unless it has been. UnusableRun if it cannot be."""
    try:
        report = directory.report_path if directory.report_path.exists() else write_report(directory.path)
    except OSError as error:
        raise UnusableRun(
            f"the run is finished, but its report cannot be written to {directory.path}: {error.strerror or error}; "
            f"once it can: {directory.resume_command}"
        ) from error
    if details is None:
        details = json.loads(directory.result_path.read_text())
    return FinetuneResult(potential, details, directory.path, model_path(directory, inputs), report)


def evaluate(
    model: str | os.PathLike | nn.Module,
    frames: Frames,
    *,
    compare: Mapping[str, str | os.PathLike | nn.Module] | Sequence[str | os.PathLike] = (),
    observables: str | Sequence[str | Observable] | None = None,
    criteria: str | Sequence[str | Criterion] | None = None,
    monitor: Monitor | None = None,
    output: str | os.PathLike | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    head: str | None = None,
    compilation: str = "off",
    trust_checkpoint: bool = False,
    **options: Any,
) -> dict[str, dict]:
    """Measure stability, observables and errors of models; `stabie-ase evaluate` is this function.

    Parameters
    ----------
    model : path, Potential or torch module
    frames : path, several, or frames in memory
    compare : paths, or mapping of names to paths or models, optional
        From the same starts, with the same seeds.
    observables : str, or sequence of str or of objects, optional
        See `finetune`.
    criteria : str, or sequence of str or of objects, optional
        See `finetune`.
    monitor : Monitor, optional
        Told in words what is measured, and how far it has come.
    output : path, optional
        A JSON file to write the summaries to.
    energy_key : str, optional
        Name of the energies (eV) in the frames, if not a usual one.
    forces_key : str, optional
        Name of the forces (eV/Å) in the frames, if not a usual one.
    device : str
        As torch calls it.
    dtype : str, optional
        "float32" or "float64"; that of the checkpoint if not given.
    head : str, optional
        Of a MACE model that has several.
    compilation : {"off", "on", "auto", "kernels"}
        Whether networks are made faster for dynamics.
    trust_checkpoint : bool
        Load a checkpoint that may run code of its own.
    **options
        Any of `EvaluationOptions`.

    Returns
    -------
    dict of str to dict
        A summary of each model by its name ("model" for one in memory), units in the names.

    Examples
    --------
    >>> import stabie_ase
    >>> found = stabie_ase.evaluate("aspirin_schnet.pt", "aspirin.xyz", time_ps=0.01, replicas=2)
    >>> found["aspirin_schnet.pt"]["n_replicas"]
    2
    """
    if output is not None:
        check_new_file(output)
    texts, live = texts_and_objects(observables=observables, criteria=criteria)
    config = from_dict(EvaluationOptions, options | texts)
    models: dict[str, str | os.PathLike | nn.Module] = {"model" if isinstance(model, nn.Module) else os.fspath(model): model}
    for name, other in compare.items() if isinstance(compare, Mapping) else ((os.fspath(path), path) for path in compare):
        if name in models:
            raise BadOption(f"two models are called {name!r}; give those of compare other names")
        models[name] = other
    keys = {"energy_key": energy_key, "forces_key": forces_key}
    about = {"device": device, "dtype": dtype, "head": head, "trust": trust_checkpoint}
    return Evaluation.set_up(models, frames, config, keys, about, live, monitor).run(compilation, output)
