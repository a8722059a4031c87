"""Patches: drawn from patients, with foreground forced by each patch's own coin, augmented by batchgenerators.

Everything random comes from a seed that names site, round and step, so that a step can be drawn again by itself: a
resumed run sees the very patches that an unbroken run would have seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform, Compose
from batchgenerators.transforms.color_transforms import (
    BrightnessMultiplicativeTransform,
    ContrastAugmentationTransform,
    GammaTransform,
)
from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform

from autofed.plans import Training
from autofed.prepared import ANNOTATED, Store

Draw = Sequence[Sequence[str]]
"""The patients of one step, in groups that share one backward pass; a patient is named once for each patch."""

AHEAD = 2
"""So many steps are drawn ahead of the one being trained on: the memory that feeding takes is bounded by it."""

_SCALE = (0.7, 1.4)
_QUARTER = math.pi / 6


@dataclass(frozen=True)
class Patches:
    """What one backward pass sees: `image` float32 (B, C, *patch), `label` int16 (B, 1, *patch)."""

    image: np.ndarray
    label: np.ndarray


def stream(store: Store, draws: Iterator[Draw], training: Training, seed: Sequence[int]) -> Iterator[list[Patches]]:
    """The patches of each draw, made ahead of time by one thread; its errors surface here.

    The thread lives as long as the iterator and no longer.
    """
    augmentation = augmentations(training)
    margin = reading_patch(training)

    def make(step: int, draw: Draw) -> list[Patches]:
        generator = np.random.default_rng([*seed, step])
        return [_group(store, group, training, margin, augmentation, generator) for group in draw]

    with ThreadPoolExecutor(1, thread_name_prefix="patches") as thread:
        ahead: list[Future[list[Patches]]] = []
        for step, draw in enumerate(draws):
            ahead.append(thread.submit(make, step, draw))
            if len(ahead) > AHEAD:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def reading_patch(training: Training) -> tuple[int, ...]:
    """The patch to read so that a rotated and shrunk view still has data in its corners (as nnU-Net enlarges it)."""
    edges = np.asarray(training.patch_size, float)
    turning = edges[-2:] if training.rotate_in_plane_only else edges
    reach = float(np.linalg.norm(turning) if _free_turn(training) else _tilted(turning))
    wide = [min(edge * 1.7, max(edge, reach)) / _SCALE[0] * 0.85 for edge in turning]
    wide = [max(edge, w) for edge, w in zip(turning, wide, strict=True)]
    fixed = [] if len(turning) == len(edges) else [edges[0]]
    return tuple(math.ceil(edge) for edge in (*fixed, *wide))


def _free_turn(training: Training) -> bool:
    return len(training.patch_size) == 2 or training.rotate_in_plane_only


def _tilted(edges: np.ndarray) -> float:
    return float(edges.max() * (math.cos(_QUARTER) + math.sin(_QUARTER)))


def _group(
    store: Store,
    patients: Sequence[str],
    training: Training,
    reading: tuple[int, ...],
    augmentation: Callable[..., dict],
    generator: np.random.Generator,
) -> Patches:
    pairs = [draw_patch(store, patient, training, reading, generator) for patient in patients]
    data = np.stack([image for image, _ in pairs])
    seg = np.stack([label for _, label in pairs])[:, None]
    return augment(augmentation, data, seg, int(generator.integers(2**32)))


def augment(augmentation: Callable[..., dict], image: np.ndarray, label: np.ndarray, seed: int) -> Patches:
    """Patches (B, C, *reading) and their labels (B, 1, *reading), augmented and cut to the patch."""
    # batchgenerators draws from the global generators of Python and numpy; only the feeding thread uses them
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    result = augmentation(data=image, seg=label.astype(np.float32))
    return Patches(
        np.ascontiguousarray(result["data"], dtype=np.float32),
        np.ascontiguousarray(np.round(result["seg"])).astype(np.int16),
    )


def draw_patch(
    store: Store, patient: str, training: Training, reading: Sequence[int], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One patch of a patient: image (C, *reading) and label (*reading), padded with zeros beyond the image's edge.

    With probability `foreground_share` the patch is centred on a voxel of a class drawn among those of the case; where
    there is an ignore label, others are centred on any voxel that was annotated (nnU-Net).
    """
    cases = store.patients[patient]
    case = cases[int(generator.integers(len(cases)))]
    image, label = store.image(case), store.label(case)
    forced = generator.random() < training.foreground_share
    centre = _middle_voxel(store, case, forced, generator)
    flat = len(training.patch_size) == 2  # a flat patch is one slice of the grid
    patch = (1, *training.patch_size) if flat else training.patch_size
    wide = (1, *reading) if flat else tuple(reading)
    middle = [None] * 3 if centre is None else [int(c) for c in centre]
    start = [_start(n, p, c, generator) for n, p, c in zip(label.shape, patch, middle, strict=True)]
    start = [s - (w - p) // 2 for s, w, p in zip(start, wide, patch, strict=True)]
    pixels, classes = _cut(image, start, wide), _cut(label, start, wide)
    return (pixels[:, 0], classes[0]) if flat else (pixels, classes)


def _middle_voxel(store: Store, case: str, forced: bool, generator: np.random.Generator) -> np.ndarray | None:
    """The voxel to centre a patch on, if there is one to choose: of a class if it is `forced` and the case has one."""
    locations = store.locations(case)
    classes = sorted(key for key in locations if key != ANNOTATED) if forced else []
    classes = classes or [key for key in locations if key == ANNOTATED]
    if not classes:
        return None
    voxels = locations[classes[int(generator.integers(len(classes)))]]
    return voxels[int(generator.integers(len(voxels)))]


def _start(size: int, patch: int, centre: int | None, generator: np.random.Generator) -> int:
    """First voxel of the patch on one axis: within the image where it fits, around it where not."""
    if patch > size:
        return -((patch - size) // 2)
    last = size - patch
    return int(generator.integers(last + 1)) if centre is None else int(np.clip(centre - patch // 2, 0, last))


def _cut(array, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """A box of the last three axes, zeros where it reaches beyond the array."""
    lead = array.shape[:-3]
    sizes = array.shape[-3:]
    inside = tuple(slice(max(0, s), min(n, s + w)) for s, w, n in zip(start, shape, sizes, strict=True))
    there = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))
    cut = np.zeros((*lead, *shape), dtype=array.dtype)
    every = (slice(None),) * len(lead)
    cut[(*every, *there)] = array[(*every, *inside)]
    return cut


def augmentations(training: Training) -> Callable[..., dict]:
    """nnU-Net's list with its probabilities, in batchgenerators' transforms."""
    in_plane = training.rotate_in_plane_only
    patch = training.patch_size[1:] if in_plane else training.patch_size
    spatial = _spatial(training, patch)
    steps: list[AbstractTransform] = [
        _SliceBySlice(spatial) if in_plane else spatial,
        GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_sample=0.1),
        GaussianBlurTransform((0.5, 1.0), different_sigma_per_channel=True, p_per_sample=0.2, p_per_channel=0.5),
        BrightnessMultiplicativeTransform((0.75, 1.25), p_per_sample=0.15),
        ContrastAugmentationTransform((0.75, 1.25), p_per_sample=0.15),
        SimulateLowResolutionTransform(
            (0.5, 1.0),
            per_channel=True,
            p_per_channel=0.5,
            order_downsample=0,
            order_upsample=1,
            p_per_sample=0.25,
            ignore_axes=(0,) if in_plane else None,
        ),
        GammaTransform((0.7, 1.5), True, True, retain_stats=True, p_per_sample=0.1),
        GammaTransform((0.7, 1.5), False, True, retain_stats=True, p_per_sample=0.3),
    ]
    if training.mirror_axes:
        steps.append(MirrorTransform(training.mirror_axes))
    return Compose(steps)


def _spatial(training: Training, patch: Sequence[int]) -> SpatialTransform:
    """Rotation and scaling. A flat patch turns freely unless much longer than wide; a volume tilts by 30 degrees."""
    free = len(patch) == 2 and max(patch) / min(patch) <= 1.5
    angle = math.pi if free or training.rotate_in_plane_only else math.pi / 12 if len(patch) == 2 else _QUARTER
    return SpatialTransform(
        patch,
        patch_center_dist_from_border=None,
        do_elastic_deform=False,
        do_rotation=True,
        angle_x=(-angle, angle),
        angle_y=(-angle, angle),
        angle_z=(-angle, angle),
        do_scale=True,
        scale=_SCALE,
        border_mode_data="constant",
        border_cval_data=0,
        order_data=3,
        border_mode_seg="constant",
        border_cval_seg=0,
        order_seg=1,
        random_crop=False,
        p_rot_per_sample=0.2,
        p_scale_per_sample=0.2,
        independent_scale_for_each_axis=False,
    )


class _SliceBySlice(AbstractTransform):
    """A flat transform for volumes: all slices of a volume turn alike, as if they were channels of one picture."""

    def __init__(self, transform: AbstractTransform):
        self.transform = transform

    def __call__(self, **data):
        shapes = {key: value.shape for key, value in data.items()}
        flat = {key: value.reshape(len(value), -1, *value.shape[-2:]) for key, value in data.items()}
        done = self.transform(**flat)
        return {key: done[key].reshape(*shapes[key][:-2], *done[key].shape[-2:]) for key in shapes}
