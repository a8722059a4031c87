"""What all figures have in common: colours, names in legends, and their way into a PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend

# Okabe and Ito's palette, which the colour-blind can tell apart; black and the one grey tone are left out.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
# The same for thin lines on white, where yellow is not seen.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, QUIET = "#1f2933", "#52606d"

Colour = tuple[float, float, float]

_DPI = 110


def distinct(count: int, palette: Sequence[str]) -> list[Colour]:
    """So many colours: of the palette while it lasts, otherwise of a rainbow."""
    if count <= len(palette):
        return [to_rgb(colour) for colour in palette[:count]]
    return [(float(r), float(g), float(b)) for r, g, b, _ in colormaps["turbo"](np.linspace(0.08, 0.95, count))]


def write_names(legend: Legend, names: Iterable[str], longest: int) -> None:
    """Write names into a legend as text: neither as formulas ("$") nor hidden ("_tumour"), as a legend takes them."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name if len(name) <= longest else name[: longest - 1] + "…")
        text.set_color(INK)


def figure(width_in: float, height_in: float, layout: Literal["constrained"] | None = None) -> Figure:
    """An empty white figure."""
    return Figure(figsize=(width_in, height_in), dpi=_DPI, facecolor="white", layout=layout)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
