"""The columns of a picture: the image, the prediction with the reference around it, and the uncertainties."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patheffects import withStroke

from autofed.data.images import Geometry
from autofed.data.labels import Labels
from autofed.report.drawing import PALETTE, Colour, distinct
from autofed.report.slices import Plane, upright


@dataclass(frozen=True)
class Scale:
    """From no uncertainty to `top` and more, the same in every picture: colours go with value ** `power`."""

    top: float
    power: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Where a value lies between the first colour, 0, and the last, 1."""
        return float(min(1.0, max(0.0, value / self.top)) ** self.power)


ENTROPY = Scale(1.0, 1.0, (0, 0.5, 1))
MUTUAL_INFORMATION = Scale(0.5, 0.5, (0, 0.02, 0.125, 0.5))
"""It is often a hundredth of the entropy (snapshots of one training are alike), sometimes half of it: a square root
shows both, so that cases can be compared."""


@dataclass(frozen=True)
class Panel:
    """A column of the picture: its heading, what draws a slice into axes, and the scale and unit of what it shows."""

    heading: str
    draw: Callable[[Axes, Plane], None]
    scale: Scale | None = None
    unit: str = ""


def panels(image: np.ndarray, maps: Mapping[str, np.ndarray], geometry: Geometry, labels: Labels) -> Iterator[Panel]:
    """The panels of an image (C, Z, Y, X) as it is stored, and of upright maps (Z, Y, X) by their headings."""
    colours = structure_colours(labels)
    unit = "ln 2" if labels.is_regions else "ln C"
    reference = maps.get("reference")
    displayed = upright(image[:3] if _is_colour(image, geometry) else image[:1], geometry)
    low, high = _window(displayed)

    def draw_image(axes: Axes, plane: Plane) -> None:
        pixels = np.clip((np.nan_to_num(plane.cut(displayed)) - low) / (high - low), 0, 1)
        pixels = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
        # hanning filters when the image is made smaller and interpolates when it is made larger
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="hanning", aspect="auto")

    def draw_prediction(axes: Axes, plane: Plane) -> None:
        draw_image(axes, plane)
        axes.imshow(tinted(plane.cut(maps["prediction"]), colours), interpolation="nearest", aspect="auto")
        if reference is not None:
            outline(axes, plane.cut(reference), colours)

    yield Panel("image", draw_image)
    yield Panel("prediction" if reference is None else "prediction (area) and reference (outline)", draw_prediction)
    if "entropy" in maps:
        yield Panel("entropy", _heat(maps["entropy"], ENTROPY), ENTROPY, unit)
    if "mutual information" in maps:
        heat = _heat(maps["mutual information"], MUTUAL_INFORMATION)
        yield Panel("mutual information", heat, MUTUAL_INFORMATION, unit)


def structure_colours(labels: Labels) -> dict[int, Colour]:
    """A colour for each value, the same in every picture of a plan; values alike in name are alike in colour."""
    names = labels.names_of_values()
    distinct_names = list(dict.fromkeys(names.values()))
    colours = dict(zip(distinct_names, distinct(len(distinct_names), PALETTE), strict=True))
    return {value: colours[name] for value, name in names.items()}


def _is_colour(image: np.ndarray, geometry: Geometry) -> bool:
    return image.shape[0] in (3, 4) and image.shape[1] == 1 and not geometry.in_millimetres


def _window(image: np.ndarray) -> tuple[float, float]:
    """The values (of one or three channels) that are shown as black and as white."""
    if len(image) == 3:
        return 0.0, 255.0 if np.nanmax(image) > 1 else 1.0
    sample = image.ravel()[:: max(1, image.size // 1_000_000)]
    low, high = np.nanpercentile(sample, (1, 99))
    if high <= low:
        low, high = np.nanmin(image), np.nanmax(image)
    return float(low), float(high if high > low else low + 1)


def _heat(values: np.ndarray, scale: Scale) -> Callable[[Axes, Plane], None]:
    norm = PowerNorm(scale.power, vmin=0, vmax=scale.top, clip=True)

    def draw(axes: Axes, plane: Plane) -> None:
        axes.imshow(plane.cut(values), cmap="inferno", norm=norm, interpolation="nearest", aspect="auto")

    return draw


def tinted(labels: np.ndarray, colours: Mapping[int, Colour]) -> np.ndarray:
    """Labels (rows, columns) as a half transparent picture (rows, columns, 4)."""
    tint = np.zeros((*labels.shape, 4))
    for value, colour in colours.items():
        tint[labels == value] = (*colour, 0.5)
    return tint


def outline(axes: Axes, labels: np.ndarray, colours: Mapping[int, Colour]) -> None:
    """Draw the outlines of labels (rows, columns)."""
    rows, columns = (np.arange(-1, n + 1) for n in labels.shape)
    for value, colour in colours.items():
        mask = np.pad(labels == value, 1)  # so that an outline closes at the border of the image
        if mask.any():
            lines = axes.contour(columns, rows, mask, levels=[0.5], colors=[colour], linewidths=1.3)
            # A dark rim keeps a line readable on an area of its own colour and on bright tissue.
            lines.set_path_effects([withStroke(linewidth=2.6, foreground=(0, 0, 0, 0.75))])
    axes.set_xlim(-0.5, labels.shape[1] - 0.5)
    axes.set_ylim(labels.shape[0] - 0.5, -0.5)
