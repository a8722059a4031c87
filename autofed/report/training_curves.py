"""Curves of a training: loss, and Dice of the patients held out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from autofed.errors import ValidationErrors
from autofed.report import drawing
from autofed.report.drawing import LINES, QUIET


def curves(metrics_path: Path) -> bytes | None:
    """A PNG of each site's training loss, and Dice if patients were held out, by round, from a run's metrics.jsonl.

    None if there is nothing in it. A round that was run again after a crash counts as it came out last.
    `ValidationErrors` if a line is not JSON; only the last line may be cut short, as a crash leaves it.
    """
    rounds = _rounds(Path(metrics_path))
    panels = {"training loss": _by_site(rounds, _loss), "Dice of held-out patients": _by_site(rounds, _dice)}
    panels = {title: values for title, values in panels.items() if values}
    sites = list(dict.fromkeys(site for values in panels.values() for site in values))
    if not sites:
        return None
    columns = math.ceil(len(sites) / 14)  # so many names fit beside the curves
    figure = drawing.figure(6.6 + 1.6 * columns, 0.6 + 2.8 * len(panels), layout="constrained")
    colours = dict(zip(sites, drawing.distinct(len(sites), LINES), strict=True))
    for axes, (title, values) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        lines = [_draw(axes, values.get(site, {}), colours[site]) for site in sites]
        _style(axes, title)
        if title == next(iter(panels)):
            _name(axes, lines, sites, columns)
    return drawing.png(figure)


def holds_out(metrics_path: Path) -> bool:
    """Whether any site scored patients that it held out."""
    return any(
        _dice(metrics) is not None for sites in _rounds(Path(metrics_path)).values() for metrics in sites.values()
    )


def _draw(axes: Axes, rounds: Mapping[int, float], colour: tuple[float, float, float]) -> Line2D:
    (line,) = axes.plot(list(rounds), list(rounds.values()), color=colour, linewidth=1.6)
    if len(rounds) < 15:  # a single round would otherwise draw nothing
        line.set(marker="o", markersize=3.5)
    return line


def _name(axes: Axes, lines: Sequence[Line2D], sites: Sequence[str], columns: int) -> None:
    legend = axes.legend(
        lines,
        ["x" for _ in sites],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        ncols=columns,
        fontsize=9,
        labelspacing=0.3,
    )
    drawing.write_names(legend, sites, 20)


def _style(axes: Axes, what: str) -> None:
    axes.set_xlabel("round", color=QUIET)
    axes.set_ylabel(what, color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.tick_params(colors=QUIET, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")


def _rounds(path: Path) -> dict[int, Mapping[str, Any]]:
    """The metrics of each site, by round."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rounds: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValidationErrors(str(path), [f"line {number} is not JSON ({error})"]) from None
            continue
        rounds[int(entry["round"])] = entry["sites"]
    return rounds


def _by_site(
    rounds: Mapping[int, Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]
) -> dict[str, dict[int, float]]:
    """A value by site and round, in the order of rounds, where there is one."""
    values: dict[str, dict[int, float]] = {}
    for number in sorted(rounds):
        for site, metrics in rounds[number].items():
            if (site_value := value(metrics)) is not None:
                values.setdefault(site, {})[number] = site_value
    return values


def _loss(metrics: Mapping[str, Any]) -> float | None:
    return None if metrics.get("loss") is None else float(metrics["loss"])


def _dice(metrics: Mapping[str, Any]) -> float | None:
    """The mean over structures."""
    dice = metrics.get("dice")
    return sum(dice.values()) / len(dice) if dice else None
