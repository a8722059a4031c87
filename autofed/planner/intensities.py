"""How intensities are normalised: the scheme by the channel's name, CT by the values of the federation's foreground."""

from __future__ import annotations

import math
from typing import Literal, cast

import numpy as np

from autofed.fingerprints import FIXED_POINT, ChannelSums, Fingerprint, is_ct, values
from autofed.planner.reasons import Reasons
from autofed.plans import Channel, Intensity

Scheme = Literal["zscore", "rescale_to_0_1", "rgb_to_0_1", "nonorm"]

MASK_BELOW = 0.75
"""Z-scores are taken inside the mask if cropping keeps less than this share of the median image (nnU-Net)."""


def intensity(fingerprint: Fingerprint, reasons: Reasons) -> Intensity:
    """Scheme and statistics of every channel, and whether z-scores leave out voxels that are zero."""
    channels = []
    for name, sums in zip(fingerprint.declaration.channels, fingerprint.channels, strict=True):
        channel = statistics(sums, "ct" if is_ct(name) else scheme(name))
        channels.append(channel)
        why = "clipped and scaled by the federation's foreground" if is_ct(name) else "by the channel's name, per image"
        reasons.record(f"local.intensity.channels.{name}", channel.scheme, why)
    ratio = float(np.median(values(fingerprint.crop_ratio)))
    inside = ratio < MASK_BELOW and any(c.scheme == "zscore" for c in channels)
    why = f"cropping to what is not zero keeps {ratio:.0%} of an image; z-scores use only that part below 75 %"
    reasons.record("local.intensity.inside_mask", inside, why)
    return Intensity(channels=tuple(channels), inside_mask=inside)


def scheme(channel: str) -> Scheme:
    """nnU-Net's scheme of that name, in upper or lower case; for all other names a z-score per image."""
    schemes = {"rescale_to_0_1", "rgb_to_0_1", "nonorm"}
    return cast("Scheme", channel.lower()) if channel.lower() in schemes else "zscore"


def statistics(sums: ChannelSums, scheme: Scheme | Literal["ct"]) -> Channel:
    """Mean, standard deviation and percentiles of the mixture in which every case weighs alike.

    The variance between sites is in it, since sums of means and of mean squares were merged, not deviations.
    """
    if sums.cases == 0:
        return Channel(scheme=scheme)
    mean = sums.total / sums.cases / FIXED_POINT
    square = sums.squares / sums.cases / FIXED_POINT
    bins = sorted((float(value), mass) for value, mass in sums.histogram.items())
    share = np.cumsum([mass for _, mass in bins]) / sum(mass for _, mass in bins)
    low, high = (bins[int(np.searchsorted(share, p))][0] for p in (0.005, 0.995))
    return Channel(
        scheme=scheme,
        mean=mean,
        std=max(math.sqrt(max(square - mean**2, 0.0)), 1e-8),
        percentile_00_5=low,
        percentile_99_5=high,
    )
