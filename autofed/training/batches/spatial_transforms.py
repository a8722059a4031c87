"""How a patch is looked at: rotated, scaled, mirrored, or straight. First it is decided, then the box is read.

Everything here has three axes: a flat patch is one slice, which turns in its plane. The ranges and chances are those of
nnU-Net; the image is sampled with cubic splines, the labels linearly, label by label.
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
"""Of being rotated, and, by another toss, of being scaled; mirroring tosses a fair coin for every axis."""

SCALE_RANGE = (0.7, 1.4)
SPLINE_MARGIN = 4
"""So many voxels are read around a view that is between voxels: a cubic spline asks for 1, and each more makes the
influence of what is left away 0.27 times as large (Unser, IEEE Signal Process Mag 16:22, 1999)."""

_SLAB = 1 << 14
"""So many voxels are sampled at a time: their coordinates and weights stay in the processor's cache."""


@dataclass(frozen=True)
class SpatialTransform:
    """What a patch shows: at x voxels from its middle, what lies `matrix` @ x from there; then mirrored along axes."""

    matrix: np.ndarray
    mirrored: tuple[int, ...] = ()

    @property
    def moved(self) -> np.ndarray:
        """The axes (3,) along which it is sampled between voxels."""
        return (self.matrix != np.eye(3)).any(axis=1)

    def box(self, patch: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What has to be read to see the patch: where it begins, counted from the patch's own first voxel, and edges.

        Along an axis that is not moved it is the patch itself.
        """
        middle = (np.asarray(patch) - 1) / 2
        half = np.abs(self.matrix) @ middle
        low = np.where(self.moved, np.floor(middle - half) - SPLINE_MARGIN, 0).astype(int)
        high = np.where(self.moved, np.ceil(middle + half) + SPLINE_MARGIN + 1, patch).astype(int)
        return low, high - low

    def transform_image(self, box: np.ndarray, patch: Sequence[int]) -> np.ndarray:
        """The view (C, *patch) of an image, float32, of which the box was read."""
        if not self.moved.any():
            return self._mirror(box)
        if np.array_equal(self.matrix, np.diag(np.diag(self.matrix))):
            return self._mirror(_scaled(box, np.diag(self.matrix), self._origin(patch), patch))
        first = 0 if self.moved[0] else 1  # slices that turn in their plane are as good as channels
        pictures = box.reshape(-1, *box.shape[1 + first :])
        turned = _turned(pictures, self.matrix[first:, first:], self._origin(patch)[first:], tuple(patch)[first:])
        return self._mirror(turned.reshape(len(box), *patch))

    def transform_label(self, box: np.ndarray, patch: Sequence[int]) -> np.ndarray:
        """The view (*patch) of a label map of which the box was read."""
        return self._mirror(_labels(box, self.matrix, self._origin(patch), patch) if self.moved.any() else box)

    def _origin(self, patch: Sequence[int]) -> np.ndarray:
        """Where in its box the first voxel of the patch looks."""
        middle = (np.asarray(patch) - 1) / 2
        return middle - self.matrix @ middle - self.box(patch)[0]

    def _mirror(self, array: np.ndarray) -> np.ndarray:
        return np.flip(array, tuple(axis - 3 for axis in self.mirrored))


IDENTITY = SpatialTransform(np.eye(3))


def sample_transform(training: Training, generator: np.random.Generator) -> SpatialTransform:
    """A view as nnU-Net draws them. Thin volumes and flat patches are rotated and scaled in their plane alone."""
    flat = len(training.patch_size) == 2
    in_plane = flat or training.rotate_in_plane_only
    inner = np.eye(2 if in_plane else 3)
    if generator.random() < TRANSFORM_PROBABILITY:
        inner = _rotation(_widest_angle(training), len(inner), generator)
    if generator.random() < TRANSFORM_PROBABILITY:
        inner = inner * _scale(generator)
    matrix = np.eye(3)
    matrix[-len(inner) :, -len(inner) :] = inner
    mirrored = tuple(axis + flat for axis in training.mirror_axes if generator.random() < 0.5)
    return SpatialTransform(matrix, mirrored)


def _widest_angle(training: Training) -> float:
    """A flat patch turns freely unless it is much longer than wide; a volume tilts by 30 degrees about each axis."""
    if training.rotate_in_plane_only:
        return math.pi
    if len(training.patch_size) == 3:
        return math.pi / 6
    return math.pi if max(training.patch_size) / min(training.patch_size) <= 1.5 else math.pi / 12


def _rotation(widest: float, axes: int, generator: np.random.Generator) -> np.ndarray:
    angles = generator.uniform(-widest, widest, size=1 if axes == 2 else 3)
    return (rotate_coords_2d if axes == 2 else rotate_coords_3d)(np.eye(axes), *angles)


def _scale(generator: np.random.Generator) -> float:
    """Half of them shrink what is seen (above 1: more is seen), half enlarge it."""
    low, high = SCALE_RANGE
    return generator.uniform(low, 1) if generator.random() < 0.5 else generator.uniform(1, high)


def widest_box(training: Training) -> tuple[int, ...]:
    """Edges that no box of a view goes beyond: the patch turned by any angle and scaled by the largest factor."""
    patch = np.array((1, *training.patch_size)[-3:], float)
    turning = patch if len(training.patch_size) == 3 and not training.rotate_in_plane_only else patch[1:]
    reach = math.ceil(SCALE_RANGE[1] * float(np.linalg.norm(turning))) + 2 * SPLINE_MARGIN + 2
    return tuple(int(p) for p in patch[: 3 - len(turning)]) + (reach,) * len(turning)


# --- sampling --------------------------------------------------------------------------------------------------------


def _turned(pictures: np.ndarray, matrix: np.ndarray, origin: np.ndarray, edges: tuple[int, ...]) -> np.ndarray:
    """Cubic splines at matrix @ place + origin: what scipy's affine_transform gives, in a third of its time.

    All pictures (N, *box) share the weights, and each of a place's 4^d neighbours is taken for many places at once.
    """
    coefficients = pictures
    for axis in range(1, pictures.ndim):
        coefficients = ndimage.spline_filter1d(coefficients, 3, axis, output=np.float32)
    rows = max(1, _SLAB // math.prod(edges[1:]))
    turned = np.empty((len(pictures), *edges), np.float32)
    for begin in range(0, edges[0], rows):
        rest = (slice(edge) for edge in edges[1:])
        places = np.ogrid[(slice(begin, min(begin + rows, edges[0])), *rest)]
        at = [o + sum(m * p for m, p in zip(row, places, strict=True)) for o, row in zip(origin, matrix, strict=True)]
        _add_up(coefficients, at, turned[:, begin : begin + rows])
    return turned


def _add_up(coefficients: np.ndarray, at: Sequence[np.ndarray], out: np.ndarray) -> None:
    """The splines of some pictures at places, given by their coordinates, one array an axis."""
    box = coefficients.shape[1:]
    strides = [math.prod(box[axis + 1 :]) for axis in range(len(box))]
    low = [np.floor(x) for x in at]
    *others, last = [_cubic((x - f).astype(np.float32)) for x, f in zip(at, low, strict=True)]
    corner = sum((f.astype(np.intp) - 1) * stride for f, stride in zip(low, strides, strict=True))
    flat = coefficients.reshape(len(coefficients), -1)
    out[:] = 0
    for steps in itertools.product(range(4), repeat=len(others)):
        share = math.prod(weights[step] for weights, step in zip(others, steps, strict=True))
        begin = corner + sum(step * stride for step, stride in zip(steps, strides, strict=False))
        for picture, total in zip(flat, out, strict=True):
            line = last[0] * picture.take(begin)
            for step in (1, 2, 3):
                line += last[step] * picture[step:].take(begin)
            line *= share
            total += line


def _cubic(beyond: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the four neighbours of a place weigh that lies so far, in [0, 1), beyond the second: the cubic B-spline."""
    left = 1 - beyond
    return (
        left * left * left / 6,
        2 / 3 - beyond * beyond * (2 - beyond) / 2,
        2 / 3 - left * left * (2 - left) / 2,
        beyond * beyond * beyond / 6,
    )


def _scaled(box: np.ndarray, factors: np.ndarray, origin: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """Cubic splines axis by axis, which is the same where nothing turns and takes a fifth of the time in 3D."""
    found = box
    for axis in (axis for axis in range(3) if factors[axis] != 1):
        size, edge = box.shape[1 + axis], patch[axis]
        at = origin[axis] + factors[axis] * np.arange(edge)
        weights = BSpline.design_matrix(at, np.arange(size + 4) - 2.0, 3).astype(np.float32)
        coefficients = ndimage.spline_filter1d(found, 3, 1 + axis, output=np.float32)
        first = np.moveaxis(coefficients, 1 + axis, 0)
        sampled = (weights @ first.reshape(size, -1)).reshape(edge, *first.shape[1:])
        found = np.moveaxis(sampled, 0, 1 + axis)
    return found


def _labels(box: np.ndarray, matrix: np.ndarray, origin: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """The label whose indicator, sampled linearly, is largest.

    That is the nearest voxel's label unless another one is beside it, so only those places are sampled label by label.
    """
    mixed = _mixed(box)
    coded = 2 * box.astype(np.int32) + mixed
    nearest = ndimage.affine_transform(coded, matrix, origin, tuple(patch), np.int32, order=0, mode="nearest")
    found = (nearest >> 1).astype(box.dtype)
    between = np.nonzero(nearest & 1)
    at = np.einsum("ij,jn->in", matrix, np.array(between)) + origin[:, None]
    best = np.zeros(at.shape[1])
    for label in np.unique(box[mixed]):
        share = ndimage.map_coordinates((box == label).astype(np.float32), at, np.float64, order=1, mode="nearest")
        ahead = share > best
        best[ahead] = share[ahead]
        found[tuple(axis[ahead] for axis in between)] = label
    return found


def _mixed(label: np.ndarray) -> np.ndarray:
    """Which voxels have a neighbour, corners included, of another label."""
    low = high = label
    for axis in range(label.ndim):
        low, high = _of_three(np.minimum, low, axis), _of_three(np.maximum, high, axis)
    return low != high


def _of_three(choose: np.ufunc, array: np.ndarray, axis: int) -> np.ndarray:
    """The smallest or largest of every voxel and its two neighbours along an axis."""
    source, chosen = np.moveaxis(array, axis, 0), array.copy()
    target = np.moveaxis(chosen, axis, 0)
    choose(target[1:], source[:-1], out=target[1:])
    choose(target[:-1], source[1:], out=target[:-1])
    return chosen
