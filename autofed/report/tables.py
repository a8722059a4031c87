"""The tables of the page: a summary by structure and site, and all cases from the worst to the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from autofed.inference.scores import CaseScores, Report, Scores
from autofed.report.template import section

_MOST_ROWS = 40
"""Longer tables are scrolled."""

_MOST_STRUCTURES = 6
"""Cases have a column for each structure unless there are more than these."""


def ranked(cases: Iterable[CaseScores]) -> list[CaseScores]:
    """Cases from the worst to the best mean Dice; those that are not scored come last."""
    return sorted(cases, key=lambda c: (c.mean.dice is None, c.mean.dice or 0.0, c.case))


def summary(report: Report) -> str:
    """The section with the means over all cases, and the report's notes."""
    rows = [_mean("All structures", report.mean, len(report.cases), "total")]
    rows += [_mean(name, scores, _scored(report, name)) for name, scores in report.classes.items()]
    if report.sites:
        rows.append("<tr class=group><th colspan=5>Sites</th></tr>")
        homes = [c.site for c in report.cases]
        rows += [_mean(site, scores, homes.count(site)) for site, scores in report.sites.items()]
    caption = (
        "Means over the cases in which a structure is scored; the mean over all structures, and that of a site, "
        "weighs every structure alike."
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return section(
        "Summary",
        _table(_head("Structure") + _scores_head(report) + _head("Cases", "n"), rows),
        f"<p class=caption>{caption}</p>",
        f"<ul class=notes>{notes}</ul>" if notes else "",
    )


def cases(report: Report) -> str:
    """The section with the scores of every case."""
    names = list(report.classes) if 2 <= len(report.classes) <= _MOST_STRUCTURES else []
    has_sites = any(c.site is not None for c in report.cases)
    head = _head("#", "n") + _head("Case") + (_head("Site") if has_sites else "") + _scores_head(report)
    head += "".join(_head(name, "n") for name in names)
    rows = []
    for rank, scored in enumerate(ranked(report.cases), start=1):
        cells = f"<td class=n>{rank}</td><th>{escape(scored.case)}</th>"
        cells += f"<td>{escape(scored.site or '–')}</td>" if has_sites else ""
        cells += _scores(scored.mean)
        cells += "".join(_number(scored.classes.get(name, Scores()).dice, 3) for name in names)
        rows.append(f"<tr>{cells}</tr>")
    caption = "From the worst to the best mean Dice. A dash: nothing to score, or no distance to measure."
    caption += " The columns on the right hold the Dice of each structure." if names else ""
    return section("Cases", f"<p class=caption>{caption}</p>", _table(head, rows))


def _scored(report: Report, name: str) -> int:
    """In how many cases a structure is scored."""
    return sum(name in c.classes and c.classes[name].dice is not None for c in report.cases)


def _table(head: str, rows: Sequence[str]) -> str:
    kind = "long" if len(rows) > _MOST_ROWS else "wide"
    return f"<div class={kind}><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _head(name: str, kind: str = "") -> str:
    return f"<th{f' class={kind}' if kind else ''}>{escape(name)}</th>"


def _scores_head(report: Report) -> str:
    return _head("Dice", "n") + _head("Jaccard", "n") + _head(f"HD95 ({report.distance_unit})", "n")


def _mean(name: str, scores: Scores, cases: int, kind: str = "") -> str:
    return f"<tr{f' class={kind}' if kind else ''}>{_head(name)}{_scores(scores)}<td class=n>{cases}</td></tr>"


def _scores(scores: Scores) -> str:
    return _share(scores.dice) + _number(scores.jaccard, 3) + _number(scores.hd95_mm, 1)


def _number(value: float | None, digits: int) -> str:
    return f"<td class=n>{'–' if value is None else f'{value:.{digits}f}'}</td>"


def _share(value: float | None) -> str:
    """A cell with a share of 1, and beside it a pale bar that is as long."""
    return _number(value, 3) if value is None else f'<td class="n bar" style="--share:{value:.3f}">{value:.3f}</td>'
