"""The directory of a fine-tuning run."""

from __future__ import annotations

import os

from ase import Atoms

from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.checkpoint import save_potential
from stabie_ase.runs.directory import FrameLog, TextLog, WorkDirectory
from stabie_ase.system.files import as_json


class RunDirectory(WorkDirectory):
    """Metrics of each window, the frames that failed, and in the end the model, the comparison and the report."""

    command = "finetune"
    INPUTS = "inputs"
    """Folder of what was given as live objects."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self.metrics_path, self.unstable_path = self.path / "metrics.jsonl", self.path / "unstable.traj"
        self.result_path, self.report_path = self.path / "result.json", self.path / "report.html"
        self.metrics, self.unstable = TextLog(self.metrics_path), FrameLog(self.unstable_path)
        self.logs = {"metrics": self.metrics, "unstable": self.unstable}

    @property
    def complete(self) -> bool:
        """Whether the run has its result already."""
        return self.result_path.exists()

    def append(self, record: dict, unstable: list[Atoms]) -> None:
        """One line of metrics, and the frames that failed."""
        with self.writing():
            self.metrics.append(as_json(record))
            self.unstable.append(unstable)

    def save_model(self, potential: Potential, name: str) -> None:
        """The result in its native format."""
        with self.writing():
            save_potential(potential, self.path / name)
