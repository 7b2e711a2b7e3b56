"""The command line: thin commands, and the only place that prints."""

from stabie_ase.cli.main import main

__all__ = ["main"]
