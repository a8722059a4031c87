"""Files of pages, by Pillow: PNG, JPEG, BMP and TIFF.

One page is a 2D picture, which has no millimetres. A TIFF of several pages is a volume, its pages the slices; as TIFF
has no agreed field for the distance of slices, the spacing stands in a JSON beside it (nnU-Net's Tiff3DIO).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from autofed.data.images.geometry import PICTURE_SLICE_MM, Geometry, Header, Image
from autofed.errors import ValidationErrors
from autofed.files import read_json, whole_file, write_json

LOSSY = (".jpg", ".jpeg")
TIFF = (".tif", ".tiff")
ENDINGS = (".png", ".bmp", *TIFF, *LOSSY)

_PICTURE_GEOMETRY = Geometry(2, (PICTURE_SLICE_MM, 1.0, 1.0))
_IDENTITY_DIRECTION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def is_volume(path: Path) -> bool:
    """Whether a file has several pages, which only a TIFF may."""
    if path.suffix.lower() not in TIFF:
        return False
    with _open(path) as picture:
        return _count_pages(picture) > 1


def header(path: Path) -> Header:
    """See `autofed.data.images.header`. Reads where each page lies, and of a page with a palette its pixels."""
    with _open(path) as picture:
        shapes = [_shape(page) for page in _pages(path, picture)]
    if len(set(shapes)) > 1:
        deviant = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
        difference = f"page 0 is {_describe_shape(shapes[0])}, page {deviant} is {_describe_shape(shapes[deviant])}"
        raise ValidationErrors(
            str(path), [f"the pages of a volume are its slices, of one size, but {difference}; remove previews"]
        )
    channels, height, width = shapes[0]
    return _geometry(path, len(shapes)).header((channels, len(shapes), height, width))


def read(path: Path) -> Image:
    """See `autofed.data.images.read`. Channels are those of the file: 1, RGB 3, RGBA 4."""
    shape = header(path).shape
    array = np.empty(shape, np.float32)
    with _open(path) as picture:
        for z, page in enumerate(_pages(path, picture)):
            pixels = np.asarray(page)
            array[:, z] = pixels if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    return Image(array, _geometry(path, shape[1]))


def write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """See `autofed.data.images.write`. A picture stores integers as they are, fractions in [0, 1] as 8 bit shares of
    255.

    A volume goes into the pages of a TIFF, fractions as they are, and its spacing, if it has one, into the JSON beside.
    """
    if geometry.dimension == 3 and path.suffix.lower() in TIFF:
        _write_volume(path, array, geometry)
        return
    pixels = array[0]
    if pixels.dtype.kind == "f":
        pixels = np.clip(np.round(pixels * 255), 0, 255).astype(np.uint8)
    with whole_file(path) as part:
        Pillow.fromarray(pixels.astype(np.uint8 if pixels.max(initial=0) < 256 else np.uint16)).save(part)


def spacing_file(path: Path) -> Path | None:
    """The JSON that may say the spacing of a TIFF, or None: case.json beside case_0000.tif and beside case.tif."""
    if path.suffix.lower() not in TIFF:
        return None
    names = dict.fromkeys((path.stem, re.sub(r"_[0-9]{4}$", "", path.stem)))  # a case's name may end in four digits
    return next((file for name in names if (file := path.with_name(f"{name}.json")).is_file()), None)


@contextmanager
def _open(path: Path) -> Iterator[Pillow.Image]:
    """An open file; whatever Pillow finds wrong with it, now or inside the block, becomes `ValidationErrors`."""
    try:
        with warnings.catch_warnings():
            if path.suffix.lower() in TIFF:  # if it is cut off, Pillow passes over its last pages with a warning
                warnings.filterwarnings("error", "Truncated File Read|Corrupt EXIF data")
            with Pillow.open(path) as picture:
                yield picture
    except (ValidationErrors, MemoryError):
        raise
    except Exception as error:  # Pillow raises a different class for each kind of damage
        is_unknown_tiff = isinstance(error, UnidentifiedImageError) and path.suffix.lower() in TIFF
        fix = "copy it again from its source" + (
            ", or write it with 32 bits a number or fewer" if is_unknown_tiff else ""
        )
        raise ValidationErrors(str(path), [f"the picture cannot be read ({error}); {fix}"]) from None


def _count_pages(picture: Pillow.Image) -> int:
    return getattr(picture, "n_frames", 1)


def _pages(path: Path, picture: Pillow.Image) -> Iterator[Pillow.Image]:
    """One page after the other. The numbers of a palette are taken as they are, but in a BMP they are colours."""
    count = _count_pages(picture)
    if count > 1 and path.suffix.lower() not in TIFF:
        raise ValidationErrors(str(path), [f"a picture has one page, but this file has {count}"])
    _refuse_more_axes(path, picture, count)
    for z in range(count):
        picture.seek(z)
        yield picture.convert() if picture.mode == "P" and path.suffix.lower() == ".bmp" else picture


def _refuse_more_axes(path: Path, picture: Pillow.Image, pages: int) -> None:
    """`ValidationErrors` if a TIFF of ImageJ or OME says that its pages are not, one by one, the slices of a volume."""
    text = str(getattr(picture, "tag_v2", {}).get(270, ""))  # 270: ImageDescription
    description = {key: int(n) for key, n in re.findall(r'\b(images|channels|frames|SizeC|SizeT)="?([0-9]+)', text)}
    images = description.pop("images", pages) if text.startswith("ImageJ=") else pages
    if images != pages or (pages > 1 and max(description.values(), default=1) > 1):
        claim = ", ".join(f"{key} {n}" for key, n in {"images": images, **description}.items())
        claim = f"found {pages} pages, while its description says {claim}"
        raise ValidationErrors(str(path), [f"{claim}; write one file per channel, with a page per slice"])


def _shape(page: Pillow.Image) -> tuple[int, int, int]:
    return len(page.getbands()), page.height, page.width


def _describe_shape(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{height} x {width}" + (f" with {channels} channels" if channels > 1 else "")


def _geometry(path: Path, pages: int) -> Geometry:
    """Of a volume without a spacing each voxel counts as 1, and that it has no origin says that these are no mm."""
    if pages == 1:
        return _PICTURE_GEOMETRY
    file = spacing_file(path)
    declared_spacing = _json_object(file).get("spacing") if file else None
    if declared_spacing is None:
        return Geometry(3, (1.0, 1.0, 1.0))
    if (
        not isinstance(declared_spacing, list)
        or len(declared_spacing) != 3
        or not all(_is_length(v) for v in declared_spacing)
    ):
        raise ValidationErrors(
            str(file), [f"`spacing` is {declared_spacing!r}; expected mm from voxel to voxel, [z, y, x], as [3, 1, 1]"]
        )
    z, y, x = map(float, declared_spacing)
    return Geometry(3, (z, y, x), (0.0, 0.0, 0.0), _IDENTITY_DIRECTION)


def _is_length(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _json_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    return value if isinstance(value, dict) else {}


def _write_volume(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    file = path.with_suffix(".json")
    if geometry.in_millimetres:  # before the voxels: a volume is never there without its spacing
        content = _json_object(file) if file.is_file() else {}
        write_json(file, {**content, "spacing": list(geometry.spacing_mm)})
    first, *rest = [Pillow.fromarray(page) for page in _storable(array)]
    with whole_file(path) as part:
        first.save(part, save_all=True, append_images=rest, compression="tiff_adobe_deflate")


def _storable(array: np.ndarray) -> np.ndarray:
    """In the smallest kind of number that Pillow has for it."""
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    return array.astype(np.uint8 if 0 <= low <= high < 2**8 else np.uint16 if 0 <= low <= high < 2**16 else np.int32)
