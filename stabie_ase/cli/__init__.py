"""The command line: thin commands, and the only place that prints."""

from stabie_ase.cli.main import main  # isort: skip
from stabie_ase.cli import bench, demo, evaluate, finetune, md, observe, pretrain, view  # noqa: F401  (they register their commands)

__all__ = ["main"]
