"""Pseudo-labels: what sites say of public images, how it is put together, and how much of it is to be believed.

What a site says of an image is uint8 (S + 1, Z, Y, X) on the image's own grid: the probability of each of S structures
and, last, the uncertainty, in 255ths. Classes exclude each other, and what they leave is background; regions do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autofed.data.labels import Labels
from autofed.preprocessing import UNKNOWN, LabelMaps

SitePredictions = Mapping[str, np.ndarray]
"""By site: what it says of one image."""


@dataclass(frozen=True)
class ConfidenceThresholds:
    """What a fused label must be to be taught: of a voxel the least `confidence` (the largest probability) and the most
    `doubt` (entropy in [0, 1]), of an image the least `share` of the voxels in question that pass them.
    """

    confidence: float
    doubt: float
    share: float


def encode_prediction(probabilities: np.ndarray, uncertainty: np.ndarray, *, is_regions: bool) -> np.ndarray:
    """What a site says, from probabilities (K, Z, Y, X) and uncertainty (Z, Y, X), all in [0, 1]."""
    structures = probabilities if is_regions else probabilities[1:]
    said = np.concatenate([structures.astype(np.float32), uncertainty[None].astype(np.float32)])
    return np.rint(255 * np.clip(said, 0, 1)).astype(np.uint8)


def decode_prediction(said: np.ndarray, *, is_regions: bool) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (K, Z, Y, X) and uncertainty (Z, Y, X), float32, of what a site said."""
    found = said.astype(np.float32) / 255
    structures, uncertainty = found[:-1], found[-1]
    if is_regions:
        return structures, uncertainty
    total = structures.sum(0)
    structures = structures / np.maximum(total, 1)  # rounding, or a site that errs, may make it more than 1
    return np.concatenate([1 - np.minimum(total, 1)[None], structures]), uncertainty


def fuse(said: SitePredictions, trust: Mapping[str, float], temperature: float, *, is_regions: bool) -> np.ndarray:
    """p = sum of w_k p_k / sum of w_k, voxel by voxel, with w_k = trust_k exp(-u_k / temperature): (K, Z, Y, X)."""
    total, weights = np.zeros(1, np.float32), np.zeros(1, np.float32)
    for site in sorted(said):
        probabilities, uncertainty = decode_prediction(said[site], is_regions=is_regions)
        weight = np.float32(trust[site]) * np.exp(-uncertainty / np.float32(temperature))
        total, weights = total + weight * probabilities, weights + weight
    return total / weights


def apply_thresholds(fused: np.ndarray, order: tuple[int, ...], gates: ConfidenceThresholds) -> np.ndarray:
    """The label map (Z, Y, X), uint8, of fused probabilities, `UNKNOWN` where a gate is shut.

    `order` are the values of regions; empty for classes. The voxels in question are those that are not clearly
    background: an image is shown as a whole or not at all, since an image whose structures are left out teaches that
    there are none.
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
    kept = (confidence >= gates.confidence) & (doubt <= gates.doubt)
    in_question = background < gates.confidence
    if in_question.any() and kept[in_question].mean() < gates.share:
        return np.full(kept.shape, UNKNOWN, np.uint8)
    return np.where(kept, Labels((), is_regions, order).paint(fused), UNKNOWN).astype(np.uint8)


def structure_masks(said: np.ndarray, *, is_regions: bool) -> np.ndarray:
    """Where a site sees each structure: bool (S, voxels)."""
    found = said[:-1].reshape(len(said) - 1, -1)
    if is_regions:
        return found > 127
    return _classes_shown(decode_prediction(said, is_regions=False)[0].reshape(len(said), -1))


def _classes_shown(probabilities: np.ndarray) -> np.ndarray:
    best = probabilities.argmax(0)
    return np.stack([best == k for k in range(1, len(probabilities))])


class PairwiseDice:
    """Dice between every two sites over all images, structure by structure, from counts that are added up."""

    def __init__(self) -> None:
        self._counts: np.ndarray | None = None

    def add(self, masks: list[np.ndarray]) -> None:
        """Count an image: for each site where it sees each structure (S, voxels)."""
        stacked = np.stack(masks, axis=1).astype(np.float32)  # (S, sites, voxels)
        counts = np.stack([one.astype(np.float64) @ one.T.astype(np.float64) for one in stacked])
        self._counts = counts if self._counts is None else self._counts + counts

    def dice(self, nothing: float = 1.0) -> np.ndarray:
        """(sites, sites): the mean over structures that one of the two sees; `nothing` where neither sees any."""
        assert self._counts is not None, "no image was added"
        sizes = np.diagonal(self._counts, axis1=1, axis2=2)
        together = sizes[:, :, None] + sizes[:, None, :]
        scored = together > 0
        each = np.where(scored, 2 * self._counts / np.where(scored, together, 1), 0)
        known = scored.sum(0)
        return np.where(known > 0, each.sum(0) / np.maximum(known, 1), nothing)


def site_weights(dice: np.ndarray, scale: float) -> np.ndarray:
    """How much each site's word counts, 1 at most, from the Dice between every two.

    A site is judged by the worst of the half of the others that it agrees with most: as long as most sites are honest,
    an honest one finds its like up to there, and one with wrong labels does not, however well a few of its kind agree.
    exp(-(best - own) / scale). Of two sites nobody can say which of them errs, and both count alike.
    """
    sites = len(dice)
    nearest = math.ceil((sites - 1) / 2)
    if not nearest:
        return np.ones(sites)
    others = np.sort(dice[~np.eye(sites, dtype=bool)].reshape(sites, sites - 1), axis=1)[:, ::-1]
    agreement = others[:, nearest - 1]
    return np.exp(-(agreement.max() - agreement) / scale)


def ramp(share: float) -> float:
    """From 0.007 to 1 as `share` goes from 0 to 1: exp(-5 (1 - share)^2) (Laine and Aila, ICLR 2017, section 2.3)."""
    return math.exp(-5 * (1 - min(1.0, max(0.0, share))) ** 2)


def changed_share(before: LabelMaps, now: LabelMaps) -> float:
    """The share of voxels whose label is another one, of those that are not background, or `UNKNOWN`, both times."""
    other = total = 0
    for name, found in now.items():
        past = before[name]
        counts = (found != past) | ((found != 0) & (found != UNKNOWN))
        other, total = other + int((found != past).sum()), total + int(counts.sum())
    return other / total if total else 0.0


def has_structure(found: np.ndarray) -> bool:
    """Whether a label map shows anything but background."""
    return bool(((found != 0) & (found != UNKNOWN)).any())


def labelled_shares(maps: LabelMaps) -> tuple[float, float]:
    """The share of images that have labels, and that of the voxels of all images."""
    voxels = [(found != UNKNOWN) for found in maps.values()]
    if not voxels:
        return 0.0, 0.0
    return float(np.mean([v.any() for v in voxels])), sum(int(v.sum()) for v in voxels) / sum(v.size for v in voxels)
