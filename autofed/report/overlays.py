"""One picture of a case: rows of slices and columns of panels, all to one scale, with a legend below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from autofed.data.images import Geometry
from autofed.data.labels import Labels
from autofed.errors import raise_if_any
from autofed.report import drawing
from autofed.report.drawing import INK, QUIET
from autofed.report.panels import Panel, Scale, panels, structure_colours
from autofed.report.slices import Plane, planes, upright

_PANEL_IN = 3.0
_GAP_IN = 0.08
_MARGIN_IN = 0.12
_LEGEND_ENTRIES = 12

Box = tuple[float, float, float, float]
"""Left, bottom, width and height, in inches from the lower left corner of the figure."""


def overlay(
    image: np.ndarray,
    prediction: np.ndarray,
    label_names: Mapping[str, Any],
    geometry: Geometry,
    *,
    reference: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    mutual_information: np.ndarray | None = None,
    title: str = "",
) -> bytes:
    """A PNG with the image, the prediction as coloured areas, the reference as outlines, and the uncertainty.

    `image` is (C, Z, Y, X), all maps are (Z, Y, X); uncertainties are shares of ln C (of regions of ln 2), from 0 to 1.
    `label_names` are the labels as dataset.json has them: a voxel is shown as the smallest region that holds it, and
    what the reference ignores is left out. A volume is shown in three rows (axial, coronal, sagittal), each the slice
    that shows the most of what was predicted, or of the reference where nothing was; a picture in one. Pictures of
    three or four channels are shown in colour; of all others the first channel, windowed from its 1st to its 99th
    percentile. `ValidationErrors` if a map's shape is not the image's.

    Args:
        image: (C, Z, Y, X).
        prediction: Label map (Z, Y, X).
        label_names: Values by name, as in dataset.json.
        geometry: Spacing and orientation of the image.
        reference: Label map (Z, Y, X), shown as outlines.
        entropy: (Z, Y, X), from 0 to 1.
        mutual_information: (Z, Y, X), from 0 to 1.
        title: Above the picture.
    """
    arrays = {
        "prediction": prediction,
        "reference": reference,
        "entropy": entropy,
        "mutual information": mutual_information,
    }
    raise_if_any(title or "this case", _shape_problems(image, arrays))
    labels = Labels.declared(label_names)
    if reference is not None:
        arrays["reference"] = np.where(labels.is_foreground(reference), reference, 0)
    maps = {name: upright(array, geometry) for name, array in arrays.items() if array is not None}
    structures = maps["prediction"] if prediction.any() else maps.get("reference", maps["prediction"])
    columns = list(panels(image, maps, geometry, labels))
    return drawing.png(_compose(planes(structures, geometry), columns, _legend(maps, labels), title))


def _shape_problems(image: np.ndarray, maps: Mapping[str, np.ndarray | None]) -> Iterator[str]:
    for name, array in maps.items():
        if array is not None and array.shape != image.shape[1:]:
            yield f"the {name} has the shape {array.shape}, the image {image.shape[1:]} (z, y, x)"


def _legend(maps: Mapping[str, np.ndarray], labels: Labels) -> list[tuple[str, Patch]]:
    """Names and handles of the structures that this case holds."""
    colours = structure_colours(labels)
    label_maps = [m for name, m in maps.items() if name in ("prediction", "reference")]
    visible = {n: v for v, n in labels.names_of_values().items() if any((m == v).any() for m in label_maps)}
    structures = list(visible.items())
    entries = [(name, Patch(color=colours[v])) for name, v in structures[:_LEGEND_ENTRIES]]
    if len(structures) > _LEGEND_ENTRIES:
        entries.append((f"and {len(structures) - _LEGEND_ENTRIES} more", Patch(alpha=0)))
    return entries or [("no structure was found", Patch(alpha=0))]


def _compose(rows: Sequence[Plane], columns: Sequence[Panel], legend: list[tuple[str, Patch]], title: str) -> Figure:
    """All panels to one scale; below them the legend and the scales of uncertainty."""
    scale = _PANEL_IN / max(plane.size_mm[1] for plane in rows)
    heights = [min(max(plane.size_mm[0] * scale, 0.3 * _PANEL_IN), 1.6 * _PANEL_IN) for plane in rows]
    per_row = 3 if max(len(name) for name, _ in legend) <= 16 else 2
    foot = max(0.55, 0.22 * math.ceil(len(legend) / per_row) + 0.15)
    head = 0.62 if title else 0.3
    width = 2 * _MARGIN_IN + len(columns) * (_PANEL_IN + _GAP_IN) - _GAP_IN
    height = head + sum(heights) + _GAP_IN * (len(heights) - 1) + foot
    figure = drawing.figure(width, height)
    _write(figure, _MARGIN_IN, height - 0.1, title, fontsize=_title_size(title), weight="bold", va="top")
    for column, panel in enumerate(columns):
        left = _MARGIN_IN + column * (_PANEL_IN + _GAP_IN)
        bottom = height - head
        _write(figure, left, bottom + 0.07, panel.heading, fontsize=10, color=QUIET, va="bottom")
        for plane, tall in zip(rows, heights, strict=True):
            bottom -= tall
            axes = _axes(figure, _fitted((left, bottom, _PANEL_IN, tall), plane.size_mm))
            panel.draw(axes, plane)
            if column == 0:
                _write_directions(axes, plane)
            bottom -= _GAP_IN
        if panel.scale is not None:
            axes = _axes(figure, (left, foot - 0.2, _PANEL_IN - 0.3, 0.09))
            _draw_scale(axes, f"{panel.heading} / {panel.unit}", panel.scale)
    _draw_legend(figure, legend, per_row, (_MARGIN_IN / width, (foot - 0.06) / height))
    return figure


def _title_size(title: str) -> float:
    """Cases may be named by a DICOM UID of 64 characters, which must fit over two panels."""
    return 12 if len(title) <= 48 else 8


def _fitted(box: Box, size: tuple[float, float]) -> Box:
    """The largest box of the proportions of `size` (rows, columns) inside a box, at its left."""
    left, bottom, width, height = box
    scale = min(width / size[1], height / size[0])
    w, h = size[1] * scale, size[0] * scale
    return left, bottom + (height - h) / 2, w, h


def _axes(figure: Figure, box: Box) -> Axes:
    width, height = figure.get_size_inches()
    left, bottom, w, h = box
    axes = figure.add_axes((left / width, bottom / height, w / width, h / height))
    axes.set_frame_on(False)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def _write(figure: Figure, left_in: float, bottom_in: float, text: str, **style: Any) -> None:
    width, height = figure.get_size_inches()
    figure.text(left_in / width, bottom_in / height, text, **{"color": INK, "parse_math": False, **style})


def _write_directions(axes: Axes, plane: Plane) -> None:
    rim = [withStroke(linewidth=2.5, foreground="black")]
    style: dict[str, Any] = {"transform": axes.transAxes, "color": "white", "fontsize": 10.5, "path_effects": rim}
    axes.text(0.5, 0.985, plane.top, ha="center", va="top", **style)
    axes.text(0.015, 0.5, plane.left, ha="left", va="center", **style)
    axes.text(0.015, 0.015, plane.name, ha="left", va="bottom", **style)


def _draw_scale(axes: Axes, name: str, scale: Scale) -> None:
    axes.imshow(np.linspace(0, 1, 256)[None], cmap="inferno", aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([scale.place(tick) for tick in scale.ticks], [f"{tick:g}" for tick in scale.ticks])
    axes.tick_params(labelsize=8, colors=QUIET, length=2, pad=2)
    axes.set_xlabel(name, fontsize=8, color=QUIET, labelpad=0)


def _draw_legend(figure: Figure, entries: list[tuple[str, Patch]], columns: int, corner: tuple[float, float]) -> None:
    legend = figure.legend(
        [handle for _, handle in entries],
        ["x" for _ in entries],
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        handleheight=0.9,
        borderaxespad=0,
        columnspacing=1.4,
    )
    drawing.write_names(legend, (name for name, _ in entries), 32)
