"""2D pictures: PNG, JPEG, BMP and single-page TIFF, by Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from autofed.files import whole_file
from autofed.images.geometry import PICTURE_SLICE_MM, Geometry, Header, Image
from autofed.problems import Problems

LOSSY = (".jpg", ".jpeg")
ENDINGS = (".png", ".bmp", ".tif", ".tiff", *LOSSY)

_SPACING = (PICTURE_SLICE_MM, 1.0, 1.0)


def _open(path: Path) -> Pillow.Image:
    try:
        picture: Pillow.Image = Pillow.open(path)
        pages = getattr(picture, "n_frames", 1)
        if pages > 1:
            picture.close()
            raise Problems(str(path), [f"a picture has one page, but this file has {pages}"])
        return picture.convert() if picture.mode == "P" and path.suffix.lower() != ".png" else picture
    except (UnidentifiedImageError, OSError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise Problems(str(path), [f"the picture cannot be read ({error}); copy it again from its source"]) from None


def header(path: Path) -> Header:
    """See `autofed.images.header`."""
    with _open(path) as picture:
        return Header((len(picture.getbands()), 1, picture.height, picture.width), _SPACING)


def read(path: Path) -> Image:
    """See `autofed.images.read`. Channels are those of the file: 1, RGB 3, RGBA 4."""
    with _open(path) as picture:
        try:
            pixels = np.asarray(picture, dtype=np.float32)
        except (OSError, SyntaxError) as error:
            raise Problems(str(path), [f"the picture is not whole ({error}); copy it again"]) from None
    channels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    return Image(np.ascontiguousarray(channels[:, None]), Geometry(2, _SPACING))


def write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """See `autofed.images.write`. Integers are stored as they are; fractions in [0, 1] as 8 bit shares of 255."""
    pixels = array[0]
    if pixels.dtype.kind == "f":
        pixels = np.clip(np.round(pixels * 255), 0, 255).astype(np.uint8)
    with whole_file(path) as part:
        Pillow.fromarray(pixels.astype(np.uint8 if pixels.max(initial=0) < 256 else np.uint16)).save(part)
