"""Dice plus cross-entropy at every supervised resolution (MONAI's losses, nnU-Net's weights)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss

from autofed.plans import Training

Loss = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


def make_loss(training: Training, resolutions: int) -> Loss:
    """A loss of (list of logits (B, K, *shape), labels (B, 1, *patch)).

    Soft Dice without background, smoothed by 1e-5, plus cross-entropy, weighted 1 to 1; each coarser resolution weighs
    half of the one above it (Isensee et al. 2021, supplement).
    """
    base = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=training.batch_dice,
        smooth_nr=1e-5, smooth_dr=1e-5,
    )  # fmt: skip
    weights = [0.5**i for i in range(resolutions)]
    deep = DeepSupervisionLoss(base, weights=[w / sum(weights) for w in weights])
    return lambda logits, labels: deep(logits, labels.float())
