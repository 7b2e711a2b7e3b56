"""`stabie-ase`: one group, one function a command."""

from __future__ import annotations

import logging
import shlex
import warnings
from importlib.resources import files

import click

import stabie_ase
from stabie_ase.cli.interrupts import sigterm_as_ctrl_c, word_and_status
from stabie_ase.cli.log import PRINTED, logging_of, tell
from stabie_ase.cli.options import Command
from stabie_ase.system.allocator import keep_freed_memory


class OneLine(click.ClickException):
    """A usage error without the usage."""

    def __init__(self, error: click.UsageError):
        command = error.ctx.command_path if error.ctx else "stabie-ase"
        text = " ".join(error.format_message().split())
        super().__init__(f"{text}{'' if text.endswith(('.', '?')) else '.'} See {command} --help")
        self.exit_code = error.exit_code  # type: ignore[misc]


class OneLineErrors(click.Group):
    """What goes wrong is told in one line; a traceback is a bug in this package, shown with -vv."""

    command_class = Command

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        context.meta["typed"] = shlex.join(arguments)
        return super().parse_args(context, arguments)

    def invoke(self, context: click.Context):
        try:
            with sigterm_as_ctrl_c():
                return super().invoke(context)
        except click.UsageError as error:
            raise _logged(OneLine(error)) from error
        except click.ClickException as error:
            raise _logged(error) from None
        except (click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as interrupt:
            word, status = word_and_status(interrupt)
            tell(f"\n{word}", err=True)
            context.exit(status)
        except Exception as error:
            if context.params.get("verbose", 0) >= 2:
                raise
            raise _logged(click.ClickException(explain(error))) from error


def _logged(error: click.ClickException) -> click.ClickException:
    PRINTED.error("Error: %s", error.format_message())
    return error


def explain(error: Exception) -> str:
    """One line for the person at the keyboard."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch's zip writer hides what the file system said
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    expected = (ValueError, OSError, NotImplementedError, ImportError, MemoryError)
    return text if isinstance(error, expected) else f"{type(error).__name__}: {text} (stabie-ase -vv ... shows where)"


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(stabie_ase.__version__, prog_name="stabie-ase")
@click.option("-q", "--quiet", is_flag=True, help="Errors and results only.")
@click.option("-v", "--verbose", count=True, help="More about what happens; -vv for tracebacks.")
@click.pass_context
def main(context: click.Context, quiet: bool, verbose: int) -> None:
    """Make machine-learning force fields stable in molecular dynamics (StABIE)."""
    if not verbose:
        warnings.simplefilter("ignore")  # of libraries, about themselves
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    context.with_resource(logging_of(context.meta["typed"], level))
    context.obj = {"quiet": quiet}
    keep_freed_memory()


def check_device(device: str) -> None:
    """One line about why a device cannot be used."""
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"unknown device {device!r}, expected cpu, cuda or cuda:N", param_hint="--device")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("CUDA was asked for, but torch finds none here; use --device cpu", param_hint="--device")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(f"there is no {device}, only {torch.cuda.device_count()} of them", param_hint="--device")


def model_options(command):
    """Options of every command that opens a model."""
    for option in reversed(
        [
            click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N"),
            click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Precision [default: the model's]"),
            click.option("--head", metavar="NAME", help="Head of a multi-head model"),
            click.option(
                "--compile",
                "compilation",
                type=click.Choice(["off", "on", "auto", "kernels"]),
                default="off",
                show_default=True,
                help="Make the network faster for dynamics by torch.compile; auto: if a trial says that it pays; "
                "kernels: by cuequivariance instead (MACE)",
            ),
            click.option("--trust-checkpoint", is_flag=True, help="Run code that a pickled checkpoint carries"),
        ]
    ):
        command = option(command)
    return command


OF_THE_INPUTS = {"device", "dtype", "energy_key", "forces_key", "head", "compilation", "trust_checkpoint"}
"""What `common_options` gives, none of it an option of the work itself."""


def common_options(command):
    """Options of every command that opens a model and a reference with energies and forces."""
    command = click.option("--forces-key", metavar="NAME", help="Forces in the reference [default: found by itself]")(command)
    command = click.option("--energy-key", metavar="NAME", help="Energies in the reference [default: found by itself]")(command)
    return model_options(command)


def packaged(name: str) -> str:
    """Path of a file that ships with the package."""
    return str(files("stabie_ase") / "data" / name)
