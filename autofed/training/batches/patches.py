"""Sampling patches: a patient, one of its cases, and a place, where each patch is forced to foreground by chance.

Everything random comes from a seed that names site, round, step and patient, so that a step can be sampled again by
itself, in any process: a resumed run sees the very patches that an unbroken run would have seen, and what is sampled
from a patient depends on no other patient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autofed.plans import Training
from autofed.preprocessing import ANNOTATED, Store
from autofed.training.batches.intensities import change_intensities
from autofed.training.batches.spatial_transforms import SpatialTransform, sample_transform

BatchSample = Sequence[Sequence[str]]
"""The patients of one step, batch by batch, each with one backward pass; a patient is named once for each patch."""


@dataclass(frozen=True)
class PatchBatch:
    """The patches of one backward pass: `image` float32 (B, C, *patch), `label` int16 (B, 1, *patch).

    `seed` determines what else is random; that of one patient's patches depends on no other patient.
    """

    image: np.ndarray
    label: np.ndarray
    seed: int = 0


def make_step_batches(store: Store, sample: BatchSample, training: Training, seed: Sequence[int]) -> list[PatchBatch]:
    """The patch batches of one step; the seed names the step."""
    patch_counts: Counter[str] = Counter()
    return [_patch_batch(store, patients, training, seed, patch_counts) for patients in sample]


def _patch_batch(
    store: Store, patients: Sequence[str], training: Training, seed: Sequence[int], patch_counts: Counter[str]
) -> PatchBatch:
    pairs, seeds = [], []
    for patient in patients:
        generator = np.random.default_rng([*seed, int.from_bytes(patient.encode(), "big"), patch_counts[patient]])
        pairs.append(make_patch(store, patient, training, generator))
        patch_counts[patient] += 1
        seeds.append(int(generator.integers(2**32)))
    label = np.stack([label for _, label in pairs])[:, None]
    batch_seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    return PatchBatch(np.stack([image for image, _ in pairs]), label.astype(np.int16, copy=False), batch_seed)


def make_patch(
    store: Store, patient: str, training: Training, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One augmented patch of a patient: image float32 (C, *patch) and label int16 (*patch)."""
    transform = sample_transform(training, generator)
    image, label = sample_patch(store, patient, training, transform, generator)
    image = change_intensities(np.ascontiguousarray(image, np.float32), training, int(generator.integers(2**32)))
    return image, label


def sample_patch(
    store: Store, patient: str, training: Training, transform: SpatialTransform, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A transformed patch of a patient: image (C, *patch) and label (*patch), zero beyond the image's edge.

    With probability `foreground_share` the patch is centred on a voxel of a class drawn among those of the case; where
    there is an ignore label, others are centred on any voxel that was annotated (nnU-Net).
    """
    cases = store.patients[patient]
    case = cases[int(generator.integers(len(cases)))]
    image, label = store.image(case), store.label(case)
    is_foreground = generator.random() < training.foreground_share
    centre = _centre_voxel(store, case, is_foreground, generator)
    flat = len(training.patch_size) == 2  # a flat patch is one slice of the grid
    patch = (1, *training.patch_size) if flat else training.patch_size
    centres = [None] * 3 if centre is None else [int(c) for c in centre]
    start = [_start(n, p, c, generator) for n, p, c in zip(label.shape, patch, centres, strict=True)]
    low, edges = transform.box(patch)
    image_box, label_box = (_crop(array, start + low, edges) for array in (image, label))
    patch_image, patch_label = transform.transform_image(image_box, patch), transform.transform_label(label_box, patch)
    return (patch_image[:, 0], patch_label[0]) if flat else (patch_image, patch_label)


def _centre_voxel(store: Store, case: str, is_foreground: bool, generator: np.random.Generator) -> np.ndarray | None:
    """The voxel to centre a patch on, if there is one to choose: of a class if `is_foreground` and the case has one."""
    locations = store.locations(case)
    classes = sorted(key for key in locations if key != ANNOTATED) if is_foreground else []
    classes = classes or [key for key in locations if key == ANNOTATED]
    if not classes:
        return None
    voxels = locations[classes[int(generator.integers(len(classes)))]]
    voxel: np.ndarray = voxels[int(generator.integers(len(voxels)))]
    return voxel


def _start(size: int, patch: int, centre: int | None, generator: np.random.Generator) -> int:
    """First voxel of the patch on one axis: within the image where it fits, around it where not."""
    if patch > size:
        return -((patch - size) // 2)
    last_start = size - patch
    return (
        int(generator.integers(last_start + 1)) if centre is None else int(np.clip(centre - patch // 2, 0, last_start))
    )


def _crop(array: Any, start: Sequence[int] | np.ndarray, shape: Sequence[int] | np.ndarray) -> np.ndarray:
    """A box of the last three axes of an array, in memory or on disk, with zeros beyond the array."""
    leading = array.shape[:-3]
    sizes = array.shape[-3:]
    source = tuple(slice(max(0, s), min(n, s + w)) for s, w, n in zip(start, shape, sizes, strict=True))
    target = tuple(slice(i.start - s, i.stop - s) for i, s in zip(source, start, strict=True))
    crop = np.zeros((*leading, *shape), dtype=array.dtype)
    all_channels = (slice(None),) * len(leading)
    crop[(*all_channels, *target)] = array[(*all_channels, *source)]
    return crop
