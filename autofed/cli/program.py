"""How commands are listed and how their help is written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import click
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

HELP_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class Command(TyperCommand):
    """A command whose help says what its arguments are, and whose summary in a list is its whole first sentence."""

    def __init__(self, name: str | None, **settings: Any):
        super().__init__(name, **settings)
        self.context_settings = {**HELP_SETTINGS, **self.context_settings}
        self.short_help = _first_sentence(self.help or "")
        for parameter, text in _arguments(self.callback):
            _named(self.params, parameter).help = text  # click 8.5 has such a field too, and empties that of typer

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: click 8.5 would write them here, and an older one nowhere."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Arguments, then options; `[required]` as it is: typer escapes it for rich, and rich does not write here."""
        records = [(param, param.get_help_record(ctx)) for param in self.get_params(ctx)]
        for title, kind in (("Arguments", click.Argument), ("Options", click.Option)):
            rows = [(r[0], r[1].replace("\\[", "[")) for param, r in records if r and isinstance(param, kind)]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Program(TyperGroup):
    """The commands in the order in which they are used. Click suggests a similar name for a misspelt one."""

    def __init__(self, **settings: Any):
        super().__init__(**{**settings, "suggest_commands": False})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Every command with its whole summary."""
        rows = [(name, command.short_help or "") for name, command in self.commands.items() if not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _arguments(callback: Callable[..., Any] | None) -> Iterator[tuple[str, str]]:
    """The arguments of a command's function, and their help."""
    if callback is None:
        return
    for name, hint in get_type_hints(inspect.unwrap(callback), include_extras=True).items():
        for metadata in getattr(hint, "__metadata__", ()):
            if isinstance(metadata, ArgumentInfo):
                yield name, metadata.help or ""


def _named(params: list[click.Parameter], name: str) -> Any:
    return next(param for param in params if param.name == name)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "." if paragraph else ""
