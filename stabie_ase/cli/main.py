"""`stabie-ase`: one group, one function a command."""

from __future__ import annotations

import logging
import sys
from importlib.resources import files

import click

import stabie_ase


class OneLineErrors(click.Group):
    """What goes wrong is told in one line; a traceback is a bug in this package, shown with -vv."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("\ninterrupted; nothing is lost", err=True)
            context.exit(130)
        except Exception as error:
            if context.params.get("verbose", 0) >= 2:
                raise
            raise click.ClickException(explain(error)) from error


def explain(error: Exception) -> str:
    """One line for the person at the keyboard."""
    text = " ".join(str(error).split()) or type(error).__name__
    expected = (ValueError, OSError, NotImplementedError, ImportError)
    return text if isinstance(error, expected) else f"{type(error).__name__}: {text} (run with -vv before the command for details)"


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(stabie_ase.__version__)
@click.option("-q", "--quiet", is_flag=True, help="Errors and results only.")
@click.option("-v", "--verbose", count=True, help="More about what happens; -vv for tracebacks.")
@click.pass_context
def main(context: click.Context, quiet: bool, verbose: int) -> None:
    """Make machine-learning force fields stable in molecular dynamics (StABIE)."""
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    context.obj = {"quiet": quiet}


def check_device(device: str) -> str:
    """The device, or one line about why it cannot be used."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise click.BadParameter(f"unknown device {device!r}; expected cpu, cuda or cuda:N", param_hint="--device") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("CUDA was asked for, but torch finds none here; use --device cpu", param_hint="--device")
    return device


def common_options(command):
    """Options of every command that opens a model and a reference."""
    for option in reversed(
        [
            click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N"),
            click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Precision [default: the model's]"),
            click.option("--energy-key", help="Name of the energies in the reference [default: found by itself]"),
            click.option("--forces-key", help="Name of the forces in the reference [default: found by itself]"),
            click.option("--head", help="Head of a multi-head model."),
            click.option("--trust-checkpoint", is_flag=True, help="Run code that a pickled checkpoint carries."),
        ]
    ):
        command = option(command)
    return command


def packaged(name: str) -> str:
    """Path of a file that ships with the package."""
    return str(files("stabie_ase") / "data" / name)


from stabie_ase.cli import demo, evaluate, finetune, pretrain, view  # noqa: E402,F401  (they register themselves)
