"""Resampling: cubic splines for images, linear for each label, nearest across slices that lie far apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from autofed.data.labels import voxel_counts

_POLE = math.sqrt(3) - 2  # of the filter that turns values into coefficients of a cubic B-spline
_SLAB = 1 << 20  # voxels that are resampled at a time


def resample(values: np.ndarray, shape: Sequence[int], *, order: int, coarse_axis: int | None) -> np.ndarray:
    """Resample a map to another shape of the same extent: a spline of `order`, edges repeated, no overshoot.

    With a `coarse_axis`, the slices along it are resampled by themselves and the nearest slice is taken, since between
    slices that lie far apart a spline invents anatomy.
    """
    if tuple(values.shape) == tuple(shape):
        return values
    resampled = exact = values.astype(np.float32, copy=False)
    centres = [_centres(n, m) for n, m in zip(exact.shape, shape, strict=True)]
    orders = [0 if axis == coarse_axis else order for axis in range(3)]
    for axis in sorted(range(3), key=lambda axis: len(centres[axis]) / exact.shape[axis]):  # the smaller, the sooner
        if len(centres[axis]) != exact.shape[axis]:
            resampled = _along(resampled, axis, centres[axis], orders[axis])
    if order > 1:
        _clip(resampled, exact, None if coarse_axis is None else (coarse_axis, centres[coarse_axis]))
    return resampled


def resample_labels(label: np.ndarray, shape: Sequence[int], *, coarse_axis: int | None) -> np.ndarray:
    """A label map on another grid: each label linearly by itself, the strongest wins, of equals the last."""
    if tuple(label.shape) == tuple(shape):
        return label
    resampled = np.zeros(shape, dtype=label.dtype)
    present = _present(label)
    if not len(present):
        return resampled
    foreground_box, share = _share(label > 0, shape, coarse_axis)
    best = 1 - share  # of the background
    for value in present:
        box, share = _share(label == value, shape, coarse_axis)
        in_foreground = tuple(
            slice(b.start - a.start, b.stop - a.start) for a, b in zip(foreground_box, box, strict=True)
        )
        resampled[box][share >= best[in_foreground]] = value
        np.maximum(best[in_foreground], share, out=best[in_foreground])
    return resampled


def _present(label: np.ndarray) -> np.ndarray:
    """The values above 0 of a label map."""
    return np.flatnonzero(voxel_counts(label)[1:]) + 1


def _share(
    mask: np.ndarray, shape: Sequence[int], coarse_axis: int | None
) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """The part of another grid where a mask that is not empty can be, and its share of each voxel there."""
    source, target, centres = [], [], []
    for axis, size in enumerate(shape):
        occupied = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = int(occupied[0]) - 1, int(occupied[-1]) + 1  # a linear share ends where the next voxel begins
        all_centres = _centres(mask.shape[axis], size)
        target_range = slice(
            int(np.searchsorted(all_centres, first, "right")), int(np.searchsorted(all_centres, last, "left"))
        )
        source.append(slice(max(first, 0), last + 1))
        target.append(target_range)
        centres.append(all_centres[target_range] - max(first, 0))
    share = mask[tuple(source)].astype(np.float32)
    for axis in range(3):
        share = _along(share, axis, centres[axis], 0 if axis == coarse_axis else 1)
    return (target[0], target[1], target[2]), share


def _centres(count: int, size: int) -> np.ndarray:
    """Where the centres of `size` voxels lie among `count` voxels of the same extent, counted from the first centre."""
    return (np.arange(size) + 0.5) * (count / size) - 0.5


def _clip(resampled: np.ndarray, exact: np.ndarray, slices: tuple[int, np.ndarray] | None) -> None:
    """Take away, in place, what a spline overshoots: beyond the range of the volume, or of each slice by itself."""
    within = tuple(axis for axis in range(3) if slices is None or axis != slices[0])
    low, high = exact.min(axis=within, keepdims=True), exact.max(axis=within, keepdims=True)
    if slices is not None:
        low, high = (_along(bound, *slices, 0) for bound in (low, high))
    np.clip(resampled, low, high, out=resampled)


def _along(values: np.ndarray, axis: int, centres: np.ndarray, order: int) -> np.ndarray:
    """Sample a map at other places along one axis: the nearest voxel (order 0), linear (1) or a cubic spline (3).

    In slabs, so that intermediate values stay in the processor's cache and take little memory.
    """
    if order == 0:
        return np.take(values, np.floor(centres + 0.5).astype(int), axis=axis)
    shape = [len(centres) if a == axis else n for a, n in enumerate(values.shape)]
    resampled = np.empty(shape, np.float32)
    across = 1 if axis == 0 else 0
    thick = max(1, _SLAB * values.shape[across] // max(values.size, 1))
    for start in range(0, values.shape[across], thick):
        slab = (slice(None),) * across + (slice(start, start + thick),)
        _interpolate(np.moveaxis(values[slab], axis, 0), np.moveaxis(resampled[slab], axis, 0), centres, order)
    return resampled


def _interpolate(values: np.ndarray, target: np.ndarray, centres: np.ndarray, order: int) -> None:
    """Write to `target` the values at other places along the first axis."""
    lines = np.concatenate([values[:1], values[:1], values, values[-1:], values[-1:]])  # edges repeated
    if order == 3:
        _to_coefficients(lines)
    first = np.floor(centres).astype(int)
    weights = (_cubic if order == 3 else _linear)(centres - first)
    total, part = np.empty_like(lines[0]), np.empty_like(lines[0])
    for place, nearest, shares in zip(range(len(target)), first + 2 - order // 2, weights.T.tolist(), strict=True):
        np.multiply(lines[nearest], shares[0], out=total)
        for step in range(1, order + 1):
            np.multiply(lines[nearest + step], shares[step], out=part)
            np.add(total, part, out=total)
        target[place] = total


def _to_coefficients(lines: np.ndarray) -> None:
    """A sixth of the coefficients of the cubic B-spline through lines whose last values go on for ever, in place.

    The recursions of Unser, Aldroubi and Eden, IEEE Trans. Signal Process. 41:834 (1993), figure 1; their start and
    turn are geometric series here, since the lines are constant beyond both ends.
    """
    beyond = lines[-1] / (1 - _POLE)
    lines[0] /= 1 - _POLE
    part = np.empty_like(lines[0])
    for before, line in pairwise(lines):
        line += np.multiply(before, _POLE, out=part)
    lines[-1] = -_POLE * (beyond / (1 - _POLE) + (lines[-1] - beyond) / (1 - _POLE**2))
    for after, line in pairwise(lines[::-1]):
        np.subtract(after, line, out=line)
        line *= _POLE


def _linear(t: np.ndarray) -> np.ndarray:
    return np.stack([1 - t, t])


def _cubic(t: np.ndarray) -> np.ndarray:
    """Six times the cubic B-spline over the four nearest voxels, at the share `t` of the way between the inner two."""
    return np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3])
