"""Intensity augmentation: nnU-Net's transforms and probabilities, by batchgenerators."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform
from batchgenerators.transforms.color_transforms import (
    BrightnessMultiplicativeTransform,
    ContrastAugmentationTransform,
    GammaTransform,
)
from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform

from autofed.plans import Training

_GLOBAL = threading.RLock()
"""The generators of `random` and `numpy.random` belong to the whole process: one thread at a time draws from them."""


def change_intensities(image: np.ndarray, training: Training, seed: int) -> np.ndarray:
    """A patch (C, *patch), float32, with its intensities augmented by the seed; in place where that is possible."""
    data = {"data": image[None]}
    with _seeded(seed):
        for transform in transforms(training.rotate_in_plane_only):
            data = transform(**data)
    augmented: np.ndarray = data["data"][0]
    return augmented


@cache
def transforms(in_plane: bool) -> tuple[AbstractTransform, ...]:
    """The transforms in order; where patches rotate in their plane alone, resolution is lowered in the plane only."""
    return (
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
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """batchgenerators draws from Python's and numpy's global generators: they are seeded here and put back after."""
    with _GLOBAL:
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
