"""Where voxels lie, and what a file holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PICTURE_SLICE_MM = 999.0
"""Slice distance given to a picture, as nnU-Net does it: so large that the slice axis always comes first."""


@dataclass(frozen=True)
class Geometry:
    """Enough to write a map back onto the image it came from.

    `spacing_mm` is (z, y, x); `origin` and `direction` are as ITK keeps them, in the file's own `dimension`.
    `affine` (4 x 4, row by row) is there only for NIfTI files that ITK cannot represent (sheared axes).
    """

    dimension: int
    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()
    affine: tuple[float, ...] = ()

    @property
    def in_millimetres(self) -> bool:
        """Whether distances have a unit: pictures have none, nor TIFFs without a spacing; there a voxel counts as 1."""
        return bool(self.origin or self.affine)

    @property
    def voxel_mm3(self) -> float:
        """The volume of a voxel in mm^3; for one slice the area of a pixel in mm^2 (1 for a picture)."""
        spacing = self.spacing_mm if self.dimension == 3 else self.spacing_mm[1:]
        return float(np.prod(spacing))

    def header(self, shape: tuple[int, ...]) -> Header:
        """What the header of a file of this geometry says; the shape is that of an image or of a map."""
        channels, z, y, x = (1, *shape)[-4:]
        direction = self.direction or (directions(self.affine) if self.affine else ())
        return Header((channels, z, y, x), self.spacing_mm, direction)


@dataclass(frozen=True)
class Header:
    """Shape (C, Z, Y, X) and spacing (z, y, x) of a file; `direction` as ITK has it, () if the file has none."""

    shape: tuple[int, int, int, int]
    spacing_mm: tuple[float, float, float]
    direction: tuple[float, ...] = ()


def directions(affine: Sequence[float]) -> tuple[float, ...]:
    """The axes of a NIfTI's 4 x 4 matrix as ITK's direction: unit columns, towards the left and the back (LPS)."""
    axes = np.reshape(affine, (4, 4))[:3, :3] * [[-1], [-1], [1]]
    return tuple((axes / np.linalg.norm(axes, axis=0)).ravel().tolist())


@dataclass(frozen=True)
class Image:
    """Voxels as float32 (C, Z, Y, X) and where they lie."""

    array: np.ndarray
    geometry: Geometry
