"""Spatial augmentation: rotation, scaling, mirroring. The transform is sampled first, then only its box is read.

Everything here has three axes: a flat patch is one slice, which rotates in its plane. Ranges and probabilities are
nnU-Net's; the image is sampled with cubic splines, the labels linearly, label by label.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from batchgenerators.augmentations.utils import rotate_coords_2d, rotate_coords_3d
from scipy import ndimage
from scipy.interpolate import BSpline

from autofed.plans import Training

TRANSFORM_PROBABILITY = 0.2
"""Of being rotated, and, independently, of being scaled; each axis is mirrored with probability 0.5."""

SCALE_RANGE = (0.7, 1.4)
SPLINE_MARGIN = 4
"""So many voxels are read around a patch that is interpolated: a cubic spline needs 1, and each more makes the
influence of what is left out 0.27 times as large (Unser, IEEE Signal Process Mag 16:22, 1999)."""

_SLAB = 1 << 14
"""So many voxels are sampled at a time: their coordinates and weights stay in the processor's cache."""


@dataclass(frozen=True)
class SpatialTransform:
    """An affine map about the patch's middle, from patch to image: x is sampled at `matrix` @ x; then mirrored axes."""

    matrix: np.ndarray
    mirrored: tuple[int, ...] = ()

    @property
    def interpolated(self) -> np.ndarray:
        """The axes (3,) along which it is sampled between voxels."""
        axes: np.ndarray = (self.matrix != np.eye(3)).any(axis=1)
        return axes

    def box(self, patch: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The box to read for a patch: its start, counted from the patch's own first voxel, and its edges.

        Along an axis that is not interpolated it is the patch itself.
        """
        middle = (np.asarray(patch) - 1) / 2
        half = np.abs(self.matrix) @ middle
        low = np.where(self.interpolated, np.floor(middle - half) - SPLINE_MARGIN, 0).astype(int)
        high = np.where(self.interpolated, np.ceil(middle + half) + SPLINE_MARGIN + 1, patch).astype(int)
        return low, high - low

    def transform_image(self, box: np.ndarray, patch: Sequence[int]) -> np.ndarray:
        """The transformed image (C, *patch), float32, from its box."""
        if not self.interpolated.any():
            return self._mirror(box)
        if np.array_equal(self.matrix, np.diag(np.diag(self.matrix))):
            return self._mirror(_scale_axes(box, np.diag(self.matrix), self._origin(patch), patch))
        first = 0 if self.interpolated[0] else 1  # slices that rotate in their plane are treated as channels
        images = box.reshape(-1, *box.shape[1 + first :])
        rotated = _rotate(images, self.matrix[first:, first:], self._origin(patch)[first:], tuple(patch)[first:])
        return self._mirror(rotated.reshape(len(box), *patch))

    def transform_label(self, box: np.ndarray, patch: Sequence[int]) -> np.ndarray:
        """The transformed label map (*patch), from its box."""
        return self._mirror(
            _sample_labels(box, self.matrix, self._origin(patch), patch) if self.interpolated.any() else box
        )

    def _origin(self, patch: Sequence[int]) -> np.ndarray:
        """Where in its box the first voxel of the patch is sampled."""
        middle = (np.asarray(patch) - 1) / 2
        origin: np.ndarray = middle - self.matrix @ middle - self.box(patch)[0]
        return origin

    def _mirror(self, array: np.ndarray) -> np.ndarray:
        return np.flip(array, tuple(axis - 3 for axis in self.mirrored))


IDENTITY = SpatialTransform(np.eye(3))


def sample_transform(training: Training, generator: np.random.Generator) -> SpatialTransform:
    """Sample a transform as nnU-Net does. Thin volumes and flat patches are rotated and scaled in their plane alone."""
    flat = len(training.patch_size) == 2
    in_plane = flat or training.rotate_in_plane_only
    inner = np.eye(2 if in_plane else 3)
    if generator.random() < TRANSFORM_PROBABILITY:
        inner = _rotation(_widest_angle(training), len(inner), generator)
    if generator.random() < TRANSFORM_PROBABILITY:
        inner = inner * _scale_factor(generator)
    matrix = np.eye(3)
    matrix[-len(inner) :, -len(inner) :] = inner
    mirrored = tuple(axis + flat for axis in training.mirror_axes if generator.random() < 0.5)
    return SpatialTransform(matrix, mirrored)


def _widest_angle(training: Training) -> float:
    """A flat patch rotates freely unless it is much longer than wide; a volume tilts by 30 degrees about each axis."""
    if training.rotate_in_plane_only:
        return math.pi
    if len(training.patch_size) == 3:
        return math.pi / 6
    return math.pi if max(training.patch_size) / min(training.patch_size) <= 1.5 else math.pi / 12


def _rotation(widest: float, axes: int, generator: np.random.Generator) -> np.ndarray:
    angles = generator.uniform(-widest, widest, size=1 if axes == 2 else 3)
    matrix: np.ndarray = (rotate_coords_2d if axes == 2 else rotate_coords_3d)(np.eye(axes), *angles)
    return matrix


def _scale_factor(generator: np.random.Generator) -> float:
    """Half of the factors enlarge the content (below 1), half shrink it (above 1: more of the image is seen)."""
    low, high = SCALE_RANGE
    return generator.uniform(low, 1) if generator.random() < 0.5 else generator.uniform(1, high)


def widest_box(training: Training) -> tuple[int, ...]:
    """The largest edges a box can have: the patch rotated by any angle and scaled by the largest factor."""
    patch = np.array((1, *training.patch_size)[-3:], float)
    rotating = patch if len(training.patch_size) == 3 and not training.rotate_in_plane_only else patch[1:]
    edge = math.ceil(SCALE_RANGE[1] * float(np.linalg.norm(rotating))) + 2 * SPLINE_MARGIN + 2
    return tuple(int(p) for p in patch[: 3 - len(rotating)]) + (edge,) * len(rotating)


# --- sampling --------------------------------------------------------------------------------------------------------


def _rotate(images: np.ndarray, matrix: np.ndarray, origin: np.ndarray, edges: tuple[int, ...]) -> np.ndarray:
    """Cubic splines at matrix @ place + origin: scipy's affine_transform, in a third of its time.

    All images (N, *box) share the weights, and each of a place's 4^d neighbours is taken for many places at once.
    """
    coefficients = images
    for axis in range(1, images.ndim):
        coefficients = ndimage.spline_filter1d(coefficients, 3, axis, output=np.float32)
    rows = max(1, _SLAB // math.prod(edges[1:]))
    rotated = np.empty((len(images), *edges), np.float32)
    for begin in range(0, edges[0], rows):
        rest = (slice(edge) for edge in edges[1:])
        places = np.ogrid[(slice(begin, min(begin + rows, edges[0])), *rest)]
        coordinates = [
            o + sum(m * p for m, p in zip(row, places, strict=True)) for o, row in zip(origin, matrix, strict=True)
        ]
        _sum_splines(coefficients, coordinates, rotated[:, begin : begin + rows])
    return rotated


def _sum_splines(coefficients: np.ndarray, coordinates: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Evaluate the splines of some images at places, given by their coordinates, one array an axis."""
    box = coefficients.shape[1:]
    strides = [math.prod(box[axis + 1 :]) for axis in range(len(box))]
    floors = [np.floor(x) for x in coordinates]
    *other_weights, last_weights = [
        _cubic_weights((x - floor).astype(np.float32)) for x, floor in zip(coordinates, floors, strict=True)
    ]
    corner = sum((floor.astype(np.intp) - 1) * stride for floor, stride in zip(floors, strides, strict=True))
    flat = coefficients.reshape(len(coefficients), -1)
    out[:] = 0
    for steps in itertools.product(range(4), repeat=len(other_weights)):
        share = math.prod(weights[step] for weights, step in zip(other_weights, steps, strict=True))
        begin = corner + sum(step * stride for step, stride in zip(steps, strides, strict=False))
        for image, total in zip(flat, out, strict=True):
            line = last_weights[0] * image.take(begin)
            for step in (1, 2, 3):
                line += last_weights[step] * image[step:].take(begin)
            line *= share
            total += line


def _cubic_weights(beyond: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cubic B-spline weights of the four neighbours of a place that lies so far, in [0, 1), beyond the second."""
    left = 1 - beyond
    return (
        left * left * left / 6,
        2 / 3 - beyond * beyond * (2 - beyond) / 2,
        2 / 3 - left * left * (2 - left) / 2,
        beyond * beyond * beyond / 6,
    )


def _scale_axes(box: np.ndarray, factors: np.ndarray, origin: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """Cubic splines axis by axis, which is the same without rotation and takes a fifth of the time in 3D."""
    scaled = box
    for axis in (axis for axis in range(3) if factors[axis] != 1):
        size, edge = box.shape[1 + axis], patch[axis]
        coordinates = origin[axis] + factors[axis] * np.arange(edge)
        weights = BSpline.design_matrix(coordinates, np.arange(size + 4) - 2.0, 3).astype(np.float32)
        coefficients = ndimage.spline_filter1d(scaled, 3, 1 + axis, output=np.float32)
        axis_first = np.moveaxis(coefficients, 1 + axis, 0)
        sampled = (weights @ axis_first.reshape(size, -1)).reshape(edge, *axis_first.shape[1:])
        scaled = np.moveaxis(sampled, 0, 1 + axis)
    return scaled


def _sample_labels(box: np.ndarray, matrix: np.ndarray, origin: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """The label whose indicator, sampled linearly, is largest.

    That is the nearest voxel's label unless a neighbour has another one; only there labels are sampled one by one.
    """
    mixed = _has_other_neighbour(box)
    coded = 2 * box.astype(np.int32) + mixed
    nearest = ndimage.affine_transform(coded, matrix, origin, tuple(patch), np.int32, order=0, mode="nearest")
    labels: np.ndarray = (nearest >> 1).astype(box.dtype)
    ambiguous = np.nonzero(nearest & 1)
    coordinates = np.einsum("ij,jn->in", matrix, np.array(ambiguous)) + origin[:, None]
    best = np.zeros(coordinates.shape[1])
    for label in np.unique(box[mixed]):
        share = ndimage.map_coordinates(
            (box == label).astype(np.float32), coordinates, np.float64, order=1, mode="nearest"
        )
        is_larger = share > best
        best[is_larger] = share[is_larger]
        labels[tuple(axis[is_larger] for axis in ambiguous)] = label
    return labels


def _has_other_neighbour(label: np.ndarray) -> np.ndarray:
    """Voxels that have a neighbour, corners included, with another label."""
    low = high = label
    for axis in range(label.ndim):
        low, high = _extremum_of_three(np.minimum, low, axis), _extremum_of_three(np.maximum, high, axis)
    is_mixed: np.ndarray = low != high
    return is_mixed


def _extremum_of_three(extremum: np.ufunc, array: np.ndarray, axis: int) -> np.ndarray:
    """The smallest or largest of every voxel and its two neighbours along an axis."""
    source, extrema = np.moveaxis(array, axis, 0), array.copy()
    target = np.moveaxis(extrema, axis, 0)
    extremum(target[1:], source[:-1], out=target[1:])
    extremum(target[:-1], source[1:], out=target[:-1])
    return extrema
