"""The command line: each command parses, calls a function of the API and prints. Heavy imports are inside commands."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from autofed import __version__
from autofed.cli.plan_commands import fingerprint, plan, preprocess
from autofed.cli.predict_commands import demo, evaluate, predict
from autofed.cli.privacy_commands import audit, ledger
from autofed.cli.program import HELP_SETTINGS, Command, Program
from autofed.cli.train_commands import run, site, train

__all__ = ["app", "main"]

_STEPS = """\b
The usual steps, from the sites' folders to scores:
  autofed plan SITE... -o plan.json --hours 1
  autofed preprocess plan.json SITE... -o WORK
  autofed train plan.json WORK -o RUN
  autofed predict RUN -i IMAGES -o OUT
  autofed evaluate OUT LABELS

\b
The first three at once:
  autofed run SITE... -o RUN --hours 1

\b
With a privacy guarantee for every patient, add --epsilon to plan or run:
  autofed plan SITE... -o plan.json --hours 1 --epsilon 8

\b
All of it on scans that come with autofed:
  autofed demo"""

app = typer.Typer(
    cls=Program,
    name="autofed",
    context_settings=HELP_SETTINGS,
    epilog=_STEPS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (fingerprint, plan, preprocess, train, run, site, predict, evaluate, ledger, audit, demo):
    app.command(cls=Command)(command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"autofed {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Plan, train and ship a segmentation model over several hospitals, none of which shares a scan."""


_INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended (128 and SIGINT)."""


def main() -> None:
    """Entry point: bad input becomes a message and exit code 2, without a traceback."""
    # Torch's threads wait for each other by spinning. Beside another busy program a step then took 8 times as long as
    # with short spins, which cost nothing on a machine of one's own (2 cores). Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        code = app(standalone_mode=False)  # an interrupted command comes back with the code of one
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except Exception as error:
        _end(error)
    if code == _INTERRUPTED:
        typer.echo("interrupted; run the same command again to go on (train: add --resume)", err=True)
    sys.exit(code or 0)


def _end(error: Exception) -> None:
    import click

    from autofed.errors import ValidationErrors

    if isinstance(error, ValidationErrors):
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "flwr":
        typer.echo('error: Flower is not installed; write: pip install "autofed[flower]"', err=True)
        sys.exit(2)
    if isinstance(error, click.ClickException):
        error.show()
        sys.exit(error.exit_code)
    if isinstance(error, click.exceptions.Exit):
        sys.exit(error.exit_code)
    if isinstance(error, click.exceptions.Abort):
        sys.exit(1)
    if isinstance(error, OSError) and error.errno is not None:
        typer.echo(f"error: {error.strerror}: {error.filename or 'no file name'}", err=True)
        sys.exit(1)
    raise error
