"""Where a patch comes from: a patient, one of its cases, and a place, with foreground forced by each patch's own coin.

Everything random comes from a seed that names site, round, step and patient, so that a step can be drawn again by
itself, wherever it is made: a resumed run sees the very patches that an unbroken run would have seen, and what is drawn
of a patient depends on no other patient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autofed.plans import Training
from autofed.preprocessing import ANNOTATED, Store
from autofed.training.batches.intensities import change_intensities
from autofed.training.batches.spatial_transforms import SpatialTransform, sample_transform

BatchSample = Sequence[Sequence[str]]
"""The patients of one step, in groups that share one backward pass; a patient is named once for each patch."""


@dataclass(frozen=True)
class PatchBatch:
    """What one backward pass sees: `image` float32 (B, C, *patch), `label` int16 (B, 1, *patch).

    From `seed` follows what else is left to chance; of one patient's patches it depends on no other patient.
    """

    image: np.ndarray
    label: np.ndarray
    seed: int = 0


def make_step_batches(store: Store, draw: BatchSample, training: Training, seed: Sequence[int]) -> list[PatchBatch]:
    """The patches of one step, group by group; the seed names the step."""
    drawn: Counter[str] = Counter()
    return [_group(store, group, training, seed, drawn) for group in draw]


def _group(
    store: Store, patients: Sequence[str], training: Training, seed: Sequence[int], drawn: Counter[str]
) -> PatchBatch:
    pairs, seeds = [], []
    for patient in patients:
        own = np.random.default_rng([*seed, int.from_bytes(patient.encode(), "big"), drawn[patient]])
        pairs.append(make_patch(store, patient, training, own))
        drawn[patient] += 1
        seeds.append(int(own.integers(2**32)))
    label = np.stack([label for _, label in pairs])[:, None]
    common = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    return PatchBatch(np.stack([image for image, _ in pairs]), label.astype(np.int16, copy=False), common)


def make_patch(
    store: Store, patient: str, training: Training, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One augmented patch of a patient: image float32 (C, *patch) and label int16 (*patch)."""
    view = sample_transform(training, generator)
    image, label = sample_patch(store, patient, training, view, generator)
    image = change_intensities(np.ascontiguousarray(image, np.float32), training, int(generator.integers(2**32)))
    return image, label


def sample_patch(
    store: Store, patient: str, training: Training, view: SpatialTransform, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A view of a place of a patient: image (C, *patch) and label (*patch), zero beyond the image's edge.

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
    middle = [None] * 3 if centre is None else [int(c) for c in centre]
    start = [_start(n, p, c, generator) for n, p, c in zip(label.shape, patch, middle, strict=True)]
    low, edges = view.box(patch)
    pixels, classes = (_cut(array, start + low, edges) for array in (image, label))
    seen, labels = view.transform_image(pixels, patch), view.transform_label(classes, patch)
    return (seen[:, 0], labels[0]) if flat else (seen, labels)


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


def _cut(array, start: Sequence[int] | np.ndarray, shape: Sequence[int] | np.ndarray) -> np.ndarray:
    """A box of the last three axes, zeros where it reaches beyond the array."""
    lead = array.shape[:-3]
    sizes = array.shape[-3:]
    inside = tuple(slice(max(0, s), min(n, s + w)) for s, w, n in zip(start, shape, sizes, strict=True))
    there = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))
    cut = np.zeros((*lead, *shape), dtype=array.dtype)
    every = (slice(None),) * len(lead)
    cut[(*every, *there)] = array[(*every, *inside)]
    return cut
