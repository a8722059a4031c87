"""Pictures of pseudo-labels of public images: which regions are labelled, and which are not."""

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
    """An image (C, Z, Y, X) with its pseudo-labels (Z, Y, X), `UNKNOWN` where there are none.

    `reference` is the true label map, if it is known.
    """

    name: str
    image: np.ndarray
    label_map: np.ndarray
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
        names = [name for name in choose_images(maps) if name in files]
        pictures = [
            PseudoLabelledImage(name, *_with_map(read_channels(files[name].images), maps[name])) for name in names
        ]
        if pictures:
            write_bytes(path := run.fold_folder(fold) / "agreed.png", draw(pictures, Labels.of(plan.agreement)))
            drawn.append(path)
    return drawn


def choose_images(maps: LabelMaps, count: int = _IMAGES) -> list[str]:
    """Images to show: half of them with labels, half without any, each evenly spaced by name."""
    labelled = [name for name, label_map in sorted(maps.items()) if (label_map != UNKNOWN).any()]
    unlabelled = [name for name in sorted(maps) if name not in labelled]
    count_unlabelled = min(len(unlabelled), max(count // 2, count - len(labelled)))
    return _spaced(labelled, count - count_unlabelled) + _spaced(unlabelled, count_unlabelled)


def draw(pictures: Sequence[PseudoLabelledImage], labels: Labels) -> bytes:
    """A PNG: each image beside its pseudo-labels, in colours; grey is without a label."""
    rows = -(-len(pictures) // (_COLUMNS // 2))
    height_in = max(_plane(picture).size_mm[0] / _plane(picture).size_mm[1] for picture in pictures) * _PANEL_IN
    figure = drawing.figure(
        _COLUMNS * _PANEL_IN, rows * (min(height_in, 1.6 * _PANEL_IN) + 0.25) + 0.4, layout="constrained"
    )
    all_axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in all_axes:
        axes.set_axis_off()
    for picture, left, right in zip(pictures, all_axes[::2], all_axes[1::2], strict=False):
        _draw(picture, labels, left, right)
    colours, names = structure_colours(labels), labels.names_of_values()
    handles = [Patch(color=colours[value], label="x") for value in names] + [Patch(color=_GREY, label="x")]
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    drawing.write_names(legend, [*names.values(), "not agreed on"], 24)
    return drawing.png(figure)


def _draw(picture: PseudoLabelledImage, labels: Labels, left: Axes, right: Axes) -> None:
    label_map = upright(picture.label_map, picture.geometry)
    reference = None if picture.reference is None else upright(picture.reference, picture.geometry)
    plane = _plane(picture)
    image = next(panels(picture.image, {}, picture.geometry, labels))
    for axes in (left, right):
        image.draw(axes, plane)
        axes.set_box_aspect(plane.size_mm[0] / plane.size_mm[1])
    colours = structure_colours(labels)
    right.imshow(tinted(plane.cut(label_map), {**colours, UNKNOWN: _GREY[:3]}), interpolation="nearest", aspect="auto")
    if reference is not None:
        outline(right, plane.cut(reference), colours)
    _name(left, picture, plane)


def _plane(picture: PseudoLabelledImage) -> Plane:
    """The slice that shows the most labels, or the most of the reference if there are none."""
    label_map = np.where(picture.label_map == UNKNOWN, 0, picture.label_map)
    structures = label_map if label_map.any() or picture.reference is None else picture.reference
    return planes(upright(structures, picture.geometry), picture.geometry)[0]


def _name(axes: Axes, picture: PseudoLabelledImage, plane: Plane) -> None:
    share = float((picture.label_map != UNKNOWN).mean())
    state = f"{100 * share:.0f} % agreed" if share else "refused"
    position = f", {plane.name}" if plane.name else ""
    axes.set_title(f"{picture.name}{position}: {state}", fontsize=8, color=drawing.QUIET, loc="left", parse_math=False)


def _with_map(image: tuple[np.ndarray, Geometry], label_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, Geometry]:
    return image[0], label_map, image[1]


def _spaced(names: Sequence[str], count: int) -> list[str]:
    places = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[place] for place in places]
