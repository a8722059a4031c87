"""Readers and writers of images: volumes (NIfTI, MHA, NRRD, GIPL, TIFF) and pictures (PNG, JPEG, BMP, TIFF).

Inside autofed every image is (C, Z, Y, X) and every map (Z, Y, X); a picture is a volume of one slice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from autofed.data.images import pictures, volumes
from autofed.data.images.geometry import PICTURE_SLICE_MM, Geometry, Header, Image
from autofed.errors import ValidationErrors

ENDINGS = tuple(sorted((*volumes.ENDINGS, *pictures.ENDINGS), key=len, reverse=True))

__all__ = [
    "ENDINGS", "PICTURE_SLICE_MM", "Geometry", "Header", "Image",
    "ending_of", "header", "is_picture", "label_ending", "read", "read_labels", "spacing_file", "write",
]  # fmt: skip


class Format(Protocol):
    """A module that reads and writes some file formats: `pictures` or `volumes`."""

    def header(self, path: Path, /) -> Header:
        """See `header`."""

    def read(self, path: Path, /) -> Image:
        """See `read`."""

    def write(self, path: Path, array: np.ndarray, geometry: Geometry, /) -> None:
        """See `write`."""


def ending_of(name: str | Path) -> str:
    """The file ending of a name that autofed reads (".nii.gz"), or "" for any other."""
    lower = Path(name).name.lower()
    return next((e for e in ENDINGS if lower.endswith(e)), "")


def is_picture(file: Path | str) -> bool:
    """Whether a file is a 2D picture without a spacing in millimetres: by its name, a TIFF by its pages.

    Given an ending alone, a TIFF counts as the picture that it most often is.
    """
    path = Path(file)
    return ending_of(path) in pictures.ENDINGS and not (path.is_file() and pictures.is_volume(path))


def label_ending(ending: str) -> str:
    """The ending of the label maps of images with `ending`: lossy pictures have PNG labels."""
    return ".png" if ending in pictures.LOSSY else ending


def spacing_file(path: Path) -> Path | None:
    """The JSON file that holds the spacing of an image; None if the image holds it itself or none is known."""
    return pictures.spacing_file(Path(path))


def _module_reading(path: Path) -> Format:
    if not ending_of(path):
        raise ValidationErrors(
            str(path), [f"files of this kind are not read; expected one of {' '.join(sorted(ENDINGS))}"]
        )
    if not Path(path).is_file():
        raise ValidationErrors(str(path), ["there is no such file"])
    return _module_for(path)


def _module_for(path: Path) -> Format:
    return pictures if ending_of(path) in pictures.ENDINGS else volumes


def header(path: Path) -> Header:
    """Shape and spacing of a file, without reading its voxels where the format allows it."""
    return _module_reading(path).header(Path(path))


def read(path: Path) -> Image:
    """An image as float32 (C, Z, Y, X) with its geometry; `ValidationErrors` if the file cannot be read whole."""
    return _module_reading(path).read(Path(path))


def read_labels(path: Path) -> tuple[np.ndarray, Geometry]:
    """A label map as int32 (Z, Y, X) with its geometry; `ValidationErrors` if it has channels or values that are not
    whole.
    """
    image = read(path)
    if image.array.shape[0] != 1:
        raise ValidationErrors(str(path), [f"a label map has one channel, but this file has {image.array.shape[0]}"])
    with np.errstate(invalid="ignore"):  # NaN becomes some number, which then differs from NaN
        labels = image.array[0].astype(np.int32)
    if not np.array_equal(labels, image.array[0]):
        problem = "a label map holds whole numbers only, but this file has fractions or NaN"
        raise ValidationErrors(str(path), [f"{problem}; write the numbers that dataset.json declares"])
    return labels, image.geometry


def write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a map (Z, Y, X) in the geometry of the image it belongs to, whole or not at all."""
    _module_for(path).write(Path(path), array, geometry)
