"""Patch, pooling and batch: the largest patch that fits the memory, after nnU-Net's rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autofed.errors import ValidationErrors
from autofed.planner.grids import Grid
from autofed.planner.presets import BASE_FEATURES, MOST_FEATURES, PresetRules
from autofed.planner.reasons import format_axes
from autofed.plans import Network

SMALLEST_EDGE = 4
"""No stage of the network gets a feature map with a shorter edge (nnU-Net)."""

START_VOXELS = {2: 2048**2, 3: 256**3}
BLOCKS = {"unet": (), "resenc": (1, 3, 4, 6), "dcfed": (1,)}
"""Residual blocks per stage of the encoder, the last figure for all further stages (nnU-Net's ResEnc planners)."""


@dataclass(frozen=True)
class Topology:
    """Where the network pools: patch size (a multiple of all strides), kernels and strides per stage."""

    patch: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """Product of the strides per axis."""
        return tuple(math.prod(s) for s in zip(*self.strides, strict=True))


@dataclass(frozen=True)
class NetworkTask:
    """Inputs, outputs and preset of a network: all that its size depends on besides the topology.

    nnU-Net's memory proxy also counts entries of `labels` for which the network has no output: `labels_without_output`.
    """

    channels: int
    classes: int
    preset: PresetRules
    labels_without_output: int = 0

    def memory_proxy(self, topology: Topology) -> int:
        """The `memory_proxy` of one patch, at full width."""
        unused_outputs = self.labels_without_output * math.prod(topology.patch)
        return memory_proxy(self.network(topology), topology.patch) + unused_outputs

    def network(self, topology: Topology, base_features: int = BASE_FEATURES) -> Network:
        """The network of a topology, with `base_features` features in its first stage."""
        stages = len(topology.strides)
        per_stage = BLOCKS[self.preset.kind]
        blocks = tuple(per_stage[min(stage, len(per_stage) - 1)] for stage in range(stages)) if per_stage else ()
        return Network(
            kind=self.preset.kind,
            in_channels=self.channels,
            classes=self.classes,
            features=features(stages, len(topology.patch), base_features),
            kernels=topology.kernels,
            strides=topology.strides,
            blocks=blocks,
        )


def topology_for_patch(spacing_mm: Sequence[float], patch: Sequence[float]) -> Topology:
    """Pool the finest axes while they are long enough; a kernel becomes 3 once its axis is among the finest."""
    spacing, size = list(spacing_mm), list(patch)
    kernel = [1] * len(size)
    kernels: list[tuple[int, ...]] = []
    strides = [(1,) * len(size)]
    while pooled := _axes_to_pool(spacing, size):
        kernel = [3 if k == 3 or s / min(spacing) < 2 else 1 for k, s in zip(kernel, spacing, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in pooled else 1 for axis in range(len(size))))
        spacing = [s * 2 if axis in pooled else s for axis, s in enumerate(spacing)]
        size = [math.ceil(s / 2) if axis in pooled else s for axis, s in enumerate(size)]
    kernels.append((3,) * len(size))
    divisor = [math.prod(s) for s in zip(*strides, strict=True)]
    padded_patch = tuple(math.ceil(p / d) * d for p, d in zip(patch, divisor, strict=True))
    return Topology(padded_patch, tuple(kernels), tuple(strides))


def _axes_to_pool(spacing: Sequence[float], size: Sequence[float]) -> list[int]:
    long_enough = [axis for axis in range(len(size)) if size[axis] >= 2 * SMALLEST_EDGE]
    if not long_enough:
        return []
    finest = min(spacing[axis] for axis in long_enough)
    pooled = [axis for axis in long_enough if spacing[axis] / finest < 2]
    return [] if len(pooled) == 1 and size[pooled[0]] < 3 * SMALLEST_EDGE else pooled


def features(stages: int, dimension: int, base: int = BASE_FEATURES) -> tuple[int, ...]:
    """Channels per stage: doubling from `base`, up to ten (3D) or sixteen (2D) times it."""
    most = MOST_FEATURES[dimension] * base // BASE_FEATURES
    return tuple(min(base * 2**stage, most) for stage in range(stages))


def memory_proxy(network: Network, patch: Sequence[int]) -> int:
    """Output elements of all convolutions for one patch, lower heads not counted: nnU-Net's proxy of memory."""
    voxels = network.stage_voxels(tuple(patch))
    convolutions = [c for c in network.convolutions() if c.role != "pooled" and (not c.is_head or c.stage == 0)]
    return sum(c.channels_out * voxels[c.stage] for c in convolutions)


def first_patch(spacing_mm: Sequence[float], shape: Sequence[float]) -> list[float]:
    """A patch of the same extent in mm along every axis, as large as nnU-Net starts with, within the median image."""
    inverse = 1 / np.asarray(spacing_mm, float)
    scale = (START_VOXELS[len(inverse)] / np.prod(inverse)) ** (1 / len(inverse))
    return [min(round(edge), size) for edge, size in zip(inverse * scale, shape, strict=True)]


def patch_for_memory(grid: Grid, task: NetworkTask, memory_gb: float) -> Topology:
    """The largest patch that fits the memory with the smallest batch (nnU-Net's shrink loop).

    `ValidationErrors` if the cases are too small for any network, or the memory for the smallest one.
    """
    preset, spacing, shape = task.preset, grid.patch_spacing_mm, grid.patch_median
    topology = topology_for_patch(spacing, first_patch(spacing, shape))
    if len(topology.strides) < 2:
        raise ValidationErrors("the plan", [_too_small_problem(shape)])
    while not _fits(topology, task, memory_gb):
        smaller = _shrink(topology, spacing, shape)
        if smaller is None:
            raise ValidationErrors(
                "the plan", [_memory_problem(topology, task, preset.least_batch[grid.axes], memory_gb)]
            )
        topology = smaller
    return topology


def _fits(topology: Topology, task: NetworkTask, memory_gb: float) -> bool:
    dimension = len(topology.patch)
    per_patch = task.memory_proxy(topology) / task.preset.batch[dimension]
    return per_patch * task.preset.least_batch[dimension] <= task.preset.allowed(dimension, memory_gb)


def batch_for_memory(topology: Topology, grid: Grid, cases: int, task: NetworkTask, memory_gb: float) -> int:
    """As many patches as fill the memory, but no more than a share of the voxels of all labelled cases; two at least.

    Counted on the grid's median shape, which for 3d_lowres is rounded (nnU-Net takes the product before rounding).
    """
    dimension = len(topology.patch)
    allowed = task.preset.allowed(dimension, memory_gb)
    fills = round(allowed / task.memory_proxy(topology) * task.preset.batch[dimension])
    voxels = math.prod(grid.median_shape) * cases
    return max(2, min(fills, round(voxels * task.preset.dataset_share / math.prod(topology.patch))))


def memory_needed(network: Network, patch: Sequence[int], batch: int, preset: PresetRules) -> float:
    """GB that a training takes by nnU-Net's measure, in which `preset.memory_gb` hold the reference."""
    dimension = len(patch)
    share = memory_proxy(network, patch) * batch / (preset.elements[dimension] * preset.batch[dimension])
    return share * preset.memory_gb


def _shrink(topology: Topology, spacing_mm: Sequence[float], shape: Sequence[float]) -> Topology | None:
    """Shorten the axis that is longest relative to the median image, by the divisor that it has after shortening.

    Of equally long ones the last (nnU-Net). An axis that cannot be shortened any more leaves it to the next.
    """
    ratios = np.asarray(topology.patch) / np.asarray(shape)
    for axis in sorted(range(len(ratios)), key=lambda a: (-ratios[a], -a)):
        smaller = _shorten(topology, axis, spacing_mm)
        if smaller is not None and math.prod(smaller.patch) < math.prod(topology.patch):
            return smaller
    return None


def _shorten(topology: Topology, axis: int, spacing_mm: Sequence[float]) -> Topology | None:
    patch = list(topology.patch)
    shortened = [*patch[:axis], patch[axis] - topology.divisor[axis], *patch[axis + 1 :]]
    if shortened[axis] < 1:
        return None
    patch[axis] -= topology_for_patch(spacing_mm, shortened).divisor[axis]
    smaller = topology_for_patch(spacing_mm, patch)
    return smaller if len(smaller.strides) > 1 else None


def _too_small_problem(shape: Sequence[float]) -> str:
    return (
        f"the median image ({format_axes(shape)}) is too small for a network that halves it even once; "
        f"expected an axis of at least {3 * SMALLEST_EDGE} voxels among the finest"
    )


def _memory_problem(topology: Topology, task: NetworkTask, batch: int, memory_gb: float) -> str:
    needed = memory_needed(task.network(topology), topology.patch, batch, task.preset)
    return (
        f"{memory_gb:g} GB are too little even for {batch} of the smallest patches ({format_axes(topology.patch)}); "
        f"expected --memory {needed:.2g} or more"
    )
