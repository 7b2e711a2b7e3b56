"""Models measured from equal starts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from stabie_ase.boltzmann import targets_at
from stabie_ase.dynamics import MDState
from stabie_ase.dynamics.compilation import compile_where_wanted
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import load_potential
from stabie_ase.potentials.module import as_potential
from stabie_ase.runs.checks import check_labels
from stabie_ase.runs.evaluation import StabilityResult, StabilityTest, Yardstick, failures_p_value, run_stability_test
from stabie_ase.runs.monitor import Monitor, Rate
from stabie_ase.runs.options import EvaluationOptions
from stabie_ase.runs.run import Live, tell_targets
from stabie_ase.runs.summaries import summarize
from stabie_ase.runs.timestep_scan import scan_timesteps
from stabie_ase.stability import VERDICT, Failures
from stabie_ase.stability.sequential import replica_ps_to_tell
from stabie_ase.structures.reference import Reference, read_reference, reference_of
from stabie_ase.structures.setting import Setting
from stabie_ase.system.files import as_json, replaced
from stabie_ase.system.options import BadOption, with_temperature
from stabie_ase.training.labels import LabelledFrames, qm_errors


@dataclass
class Evaluation:
    """Models, the first of which the others are compared with, and what they are held against.

    Attributes
    ----------
    potentials : dict of str to Potential
    reference : Reference
    yardstick : Yardstick
    test : StabilityTest
    monitor : Monitor
    results : dict of str to StabilityResult
        Of the models that have been tested.
    seconds_per_ps : dict of str to float
        What a stable replica-ps took of them.
    timesteps_fs : tuple of float
        Larger time steps to try, in fs.
    """

    potentials: dict[str, Potential]
    reference: Reference
    yardstick: Yardstick
    test: StabilityTest
    monitor: Monitor
    results: dict[str, StabilityResult]
    seconds_per_ps: dict[str, float]
    timesteps_fs: tuple[float, ...] = ()

    @classmethod
    def set_up(
        cls,
        models: Mapping[str, str | os.PathLike | nn.Module],
        frames: Any,
        config: EvaluationOptions,
        keys: Mapping[str, str | None],
        about: Mapping[str, Any],
        live: Live | None = None,
        monitor: Monitor | None = None,
    ) -> Evaluation:
        """Check everything that can be checked before any dynamics.

        Parameters
        ----------
        models : mapping of str to path or module
            By the names that summaries will have.
        frames : names of frames, or frames in memory
        config : EvaluationOptions
        keys : mapping
            energy_key and forces_key of the frames.
        about : mapping
            device, dtype, head and trust of models that are loaded.
        live : Live, optional
            Observables and criteria that have been made already.
        monitor : Monitor, optional
            Told in words what is measured, and how far it has come.

        Returns
        -------
        Evaluation
            Of which no model has been tested yet.
        """
        live, monitor = live or Live(), monitor or Monitor()
        in_memory = not isinstance(frames, (str, os.PathLike)) and not all(isinstance(x, (str, os.PathLike)) for x in frames)
        reference = (reference_of if in_memory else read_reference)(frames, **keys)
        config = with_temperature(config, reference.temperature_K, "the reference")
        potentials = {name: _opened(model, about) for name, model in models.items()}
        reference = reference.isolated(max(potential.cutoff for potential in potentials.values()))
        times = (config.timestep_fs, config.check_every_fs)
        setting = Setting(reference.frames, config.temperature_K, reference.temperature_K, *times)
        config, observables, criteria = live.resolved(config, setting, VERDICT, verdict=True)
        targets = targets_at(observables, reference, config.temperature_K, config.reweight)
        yardstick = Yardstick.of(criteria, setting, targets)
        test = StabilityTest(
            temperature_K=config.temperature_K,
            replicas=config.replicas,
            time_ps=config.time_ps,
            timestep_fs=config.timestep_fs,
            friction_per_fs=config.friction_per_fs,
            check_every_fs=config.check_every_fs,
            seed=config.seed,
        )
        for name, potential in potentials.items():
            try:
                potential.check_numbers(z for atoms in reference.frames for z in set(atoms.numbers))
            except ValueError as error:
                raise BadOption(f"{name}: {error}") from error
            check_labels(potential, reference, Path(name).name, "the reference")
        monitor.message(f"Reference: {reference.source}")
        monitor.message(f"System: {setting.kind.describe()}")
        monitor.message(f"{test.replicas} replicas of {test.time_ps:g} ps at {test.temperature_K:g} K; unstable is any of")
        monitor.message("\n".join(f"  - {line}" for line in yardstick.describe()))
        yardstick.warn_if_blind(test.time_ps)
        tell_targets(targets, monitor)
        return cls(potentials, reference, yardstick, test, monitor, {}, {}, config.scanned_fs)

    def measure(self, name: str, compilation: str = "off") -> None:
        """Run the replicas of one model, its network made faster as it is asked for (`compile_where_wanted`)."""
        test, frames, potential = self.test, self.reference.frames, self.potentials[name]
        compile_where_wanted(compilation, potential, frames, test.replicas, steps=test.n_steps, say=self.monitor.message)
        began, rate, task = time.monotonic(), Rate(), Path(name).name

        def on_look(steps: int, state: MDState, failures: Failures) -> None:
            note = f"unstable {100 * failures.fraction:.0f} %, {rate.update(steps * test.replicas)}"
            self.monitor.progress(task, steps, test.n_steps, note)

        result = run_stability_test(potential, frames, self.yardstick, test, on_look)
        self.monitor.progress(task, test.n_steps, test.n_steps, "")  # all may have failed long before
        self.results[name] = result
        self.seconds_per_ps[name] = (time.monotonic() - began) / max(result.statistics.stable_replica_ps, 1e-9)

    def summaries(self) -> dict[str, dict]:
        """Of all models that have been measured; those after the first with the p value of failing less often than it."""
        found, first = {}, next(iter(self.results))
        for name, result in self.results.items():
            potential = self.potentials[name]
            errors = qm_errors(potential, LabelledFrames.from_reference(self.reference, potential.device))
            found[name] = summarize(result, self.yardstick, None, errors, None if name == first else self.results[first])
            if name != first:
                found[name]["p_value"] = failures_p_value(self.results[first], result)
        return found

    def run(self, compilation: str = "off", output: str | os.PathLike | None = None) -> dict[str, dict]:
        """All of it; the summaries are written to a JSON file if one is given."""
        for name in self.potentials:
            self.measure(name, compilation)
        first, summaries = next(iter(self.potentials)), self.summaries()
        self.monitor.message(self._time_to_tell(first))
        for name in self.potentials if self.timesteps_fs else ():
            summaries[name] |= self._scan(name)
        if output is not None:
            with replaced(output) as temporary:
                temporary.write_text(as_json(summaries, indent=1) + "\n")
        return summaries

    def _scan(self, name: str) -> dict[str, object]:
        """How stable a model is at larger time steps, which is said as well."""
        potential, frames, known = self.potentials[name], self.reference.frames, self.results[name].statistics
        called = Path(name).name
        scan = scan_timesteps(potential, frames, self.yardstick, self.test, known, self.timesteps_fs, self.monitor, called)
        self.monitor.message(scan.describe(called))
        return {"timestep_scan": scan.rows(), "largest_stable_timestep_fs": scan.largest_stable_fs}

    def _time_to_tell(self, name: str) -> str:
        """How long a comparison has to be to mean something; of a model that did not fail, for one failure in the time it was seen."""
        statistics = self.results[name].statistics
        needed = replica_ps_to_tell(statistics.hazard_per_ps or 1.0 / statistics.stable_replica_ps)
        return (
            f"To tell a model four times as stable as {name} from it takes about {needed:.2g} replica-ps of each, "
            f"{2 * needed * self.seconds_per_ps[name] / 60:.2g} min here"
        )


def _opened(model: str | os.PathLike | nn.Module, about: Mapping[str, Any]) -> Potential:
    return as_potential(model) if isinstance(model, nn.Module) else load_potential(model, **about)
