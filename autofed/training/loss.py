"""Dice plus cross-entropy at every supervised resolution (MONAI's losses, nnU-Net's weights)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from monai.losses.dice import DiceCELoss, DiceLoss
from monai.losses.ds_loss import DeepSupervisionLoss
from torch.nn import functional
from torch.nn.modules.loss import _Loss

from autofed.data.labels import Labels
from autofed.plans import Training

Loss = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]

_SMOOTH = 1e-5


def make_loss(training: Training, resolutions: int, labels: Labels | None = None) -> Loss:
    """A loss of (list of logits (B, K, *shape), label maps (B, 1, *patch)).

    Soft Dice without background, smoothed by 1e-5, plus cross-entropy, weighted 1 to 1; each coarser resolution weighs
    half of the one above it (Isensee et al. 2021, supplement). `labels` say what the values of the maps mean; without
    them they are classes, all annotated. Of regions each is a binary task, and ignored voxels count in no sum. A
    structure that was not annotated is not learned as absent: such a region has no part in the loss, and such a class
    is one with the background, whose probability is the sum of theirs (marginal loss; Shi et al., Med Image Anal
    70:101979, 2021).
    """
    if labels is not None and (labels.is_regions or labels.ignore is not None or labels.annotated):
        base: _Loss = _AnnotatedLoss(labels, training.batch_dice)
    else:
        base = _class_loss(training)
    weights = [0.5**i for i in range(resolutions)]
    deep = DeepSupervisionLoss(base, weights=[w / sum(weights) for w in weights])
    return lambda logits, maps: cast("torch.Tensor", deep(logits, maps.float()))


def _class_loss(training: Training) -> _Loss:
    return DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=training.batch_dice,
        smooth_nr=_SMOOTH, smooth_dr=_SMOOTH,
    )  # fmt: skip


class _AnnotatedLoss(_Loss):
    """Dice plus cross-entropy of logits (B, K, *shape) over the voxels of label maps (B, 1, *shape) that are annotated.

    Where nothing is annotated, the loss and its gradient are 0: both sums of Dice are empty, and smoothing makes it 1.
    """

    def __init__(self, labels: Labels, batch_dice: bool):
        super().__init__()
        self.is_regions, self.ignore = labels.is_regions, labels.ignore
        unknown = labels.unannotated_channels
        self.background_channels = [0, *unknown] if unknown and not labels.is_regions else []
        self.annotated_channels = [
            channel for channel in range(labels.channels) if channel not in {*unknown, *self.background_channels}
        ]
        targets = torch.from_numpy(labels.targets())
        self.targets = targets[
            :, [0, *self.annotated_channels] if self.background_channels else self.annotated_channels
        ]
        self.dice = DiceLoss(
            include_background=labels.is_regions, batch=batch_dice, smooth_nr=_SMOOTH, smooth_dr=_SMOOTH
        )

    def forward(self, logits: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        logits, values = self._of_annotated(logits), maps[:, 0].long()
        target = self.targets.to(logits.device)[values].movedim(-1, 1)  # of an ignored voxel 0 in every channel
        annotated = torch.ones_like(maps) if self.ignore is None else (values != self.ignore)[:, None].to(logits)
        if self.is_regions:
            probabilities = torch.sigmoid(logits)
            entropies = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        else:
            probabilities = torch.softmax(logits, 1)
            entropies = functional.cross_entropy(logits, target, reduction="none")
        # ignored voxels are left out after the softmax: a logit of 0 would still be a probability
        overlap: torch.Tensor = self.dice(probabilities * annotated, target * annotated)
        return overlap + (entropies * annotated[:, 0]).sum() / annotated.sum().clamp_min(1)

    def _of_annotated(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of what was annotated; the softmax of a logsumexp is the sum of the probabilities."""
        if len(self.annotated_channels) == logits.shape[1]:
            return logits
        channels = torch.split(logits, 1, 1)
        background = (
            [torch.cat([channels[k] for k in self.background_channels], 1).logsumexp(1, keepdim=True)]
            if self.background_channels
            else []
        )
        return torch.cat([*background, *(channels[k] for k in self.annotated_channels)], 1)
