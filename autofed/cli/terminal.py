"""Output on the terminal: progress bars, tables, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer


@contextmanager
def progress() -> Iterator[Any]:
    """A bar per stage with the time left, on the terminal's error stream."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=True), refresh_per_second=2, speed_estimate_period=300)
    tasks: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()  # not before, so that a wrong input is answered by its message alone, without an empty line
            tasks[stage] = bars.add_task(stage, total=total, completed=done)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()


_MAIN_POINTS = (
    "local.geometry.configuration",
    "local.geometry.spacing_mm",
    "local.training.patch_size",
    "local.training.batch_size",
    "local.network.features",
    "agreement.training.rounds",
    "agreement.annotated",
    "agreement.privacy.mechanism",
    "agreement.privacy.noise_multiplier",
    "agreement.privacy.epsilon",
    "agreement.privacy.delta",
)


def show_plan(plan: Any, every: bool) -> None:
    """The decisions as a table: all of them, or the main points and what was set by hand."""
    reasons = (reason for reason in plan.reasons
             if every or reason.field in _MAIN_POINTS or reason.code == "by-hand")  # fmt: skip
    _print_table(("field", "value", "why"), ((r.field, _value(r), r.why) for r in reasons), whole=("field",))
    if plan.agreement.privacy.by_patient:
        _show_forecast(plan, every)
    if not every:
        typer.echo("\nadd --explain to see every decision")


HARDLY_ANY_STEPS = 150
"""After fewer at each site a model may have found nothing at all."""


def warn_of_few_steps(plan: Any) -> None:
    """A last line on the error stream, where a training would be over before it has begun to learn.

    A private plan has few and large steps on purpose; its own forecast says what they are worth.
    """
    from autofed.planner.hours import ENOUGH_STEPS

    if plan.agreement.privacy.by_patient:
        return
    steps = plan.agreement.training.rounds * plan.local.training.steps_per_round
    if steps < HARDLY_ANY_STEPS:
        hint = f": --hours {plan.budget.hours * ENOUGH_STEPS / steps:.2g}" if plan.budget.hours else ""
        typer.echo(f"warning: this plan takes only {steps} steps at each site, after which a model may have found "
                   f"nothing; at least {ENOUGH_STEPS} are recommended{hint}", err=True)  # fmt: skip


_FORECAST = ("site", "patients", "in a step", "noise multiplier", "epsilon", "noise over signal, a step")


def _show_forecast(plan: Any, every: bool) -> None:
    """The guarantee of a private plan, how much is expected to be learned despite its noise, and suggestions."""
    from autofed.planner import EXPECTED_LEARNING, forecast, suggestions
    from autofed.privacy.accounting import percent_at_most, protection, success_rate

    learning, guarantee = forecast(plan), plan.agreement.privacy
    if learning is None:
        return
    if every:
        typer.echo()
        _print_table(_FORECAST, _forecast_rows(learning), whole=("site",))
    epsilon, delta = guarantee.epsilon, guarantee.delta
    rate = percent_at_most(success_rate(epsilon, delta))
    typer.echo(f"\nprotection: {protection(epsilon)} at epsilon {epsilon:g} (delta {delta:g}); "
               f"whether a given patient was used can be told with a success rate of at most {rate} %, where guessing "
               "gives 50 %")  # fmt: skip
    typer.echo(f"expected learning: {EXPECTED_LEARNING[learning.grade]}; over all steps the noise is "
               f"{learning.total_ratio:.2g} times as strong as the patients' signal")  # fmt: skip
    for suggestion in suggestions(plan):
        typer.echo(f"  {suggestion}")


def _forecast_rows(learning: Any) -> Iterator[tuple[str, ...]]:
    """A row a site, and one of their average."""
    from autofed.privacy.accounting import rounded_up

    for name, site in learning.sites.items():
        noise, spent = f"{site.noise_multiplier:.4g}", rounded_up(site.epsilon)
        yield name, str(site.patients), f"{site.expected:.3g}", noise, spent, f"{site.ratio:.3g}"
    yield "averaged", "", "", "", "", f"{learning.ratio:.3g}"


def _value(reason: Any) -> str:
    """As the table shows it: a grade is of the expected learning, and must not be read as one of the protection."""
    from autofed.planner import EXPECTED_LEARNING, GRADED

    word = EXPECTED_LEARNING.get(reason.value) if reason.field == GRADED else None
    return f"expected learning: {word}" if word else str(reason.value)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], whole: Sequence[str]) -> None:
    """The columns named `whole` are never broken, however narrow the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=name in whole, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


_SPENT = ("run", "mechanism", "unit", "rounds", "steps", "epsilon")


def show_ledger(statement: Any) -> None:
    """The privacy spent by run and mechanism as a table, then what it means."""
    typer.echo(f"{statement.site}: {statement.ledger}, opened {statement.opened}")
    if statement.runs:
        typer.echo(f"what was spent, with delta {statement.delta:g}:\n")
        _print_table(_SPENT, _spent_rows(statement), whole=_SPENT[1:])
    typer.echo()
    for line in (statement.promise, *statement.notes):
        typer.echo(line)


def _spent_rows(statement: Any) -> Iterator[tuple[str, ...]]:
    for run in statement.runs:
        seed = " (test seed)" if run.seeded else ""
        for spent in run.mechanisms:
            counts = (str(spent.rounds), str(spent.steps))
            yield run.run, spent.mechanism + seed, spent.unit, *counts, _epsilon(spent.epsilon)
        if len(run.mechanisms) != 1:
            yield run.run, "together" + seed, "", "", "", _epsilon(run.epsilon)
    yield "all runs", "", "", "", "", _epsilon(statement.epsilon)


def _epsilon(value: float | None) -> str:
    from autofed.privacy.accounting import rounded_up

    return "infinite" if value is None else rounded_up(value)


def number(value: float | None, digits: int = 4) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
