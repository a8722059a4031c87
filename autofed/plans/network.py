"""A network as numbers: its stages, and what they cost in parameters, work and memory. Without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from autofed.files import Record
from autofed.plans.kinds import Positive, Shape

SPATIAL_KERNEL = 7
"""Edge of the kernel that weighs places in the attention blocks of a "dcfed" network."""

Trained = Literal["all", "decoder"]
"""Which weights learn: every one, or those of the decoder and the heads."""

ENCODER = "down."
"""Prefix of the names of the encoder's weights, in a network that is built."""

Probability = Annotated[float, Field(ge=0, lt=1, exclude_if=lambda chance: not chance)]
"""How likely something is left out, in a record: where it never is, that is not written."""

_SQUEEZE = 16
_PYRAMID = (1, 3, 3, 3)


def squeezed(channels: int) -> int:
    """Hidden units of the attention blocks' perceptron: a sixteenth of the channels, four at least."""
    return max(4, channels // _SQUEEZE)


class Convolution(NamedTuple):
    """One convolution: the stage whose grid its output lies on, its channels, the voxels of its kernel, its role."""

    stage: int
    channels_in: int
    channels_out: int
    kernel: int
    role: Literal["normalised", "bare", "biased", "head", "pooled", "transposed"] = "normalised"

    @property
    def is_head(self) -> bool:
        """Whether its output are logits."""
        return self.role == "head"

    @property
    def taps(self) -> int:
        """Voxels of the kernel that each output voxel sees; a transposed kernel as large as its stride lends one."""
        return 1 if self.role == "transposed" else self.kernel

    @property
    def parameters(self) -> int:
        """Weights; a scale and a shift per channel where it is normalised; biases."""
        extra = {"normalised": 2, "biased": 1, "head": 1}.get(self.role, 0)
        return self.channels_out * (self.channels_in * self.kernel + extra)


class Network(Record):
    """A U-Net stage by stage: features, kernel sizes and strides, and what it costs in parameters and memory.

    "unet" has two convolutions per stage in encoder and decoder. "resenc" has residual `blocks` of two convolutions in
    the encoder, behind a stem of one, and one convolution per stage in the decoder. "dcfed" is a resenc whose stages
    end in an attention block (CBAM) each, the coarsest in atrous spatial pyramid pooling (ASPP), as in DCFed (JBHI
    2025). In training each channel is left out with probability `dropout` behind the coarsest stage and each stage of
    the decoder.
    """

    kind: Literal["unet", "resenc", "dcfed"] = "unet"
    in_channels: int = Field(ge=1)
    classes: int = Field(ge=1)
    features: Shape
    kernels: tuple[Shape, ...]
    strides: tuple[Shape, ...]
    blocks: tuple[Positive, ...] = ()
    deep_supervision: bool = True
    dropout: Probability = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stages = len(self.features)
        if stages < 2 or len(self.kernels) != stages or len(self.strides) != stages:
            raise ValueError(
                f"features, kernels and strides need one entry per stage and at least two stages, found "
                f"{stages}, {len(self.kernels)} and {len(self.strides)}"
            )
        if len(self.blocks) != (0 if self.kind == "unet" else stages):
            raise ValueError(f"blocks: a {self.kind} of {stages} stages found {list(self.blocks)}; a unet has none")
        if self.kind == "dcfed" and self.features[-1] % len(_PYRAMID):
            raise ValueError(f"the coarsest features of a dcfed must be a multiple of 4, found {self.features[-1]}")
        even = [kernel for kernel in self.kernels if any(edge % 2 == 0 for edge in kernel)]
        if even:
            raise ValueError(f"kernels must be odd, so that they have a middle, found {even}")
        if any(step != 1 for step in self.strides[0]):
            raise ValueError(
                f"the first stage lies on the patch's own grid: its strides are 1, found {self.strides[0]}"
            )
        return self

    @property
    def divisor(self) -> Shape:
        """What the patch size must be a multiple of, per axis."""
        return tuple(math.prod(s) for s in zip(*self.strides, strict=True))

    def convolutions(self) -> Iterator[Convolution]:
        """Every convolution, in the order in which a patch passes them."""
        for stage, kernel in enumerate(self.kernels):
            yield from self._encoder(stage, math.prod(kernel))
        yield from self._decoder()

    def _decoder(self) -> Iterator[Convolution]:
        last = len(self.features) - 1
        for stage in reversed(range(last)):
            width, volume = self.features[stage], math.prod(self.kernels[stage])
            yield Convolution(stage, self.features[stage + 1], width, math.prod(self.strides[stage + 1]), "transposed")
            yield Convolution(stage, 2 * width, width, volume)
            if self.kind == "unet":
                yield Convolution(stage, width, width, volume)
            if stage == 0 or (self.deep_supervision and stage < last - 1):
                yield Convolution(stage, width, self.classes, 1, "head")

    def _encoder(self, stage: int, volume: int) -> Iterator[Convolution]:
        width = self.features[stage]
        before = self.in_channels if stage == 0 else self.features[stage - 1]
        if self.kind == "unet":
            yield Convolution(stage, before, width, volume)
            yield Convolution(stage, width, width, volume)
            return
        if stage == 0:
            yield Convolution(0, before, width, volume)  # the stem
            before = width
        for block in range(self.blocks[stage]):
            yield Convolution(stage, before, width, volume)
            yield Convolution(stage, width, width, volume)
            if before != width or (block == 0 and math.prod(self.strides[stage]) > 1):
                yield Convolution(stage, before, width, 1)  # the shortcut
            before = width
        if self.kind == "dcfed":
            yield from self._pyramid(stage) if stage == len(self.features) - 1 else self._attention(stage)

    def _attention(self, stage: int) -> Iterator[Convolution]:
        width = self.features[stage]
        yield Convolution(stage, width, squeezed(width), 1, "pooled")
        yield Convolution(stage, squeezed(width), width, 1, "pooled")
        yield Convolution(stage, 2, 1, SPATIAL_KERNEL ** len(self.strides[0]), "bare")

    def _pyramid(self, stage: int) -> Iterator[Convolution]:
        width = self.features[stage]
        for edge in _PYRAMID:
            yield Convolution(stage, width, width // len(_PYRAMID), edge ** len(self.strides[0]), "biased")
        yield Convolution(stage, width, width, 1)

    @property
    def parameters(self) -> int:
        """The number of all parameters."""
        return self.trained_parameters("all")

    def trained_parameters(self, trained: Trained) -> int:
        """The number of parameters that learn."""
        learning = self._decoder() if trained == "decoder" else self.convolutions()
        return sum(convolution.parameters for convolution in learning)

    def stage_voxels(self, patch: Shape) -> list[int]:
        """Voxels of one patch at each stage."""
        sizes, voxels = list(patch), []
        for stride in self.strides:
            sizes = [math.ceil(s / k) for s, k in zip(sizes, stride, strict=True)]
            voxels.append(math.prod(sizes))
        return voxels

    def is_thin(self, patch: Shape) -> bool:
        """Whether a kernel of 3 meets a grid just two voxels deep, in 3D.

        There torch 2.13 (oneDNN 3.12) computes rubbish for the gradient of the weights in bfloat16 on a CPU.
        """
        depth = patch[0]
        for stride, kernel in zip(self.strides, self.kernels, strict=True):
            depth = math.ceil(depth / stride[0])
            if len(patch) == 3 and depth == 2 and kernel[0] == 3:
                return True
        return False

    def work(self, patch: Shape, batch: int) -> tuple[float, float]:
        """Of one training step: 10^9 output elements of all convolutions, and 10^12 operations.

        A multiply-add is two operations; the backward pass costs twice the forward pass.
        """
        voxels = self.stage_voxels(patch)
        elements = operations = 0
        for c in (c for c in self.convolutions() if c.role != "pooled"):
            elements += c.channels_out * voxels[c.stage]
            operations += 3 * 2 * c.channels_in * c.channels_out * c.taps * voxels[c.stage]
        return batch * elements / 1e9, batch * operations / 1e12
