"""The HTML page about an evaluation."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from autofed import __version__
from autofed.errors import ValidationErrors
from autofed.federation import communication
from autofed.federation.run_folder import Run
from autofed.files import write_bytes
from autofed.inference.prediction_folder import PredictedCase, PredictionFolder
from autofed.inference.scores import CaseScores, Report, find_references
from autofed.report import tables
from autofed.report.prediction_pictures import draw_case
from autofed.report.tables import ranked
from autofed.report.template import CAUTION, GLOSSARY, document, section
from autofed.report.training_curves import curves, holds_out

_GROUP = 4
"""So many cases are shown of the worst, the middle and the best."""


@dataclass(frozen=True)
class _ChosenCase:
    """A case with a picture: the group it stands for, its rank from the worst, and how many ranks there are."""

    group: str
    rank: int
    ranks: int
    scored: CaseScores


def page(report: Report, predictions: Path, labels: Path | None, runs: Sequence[Path], out: Path) -> None:
    """Write one self-contained HTML page about an evaluation to the file `out`: no script, no font, no address.

    It holds the summary, all cases from worst to best, pictures of up to twelve of them and the loss curves of `runs`.
    The pictures need the images where they were; with `labels` (see `scores.find_references`) they show the outlines.
    """
    count = len(report.cases)
    title = f"Evaluation of {count} case{'' if count == 1 else 's'}"
    sections = [
        _header(title, Path(predictions), labels),
        tables.summary(report),
        tables.cases(report),
        _pictures(report, Path(predictions), labels),
        _training(runs),
        GLOSSARY,
    ]
    write_bytes(Path(out), document(title, sections).encode())


def _header(title: str, predictions: Path, labels: Path | None) -> str:
    against = "" if labels is None else f" against the references in <code>{escape(str(labels))}</code>"
    return (
        f"<header><h1>{escape(title)}</h1>"
        f"<p>Predictions in <code>{escape(str(predictions))}</code>{against}. Written on "
        f"{datetime.date.today().isoformat()} by autofed {escape(__version__)}.</p>"
        f"<p class=caution>{CAUTION}</p></header>"
    )


def _pictures(report: Report, predictions: Path, labels: Path | None) -> str:
    predicted = PredictionFolder(predictions).cases()
    references = find_references(Path(labels))[0] if labels is not None else {}
    parts, group = [], ""
    for chosen in _chosen(report.cases):
        if chosen.group != group:
            group = chosen.group
            parts.append(f"<h3>{group}</h3>")
        case = chosen.scored.case
        text = _caption(chosen, report)
        parts.append(_figure(case, text, _picture(predicted.get(case), references.get(case))))
    if not parts:
        return ""
    about_slices = "The slices that show the most of what was predicted, the patient's right on the left."
    caption = f"<p class=caption>{about_slices}</p>" if report.distance_unit == "mm" else ""
    return section("Pictures", caption, *parts)


def _chosen(cases: Iterable[CaseScores]) -> list[_ChosenCase]:
    """All scored cases if they are few; otherwise the worst, the middle and the best."""
    order = [c for c in ranked(cases) if c.mean.dice is not None]
    ranks = range(len(order))
    groups = {"All cases, from the worst to the best": ranks}
    if len(order) > 3 * _GROUP:
        middle = (len(order) - _GROUP) // 2
        groups = {"Worst": ranks[:_GROUP], "Middle": ranks[middle : middle + _GROUP], "Best": ranks[-_GROUP:]}
    return [_ChosenCase(name, rank + 1, len(order), order[rank]) for name, group in groups.items() for rank in group]


def _caption(chosen: _ChosenCase, report: Report) -> str:
    scores, site = chosen.scored.mean, chosen.scored.site
    text = f"rank {chosen.rank} of {chosen.ranks}, Dice {scores.dice:.3f}"
    text += f", HD95 {scores.hd95_mm:.1f} {report.distance_unit}" if scores.hd95_mm is not None else ""
    return text + (f", site {site}" if site is not None else "")


def _picture(predicted: PredictedCase | None, reference: Path | None) -> bytes | str:
    """A PNG, or why there is none: a page with a gap that is explained is worth more than no page."""
    if predicted is None or not predicted.has_images:
        return "the images of this case were not found."
    try:
        return draw_case(predicted, reference)
    except ValidationErrors as error:
        return str(error)


def _training(runs: Sequence[Path]) -> str:
    parts = [
        _figure(f"{run.name}, {path.parent.name.replace('_', ' ')}", _curves_shown(path), picture)
        for run in map(Path, runs)
        for path in sorted(run.glob("fold_*/metrics.jsonl"))
        if (picture := curves(path)) is not None
    ]
    existing = [run for run in map(Run, runs) if run.exists]
    parts += [
        f"<p class=caption>{escape(line)}.</p>" for run in existing for line in communication.communication_summary(run)
    ]
    return section("Training", *parts) if parts else ""


def _curves_shown(metrics_path: Path) -> str:
    and_dice = ", and Dice of held-out patients," if holds_out(metrics_path) else ""
    return f"training loss{and_dice} of each site by round"


def _figure(name: str, text: str, picture: bytes | str) -> str:
    caption = f"<figcaption><b>{escape(name)}</b>: {escape(text)}</figcaption>"
    if isinstance(picture, str):
        return f"<figure>{caption}<p class=caption>No picture: {escape(picture)}</p></figure>"
    data = base64.b64encode(picture).decode()
    return f'<figure>{caption}<img alt="{escape(f"{name}: {text}")}" src="data:image/png;base64,{data}"></figure>'
