"""The frame of the page: its sections, its style, and the words that are the same on every page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

CAUTION = "autofed is a research tool and no medical device. Nothing on this page may guide the care of a patient."


def section(title: str, *parts: str) -> str:
    """A section under its heading; the parts are HTML."""
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def document(title: str, sections: Iterable[str]) -> str:
    """The whole page of its sections, which are HTML; empty ones are left out."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, sections)), foot=CAUTION)


GLOSSARY = section(
    "How to read the numbers",
    """<dl>
<dt>Dice and Jaccard</dt><dd>How much of prediction and reference overlap: twice the common volume over the sum of both,
and the common volume over the joint one. 1 is perfect agreement, 0 none. Small structures lose more by the same error
at their rim.</dd>
<dt>HD95</dt><dd>How far the outlines are apart where they are worst, leaving out the worst twentieth: the 95th
percentile of the distance from one surface to the other, taken in both directions, the larger of the two.</dd>
<dt>Entropy</dt><dd>How undecided the model is about a voxel: 0 where all probability lies on one structure, 1 where all
structures are equally likely (it is divided by the logarithm of the number of classes). Regions that overlap are asked
for one by one, and the map shows the most doubtful of them: 1 where being in it is as likely as not. It is high at rims
that the image itself leaves open, and more training does not change that.</dd>
<dt>Mutual information</dt><dd>The part of the entropy that comes from disagreement among the models of the ensemble,
each of which may be sure of itself. It is high where there was little to learn from, such as an unusual scanner or
finding; more data of the kind can lower it. A single model has none.</dd>
</dl><p class=caption>Neither entropy nor mutual information is the probability of an error. A model may be sure and
wrong, above all on images unlike those it was trained on.</p>""",
)

_STYLE = """
:root { --ink: #1f2933; --quiet: #52606d; --rule: #d5dbe1; --accent: #1c4e72; --bar: #c4d9e7; --pale: #f5f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 3rem; max-width: 68rem; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.75rem; font-weight: 600; line-height: 1.2; }
h2 { margin: 2.6rem 0 .7rem; padding-bottom: .3rem; border-bottom: 2px solid var(--accent); color: var(--accent);
  font-size: 1.2rem; font-weight: 600; }
h3 { margin: 1.6rem 0 .5rem; font-size: 1rem; font-weight: 600; }
p, ul { margin: .4rem 0 .8rem; max-width: 46rem; }
code { font-size: .88em; overflow-wrap: anywhere; }
header p, footer p { max-width: none; }
header p, .caption, .notes, footer { color: var(--quiet); font-size: .9rem; }
.notes { padding-left: 1.2rem; }
.caution { padding: .5rem .8rem; border-left: 3px solid var(--accent); background: var(--pale); color: var(--ink); }
.wide, .long { overflow: auto; }
.long { max-height: 40rem; padding: 0 .8rem; border: 1px solid var(--rule); }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .8rem; border-bottom: 1px solid var(--rule); text-align: left; font-weight: 400; }
thead th { position: sticky; top: 0; border: 0; background: #fff; box-shadow: inset 0 -1.5px var(--ink);
  font-weight: 600; vertical-align: bottom; }
tr > :first-child { padding-left: .2rem; }
.n { text-align: right; }
.total th, .total td { font-weight: 600; }
.group th { padding-top: .9rem; color: var(--quiet); font-weight: 600; }
.bar { min-width: 10rem; background: linear-gradient(var(--bar), var(--bar)) no-repeat left .8rem center
  / calc((100% - 4.8rem) * var(--share)) .7em; }
figure { margin: .8rem 0 1.4rem; border: 1px solid var(--rule); }
figure > p { margin: .5rem .7rem; white-space: pre-line; }
figcaption { padding: .35rem .7rem; background: var(--pale); font-size: .92rem; }
img { display: block; max-width: 100%; height: auto; }
dl { columns: 2 24rem; column-gap: 2.5rem; }
dt { font-weight: 600; break-after: avoid; }
dd { margin: 0 0 .7rem; break-inside: avoid; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--rule); }
@page { margin: 16mm 14mm; }
@media print {
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  h2, h3, h2 + .caption { break-after: avoid; }
  figure, tr, dt { break-inside: avoid; }
  thead { display: table-header-group; }
  .wide, .long { max-height: none; padding: 0; border: 0; overflow: visible; }
  thead th { position: static; border-bottom: 1.5px solid; box-shadow: none; }
  img { max-height: 10cm; }
  .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<footer><p>{foot}</p></footer>
</body>
</html>
"""
