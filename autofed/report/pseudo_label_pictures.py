"""What sites agreed on in public images: which regions are taught, and which nobody vouches for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from autofed.data import read_channels
from autofed.data.images import Geometry
from autofed.data.labels import Labels
from autofed.federation.run_folder import Run
from autofed.files import write_bytes
from autofed.preprocessing import UNKNOWN, LabelMaps, find_public
from autofed.report import drawing
from autofed.report.panels import outline, panels, structure_colours, tinted
from autofed.report.slices import Plane, planes, upright

_IMAGES = 8
_COLUMNS = 4
_PANEL_IN = 2.4
_GREY = (0.5, 0.5, 0.5, 0.75)


@dataclass(frozen=True)
class PseudoLabelledImage:
    """An image (C, Z, Y, X) with the labels (Z, Y, X) that were agreed on, `UNKNOWN` where none were.

    `reference` is the truth, where somebody knows it.
    """

    name: str
    image: np.ndarray
    found: np.ndarray
    geometry: Geometry
    reference: np.ndarray | None = None


def draw_pseudo_labels(run: Run) -> list[Path]:
    """Draw some public images of each fold of a run whose sites labelled them to `agreed.png` in the fold's folder.

    Nothing is drawn where the images are no longer where they were, and for a run whose sites share weights.
    """
    folder, plan, drawn = Path(run.identity().public), run.plan(), []
    for fold in run.folds() if run.identity().public and folder.is_dir() else []:
        maps = run.agreed(fold)
        files = find_public(folder, len(plan.agreement.channels))
        chosen = [name for name in choose_images(maps) if name in files]
        shown = [
            PseudoLabelledImage(name, *_with_map(read_channels(files[name].images), maps[name])) for name in chosen
        ]
        if shown:
            write_bytes(path := run.fold_folder(fold) / "agreed.png", draw(shown, Labels.of(plan.agreement)))
            drawn.append(path)
    return drawn


def choose_images(maps: LabelMaps, count: int = _IMAGES) -> list[str]:
    """Images to show: half of them with labels, half that were refused, each evenly spaced by name."""
    taught = [name for name, found in sorted(maps.items()) if (found != UNKNOWN).any()]
    refused = [name for name in sorted(maps) if name not in taught]
    few = min(len(refused), max(count // 2, count - len(taught)))
    return _spaced(taught, count - few) + _spaced(refused, few)


def draw(shown: Sequence[PseudoLabelledImage], labels: Labels) -> bytes:
    """A PNG: each image beside what is taught of it, in colours; grey is what nobody vouches for."""
    rows = -(-len(shown) // (_COLUMNS // 2))
    tall = max(_plane(one).size_mm[0] / _plane(one).size_mm[1] for one in shown) * _PANEL_IN
    figure = drawing.figure(
        _COLUMNS * _PANEL_IN, rows * (min(tall, 1.6 * _PANEL_IN) + 0.25) + 0.4, layout="constrained"
    )
    every = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in every:
        axes.set_axis_off()
    for one, left, right in zip(shown, every[::2], every[1::2], strict=False):
        _draw(one, labels, left, right)
    colours, names = structure_colours(labels), labels.names_of_values()
    handles = [Patch(color=colours[value], label="x") for value in names] + [Patch(color=_GREY, label="x")]
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    drawing.write_names(legend, [*names.values(), "not agreed on"], 24)
    return drawing.png(figure)


def _draw(one: PseudoLabelledImage, labels: Labels, left: Axes, right: Axes) -> None:
    found = upright(one.found, one.geometry)
    reference = None if one.reference is None else upright(one.reference, one.geometry)
    plane = _plane(one)
    image = next(panels(one.image, {}, one.geometry, labels))
    for axes in (left, right):
        image.draw(axes, plane)
        axes.set_box_aspect(plane.size_mm[0] / plane.size_mm[1])
    colours = structure_colours(labels)
    right.imshow(tinted(plane.cut(found), {**colours, UNKNOWN: _GREY[:3]}), interpolation="nearest", aspect="auto")
    if reference is not None:
        outline(right, plane.cut(reference), colours)
    _name(left, one, plane)


def _plane(one: PseudoLabelledImage) -> Plane:
    """The slice that shows the most of what is taught, or of the truth where nothing is."""
    taught = np.where(one.found == UNKNOWN, 0, one.found)
    shown = taught if taught.any() or one.reference is None else one.reference
    return planes(upright(shown, one.geometry), one.geometry)[0]


def _name(axes: Axes, one: PseudoLabelledImage, plane: Plane) -> None:
    share = float((one.found != UNKNOWN).mean())
    said = f"{100 * share:.0f} % agreed" if share else "refused"
    place = f", {plane.name}" if plane.name else ""
    axes.set_title(f"{one.name}{place}: {said}", fontsize=8, color=drawing.QUIET, loc="left", parse_math=False)


def _with_map(read: tuple[np.ndarray, Geometry], found: np.ndarray) -> tuple[np.ndarray, np.ndarray, Geometry]:
    return read[0], found, read[1]


def _spaced(names: Sequence[str], count: int) -> list[str]:
    places = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[place] for place in places]
