"""Which slices of a volume to show, and which way up: the patient's right on the left, anterior or superior on top."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from nibabel import orientations

from autofed.data.images import Geometry

# More pixels than this cannot be seen in a panel, and outlines of larger maps take long to trace.
_PIXELS = 1024


@dataclass(frozen=True)
class Plane:
    """A slice to show: across which axis of (Z, Y, X), where, and its letters at the top and at the left."""

    name: str
    axis: int
    index: int
    size_mm: tuple[float, float]
    top: str = ""
    left: str = ""

    def cut(self, array: np.ndarray) -> np.ndarray:
        """The slice (..., rows, columns) of an upright array (..., Z, Y, X), thinned to what a panel can show."""
        part: np.ndarray = np.take(array, self.index, axis=self.axis - 3)
        part = part if self.axis == 0 else np.flip(part, axis=-2)  # z runs upwards in the patient
        step = math.ceil(max(part.shape[-2:]) / _PIXELS)
        return part[..., ::step, ::step]


def upright(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """An array (..., Z, Y, X) with its axes turned to superior, posterior and left; as it is if they are unknown."""
    turn = _turn(geometry)
    if turn is None:
        return array
    turned: np.ndarray = orientations.apply_orientation(array.T, turn).T  # type: ignore[no-untyped-call]
    return turned


def planes(labels: np.ndarray, geometry: Geometry) -> list[Plane]:
    """The slices that show the most of upright labels (Z, Y, X): of a volume one in each direction."""
    indices = _fullest(labels)
    z, y, x = (n * s for n, s in zip(labels.shape, _upright_spacing(geometry), strict=True))
    if _turn(geometry) is None:
        all_planes = [
            Plane("", 0, indices[0], (y, x)),
            Plane("", 1, indices[1], (z, x)),
            Plane("", 2, indices[2], (z, y)),
        ]
    else:
        all_planes = [
            Plane("axial", 0, indices[0], (y, x), top="A", left="R"),
            Plane("coronal", 1, indices[1], (z, x), top="S", left="R"),
            Plane("sagittal", 2, indices[2], (z, y), top="S", left="A"),
        ]
    flat = [plane for plane in all_planes if labels.shape[plane.axis] == 1]
    return flat[:1] or all_planes


def _fullest(labels: np.ndarray) -> list[int]:
    """For each axis the slice with the most foreground, every structure weighing alike; the middle if there is none.

    By area alone, a small tumour would not be seen beside its organ.
    """
    where = np.nonzero(labels)
    values = labels[where]
    if not len(values):
        return [n // 2 for n in labels.shape]
    kinds = int(values.max()) + 1
    indices = []
    for index, length in zip(where, labels.shape, strict=True):
        areas = np.bincount(index * kinds + values, minlength=length * kinds).reshape(length, kinds)
        indices.append(int((areas / np.maximum(areas.max(axis=0), 1)).sum(axis=1).argmax()))
    return indices


def _turn(geometry: Geometry) -> np.ndarray | None:
    """How to reorder and flip the axes (x, y, z) so that they point to the patient's left, back and head."""
    if geometry.affine:
        affine = np.reshape(geometry.affine, (4, 4))
    elif len(geometry.direction) == 9:
        affine = np.eye(4)  # ITK's axes point to left, posterior, superior; nibabel's to right, anterior, superior
        affine[:3, :3] = np.diag([-1, -1, 1]) @ np.reshape(geometry.direction, (3, 3))
    else:
        return None
    here, there = orientations.io_orientation(affine), orientations.axcodes2ornt("LPS")  # type: ignore[no-untyped-call]
    turn: np.ndarray = orientations.ornt_transform(here, there)  # type: ignore[no-untyped-call]
    return turn


def _upright_spacing(geometry: Geometry) -> tuple[float, float, float]:
    """Spacing (z, y, x) in mm of the turned array."""
    turn = _turn(geometry)
    if turn is None:
        return geometry.spacing_mm
    spacing = [0.0, 0.0, 0.0]
    for before, after in enumerate(turn[:, 0].astype(int)):
        spacing[2 - after] = geometry.spacing_mm[2 - before]
    return (spacing[0], spacing[1], spacing[2])
