"""The features of a patient's row and how a bin is encoded; both follow from the declaration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from autofed.data import Declaration
from autofed.fingerprints.exact import is_ct

SPACINGS_MM = (
    0.1, 0.125, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95,
    1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0, 20.0,
)  # fmt: skip
"""The values of the bins of spacing: those of protocols, so that they are exact. A case is in the nearest."""

EXTENTS = tuple(2 ** (step / 8) for step in range(2 * 8, 14 * 8 + 1))
"""The values of the bins of extent (mm, in pictures pixels), 9 % apart, from 4 to 16384."""

KEPT_BELOW = 0.75
"""Counted: patients of whose images cropping keeps less than this share (below it nnU-Net masks z-scores)."""

STDS = (1.0, 800.0)
"""HU. Standard deviations outside count as the nearer of these."""

AXES = "zyx"
SPACING, EXTENT, KEPT = "spacing.", "extent.", "kept"
CT = "ct."


@dataclass(frozen=True)
class Feature:
    """One feature of a patient's row: its name, its weight relative to the others', and how many numbers it has."""

    name: str
    weight: float
    size: int


BINS = {SPACING: SPACINGS_MM, EXTENT: EXTENTS}
_WEIGHTS = {SPACING: 1.5, EXTENT: 1.5, KEPT: 0.4}

PERIODS: Mapping[str, tuple[tuple[float, float], ...]] = {
    "mean": ((5000.0, 0.6), (800.0, 1.0), (160.0, 2.4)),
    "std": ((7.5, 0.6), (1.6, 1.2)),
    "low": ((12.0, 0.3),),
    "high": ((12.0, 0.3),),
}
"""Of CT: the periods of the angles that encode a number, coarse to fine, with their weights.

The mean is in HU, the standard deviation as its logarithm, the percentiles as how many standard deviations they are
from the mean.
"""

LEAST = {"mean": -1500.0, "std": -0.4, "low": -1.0, "high": -1.0}
"""Where the coarsest period begins: a little below the least number, since noise may turn it back."""


def feature_layout(declaration: Declaration, declared: Sequence[str] = ()) -> tuple[Feature, ...]:
    """The features of a row without those that a site `declared`: only what the plan needs, since each adds noise."""
    axes = AXES if declaration.dimension == 3 else AXES[1:]
    bins = [Feature(kind + axis, _WEIGHTS[kind], len(BINS[kind])) for kind in BINS for axis in axes]
    cropping = [Feature(KEPT, _WEIGHTS[KEPT], 1)] if any(map(_takes_zscore, declaration.channels)) else []
    angles = [
        Feature(f"{CT}{number}.{what}.{period:g}", weight, 2)
        for number, name in enumerate(declaration.channels)
        if is_ct(name)
        for what, periods in PERIODS.items()
        for period, weight in periods
    ]
    return tuple(feature for feature in (*bins, *cropping, *angles) if feature.name not in declared)


def _takes_zscore(channel: str) -> bool:
    return channel.lower() not in ("ct", "rescale_to_0_1", "rgb_to_0_1", "nonorm")


def feature_shares(features: Sequence[Feature]) -> tuple[float, ...]:
    """The share of a row's squared norm that each feature may take; they add up to 1."""
    total = sum(feature.weight for feature in features)
    return tuple(feature.weight / total for feature in features)


@cache
def triangular_factor(size: int) -> np.ndarray:
    """The encoding of bins, (size, size): the square root of the matrix of prefix sums, its columns at most 1 long.

    Counts up to a bin are then off by little more than a number's own noise, 1 + ln(size) / pi times, where plain
    counts would add up the noise of every bin before (Fichtenberger, Henzinger and Upadhyay 2023).
    """
    first = np.cumprod([1.0, *(1 - 1 / (2 * k) for k in range(1, size))])
    root = np.tril(first[np.maximum(np.subtract.outer(np.arange(size), np.arange(size)), 0)])
    return np.asarray(root / np.linalg.norm(first))
