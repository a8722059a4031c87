"""What a person looks at: pictures of predictions, training curves, and one HTML page about an evaluation.

Volumes are turned upright before they are shown, as a radiologist reads them: patient's right on the left, anterior or
superior on top. Figures are drawn without pyplot, so that nothing here has a state or needs a screen.
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from nibabel import orientations

from autofed import __version__, images
from autofed.case import read_channels
from autofed.files import read_json, write_bytes
from autofed.images import Geometry
from autofed.parallel import Progress, each, silent
from autofed.problems import Problems, refuse
from autofed.scores import CaseScores, Report, Scores, Unit, find_references

# Okabe and Ito's palette, which the colour-blind can tell apart; black and the one grey tone are left out.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
# The same for thin lines on white, where yellow is not seen.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, QUIET = "#1f2933", "#52606d"

_DPI = 110
_PANEL_IN = 3.0
_GAP_IN = 0.08
_MARGIN_IN = 0.12
# More pixels than this cannot be seen in a panel, and outlines of larger maps take long to trace.
_PIXELS = 1024
_LEGEND_ENTRIES = 12
_GROUP = 4
"""So many cases are shown of the worst, the middle and the best."""


# Pictures of predictions


@dataclass(frozen=True)
class _Plane:
    """A slice to show: across which axis of (Z, Y, X), where, and its letters at the top and at the left."""

    name: str
    axis: int
    index: int
    size_mm: tuple[float, float]
    top: str = ""
    left: str = ""

    def cut(self, array: np.ndarray) -> np.ndarray:
        """The slice (..., rows, columns) of an array (..., Z, Y, X), thinned to what a panel can show."""
        part = np.take(array, self.index, axis=self.axis - 3)
        part = part if self.axis == 0 else np.flip(part, axis=-2)  # z runs upwards in the patient
        step = math.ceil(max(part.shape[-2:]) / _PIXELS)
        return part[..., ::step, ::step]


@dataclass(frozen=True)
class _Panel:
    """A column of the picture: its heading and what draws a slice into axes."""

    heading: str
    draw: Callable[[Axes, _Plane], None]
    colours: str = ""
    top_value: float = 1.0


def overlay(
    image: np.ndarray,
    prediction: np.ndarray,
    label_names: Mapping[str, int],
    geometry: Geometry,
    *,
    reference: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    mutual_information: np.ndarray | None = None,
    title: str = "",
) -> bytes:
    """A PNG with the image, the prediction as coloured areas, the reference as outlines, and the uncertainty.

    `image` is (C, Z, Y, X), all maps are (Z, Y, X); uncertainties are shares of ln C, from 0 to 1. A volume is shown
    in three rows (axial, coronal, sagittal), each the slice that shows the most of it; a picture in one. Pictures of
    three or four channels are shown in colour; of all others the first channel, windowed from its 1st to its 99th
    percentile. `Problems` if a map's shape is not the image's.
    """
    maps = {
        "prediction": prediction,
        "reference": reference,
        "entropy": entropy,
        "mutual information": mutual_information,
    }
    refuse(title or "overlay", _shape_problems(image, maps))
    upright = {name: _upright(array, geometry) for name, array in maps.items() if array is not None}
    shown = _upright(image[:3] if _is_colour(image, geometry) else image[:1], geometry)
    planes = _planes(upright["prediction"], upright.get("reference"), geometry)
    panels = list(_panels(shown, upright, label_names))
    return _png(_compose(planes, panels, _legend(upright, label_names), title))


def draw_predictions(folder: Path, progress: Progress = silent) -> list[Path]:
    """Draw every case of a folder that `autofed predict` filled into `pictures/{case}.png`; returns these paths.

    A case whose images are no longer where they were is passed over.
    """
    folder = Path(folder)
    targets = [(p, folder / "pictures" / f"{p.case}.png") for p in _predicted(folder).values() if p.has_images]

    def draw(item: tuple[_Predicted, Path]) -> Path:
        predicted, path = item
        write_bytes(path, _draw(predicted, None))
        return path

    return each(draw, targets, stage="pictures", progress=progress)


@dataclass(frozen=True)
class _Predicted:
    """A case of a folder of predictions, as the JSON file beside its maps describes it."""

    case: str
    images: tuple[Path, ...]
    labels: Mapping[str, int]
    maps: Mapping[str, Path]

    @property
    def has_images(self) -> bool:
        return all(path.is_file() for path in self.images)


def _predicted(folder: Path) -> dict[str, _Predicted]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        value = read_json(path)
        if not isinstance(value, dict) or not {"case", "images", "labels", "files"} <= value.keys():
            continue  # a report or a plan that lies here too
        maps = {kind: folder / name for kind, name in value["files"].items() if name}
        found[value["case"]] = _Predicted(value["case"], tuple(map(Path, value["images"])), value["labels"], maps)
    return found


def _draw(predicted: _Predicted, reference: Path | None) -> bytes:
    image, geometry = read_channels(predicted.images)
    return overlay(
        image,
        images.read_labels(predicted.maps["labels"])[0],
        predicted.labels,
        geometry,
        reference=None if reference is None else images.read_labels(reference)[0],
        entropy=_read_share(predicted.maps.get("entropy")),
        mutual_information=_read_share(predicted.maps.get("mutual_information")),
        title=predicted.case,
    )


def _read_share(path: Path | None) -> np.ndarray | None:
    """A map of shares of ln C; pictures hold them as 8 bit shares of 255. None if there is no such file."""
    if path is None or not path.is_file():
        return None
    array = images.read(path).array[0]
    return array / 255 if images.is_picture(images.ending_of(path)) else array


def _shape_problems(image: np.ndarray, maps: Mapping[str, np.ndarray | None]) -> Iterator[str]:
    for name, array in maps.items():
        if array is not None and array.shape != image.shape[1:]:
            yield f"the {name} has the shape {array.shape}, the image {image.shape[1:]} (z, y, x)"


# Upright


def _turn(geometry: Geometry) -> np.ndarray | None:
    """How to reorder and flip the axes (x, y, z) so that they point to the patient's left, back and head."""
    if geometry.affine:
        affine = np.reshape(geometry.affine, (4, 4))
    elif len(geometry.direction) == 9:
        affine = np.eye(4)  # ITK's axes point to left, posterior, superior; nibabel's to right, anterior, superior
        affine[:3, :3] = np.diag([-1, -1, 1]) @ np.reshape(geometry.direction, (3, 3))
    else:
        return None
    return orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt("LPS"))


def _upright(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """An array (..., Z, Y, X) with its axes turned to superior, posterior and left; as it is if nobody knows them."""
    turn = _turn(geometry)
    return array if turn is None else orientations.apply_orientation(array.T, turn).T


def _upright_spacing(geometry: Geometry) -> tuple[float, float, float]:
    """Spacing (z, y, x) in mm of the turned array."""
    turn = _turn(geometry)
    if turn is None:
        return geometry.spacing_mm
    spacing = [0.0, 0.0, 0.0]
    for before, after in enumerate(turn[:, 0].astype(int)):
        spacing[2 - after] = geometry.spacing_mm[2 - before]
    return (spacing[0], spacing[1], spacing[2])


# Slices


def _planes(prediction: np.ndarray, reference: np.ndarray | None, geometry: Geometry) -> list[_Plane]:
    """The slices that show the most of what was predicted; of the reference where nothing was."""
    labels = prediction if reference is None or prediction.any() else reference
    at = _fullest(labels)
    z, y, x = (n * s for n, s in zip(prediction.shape, _upright_spacing(geometry), strict=True))
    if _turn(geometry) is None:
        planes = [_Plane("", 0, at[0], (y, x)), _Plane("", 1, at[1], (z, x)), _Plane("", 2, at[2], (z, y))]
    else:
        planes = [
            _Plane("axial", 0, at[0], (y, x), top="A", left="R"),
            _Plane("coronal", 1, at[1], (z, x), top="S", left="R"),
            _Plane("sagittal", 2, at[2], (z, y), top="S", left="A"),
        ]
    flat = [plane for plane in planes if prediction.shape[plane.axis] == 1]
    return flat[:1] or planes


def _fullest(labels: np.ndarray) -> list[int]:
    """For each axis the slice with the most foreground, every structure weighing alike; the middle if there is none.

    By area alone, a small tumour would not be seen beside its organ.
    """
    where = np.nonzero(labels)
    values = labels[where]
    if not len(values):
        return [n // 2 for n in labels.shape]
    kinds = int(values.max()) + 1
    at = []
    for index, length in zip(where, labels.shape, strict=True):
        areas = np.bincount(index * kinds + values, minlength=length * kinds).reshape(length, kinds)
        at.append(int((areas / np.maximum(areas.max(axis=0), 1)).sum(axis=1).argmax()))
    return at


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


# Panels


def _panels(shown: np.ndarray, maps: Mapping[str, np.ndarray], label_names: Mapping[str, int]) -> Iterator[_Panel]:
    colours = _colours(label_names)
    reference = maps.get("reference")
    low, high = _window(shown)

    def draw_image(axes: Axes, plane: _Plane) -> None:
        pixels = np.clip((np.nan_to_num(plane.cut(shown)) - low) / (high - low), 0, 1)
        pixels = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
        # hanning filters when the image is made smaller and interpolates when it is made larger
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="hanning", aspect="auto")

    def draw_prediction(axes: Axes, plane: _Plane) -> None:
        draw_image(axes, plane)
        axes.imshow(_tinted(plane.cut(maps["prediction"]), colours), interpolation="nearest", aspect="auto")
        if reference is not None:
            _outline(axes, plane.cut(reference), colours)

    yield _Panel("image", draw_image)
    yield _Panel("prediction" if reference is None else "prediction (area) and reference (outline)", draw_prediction)
    # Mutual information is a part of the entropy, and seldom more than a half of it: on a scale to 1 it would be black.
    for name, top in (("entropy", 1.0), ("mutual information", 0.5)):
        if name in maps:
            yield _Panel(name, _heat(maps[name], top), f"{name} / ln C", top)


def _heat(values: np.ndarray, top: float) -> Callable[[Axes, _Plane], None]:
    def draw(axes: Axes, plane: _Plane) -> None:
        axes.imshow(plane.cut(values), cmap="inferno", vmin=0, vmax=top, interpolation="nearest", aspect="auto")

    return draw


def _colours(label_names: Mapping[str, int]) -> dict[int, tuple[float, float, float]]:
    """A colour for each structure, the same in every picture of a plan."""
    values = sorted(v for v in label_names.values() if v)
    return dict(zip(values, _distinct(len(values), PALETTE), strict=True))


def _distinct(count: int, palette: Sequence[str]) -> list[tuple[float, float, float]]:
    if count <= len(palette):
        return [to_rgb(colour) for colour in palette[:count]]
    return [(float(r), float(g), float(b)) for r, g, b, _ in colormaps["turbo"](np.linspace(0.08, 0.95, count))]


def _tinted(labels: np.ndarray, colours: Mapping[int, tuple[float, float, float]]) -> np.ndarray:
    """Labels (rows, columns) as a half transparent picture (rows, columns, 4)."""
    tint = np.zeros((*labels.shape, 4))
    for value, colour in colours.items():
        tint[labels == value] = (*colour, 0.5)
    return tint


def _outline(axes: Axes, labels: np.ndarray, colours: Mapping[int, tuple[float, float, float]]) -> None:
    rows, columns = (np.arange(-1, n + 1) for n in labels.shape)
    for value, colour in colours.items():
        mask = np.pad(labels == value, 1)  # so that an outline closes at the border of the image
        if mask.any():
            lines = axes.contour(columns, rows, mask, levels=[0.5], colors=[colour], linewidths=1.3)
            # A dark rim keeps a line readable on an area of its own colour and on bright tissue.
            lines.set_path_effects([withStroke(linewidth=2.6, foreground=(0, 0, 0, 0.75))])
    axes.set_xlim(-0.5, labels.shape[1] - 0.5)
    axes.set_ylim(labels.shape[0] - 0.5, -0.5)


def _legend(maps: Mapping[str, np.ndarray], label_names: Mapping[str, int]) -> list[tuple[str, Any]]:
    """Names and handles of the structures that this case holds."""
    colours = _colours(label_names)
    held = [m for name, m in maps.items() if name in ("prediction", "reference")]
    present = [(n, v) for n, v in label_names.items() if v and any((m == v).any() for m in held)]
    entries: list[tuple[str, Any]] = [(name, Patch(color=colours[v])) for name, v in present[:_LEGEND_ENTRIES]]
    if len(present) > _LEGEND_ENTRIES:
        entries.append((f"and {len(present) - _LEGEND_ENTRIES} more", Patch(alpha=0)))
    return entries or [("no structure was found", Patch(alpha=0))]


# Composition, in inches


def _compose(planes: Sequence[_Plane], panels: Sequence[_Panel], legend: list[tuple[str, Any]], title: str) -> Figure:
    """Rows of planes and columns of panels, all to one scale; below them the legend and the scales of uncertainty."""
    scale = _PANEL_IN / max(plane.size_mm[1] for plane in planes)
    heights = [min(max(plane.size_mm[0] * scale, 0.3 * _PANEL_IN), 1.6 * _PANEL_IN) for plane in planes]
    per_row = 3 if max(len(name) for name, _ in legend) <= 16 else 2
    foot = max(0.55, 0.22 * math.ceil(len(legend) / per_row) + 0.15)
    head = 0.62 if title else 0.3
    width = 2 * _MARGIN_IN + len(panels) * (_PANEL_IN + _GAP_IN) - _GAP_IN
    height = head + sum(heights) + _GAP_IN * (len(heights) - 1) + foot
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _text(figure, _MARGIN_IN / width, 1 - 0.1 / height, title, _title_size(title), weight="bold", va="top")
    for column, panel in enumerate(panels):
        left = _MARGIN_IN + column * (_PANEL_IN + _GAP_IN)
        bottom = height - head
        _text(figure, left / width, (bottom + 0.07) / height, panel.heading, size=9.5, color=QUIET, va="bottom")
        for plane, tall in zip(planes, heights, strict=True):
            bottom -= tall
            box = _fitted((left, bottom, _PANEL_IN, tall), plane.size_mm)
            _draw_panel(figure.add_axes(_relative(box, width, height)), panel, plane, is_first=column == 0)
            bottom -= _GAP_IN
        if panel.colours:
            box = (left + 0.15, foot - 0.2, _PANEL_IN - 0.3, 0.09)
            _draw_scale(figure.add_axes(_relative(box, width, height)), panel)
    _draw_legend(figure, legend, per_row, (_MARGIN_IN / width, (foot - 0.06) / height))
    return figure


def _title_size(title: str) -> float:
    """Cases may be named by a DICOM UID of 64 characters, which must fit over two panels."""
    return 12 if len(title) <= 48 else 8


def _fitted(box: tuple[float, float, float, float], size: tuple[float, float]) -> tuple[float, float, float, float]:
    """The largest box (left, bottom, width, height) of the proportions of `size` (rows, columns) inside a box."""
    left, bottom, width, height = box
    scale = min(width / size[1], height / size[0])
    w, h = size[1] * scale, size[0] * scale
    return left + (width - w) / 2, bottom + (height - h) / 2, w, h


def _relative(box: tuple[float, float, float, float], width: float, height: float) -> tuple[float, float, float, float]:
    left, bottom, w, h = box
    return left / width, bottom / height, w / width, h / height


def _draw_panel(axes: Axes, panel: _Panel, plane: _Plane, is_first: bool) -> None:
    panel.draw(axes, plane)
    axes.set_axis_off()
    if not is_first:
        return
    rim = [withStroke(linewidth=2, foreground="black")]
    style: dict[str, Any] = {"transform": axes.transAxes, "color": "white", "fontsize": 8.5, "path_effects": rim}
    axes.text(0.5, 0.985, plane.top, ha="center", va="top", **style)
    axes.text(0.015, 0.5, plane.left, ha="left", va="center", **style)
    axes.text(0.015, 0.015, plane.name, ha="left", va="bottom", **style)


def _draw_scale(axes: Axes, panel: _Panel) -> None:
    axes.imshow(np.linspace(0, 1, 256)[None], cmap="inferno", aspect="auto", extent=(0, panel.top_value, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([0, panel.top_value / 2, panel.top_value])
    axes.tick_params(labelsize=8, colors=QUIET, length=2, pad=1)
    axes.set_xlabel(panel.colours, fontsize=8, color=QUIET, labelpad=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(figure: Figure, entries: list[tuple[str, Any]], columns: int, corner: tuple[float, float]) -> None:
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
    _name(legend, (name for name, _ in entries), 32)


def _name(legend: Legend, names: Iterable[str], longest: int) -> None:
    """Write names into a legend as text: neither as formulas ("$") nor hidden ("_tumour"), as a legend takes them."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name if len(name) <= longest else name[: longest - 1] + "…")
        text.set_color(INK)


def _text(figure: Figure, x: float, y: float, text: str, size: float, color: str = INK, **style: Any) -> None:
    figure.text(x, y, text, fontsize=size, color=color, ha="left", parse_math=False, **style)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


# Training curves


def curves(metrics_path: Path) -> bytes | None:
    """A PNG of the training loss of each site by round, from a run's metrics.jsonl; None if there is nothing in it.

    A round that was run again after a crash counts as it came out last. `Problems` if a line is not JSON; only the
    last line may be cut short, as a crash leaves it.
    """
    losses = _losses(Path(metrics_path))
    if not losses:
        return None
    columns = math.ceil(len(losses) / 14)  # so many names fit beside the curves
    figure = Figure(figsize=(6.6 + 1.6 * columns, 3.4), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = []
    for colour, rounds in zip(_distinct(len(losses), LINES), losses.values(), strict=True):
        lines += axes.plot(list(rounds), list(rounds.values()), color=colour, linewidth=1.6)
        if len(rounds) < 15:  # a single round would otherwise draw nothing
            lines[-1].set(marker="o", markersize=3.5)
    _style_curves(axes)
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
    _name(legend, losses, 20)
    return _png(figure)


def _style_curves(axes: Axes) -> None:
    axes.set_xlabel("round", color=QUIET)
    axes.set_ylabel("training loss", color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.tick_params(colors=QUIET, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")


def _losses(path: Path) -> dict[str, dict[int, float]]:
    """Loss by site and round, in the order of rounds."""
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
    losses: dict[str, dict[int, float]] = {}
    for number in sorted(rounds):
        for site, values in rounds[number].items():
            if values.get("loss") is not None:
                losses.setdefault(site, {})[number] = float(values["loss"])
    return losses


# The page


@dataclass(frozen=True)
class _Shown:
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
    title = f"Evaluation of {_count(len(report.cases), 'case')}"
    sections = [
        _header(title, Path(predictions), labels),
        _summary(report),
        _case_table(report),
        _pictures(report, Path(predictions), labels),
        _training(runs),
        _GLOSSARY,
    ]
    body = "\n".join(section for section in sections if section)
    write_bytes(Path(out), _PAGE.format(title=escape(title), style=_STYLE, body=body, foot=_FOOT).encode())


def ranked(cases: Iterable[CaseScores]) -> list[CaseScores]:
    """Cases from the worst to the best mean Dice; those that are not scored come last."""
    return sorted(cases, key=lambda c: (c.mean.dice is None, c.mean.dice or 0.0, c.case))


def _header(title: str, predictions: Path, labels: Path | None) -> str:
    against = "" if labels is None else f" against the references in <code>{escape(str(labels))}</code>"
    return (
        f"<header><h1>{escape(title)}</h1>"
        f"<p>Predictions in <code>{escape(str(predictions))}</code>{against}. Written on "
        f"{datetime.date.today().isoformat()} by autofed {escape(__version__)}.</p>"
        f"<p class=caution>{_CAUTION}</p></header>"
    )


def _summary(report: Report) -> str:
    counts = {name: _scored(report, name) for name in report.classes}
    rows = [_row("All structures", report.mean, len(report.cases), "total")]
    rows += [_row(name, scores, counts[name]) for name, scores in report.classes.items()]
    if report.sites:
        rows.append("<tr class=group><th colspan=5>Sites</th></tr>")
        homes = [c.site for c in report.cases]
        rows += [_row(site, scores, homes.count(site)) for site, scores in report.sites.items()]
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return (
        "<section><h2>Summary</h2><table class=summary><thead><tr><th>Structure</th><th class=n>Dice</th>"
        f"<th class=n>Jaccard</th><th class=n>HD95 ({report.distance_unit})</th><th class=n>Cases</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table><p class=caption>Means over the cases in which a structure is scored; "
        "the mean over all structures, and that of a site, weighs every structure alike.</p>"
        + (f"<ul class=notes>{notes}</ul>" if notes else "")
        + "</section>"
    )


def _scored(report: Report, name: str) -> int:
    """In how many cases a structure is scored."""
    return sum(name in c.classes and c.classes[name].dice is not None for c in report.cases)


def _row(name: str, scores: Scores, cases: int, kind: str = "") -> str:
    return (
        f"<tr{f' class={kind}' if kind else ''}><th>{escape(name)}</th>{_share(scores.dice)}"
        f"<td class=n>{_number(scores.jaccard, 3)}</td><td class=n>{_number(scores.hd95_mm, 1)}</td>"
        f"<td class=n>{cases}</td></tr>"
    )


def _case_table(report: Report) -> str:
    names = list(report.classes) if 2 <= len(report.classes) <= 6 else []
    has_sites = any(c.site is not None for c in report.cases)
    head = "<th class=n>#</th><th>Case</th>" + ("<th>Site</th>" if has_sites else "")
    head += f"<th class=n>Dice</th><th class=n>Jaccard</th><th class=n>HD95 ({report.distance_unit})</th>"
    head += "".join(f"<th class=n>{escape(name)}</th>" for name in names)
    rows = []
    for rank, scored in enumerate(ranked(report.cases), start=1):
        row = f"<td class=n>{rank}</td><th>{escape(scored.case)}</th>"
        row += f"<td>{escape(scored.site or '–')}</td>" if has_sites else ""
        row += f"{_share(scored.mean.dice)}<td class=n>{_number(scored.mean.jaccard, 3)}</td>"
        row += f"<td class=n>{_number(scored.mean.hd95_mm, 1)}</td>"
        row += "".join(f"<td class=n>{_number(scored.classes[n].dice, 3)}</td>" for n in names if n in scored.classes)
        rows.append(f"<tr>{row}</tr>")
    caption = "From the worst to the best mean Dice. A dash: nothing to score, or no distance to measure."
    caption += " The columns on the right hold the Dice of each structure." if names else ""
    return (
        f"<section><h2>Cases</h2><p class=caption>{caption}</p><div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    """A cell with a share of 1, and a pale bar behind it that is as long."""
    if value is None:
        return "<td class=n>–</td>"
    return f'<td class="n bar" style="--share:{100 * value:.1f}%">{value:.3f}</td>'


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _chosen(cases: Iterable[CaseScores]) -> list[_Shown]:
    """All scored cases if they are few; otherwise the worst, the middle and the best."""
    order = [c for c in ranked(cases) if c.mean.dice is not None]
    ranks = range(len(order))
    groups = {"All cases, from the worst to the best": ranks}
    if len(order) > 3 * _GROUP:
        middle = (len(order) - _GROUP) // 2
        groups = {"Worst": ranks[:_GROUP], "Middle": ranks[middle : middle + _GROUP], "Best": ranks[-_GROUP:]}
    return [_Shown(name, rank + 1, len(order), order[rank]) for name, group in groups.items() for rank in group]


def _pictures(report: Report, predictions: Path, labels: Path | None) -> str:
    predicted = _predicted(predictions)
    references = find_references(Path(labels))[0] if labels is not None else {}
    parts, group = [], ""
    for shown in _chosen(report.cases):
        if shown.group != group:
            group = shown.group
            parts.append(f"<h3>{group}</h3>")
        parts.append(_figure(shown, predicted.get(shown.scored.case), references, report.distance_unit))
    if not parts:
        return ""
    caption = "Of a volume, the slices that show the most of what was predicted, the patient's right on the left."
    return f"<section><h2>Pictures</h2><p class=caption>{caption}</p>{''.join(parts)}</section>"


def _figure(shown: _Shown, predicted: _Predicted | None, references: Mapping[str, Path], unit: Unit) -> str:
    scored = shown.scored
    said = f"rank {shown.rank} of {shown.ranks}, Dice {_number(scored.mean.dice, 3)}"
    said += f", HD95 {_number(scored.mean.hd95_mm, 1)} {unit}" if scored.mean.hd95_mm is not None else ""
    said += f", site {scored.site}" if scored.site is not None else ""
    caption = f"<figcaption><b>{escape(scored.case)}</b>: {escape(said)}</figcaption>"
    if predicted is None or not predicted.has_images:
        return f"<figure>{caption}<p class=caption>No picture: the images of this case were not found.</p></figure>"
    try:
        picture = _draw(predicted, references.get(scored.case))
    except Problems as error:  # a page with a gap that is explained is worth more than none
        return f"<figure>{caption}<p class=caption>No picture: {escape(str(error))}</p></figure>"
    return f"<figure>{_embedded(picture, f'Prediction of {scored.case}')}{caption}</figure>"


def _training(runs: Sequence[Path]) -> str:
    parts = []
    for run in map(Path, runs):
        picture = curves(run / "fold_all" / "metrics.jsonl")
        if picture is not None:
            image = _embedded(picture, f"Training loss of {run.name}")
            parts.append(f"<figure>{image}<figcaption><b>{escape(run.name)}</b>: training loss of each site by round"
                         "</figcaption></figure>")  # fmt: skip
    return f"<section><h2>Training</h2>{''.join(parts)}</section>" if parts else ""


def _embedded(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


_CAUTION = "autofed is a research tool and no medical device. Nothing on this page may guide the care of a patient."

_FOOT = f"<footer><p>{_CAUTION}</p></footer>"

_GLOSSARY = """<section><h2>How to read the numbers</h2><dl>
<dt>Dice and Jaccard</dt><dd>How much of prediction and reference overlap: twice the common volume over the sum of both,
and the common volume over the joint one. 1 is perfect agreement, 0 none. Small structures lose more by the same error
at their rim.</dd>
<dt>HD95</dt><dd>How far the outlines are apart where they are worst, leaving out the worst twentieth: the 95th
percentile of the distance from one surface to the other, taken in both directions, the larger of the two.</dd>
<dt>Entropy</dt><dd>How undecided the model is about a voxel: 0 where all probability lies on one structure, 1 where all
structures are equally likely (it is divided by the logarithm of the number of classes). It is high at rims that the
image itself leaves open, and more training does not change that.</dd>
<dt>Mutual information</dt><dd>The part of the entropy that comes from disagreement among the models of the ensemble,
each of which may be sure of itself. It is high where there was little to learn from, such as an unusual scanner or
finding; more data of the kind can lower it. A single model has none.</dd>
</dl><p class=caption>Neither entropy nor mutual information is the probability of an error. A model may be sure and
wrong, above all on images unlike those it was trained on.</p></section>"""

_STYLE = """
:root { --ink: #1f2933; --quiet: #52606d; --rule: #d5dbe1; --accent: #1c4e72; --bar: #dce8f0; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 3rem; max-width: 68rem; background: #fff; color: var(--ink);
  font: 16px/1.5 "Segoe UI", "Helvetica Neue", Helvetica, Arial, sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.75rem; font-weight: 600; line-height: 1.2; }
h2 { margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 2px solid var(--accent); color: var(--accent);
  font-size: 1.2rem; font-weight: 600; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; font-weight: 600; }
p { margin: .3rem 0 .7rem; max-width: 46rem; }
code { font-size: .88em; overflow-wrap: anywhere; }
header p, .caption, figcaption, footer { color: var(--quiet); font-size: .9rem; }
.caution { padding: .5rem .8rem; border-left: 3px solid var(--accent); background: #f5f8fa; color: var(--ink); }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
.summary { min-width: 34rem; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--rule); text-align: left; font-weight: 400; }
thead th { border-bottom: 1.5px solid var(--ink); font-weight: 600; vertical-align: bottom; }
.n { text-align: right; }
.total th, .total td { font-weight: 600; }
.group th { padding-top: .9rem; color: var(--quiet); font-weight: 600; }
.bar { background: linear-gradient(90deg, var(--bar) var(--share), transparent 0); }
.notes { margin: .6rem 0; padding-left: 1.2rem; max-width: 46rem; font-size: .9rem; }
figure { margin: .8rem 0 1.8rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .2rem; }
dl { max-width: 46rem; }
dt { font-weight: 600; }
dd { margin: 0 0 .7rem; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--rule); }
@page { margin: 16mm 14mm; }
@media print {
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  h2, h3 { break-after: avoid; }
  figure, tr, dt { break-inside: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; }
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
{foot}
</body>
</html>
"""
