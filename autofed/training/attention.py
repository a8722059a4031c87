"""Attention blocks that MONAI lacks."""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv
from torch import nn

from autofed.plans import SPATIAL_KERNEL, squeezed


class CBAM(nn.Module):
    """Convolutional block attention: which channels matter, then where (Woo et al., ECCV 2018, arXiv:1807.06521).

    (B, C, *shape) to the same. Channels: one two-layer perceptron on the mean and on the maximum of each, summed
    (eq. 2). Places: a convolution over the mean and the maximum across channels (eq. 3). Both scale by a sigmoid.
    """

    def __init__(self, dims: int, channels: int):
        super().__init__()
        conv, hidden = Conv[Conv.CONV, dims], squeezed(channels)
        self.squeeze = conv(channels, hidden, 1, bias=False)
        self.excite = conv(hidden, channels, 1, bias=False)
        self.place = conv(2, 1, SPATIAL_KERNEL, padding=SPATIAL_KERNEL // 2, bias=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The image, scaled by both."""
        axes = tuple(range(2, image.ndim))
        pooled = (image.mean(axes, keepdim=True), image.amax(axes, keepdim=True))
        image = image * torch.sigmoid(sum(self.excite(torch.relu(self.squeeze(p))) for p in pooled))
        where = torch.cat((image.mean(1, keepdim=True), image.amax(1, keepdim=True)), dim=1)
        return image * torch.sigmoid(self.place(where))
