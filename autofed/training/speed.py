"""How long a training step takes on a device: four costs, measured with the very step that `fit` takes.

Torch is read only when something is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from autofed.plans import Device, Network, Precision, Speed, Training

if TYPE_CHECKING:
    from autofed.preprocessing import Store

_BATCH = 2
_EDGES = {"cpu": {2: (64, 192), 3: (16, 32)}, "accelerator": {2: (256, 512), 3: (32, 96)}}
_WIDTHS = (8, 32)
_PATCHES = 24
"""Patches made to measure what one costs: rotation, the most expensive part, meets one patch in five."""

_SEED = 123
"""Of these patches 5 are rotated and 4 only scaled, as many as on average."""

_LARGEST_TIME_SHARE = 0.9
"""A coarser precision must take at most this share of the time, or float32 it stays."""


def measure_speed(device: Device, dimension: int, channels: int = 1) -> Speed:
    """What a step costs on a device, in the precision that is faster there; takes a few seconds.

    Three small U-Nets (narrow on a small and a large patch, wide on a large one) separate the cost of a step from
    that of an output element and of an operation: the least squares of the relative errors with no cost below zero.
    """
    probes = [_probe(device, dimension, channels, width, edge) for width, edge in _probes(device, dimension)]
    times = [_time(p, device, "float32") for p in probes]
    precision: Precision = "float32"
    bfloat16_times = _bfloat16_times(probes, device)
    if bfloat16_times and bfloat16_times[-1] < _LARGEST_TIME_SHARE * times[-1]:
        times, precision = bfloat16_times, "bfloat16"
    costs = fit_costs(probes, times)
    return Speed(
        device=device,
        precision=precision,
        seconds_per_step=costs[0],
        seconds_per_gigaelement=costs[1],
        seconds_per_teraflop=costs[2],
        seconds_per_megavoxel=_loading_seconds(probes[-1][1], channels),
    )


def _bfloat16_times(probes: list[tuple[Network, Training]], device: str) -> list[float]:
    """The times with bfloat16; none where the device does not support it."""
    try:
        return [_time(p, device, "bfloat16") for p in probes]
    except RuntimeError:
        return []


def fit_costs(probes: list[tuple[Network, Training]], times: list[float]) -> tuple[float, float, float]:
    """Costs of a step, of 10^9 output elements and of 10^12 operations that explain the times best, none negative."""
    from scipy.optimize import nnls

    work = np.array([[1.0, *network.work(t.patch_size, t.batch_size)] for network, t in probes])
    costs, _ = nnls(work / np.array(times)[:, None], np.ones(len(times)))
    return (float(costs[0]), float(costs[1]), float(costs[2]))


def _probes(device: str, dimension: int) -> list[tuple[int, int]]:
    small, large = _EDGES["cpu" if device == "cpu" else "accelerator"][dimension]
    narrow, wide = _WIDTHS
    return [(narrow, small), (narrow, large), (wide, large)]


def _probe(device: str, dimension: int, channels: int, width: int, edge: int) -> tuple[Network, Training]:
    network = Network(
        in_channels=channels, classes=2, features=tuple(width * 2**stage for stage in range(4)),
        kernels=((3,) * dimension,) * 4, strides=((1,) * dimension, *((2,) * dimension,) * 3),
    )  # fmt: skip
    return network, Training(patch_size=(edge,) * dimension, batch_size=_BATCH, steps_per_round=1)


def _time(probe: tuple[Network, Training], device: str, precision: Precision) -> float:
    from autofed.training.batches import PatchBatch
    from autofed.training.devices import shortest_seconds
    from autofed.training.fit import Learner

    network, training = probe
    training = training.model_copy(update={"precision": precision})
    image, label = _random_images(training.patch_size, network.in_channels, training.batch_size)
    learner = Learner(network, training, device)
    return shortest_seconds(partial(learner.gradient, PatchBatch(image, label), []), device)


def _random_images(shape: tuple[int, ...], channels: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).normal(size=(count, channels, *shape)).astype(np.float32)
    return image, (image[:, :1] > 0).astype(np.int16)


@dataclass(frozen=True)
class _InMemoryStore:
    """A store of one case in memory, as large as a patch and half as much again."""

    picture: np.ndarray
    label_map: np.ndarray
    patients: ClassVar = {"patient": ("case",)}

    def image(self, case: str) -> np.ndarray:
        return self.picture

    def label(self, case: str) -> np.ndarray:
        return self.label_map

    def locations(self, case: str) -> dict[int, np.ndarray]:
        return {}


def _loading_seconds(training: Training, channels: int) -> float:
    """Seconds to make patches of 10^6 voxels, all channels counted, in one thread; what a disk takes is not in it."""
    from autofed.training.batches import make_step_batches
    from autofed.training.devices import shortest_seconds

    grid = (1, *(3 * edge // 2 for edge in training.patch_size))[-3:]
    image, label = _random_images(grid, channels, 1)
    store = cast("Store", _InMemoryStore(image[0], label[0, 0]))
    work = partial(make_step_batches, store, [["patient"] * _PATCHES], training, [_SEED])
    return shortest_seconds(work, "cpu", repeats=1) / (_PATCHES * channels * math.prod(training.patch_size) / 1e6)
