"""Readers and writers of images: volumes (NIfTI, MHA, NRRD, GIPL) and pictures (PNG, JPEG, BMP, TIFF).

Inside autofed every image is (C, Z, Y, X) and every map (Z, Y, X); a picture is a volume of one slice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autofed.images import pictures, volumes
from autofed.images.geometry import PICTURE_SLICE_MM, Geometry, Header, Image
from autofed.problems import Problems

ENDINGS = tuple(sorted((*volumes.ENDINGS, *pictures.ENDINGS), key=len, reverse=True))

__all__ = [
    "ENDINGS", "PICTURE_SLICE_MM", "Geometry", "Header", "Image",
    "ending_of", "header", "is_picture", "label_ending", "read", "read_labels", "write",
]  # fmt: skip


def ending_of(name: str | Path) -> str:
    """The file ending of a name that autofed reads (".nii.gz"), or "" for any other."""
    lower = Path(name).name.lower()
    return next((e for e in ENDINGS if lower.endswith(e)), "")


def is_picture(ending: str) -> bool:
    """Whether files of this ending are 2D pictures without a spacing in millimetres."""
    return ending in pictures.ENDINGS


def label_ending(ending: str) -> str:
    """The ending of label maps beside images of `ending`: lossy pictures have PNG labels."""
    return ".png" if ending in pictures.LOSSY else ending


def _room(path: Path):
    ending = ending_of(path)
    if not ending:
        raise Problems(str(path), [f"files of this kind are not read; expected one of {' '.join(sorted(ENDINGS))}"])
    if not Path(path).is_file():
        raise Problems(str(path), ["there is no such file"])
    return pictures if is_picture(ending) else volumes


def header(path: Path) -> Header:
    """Shape and spacing of a file, without reading its voxels where the format allows it."""
    return _room(path).header(Path(path))


def read(path: Path) -> Image:
    """An image as float32 (C, Z, Y, X) with its geometry; `Problems` if the file cannot be read whole."""
    return _room(path).read(Path(path))


def read_labels(path: Path) -> tuple[np.ndarray, Geometry]:
    """A label map as int32 (Z, Y, X) with its geometry; `Problems` if it has channels or values that are not whole."""
    image = read(path)
    if image.array.shape[0] != 1:
        raise Problems(str(path), [f"a label map has one channel, but this file has {image.array.shape[0]}"])
    labels = image.array[0]
    if not np.isfinite(labels).all() or not (labels == np.round(labels)).all():
        raise Problems(str(path), ["a label map holds whole numbers only, but this file has fractions or NaN"])
    return labels.astype(np.int32), image.geometry


def write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a map (Z, Y, X) in the geometry of the image it belongs to, whole or not at all."""
    room = pictures if is_picture(ending_of(path)) else volumes
    room.write(Path(path), array, geometry)
