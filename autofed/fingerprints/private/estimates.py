"""Estimates from a private fingerprint, with the standard errors that its noise leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autofed.fingerprints.private.features import AXES, BINS, CT, KEPT, LEAST, PERIODS, SPACING, triangular_factor
from autofed.fingerprints.private.records import NoisySums, PrivateFingerprint


@dataclass(frozen=True)
class Distribution:
    """How a value is distributed over patients: ascending `values`, the share of patients up to each.

    `error` is the standard error of a rank as a share of the patients, at its largest.
    """

    values: np.ndarray
    share: np.ndarray
    error: float

    def quantile(self, at: float) -> float:
        """The value that this share of the patients does not exceed."""
        return float(self.values[min(int(np.searchsorted(self.share, at)), len(self.values) - 1)])

    def counts(self, patients: int) -> dict[str, int]:
        """So many patients over the values, as a fingerprint has them.

        At either end what is rarer than noise, a share below 1.5 standard errors, counts at the nearest value that is
        not.
        """
        rare = min(1.5 * self.error, 0.5)
        share = np.where(self.share < rare, 0.0, np.where(self.share > 1 - rare, 1.0, self.share))
        cumulative = np.round(share * patients).astype(int)
        patients_at = np.diff(cumulative, prepend=0)
        return {repr(float(value)): int(n) for value, n in zip(self.values, patients_at, strict=True) if n > 0}


def distribution(fingerprint: PrivateFingerprint, kind: str, axis: int) -> Distribution:
    """Of the spacings or extents ("spacing." or "extent.") on an axis: noisy counts and declared values together."""
    name, declared = f"{kind}{AXES[axis]}", fingerprint.declared.get(f"{kind}{AXES[axis]}", {})
    values = np.array(
        sorted({*BINS[kind], *map(float, declared)} if name in fingerprint.parts else {*map(float, declared)})
    )
    cumulative = np.zeros(len(values))
    for value, patients in declared.items():
        cumulative += patients * (values >= float(value))
    error = 0.0
    if name in fingerprint.parts:
        noisy_cumulative, error = _cumulative_counts(fingerprint.parts[name])
        cumulative += noisy_cumulative[np.searchsorted(BINS[kind], values, side="right").clip(1) - 1] * (
            values >= BINS[kind][0]
        )
    return Distribution(values, cumulative / cumulative[-1], error / fingerprint.patients)


def spacings(fingerprint: PrivateFingerprint) -> list[Distribution]:
    """Of the axes of the images, (z, y, x) or (y, x). Where noise could explain how two differ, both are their mean.

    Voxels are mostly square within slices; then this halves the variance, and the axes come out equal.
    """
    first_axis = 3 - fingerprint.declaration.dimension
    by_axis = [distribution(fingerprint, SPACING, axis) for axis in range(first_axis, 3)]
    return [
        _mean([candidate for candidate in by_axis if candidate is own or _are_compatible(own, candidate)])
        for own in by_axis
    ]


def _are_compatible(a: Distribution, b: Distribution) -> bool:
    """Whether two standard errors of the difference are more than the largest difference."""
    if not a.error or not b.error or len(a.values) != len(b.values):
        return False
    return bool(np.max(np.abs(a.share - b.share)) <= 2 * math.hypot(a.error, b.error))


def _mean(distributions: Sequence[Distribution]) -> Distribution:
    share = np.mean([distribution.share for distribution in distributions], axis=0)
    return Distribution(distributions[0].values, share, distributions[0].error / math.sqrt(len(distributions)))


def _cumulative_counts(sums_of_bins: NoisySums) -> tuple[np.ndarray, float]:
    """How many patients are in a bin or below, rising from 0 to all of them, and the largest standard error.

    All patients are in some bin: every sum is corrected by the noise that the last one reveals, and then made
    ascending by isotonic regression.
    """
    from scipy.optimize import isotonic_regression

    size = len(sums_of_bins.numbers)
    noise = triangular_factor(size) / triangular_factor(size)[0, 0] ** 2  # from factored bins to prefix sums
    sums, spread = noise @ np.asarray(sums_of_bins.numbers), noise @ noise.T
    gain = spread[:, -1] / spread[-1, -1]
    corrected = sums + gain * (sums_of_bins.patients - sums[-1])
    error = math.sqrt(sums_of_bins.variance * float(np.max(np.diag(spread) - gain * spread[:, -1])))
    rising = np.clip(isotonic_regression(corrected).x, 0, sums_of_bins.patients)
    rising[-1] = sums_of_bins.patients
    return rising, error


@dataclass(frozen=True)
class Estimate:
    """A number of a typical patient, its standard error, and how far patients are apart."""

    value: float
    error: float
    spread: float


def cropped_share(fingerprint: PrivateFingerprint) -> tuple[float, float] | None:
    """The share of patients of whose images cropping keeps little, and its standard error; None if not counted."""
    part = fingerprint.parts.get(KEPT)
    return None if part is None else (part.numbers[0] / part.patients, math.sqrt(part.variance) / part.patients)


def circular_estimate(fingerprint: PrivateFingerprint, channel: int, what: str) -> Estimate | None:
    """A CT statistic decoded from its angles at all periods, coarse to fine; None if noise hides one of them.

    A step counts if the mean of its angles is longer than three times its noise, and if three errors of the number so
    far are half of its period at most. How far patients are apart follows from how much shorter the mean is at the
    finer period.
    """
    value = error = 0.0
    lengths = []
    for at, (period, _) in enumerate(PERIODS[what]):
        part = fingerprint.parts[f"{CT}{channel}.{what}.{period:g}"]
        length, noise = math.hypot(*part.numbers), math.sqrt(part.variance)
        if length < 3 * noise or (at and error > period / 6):
            return None
        remainder = math.atan2(part.numbers[1], part.numbers[0]) / (2 * math.pi) * period
        least = value - period / 2 if at else LEAST[what]
        value = least + (remainder - least) % period
        error = noise / length * period / (2 * math.pi)
        lengths.append(math.sqrt(length**2 - 2 * part.variance))
    return Estimate(value, error, _spread(PERIODS[what], lengths))


def _spread(periods: Sequence[tuple[float, float]], lengths: Sequence[float]) -> float:
    """The standard deviation over patients from the two finest lengths, as of normal numbers; at most a quarter period.

    Patients without any foreground shorten both alike. 0 where there is one period.
    """
    if len(periods) < 2:
        return 0.0
    (coarse, _), (fine, _) = periods[-2:]
    square = 2 * math.log(lengths[-2] / lengths[-1]) / (2 * math.pi) ** 2 / (fine**-2 - coarse**-2)
    return min(math.sqrt(max(square, 0.0)), fine / 4)
