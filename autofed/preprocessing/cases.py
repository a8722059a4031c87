"""A case onto the plan's grid, and maps of it back onto the grid of the file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autofed.data import Case
from autofed.data.images import Geometry
from autofed.errors import raise_if_any
from autofed.files import Record
from autofed.fingerprints import crop_box
from autofed.plans import ANISOTROPY, Channel, Intensity, TargetGrid
from autofed.preprocessing.resampling import resample, resample_labels

_EPSILON = 1e-8


class InverseTransform(Record):
    """How a case came onto the plan's grid: all that is needed to bring a map back onto the file's own grid.

    `shape` is the file's (z, y, x), `box` the crop in it, `grid` the prepared shape, in the plan's axis order;
    `coarse_axis` is the axis of the grid along which slices were taken as they are, if there is one.
    """

    shape: tuple[int, int, int]
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    grid: tuple[int, int, int]
    transpose: tuple[int, int, int]
    coarse_axis: int | None
    dimension: int
    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    affine: tuple[float, ...]

    @property
    def geometry(self) -> Geometry:
        """Geometry of the file that the case came from."""
        return Geometry(self.dimension, self.spacing_mm, self.origin, self.direction, self.affine)


@dataclass(frozen=True)
class PreprocessedCase:
    """A case on the plan's grid: `image` float32 (C, *grid), `label` int16 (*grid) or None, and the inverse."""

    image: np.ndarray
    label: np.ndarray | None
    inverse: InverseTransform


def preprocess_case(case: Case, geometry: TargetGrid, intensity: Intensity) -> PreprocessedCase:
    """Crop to what is not zero, normalise, then resample onto the plan's grid (nnU-Net's order)."""
    box = crop_box(case.image)
    cropped = case.image[(slice(None), *box)]
    mask = _filled(cropped) if intensity.inside_mask else None
    order = geometry.transpose
    spacing = [case.spacing_mm[axis] for axis in order]
    grid = _grid([cropped.shape[1:][axis] for axis in order], spacing, geometry)
    coarse = _coarse_axis(spacing, geometry)
    label = None
    if case.label is not None:
        label = _label_on_grid(case.label[box], order, grid, coarse)
    image = np.empty((len(cropped), *grid), np.float32)
    for part, voxels, channel in zip(image, cropped, intensity.channels, strict=True):
        part[...] = resample(
            normalise(voxels, channel, mask, about=case.id).transpose(order), grid, order=3, coarse_axis=coarse
        )
    file = case.geometry
    inverse = InverseTransform(
        shape=case.image.shape[1:],
        box=tuple((s.start, s.stop) for s in box),
        grid=grid,
        transpose=order,
        coarse_axis=coarse,
        dimension=file.dimension,
        spacing_mm=file.spacing_mm,
        origin=file.origin,
        direction=file.direction,
        affine=file.affine,
    )
    return PreprocessedCase(image, label, inverse)


def preprocess_label(label: np.ndarray, inverse: InverseTransform) -> np.ndarray:
    """A label map (Z, Y, X) on the grid that its image was preprocessed onto, int16."""
    return _label_on_grid(label[_slices(inverse)], inverse.transpose, inverse.grid, inverse.coarse_axis)


def restore(values: np.ndarray, inverse: InverseTransform, fill: float = 0.0) -> np.ndarray:
    """A map (*grid) of real values back on the file's grid (Z, Y, X), linearly; `fill` where it was cropped."""
    cropped = [stop - start for start, stop in inverse.box]
    resampled = resample(
        values, [cropped[axis] for axis in inverse.transpose], order=1, coarse_axis=inverse.coarse_axis
    )
    whole = np.full(inverse.shape, fill, dtype=values.dtype)
    whole[_slices(inverse)] = resampled.transpose(_inverse_order(inverse.transpose))
    return whole


def restore_labels(probabilities: np.ndarray, inverse: InverseTransform) -> np.ndarray:
    """The most probable class (Z, Y, X), uint8 (uint16 above 256 classes), from probabilities (K, *grid).

    Class by class with a running maximum, so that memory does not grow with the number of classes.
    """
    best = restore(probabilities[0], inverse, fill=1.0)
    labels = np.zeros(inverse.shape, dtype=np.uint8 if len(probabilities) <= 256 else np.uint16)
    for value in range(1, len(probabilities)):
        rival = restore(probabilities[value], inverse)
        labels[rival > best] = value
        np.maximum(best, rival, out=best)
    return labels


def restore_regions(probabilities: np.ndarray, inverse: InverseTransform, order: Sequence[int]) -> np.ndarray:
    """Regions (Z, Y, X), uint8 (uint16 above 255), from probabilities (K, *grid) that need not add up to 1.

    Where a region is more probable than not, its value of `order` is written, later ones over earlier ones.
    """
    labels = np.zeros(inverse.shape, dtype=np.uint8 if max(order) < 256 else np.uint16)
    for probability, value in zip(probabilities, order, strict=True):
        labels[restore(probability, inverse) > 0.5] = value
    return labels


def normalise(voxels: np.ndarray, channel: Channel, mask: np.ndarray | None, about: str = "the image") -> np.ndarray:
    """One channel's intensities by its scheme; z-scores inside `mask` only, if there is one.

    `ValidationErrors` about the image if its values are not those that the scheme is for.
    """
    values = voxels.astype(np.float32, copy=True)
    match channel.scheme:
        case "ct":
            assert channel.mean is not None and channel.std is not None
            np.clip(values, channel.percentile_00_5, channel.percentile_99_5, out=values)
            values -= channel.mean
            values /= max(channel.std, _EPSILON)
        case "zscore":
            inside = values if mask is None else values[mask]
            inside -= inside.mean()
            inside /= max(float(inside.std()), _EPSILON)
            if mask is not None:
                values[mask] = inside
        case "rescale_to_0_1":
            low, high = float(values.min()), float(values.max())
            values -= low
            values /= max(high - low, _EPSILON)
        case "rgb_to_0_1":
            raise_if_any(about, _colour_problems(values))
            values /= 255
        case "nonorm":
            pass
    return values


def _label_on_grid(cropped: np.ndarray, order: Sequence[int], grid: Sequence[int], coarse: int | None) -> np.ndarray:
    transposed = cropped.astype(np.int16).transpose(order)
    return np.ascontiguousarray(resample_labels(transposed, grid, coarse_axis=coarse))


def _filled(image: np.ndarray) -> np.ndarray:
    """Where some channel of (C, Z, Y, X) is not zero, and what such voxels enclose."""
    from scipy import ndimage

    filled: np.ndarray = ndimage.binary_fill_holes((image != 0).any(axis=0))
    return filled


def _colour_problems(values: np.ndarray) -> list[str]:
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 255:
        return []
    return [
        f"a channel named rgb_to_0_1 holds values from {low:g} to {high:g}, expected 0 to 255; "
        "give the channel another name in dataset.json (rescale_to_0_1 takes any values)"
    ]


def _grid(shape: Sequence[int], spacing: Sequence[float], geometry: TargetGrid) -> tuple[int, int, int]:
    target = list(geometry.spacing_mm)
    if geometry.configuration == "2d":
        target[0] = spacing[0]  # slices stay where they are
    new = [max(1, round(n * s / t)) for n, s, t in zip(shape, spacing, target, strict=True)]
    return (new[0], new[1], new[2])


def _coarse_axis(spacing: Sequence[float], geometry: TargetGrid) -> int | None:
    """The axis along which slices lie so far apart that they are not mixed (nnU-Net's rule); both in the plan's order.

    The case's own spacing decides if it is anisotropic, else the plan's; two axes alike are no slices.
    """
    if geometry.configuration == "2d":
        return 0
    for candidate in (spacing, geometry.spacing_mm):
        coarsest = max(candidate)
        if coarsest > ANISOTROPY * min(candidate):
            axes = [axis for axis, mm in enumerate(candidate) if math.isclose(mm, coarsest, rel_tol=1e-3)]
            return axes[0] if len(axes) == 1 else None
    return None


def _slices(inverse: InverseTransform) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in inverse.box)


def _inverse_order(order: Sequence[int]) -> list[int]:
    return sorted(range(3), key=lambda axis: order[axis])
