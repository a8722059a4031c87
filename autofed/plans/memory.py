"""The memory of a training step on a CPU, computed from the network's layers without torch.

A training step is written down as a tape: for each operation what it stores for the backward pass, the gradient that it
computes there, and its workspace while it does. Reading the tape from its end finds the largest sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from autofed.plans.kinds import Precision, Shape
from autofed.plans.network import Network

CHANNELS_LAST_BELOW = 16
"""Features of the first stage, below which a CPU is faster with channels last (1.5 times at 8), above it is not."""

CONVOLUTION_OVERHEAD_BYTES = 200_000
"""Bytes that oneDNN makes ready for a convolution and keeps, kernels among them (measured: 0.1 to 0.4 MB)."""

_FLOAT = 4
_LABEL = 2
_CLASS_INDEX = 8


class Operation(NamedTuple):
    """One operation of the forward pass, in bytes.

    `stores` is freed once its backward pass is done, `gradient` handed to the operation before it (unless `hands` says
    otherwise), `works` needed meanwhile, `weights` the gradient that stays; `holds` is kept for an operation further
    back from then on, or, below 0, no more.
    """

    stores: float = 0
    gradient: float = 0
    works: float = 0
    weights: float = 0
    holds: float = 0
    hands: float | None = None


def peak(operations: list[Operation]) -> float:
    """The most that is in use at any time of the backward pass."""
    stored = sum(operation.stores for operation in operations)
    held = gradients = flowing = most = 0.0
    for operation in reversed(operations):
        gradients += operation.weights
        here = stored + held + gradients + flowing + operation.gradient + operation.works
        most = max(most, here)
        stored -= operation.stores
        held += operation.holds
        flowing = operation.gradient if operation.hands is None else operation.hands
    return most


def training_bytes(network: Network, patch: Shape, batch: int, precision: Precision = "float32") -> int:
    """What training on a CPU takes at its peak, in bytes beyond what the process had before.

    Patches of one step, weights, momentum, gradients, all that is stored for the backward pass, the largest workspace.
    Tensors only: glibc keeps freed blocks below 32 MB for the next step, which may add half as much.
    """
    tape = Tape(network, patch, batch, precision)
    weights = _FLOAT * network.parameters
    optimiser = 3 * weights + 2 * _FLOAT * max(c.parameters for c in network.convolutions())
    step = 2 * weights + tape.logits() + peak(tape.operations())
    prepared = CONVOLUTION_OVERHEAD_BYTES * len(list(network.convolutions()))
    return round(prepared + tape.patches() + max(optimiser, step))


class Tape:
    """A training step of a network with a patch, batch and precision, operation by operation."""

    def __init__(self, network: Network, patch: Shape, batch: int, precision: Precision):
        self.network = network
        self.voxels = [batch * v for v in network.stage_voxels(patch)]
        self.each = _FLOAT if precision == "float32" else 2
        self.cast = self.each != _FLOAT
        self.last = len(network.features) - 1
        self.channels_last = network.features[0] < CHANNELS_LAST_BELOW

    @property
    def supervised(self) -> list[int]:
        """The stages that have a head, from the finest."""
        return [0, *range(1, self.last - 1)] if self.network.deep_supervision else [0]

    def map(self, stage: int, channels: int | None = None) -> float:
        """Bytes of the feature maps of a stage."""
        return self.each * self.voxels[stage] * (self.network.features[stage] if channels is None else channels)

    def patches(self) -> float:
        """The patches and their labels, and the copy with channels last."""
        image = _FLOAT * self.network.in_channels * self.voxels[0]
        return image * (2 if self.channels_last and self.network.in_channels > 1 else 1) + _LABEL * self.voxels[0]

    def logits(self) -> float:
        """All outputs, which the step holds until it is done."""
        return sum(self.map(stage, self.network.classes) for stage in self.supervised)

    def operations(self) -> list[Operation]:
        """The whole forward pass and the loss."""
        operations = [o for stage in range(self.last + 1) for o in self._down(stage)]
        operations += [o for stage in reversed(range(self.last)) for o in self._up(stage)]
        operations += [self._head(stage) for stage in self.supervised]
        return operations + [self._loss(stage) for stage in self.supervised]

    def _convolution(self, before: float, after: float, weights: int, **other: float) -> Operation:
        """oneDNN brings image, gradient and weights into an order of its own; with channels last the gradient alone.

        That comes from the norm, which works with channels first.
        """
        reordered = after if self.channels_last else before + after
        return Operation(
            stores=other.pop("stores", 0) + (self.each * weights if self.cast else 0),
            gradient=other.pop("gradient", before),
            works=other.pop("works", reordered) + 2 * self.each * weights,
            weights=_FLOAT * weights,
            **other,
        )

    def _norm(self, bytes_: float, **other: float) -> Operation:
        return Operation(bytes_, bytes_, works=bytes_ if self.channels_last else 0, **other)

    def _layer(self, stage: int, before: float, channels: int, volume: int, **other: float) -> Iterator[Operation]:
        """Convolution, norm, activation in place: stored are the convolution's output and the activation's."""
        width = self.network.features[stage]
        here = self.map(stage)
        yield self._convolution(before, here, channels * width * volume, **other)
        yield self._norm(here)
        yield Operation(here, here)

    def _down(self, stage: int) -> Iterator[Operation]:
        network, here, volume = self.network, self.map(stage), math.prod(self.network.kernels[stage])
        width = network.features[stage]
        channels = network.in_channels if stage == 0 else network.features[stage - 1]
        before = self.map(stage - 1) if stage else self.map(0, channels)
        image: dict[str, float] = {} if stage else {"gradient": 0, "stores": before if self.cast else 0}
        if network.kind == "unet":
            yield from self._layer(stage, before, channels, volume, **image)
            yield from self._layer(stage, here, width, volume)
        else:
            if stage == 0:
                yield from self._layer(stage, before, channels, volume, **image)
                before, channels = here, width
            for block in range(network.blocks[stage]):
                strided = block == 0 and math.prod(network.strides[stage]) > 1
                yield from self._residual(stage, before, channels, volume, shortcut=strided or channels != width)
                before, channels = here, width
        if network.kind == "dcfed":
            yield from self._pyramid() if stage == self.last else self._attention(stage)
        if stage < self.last:  # the gradient of the skip and that from below are summed
            yield Operation(gradient=here, holds=-2 * here)
        else:
            yield from self._dropout(stage)

    def _dropout(self, stage: int) -> Iterator[Operation]:
        """What is left of the channels is another map than that of the activation."""
        if self.network.dropout:
            yield Operation(self.map(stage), self.map(stage))

    def _residual(self, stage: int, before: float, channels: int, volume: int, shortcut: bool) -> Iterator[Operation]:
        """The sum's gradient goes both ways; that of the shortcut waits for that of the block."""
        width, here = self.network.features[stage], self.map(stage)
        yield self._convolution(before, here, channels * width * volume, holds=-before)
        yield self._norm(here)
        yield Operation(here, here)
        yield self._convolution(here, here, width * width * volume)
        yield self._norm(here, holds=0 if shortcut else here)
        if shortcut:
            yield self._convolution(before, here, channels * width, holds=before - here, hands=here)
            yield self._norm(here, holds=here)
        yield Operation(here, here)

    def _attention(self, stage: int) -> Iterator[Operation]:
        """Two products, each with a gradient of its own, beside those of the mean and the maximum."""
        here, flat = self.map(stage), self.map(stage, 1)
        masks = here / self.each
        yield Operation(gradient=here, works=3 * here + masks)
        yield Operation(here + 4 * flat, here, works=3 * here + masks)
        yield Operation(here, here)

    def _pyramid(self) -> Iterator[Operation]:
        here, last = self.map(self.last), self.last
        width, dims = self.network.features[last], len(self.network.strides[0])
        for edge in (1, 3, 3, 3):
            yield self._convolution(here, here / 4, width * width // 4 * edge**dims)
        yield from self._layer(last, here, width, 1, stores=here)

    def _up(self, stage: int) -> Iterator[Operation]:
        network, here, below = self.network, self.map(stage), self.map(stage + 1)
        width, volume = network.features[stage], math.prod(network.kernels[stage])
        weights = network.features[stage + 1] * width * math.prod(network.strides[stage + 1])
        yield self._convolution(below, 2 * here, weights, works=below + 2 * here)
        yield Operation(holds=2 * here)  # both halves of the gradient live until the encoder has used its half
        yield from self._layer(stage, 2 * here, 2 * width, volume, stores=2 * here)
        if network.kind == "unet":
            yield from self._layer(stage, here, width, volume)
        yield from self._dropout(stage)
        if stage in self.supervised:
            yield Operation(holds=-here, hands=here)

    def _head(self, stage: int) -> Operation:
        here, logits = self.map(stage), self.map(stage, self.network.classes)
        waiting = _FLOAT * self.network.classes * self.voxels[stage]
        weights = self.network.features[stage] * self.network.classes
        return self._convolution(here, logits, weights, works=here + logits, holds=here - waiting, hands=0)

    def _loss(self, stage: int) -> Operation:
        """Softmax, one-hot labels, logarithms of the softmax, and the labels as long integers (MONAI's DiceCELoss)."""
        per_class = _FLOAT * self.network.classes * self.voxels[stage]
        stores = 3 * per_class + _CLASS_INDEX * self.voxels[stage]
        return Operation(stores, per_class, works=2 * per_class, holds=per_class, hands=0)
