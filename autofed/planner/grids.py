"""The grid to train on: target spacing, order of the axes, and configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autofed.data.images import PICTURE_SLICE_MM
from autofed.fingerprints import Fingerprint, values
from autofed.planner.reasons import Reasons, format_axes
from autofed.plans import ANISOTROPY, Configuration

FLAT_SLICES = 8.0
"""Slices this many times farther apart than pixels have too little in common for a kernel of three slices."""

FEWEST_SLICES = 8
"""A 3D network pools an axis only if it has this many voxels (nnU-Net's smallest edge of 4, twice)."""

LOW_RESOLUTION_STEP = 1.03
LOW_RESOLUTION_SHARE = 0.25
"""A low resolution is planned if the patch holds less than this share of the median case (nnU-Net)."""


@dataclass(frozen=True)
class Grid:
    """A configuration's grid, axes in the plan's order; the median shape is whole or the half between two sizes."""

    configuration: Configuration
    transpose: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    median_shape: tuple[float, float, float]

    @property
    def axes(self) -> int:
        """The number of axes of a patch: two where the network takes single slices."""
        return 2 if self.configuration == "2d" else 3

    @property
    def patch_spacing_mm(self) -> tuple[float, ...]:
        """Spacing of the patch's axes."""
        return self.spacing_mm[-self.axes :]

    @property
    def patch_median(self) -> tuple[float, ...]:
        """Median size of the cases on the patch's axes."""
        return self.median_shape[-self.axes :]


def target_spacing(fingerprint: Fingerprint) -> tuple[float, float, float]:
    """Median spacing per axis; a much coarser axis takes its 10th percentile instead (nnU-Net, fullres)."""
    spacings = [values(axis.spacing_mm) for axis in fingerprint.axes]
    sizes = [float(np.median(values(axis.size))) for axis in fingerprint.axes]
    target = [float(np.median(s)) for s in spacings]
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarse = target[worst] > ANISOTROPY * max(target[a] for a in others)
    thin = sizes[worst] * ANISOTROPY < min(sizes[a] for a in others)
    if coarse and thin:
        target[worst] = float(np.percentile(spacings[worst], 10))
        floor = max(target[a] for a in others)
        if target[worst] < floor:
            target[worst] = floor + 1e-5
    return (target[0], target[1], target[2])


def transposition(spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """The axis with the largest spacing comes first; the other two keep their order."""
    first = int(np.argmax(spacing_mm))
    rest = [axis for axis in range(3) if axis != first]
    return (first, rest[0], rest[1])


def median_shape(
    fingerprint: Fingerprint, order: Sequence[int], spacing_mm: Sequence[float]
) -> tuple[float, float, float]:
    """Median size on the target grid, axes in the given order: a whole number each, or the half between two.

    Rounding is monotone, so extents per axis are enough.
    """
    pairs = zip((fingerprint.axes[axis] for axis in order), spacing_mm, strict=True)
    z, y, x = (float(np.median(np.round(values(axis.extent_mm) / spacing))) for axis, spacing in pairs)
    return (z, y, x)


def full_resolution(fingerprint: Fingerprint, reasons: Reasons) -> Grid:
    """The grid at the target spacing: 2d for pictures, 3d_fullres for volumes."""
    spacing = target_spacing(fingerprint)
    flat = fingerprint.declaration.dimension == 2
    order = (0, 1, 2) if flat else transposition(spacing)
    ordered_mm = (spacing[order[0]], spacing[order[1]], spacing[order[2]])
    shape = median_shape(fingerprint, order, ordered_mm)
    reasons.record(
        "local.geometry.spacing_mm", format_axes(ordered_mm), _spacing_reason(fingerprint, order, ordered_mm)
    )
    first = "the one slice of a picture comes first" if flat else "the axis with the largest spacing comes first"
    reasons.record("local.geometry.transpose", order, first)
    return Grid("2d" if flat else "3d_fullres", order, ordered_mm, shape)


def preferred_configuration(grid: Grid) -> tuple[Configuration, str]:
    """2d for pictures and for volumes whose slices are too thick or too few to learn across, else 3d_fullres.

    nnU-Net trains all and picks by cross-validation, which a federation cannot afford. The thresholds are this
    project's: at a depth below 8 no axis across slices is ever halved, and at slices 8 times as far apart as pixels the
    kernels of nnU-Net's own topology stay flat for three stages, where nearly all of the network's resolution is.
    """
    if grid.configuration == "2d":
        return "2d", "pictures"
    slices, ratio = grid.median_shape[0], grid.spacing_mm[0] / max(grid.spacing_mm[1:])
    if slices < 2:
        return "2d", "volumes of one slice"
    if ratio >= FLAT_SLICES or (ratio > ANISOTROPY and slices < FEWEST_SLICES):
        return "2d", f"{slices:g} slices, {ratio:.1f} times as far apart as pixels: too thick to learn across"
    return "3d_fullres", f"volumes of {slices:g} slices, {ratio:.1f} times as far apart as pixels"


def low_resolution(full: Grid, patch_of: Callable[[Grid], Sequence[int]]) -> Grid | None:
    """The coarser grid on which a patch holds a quarter of the median case; None where none is needed.

    Source: nnU-Net 2.8.1, the 3d_lowres configuration: widen the spacing by 3 % at a time, the finest axes alone while
    they are more than twice finer; not worth it unless it halves the number of voxels.
    """
    full_spacing, full_shape = np.asarray(full.spacing_mm), np.asarray(full.median_shape)
    grid, voxels = full, float(np.prod(full_shape))
    while float(np.prod(patch_of(grid))) / voxels < LOW_RESOLUTION_SHARE:
        spacing = np.asarray(grid.spacing_mm)
        finer = spacing.max() / spacing > 2
        spacing = np.where(finer | (not finer.any()), spacing * LOW_RESOLUTION_STEP, spacing)
        exact = full_spacing / spacing * full_shape
        voxels = float(np.prod(exact))
        grid = Grid("3d_lowres", full.transpose, _triple(spacing), _triple(np.round(exact)))
    return None if float(np.prod(full_shape)) / voxels < 2 else grid


def _triple(numbers: np.ndarray) -> tuple[float, float, float]:
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def _spacing_reason(fingerprint: Fingerprint, order: Sequence[int], spacing_mm: Sequence[float]) -> str:
    if spacing_mm[0] == PICTURE_SLICE_MM:
        return "pixels: pictures have no millimetres"
    medians = [float(np.median(values(fingerprint.axes[axis].spacing_mm))) for axis in order]
    why = f"median over {fingerprint.cases} cases of all sites, in mm"
    thick = [n for n, (m, s) in enumerate(zip(medians, spacing_mm, strict=True)) if m != s]
    if thick:
        why += f"; the median of axis {thick[0]}, {medians[thick[0]]:g}, is far coarser: its 10th percentile instead"
    return why
