"""The command line: autofed as a program."""

from __future__ import annotations

import os
import sys

import typer

from autofed.cli.commands import app

__all__ = ["app", "main"]

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

    from autofed.problems import Problems

    if isinstance(error, Problems):
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
