"""From the plan's network section to a torch module, on MONAI's blocks; weights in and out as plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from monai.networks.blocks.aspp import SimpleASPP
from monai.networks.blocks.dynunet_block import (
    UnetBasicBlock,
    UnetOutBlock,
    UnetResBlock,
    UnetUpBlock,
    get_conv_layer,
)
from monai.networks.layers.factories import Norm
from torch import nn

from autofed.errors import raise_if_any
from autofed.plans import Network
from autofed.training.attention import CBAM

_NORM = ("OWNING_INSTANCE", {"affine": True, "eps": 1e-5})
_ACT = ("leakyrelu", {"inplace": True, "negative_slope": 0.01})


class _OwningNorm(nn.Module):
    """Makes an instance norm return a tensor that is no view, in the image's memory layout; torch returns a view.

    To change a view in place, as the activation after it does, autograd copies its whole gradient three times; and
    with channels last only before the norm, each convolution reorders its image twice.

    For a single image torch (2.13, CPU) silently computes a wrong gradient if that of the output has channels last: the
    norm mistakes its memory layout. So the gradient is made contiguous first.
    """

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The same values, bit for bit."""
        normalised: torch.Tensor = super().forward(image)
        if len(image) == 1 and normalised.requires_grad:
            cast("Any", normalised).register_hook(torch.Tensor.contiguous)  # torch has no types for it
        last = torch.channels_last if image.ndim == 4 else torch.channels_last_3d
        if image.is_contiguous(memory_format=last) and not image.is_contiguous():
            return normalised.contiguous(memory_format=last)
        owned: torch.Tensor = torch.ops.aten._unsafe_view.default(normalised, normalised.shape)
        return owned


class _OwningNorm2d(_OwningNorm, nn.InstanceNorm2d):
    pass


class _OwningNorm3d(_OwningNorm, nn.InstanceNorm3d):
    pass


@Norm.factory_function("owning_instance")
def _owning_instance(dims: int) -> type[nn.Module]:
    return {2: _OwningNorm2d, 3: _OwningNorm3d}[dims]


class UNet(nn.Module):
    """nnU-Net's U-Nets, plain or with residual blocks in the encoder, and DCFed's; strided and transposed convolutions.

    Takes (B, C, *patch). Gives logits (B, K, *patch); in training mode a list of them, from the finest to the coarsest
    supervised stage, and channels drop out with the plan's probability. No submodule is held twice, so that
    `named_parameters` and `state_dict` name the same things.
    """

    def __init__(self, plan: Network):
        super().__init__()
        dims, last = len(plan.strides[0]), len(plan.features) - 1
        down, up = (_plain_stage, UnetUpBlock) if plan.kind == "unet" else (_residual_stage, _SingleUpBlock)
        self.down = nn.ModuleList(down(plan, stage) for stage in range(last + 1))
        self.up = nn.ModuleList(
            up(dims, plan.features[s + 1], plan.features[s], plan.kernels[s], 1, plan.strides[s + 1], _NORM, _ACT)
            for s in reversed(range(last))
        )
        self.dropout = {2: nn.Dropout2d, 3: nn.Dropout3d}[dims](plan.dropout) if plan.dropout else nn.Identity()
        self.supervised = [0, *range(1, last - 1)] if plan.deep_supervision else [0]
        self.heads = nn.ModuleList(UnetOutBlock(dims, plan.features[s], plan.classes) for s in self.supervised)

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits; see the class."""
        skips = []
        for block in self.down:
            image = block(image)
            skips.append(image)
        image, decoded = self.dropout(image), {}
        for stage, block in zip(reversed(range(len(skips) - 1)), self.up, strict=True):
            image = self.dropout(block(image, skips[stage]))
            decoded[stage] = image
        if not self.training:
            logits: torch.Tensor = self.heads[0](decoded[0])
            return logits
        return [head(decoded[stage]) for stage, head in zip(self.supervised, self.heads, strict=True)]


def _channels_into(plan: Network, stage: int) -> int:
    return plan.in_channels if stage == 0 else plan.features[stage - 1]


def _plain_stage(plan: Network, stage: int) -> nn.Module:
    kernel, stride = plan.kernels[stage], plan.strides[stage]
    width, before = plan.features[stage], _channels_into(plan, stage)
    return UnetBasicBlock(len(stride), before, width, kernel, stride, _NORM, _ACT)


def _residual_stage(plan: Network, stage: int) -> nn.Module:
    """Residual blocks, the first of which strides; before those of the finest stage a stem of one convolution."""
    kernel, stride = plan.kernels[stage], plan.strides[stage]
    width, before = plan.features[stage], _channels_into(plan, stage)
    layers: list[nn.Module] = []
    if stage == 0:
        layers.append(_convolution(len(stride), before, width, kernel))
        before = width
    for block in range(plan.blocks[stage]):
        step = stride if block == 0 else 1
        layers.append(UnetResBlock(len(stride), before, width, kernel, step, _NORM, _ACT))
        before = width
    if plan.kind == "dcfed":
        coarsest = stage == len(plan.features) - 1
        layers.append(_pyramid(len(stride), width) if coarsest else CBAM(len(stride), width))
    return nn.Sequential(*layers)


def _pyramid(dims: int, width: int) -> nn.Module:
    """Atrous spatial pyramid pooling: four convolutions of growing dilation side by side, then one across them."""
    return SimpleASPP(dims, width, width // 4, norm_type=_NORM, acti_type=_ACT)


def _convolution(dims: int, before: int, width: int, kernel: Sequence[int]) -> nn.Module:
    layer: nn.Module = get_conv_layer(dims, before, width, kernel, 1, _ACT, _NORM, conv_only=False)
    return layer


class _SingleUpBlock(nn.Module):
    """MONAI's UnetUpBlock with one convolution instead of two."""

    def __init__(
        self,
        dims: int,
        before: int,
        width: int,
        kernel: Sequence[int],
        _stride: int,
        upsampling: Sequence[int],
        _norm: object,
        _act: object,
    ):
        super().__init__()
        self.transp_conv = get_conv_layer(
            dims, before, width, upsampling, upsampling, None, None, conv_only=False, is_transposed=True
        )
        self.conv = _convolution(dims, 2 * width, width, kernel)

    def forward(self, image: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        upsampled = self.transp_conv(image)
        decoded: torch.Tensor = self.conv(torch.cat((upsampled, skip), dim=1))
        return decoded


def build(plan: Network, seed: int | None = None) -> UNet:
    """The module of a plan's network. With a seed, its weights are He-initialised by it and by nothing else."""
    module = UNet(plan)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, a=0.01, generator=generator)
            else:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)  # of a norm, its scale
    return module


def normalisation(plan: Network) -> frozenset[str]:
    """The names of the weights that belong to normalisation layers."""
    layers = (nn.modules.instancenorm._InstanceNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    layer_names = [name for name, layer in build(plan).named_modules() if isinstance(layer, layers)]
    return frozenset(w for w in weights_of(build(plan)) if w.rsplit(".", 1)[0] in layer_names)


def coupling_layers(module: nn.Module) -> list[str]:
    """Layers through which one patient changes what another's gradient is: those that keep or share statistics.

    Batch normalisation shares them in a batch and keeps a running mean of all patients, to which no noise is added;
    other norms do so if they track running statistics.
    """
    return [
        f"{name} ({type(layer).__name__})"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) or getattr(layer, "track_running_stats", False)
    ]


def set_dropout(network: UNet, active: bool) -> None:
    """Turn dropout on or off, in whichever mode the rest is; `train` and `eval` set it again."""
    network.dropout.train(active)


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    """All trainable arrays by name, as float32 copies."""
    return {name: p.detach().to("cpu", torch.float32).numpy().copy() for name, p in module.named_parameters()}


def load_weights(module: nn.Module, weights: Mapping[str, np.ndarray], about: str = "the weights") -> None:
    """Set all trainable arrays; `ValidationErrors` names every one that is missing, unknown or of another shape."""
    parameters = dict(module.named_parameters())
    problems = [f"{name} is missing" for name in parameters if name not in weights]
    problems += [f"{name} is not in the plan's network" for name in weights if name not in parameters]
    for name in parameters.keys() & weights.keys():
        if tuple(weights[name].shape) != tuple(parameters[name].shape):
            problems.append(
                f"{name} has the shape {tuple(weights[name].shape)}, the plan's network {tuple(parameters[name].shape)}"
            )
    raise_if_any(about, (f"{p}; are these weights and this plan of one run?" for p in problems))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights[name])))
