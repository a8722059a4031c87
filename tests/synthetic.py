"""Small made-up hospitals: bright blobs on a noisy ground, in nnU-Net's raw layout.

Each class is a blob of its own brightness in every channel, so that a small network learns it in a few steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from autofed.data import images
from autofed.data.images import PICTURE_SLICE_MM, Geometry
from autofed.data.labels import Labels
from autofed.files import write_json

TUMOUR = {"background": 0, "tumour": 1}
ORGAN_AND_TUMOUR = {"background": 0, "organ": 1, "tumour": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
"""`core` lies on top of `whole`; with the class order (1, 2)."""


def blobs(shape: Sequence[int], classes: int, rng: np.random.Generator) -> np.ndarray:
    """A label map (Z, Y, X), int32, with one ellipsoid per class; later classes lie on top of earlier ones."""
    extent = np.array(shape, float)
    axes = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    label = np.zeros(shape, np.int32)
    for value in range(1, classes):
        radius = np.maximum(extent * rng.uniform(0.15, 0.25, 3), 1.0)
        centre = extent * rng.uniform(0.3, 0.7, 3)
        inside = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radius, strict=True)) <= 1
        label[inside] = value
        label[tuple(np.minimum(centre, extent - 1).astype(int))] = value
    return label


def paint(label: np.ndarray, channels: int, rng: np.random.Generator, top: float = 255.0) -> np.ndarray:
    """An image float32 (C, Z, Y, X) in [0, top] for a label map: brightness by class, other channels the other way."""
    share = 0.2 + 0.6 * label / max(int(label.max()), 1)
    clean = np.stack([share if c % 2 == 0 else 1 - share for c in range(channels)])
    return (np.clip(clean + rng.normal(0, 0.05, clean.shape), 0, 1) * top).astype(np.float32)


def make_site(
    folder: Path | str,
    *,
    cases: int = 4,
    dimension: int = 3,
    channels: Sequence[str] = ("MRI",),
    labels: Mapping[str, int | list[int]] = TUMOUR,
    order: Sequence[int] = (),
    annotated: float = 1.0,
    annotated_structures: Sequence[str] = (),
    ending: str = "",
    patients: int | Mapping[str, str] = 0,
    unlabelled: int = 0,
    shape: Sequence[int] = (),
    spacing_mm: Sequence[float] = (),
    part: str = "Tr",
    top: float = 255.0,
    empty: bool = False,
    seed: int = 0,
) -> Path:
    """Write a site and return its folder, whose name is the site's; ids are "{site}_{000}".

    `ending` is .nii.gz in 3D and .png in 2D unless said otherwise; three channels in pictures make one RGB file each.
    `patients` is a mapping of case to patient, or how many cases each patient has. The last `unlabelled` cases have no
    label. Labels that are regions have a class `order`; of each label map the share `annotated` from the left has its
    values, and the rest is `ignore`. All is in the images, but in the labels only `annotated_structures`, if any are
    named. `top` is the brightest value; more than 255 make pictures of 16 bits. An `empty` site has nothing in images
    and labels, and says that it looked. `shape` and `spacing_mm` are (z, y, x) or, in 2D, (y, x); the shape varies a
    little from case to case. `part` is Tr for what a site holds, Ts for a test set.
    """
    folder = Path(folder)
    ending = ending or (".nii.gz" if dimension == 3 else ".png")
    rng = np.random.default_rng([seed, *folder.name.encode()])
    base = tuple(shape) or ((16, 24, 20) if dimension == 3 else (32, 40))
    ids = [f"{folder.name}_{i:03d}" for i in range(cases)]
    known = Labels.declared(labels)
    for i, case in enumerate(ids):
        size = [n + (0 if shape else int(rng.integers(0, 5))) for n in base]
        label = blobs([1, *size][-3:], 1 if empty else max(known.values) + 1, rng)
        geometry = _geometry(dimension, ending, tuple(spacing_mm))
        _write_image(folder / f"images{part}", case, ending, paint(label, len(channels), rng, top), geometry)
        label = only(label, known.with_annotated(annotated_structures), order)
        if i < cases - unlabelled:
            name = f"{case}{images.label_ending(ending)}"
            label[..., round(label.shape[-1] * annotated) :] = known.ignore or 0
            _write_map(folder / f"labels{part}" / name, label.astype(np.uint8), geometry)
    description = describe(ids, channels, labels, ending, patients, order)
    said = list(known.names) if empty else list(annotated_structures)
    write_json(folder / "dataset.json", {**description, **({"annotated": said} if said else {})})
    return folder


def only(label: np.ndarray, labels: Labels, order: Sequence[int] = ()) -> np.ndarray:
    """A label map as it is where some structures were annotated alone; regions are painted in their class order."""
    if not labels.annotated:
        return label
    painted = np.zeros_like(label)
    for number, (name, values) in enumerate(labels.structures):
        if labels.is_annotated(name):
            painted[np.isin(label, values)] = order[number] if order else values[0]
    return painted


def describe(
    ids: Sequence[str],
    channels: Sequence[str],
    labels: Mapping[str, int | list[int]],
    ending: str,
    patients: int | Mapping[str, str] = 0,
    order: Sequence[int] = (),
) -> dict[str, object]:
    """The content of dataset.json."""
    named = dict(patients) if isinstance(patients, Mapping) else {}
    if isinstance(patients, int) and patients:
        named = {case: f"patient_{i // patients:03d}" for i, case in enumerate(ids)}
    description: dict[str, object] = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": len(ids),
        "file_ending": ending,
    }
    extra = {"patients": named} if named else {}
    return {**description, **extra, **({"regions_class_order": list(order)} if order else {})}


def _geometry(dimension: int, ending: str, spacing_mm: tuple[float, ...]) -> Geometry:
    if dimension == 2 and images.is_picture(ending):
        return Geometry(2, (PICTURE_SLICE_MM, 1.0, 1.0))
    if dimension == 2:
        y, x = spacing_mm or (1.0, 1.0)
        return Geometry(2, (PICTURE_SLICE_MM * max(y, x), y, x), (3.0, -7.0), (1.0, 0.0, 0.0, 1.0))
    z, y, x = spacing_mm or (1.0, 1.0, 1.0)
    return Geometry(3, (z, y, x), (-10.0, 20.5, 3.25), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))


def _write_image(folder: Path, case: str, ending: str, image: np.ndarray, geometry: Geometry) -> None:
    if geometry.dimension == 2 and images.is_picture(ending) and len(image) == 3:
        write_rgb(folder / f"{case}_0000{ending}", np.round(image[:, 0]).astype(np.uint8))
        return
    for c, channel in enumerate(image):
        name = f"{case}_{c:04d}{ending}"
        picture = np.uint8 if channel.max() <= 255 else np.uint16
        _write_map(
            folder / name, np.round(channel).astype(picture if images.is_picture(ending) else np.int16), geometry
        )
        if (beside := images.spacing_file(folder / name)) is not None:
            beside.replace(folder / f"{case}.json")  # one for all channels, as nnU-Net has it


def write_rgb(path: Path, pixels: np.ndarray) -> None:
    """A colour picture from (3, Y, X) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.moveaxis(pixels, 0, -1)).save(path, quality=95)


def _write_map(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write(path, array, geometry)
