"""Curves of the training loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from autofed.problems import Problems
from autofed.report import drawing
from autofed.report.drawing import LINES, QUIET


def curves(metrics_path: Path) -> bytes | None:
    """A PNG of the training loss of each site by round, from a run's metrics.jsonl; None if there is nothing in it.

    A round that was run again after a crash counts as it came out last. `Problems` if a line is not JSON; only the
    last line may be cut short, as a crash leaves it.
    """
    losses = _losses(_rounds(Path(metrics_path)))
    if not losses:
        return None
    columns = math.ceil(len(losses) / 14)  # so many names fit beside the curves
    figure = drawing.figure(6.6 + 1.6 * columns, 3.4, layout="constrained")
    axes = figure.add_subplot()
    lines = []
    for colour, rounds in zip(drawing.distinct(len(losses), LINES), losses.values(), strict=True):
        lines += axes.plot(list(rounds), list(rounds.values()), color=colour, linewidth=1.6)
        if len(rounds) < 15:  # a single round would otherwise draw nothing
            lines[-1].set(marker="o", markersize=3.5)
    _style(axes)
    legend = axes.legend(
        lines,
        ["x" for _ in losses],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        ncols=columns,
        fontsize=9,
        labelspacing=0.3,
    )
    drawing.write_names(legend, losses, 20)
    return drawing.png(figure)


def _style(axes: Axes) -> None:
    axes.set_xlabel("round", color=QUIET)
    axes.set_ylabel("training loss", color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.tick_params(colors=QUIET, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")


def _rounds(path: Path) -> dict[int, Mapping[str, Any]]:
    """What each site said, by round."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rounds: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise Problems(str(path), [f"line {number} is not JSON ({error})"]) from None
            continue
        rounds[int(entry["round"])] = entry["sites"]
    return rounds


def _losses(rounds: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Loss by site and round, in the order of rounds."""
    losses: dict[str, dict[int, float]] = {}
    for number in sorted(rounds):
        for site, values in rounds[number].items():
            if values.get("loss") is not None:
                losses.setdefault(site, {})[number] = float(values["loss"])
    return losses
