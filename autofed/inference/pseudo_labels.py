"""Pseudo-labels: sites' predictions for public images, their fusion, and the confidence that they need.

A site's prediction for an image is uint8 (S + 1, Z, Y, X) on the image's own grid: the probability of each of S
structures and, last, the uncertainty, in 255ths. Classes exclude each other, and what they leave is background; regions
do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autofed.data.labels import Labels
from autofed.preprocessing import UNKNOWN, LabelMaps

SitePredictions = Mapping[str, np.ndarray]
"""By site: its prediction for one image."""


@dataclass(frozen=True)
class ConfidenceThresholds:
    """What a fused label needs to be trained on.

    Of a voxel the least `confidence` (the largest probability) and the most `doubt` (entropy in [0, 1]); of an image
    the least `share` of the voxels in question that pass both.
    """

    confidence: float
    doubt: float
    share: float


def encode_prediction(probabilities: np.ndarray, uncertainty: np.ndarray, *, is_regions: bool) -> np.ndarray:
    """A site's prediction as bytes, from probabilities (K, Z, Y, X) and uncertainty (Z, Y, X), all in [0, 1]."""
    structures = probabilities if is_regions else probabilities[1:]
    shares = np.concatenate([structures.astype(np.float32), uncertainty[None].astype(np.float32)])
    prediction: np.ndarray = np.rint(255 * np.clip(shares, 0, 1)).astype(np.uint8)
    return prediction


def decode_prediction(prediction: np.ndarray, *, is_regions: bool) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (K, Z, Y, X) and uncertainty (Z, Y, X), float32, from a site's prediction."""
    shares = prediction.astype(np.float32) / 255
    structures, uncertainty = shares[:-1], shares[-1]
    if is_regions:
        return structures, uncertainty
    total = structures.sum(0)
    structures = structures / np.maximum(total, 1)  # rounding, or a site with an error, may make it more than 1
    return np.concatenate([1 - np.minimum(total, 1)[None], structures]), uncertainty


def fuse(
    predictions: SitePredictions, site_weights: Mapping[str, float], temperature: float, *, is_regions: bool
) -> np.ndarray:
    """p = sum of w_k p_k / sum of w_k, voxel by voxel, with w_k = weight_k exp(-u_k / temperature): (K, Z, Y, X)."""
    total, weights = np.zeros(1, np.float32), np.zeros(1, np.float32)
    for site in sorted(predictions):
        probabilities, uncertainty = decode_prediction(predictions[site], is_regions=is_regions)
        weight = np.float32(site_weights[site]) * np.exp(-uncertainty / np.float32(temperature))
        total, weights = total + weight * probabilities, weights + weight
    return total / weights


def apply_thresholds(fused: np.ndarray, order: tuple[int, ...], thresholds: ConfidenceThresholds) -> np.ndarray:
    """The label map (Z, Y, X), uint8, of fused probabilities, `UNKNOWN` where a threshold is missed.

    `order` are the values of regions; empty for classes. The voxels in question are those that are not clearly
    background: an image is used as a whole or not at all, since from an image whose structures are left out a network
    learns that there are none.
    """
    import torch

    from autofed.inference.uncertainty import binary_entropy, entropy

    values, is_regions = torch.from_numpy(np.ascontiguousarray(fused)), bool(order)
    if is_regions:
        confidence, doubt = np.maximum(fused, 1 - fused).min(0), binary_entropy(values).amax(0).numpy()
        background = 1 - fused.max(0)
    else:
        confidence, doubt = fused.max(0), entropy(values).numpy()
        background = fused[0]
    is_confident = (confidence >= thresholds.confidence) & (doubt <= thresholds.doubt)
    in_question = background < thresholds.confidence
    if in_question.any() and is_confident[in_question].mean() < thresholds.share:
        return np.full(is_confident.shape, UNKNOWN, np.uint8)
    return np.where(is_confident, Labels((), is_regions, order).paint(fused), UNKNOWN).astype(np.uint8)


def structure_masks(prediction: np.ndarray, *, is_regions: bool) -> np.ndarray:
    """The masks of the structures that a site predicts: bool (S, voxels)."""
    structures = prediction[:-1].reshape(len(prediction) - 1, -1)
    if is_regions:
        predicted: np.ndarray = structures > 127
        return predicted
    return _class_masks(decode_prediction(prediction, is_regions=False)[0].reshape(len(prediction), -1))


def _class_masks(probabilities: np.ndarray) -> np.ndarray:
    best = probabilities.argmax(0)
    return np.stack([best == k for k in range(1, len(probabilities))])


class PairwiseDice:
    """Dice between every two sites over all images, structure by structure, from counts that are added up."""

    def __init__(self) -> None:
        self._counts: np.ndarray | None = None

    def add(self, masks: list[np.ndarray]) -> None:
        """Count an image: for each site the masks of its structures (S, voxels)."""
        stacked = np.stack(masks, axis=1).astype(np.float32)  # (S, sites, voxels)
        counts = np.stack([structure.astype(np.float64) @ structure.T.astype(np.float64) for structure in stacked])
        self._counts = counts if self._counts is None else self._counts + counts

    def dice(self, nothing: float = 1.0) -> np.ndarray:
        """(sites, sites): the mean over structures that either predicts; `nothing` where neither predicts any."""
        assert self._counts is not None, "no image was added"
        sizes = np.diagonal(self._counts, axis1=1, axis2=2)
        summed_sizes = sizes[:, :, None] + sizes[:, None, :]
        scored = summed_sizes > 0
        dice = np.where(scored, 2 * self._counts / np.where(scored, summed_sizes, 1), 0)
        scored_structures = scored.sum(0)
        return np.where(scored_structures > 0, dice.sum(0) / np.maximum(scored_structures, 1), nothing)


def site_weights(dice: np.ndarray, scale: float) -> np.ndarray:
    """The weight of each site, 1 at most, from the Dice between every two.

    exp(-(best - own) / scale). A site's agreement is the worst among the half of the others that it agrees with most:
    as long as most sites are honest, an honest one agrees with honest ones up to there, and one with wrong labels does
    not, however well a few such sites agree. Of two sites it is unknown which is wrong, and both count alike.
    """
    sites = len(dice)
    nearest = math.ceil((sites - 1) / 2)
    if not nearest:
        return np.ones(sites)
    others = np.sort(dice[~np.eye(sites, dtype=bool)].reshape(sites, sites - 1), axis=1)[:, ::-1]
    agreement = others[:, nearest - 1]
    weights: np.ndarray = np.exp(-(agreement.max() - agreement) / scale)
    return weights


def ramp(share: float) -> float:
    """From 0.007 to 1 as `share` goes from 0 to 1: exp(-5 (1 - share)^2) (Laine and Aila, ICLR 2017, section 2.3)."""
    return math.exp(-5 * (1 - min(1.0, max(0.0, share))) ** 2)


def changed_share(before: LabelMaps, now: LabelMaps) -> float:
    """The share of voxels whose label changed, of those that are not background, or `UNKNOWN`, both times."""
    changed = total = 0
    for name, label_map in now.items():
        previous = before[name]
        counts = (label_map != previous) | ((label_map != 0) & (label_map != UNKNOWN))
        changed, total = changed + int((label_map != previous).sum()), total + int(counts.sum())
    return changed / total if total else 0.0


def has_structure(label_map: np.ndarray) -> bool:
    """Whether a label map has anything but background."""
    return bool(((label_map != 0) & (label_map != UNKNOWN)).any())


def labelled_shares(maps: LabelMaps) -> tuple[float, float]:
    """The share of images that have labels, and that of the voxels of all images."""
    voxels = [(label_map != UNKNOWN) for label_map in maps.values()]
    if not voxels:
        return 0.0, 0.0
    return float(np.mean([v.any() for v in voxels])), sum(int(v.sum()) for v in voxels) / sum(v.size for v in voxels)
