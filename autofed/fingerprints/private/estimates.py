"""What a census says of its patients, with the errors that its noise leaves."""

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
        upto = np.round(share * patients).astype(int)
        often = np.diff(upto, prepend=0)
        return {repr(float(value)): int(n) for value, n in zip(self.values, often, strict=True) if n > 0}


def distribution(found: PrivateFingerprint, kind: str, axis: int) -> Distribution:
    """Of the spacings or extents ("spacing." or "extent.") on an axis: noised counts and declared facts together."""
    name, said = f"{kind}{AXES[axis]}", found.declared.get(f"{kind}{AXES[axis]}", {})
    values = np.array(sorted({*BINS[kind], *map(float, said)} if name in found.parts else {*map(float, said)}))
    upto = np.zeros(len(values))
    for value, patients in said.items():
        upto += patients * (values >= float(value))
    error = 0.0
    if name in found.parts:
        counted, error = _upto(found.parts[name])
        upto += counted[np.searchsorted(BINS[kind], values, side="right").clip(1) - 1] * (values >= BINS[kind][0])
    return Distribution(values, upto / upto[-1], error / found.patients)


def spacings(found: PrivateFingerprint) -> list[Distribution]:
    """Of the axes that were asked, (z, y, x) or (y, x). Where noise could explain how two differ, both are their mean.

    Voxels are mostly square within slices; then this halves the variance, and the axes come out equal.
    """
    first = 3 - found.declaration.dimension
    alone = [distribution(found, SPACING, axis) for axis in range(first, 3)]
    return [_mean([other for other in alone if other is one or _are_alike(one, other)]) for one in alone]


def _are_alike(one: Distribution, other: Distribution) -> bool:
    """Whether two standard errors of the difference are more than the largest difference."""
    if not one.error or not other.error or len(one.values) != len(other.values):
        return False
    return bool(np.max(np.abs(one.share - other.share)) <= 2 * math.hypot(one.error, other.error))


def _mean(alike: Sequence[Distribution]) -> Distribution:
    share = np.mean([one.share for one in alike], axis=0)
    return Distribution(alike[0].values, share, alike[0].error / math.sqrt(len(alike)))


def _upto(part: NoisySums) -> tuple[np.ndarray, float]:
    """How many patients are in a bin or below, rising from 0 to all of them, and the largest standard error.

    All patients are in some bin, and what that says of the noise is taken out of every sum; then the nearest rising
    sums are taken.
    """
    from scipy.optimize import isotonic_regression

    size = len(part.numbers)
    noise = triangular_factor(size) / triangular_factor(size)[0, 0] ** 2  # from bins as they are told to sums
    sums, spread = noise @ np.asarray(part.numbers), noise @ noise.T
    pull = spread[:, -1] / spread[-1, -1]
    known = sums + pull * (part.patients - sums[-1])
    error = math.sqrt(part.variance * float(np.max(np.diag(spread) - pull * spread[:, -1])))
    rising = np.clip(isotonic_regression(known).x, 0, part.patients)
    rising[-1] = part.patients
    return rising, error


@dataclass(frozen=True)
class Estimate:
    """A number of a typical patient, its standard error, and how far patients are apart."""

    value: float
    error: float
    spread: float


def cropped_share(found: PrivateFingerprint) -> tuple[float, float] | None:
    """The share of patients of whose images cropping keeps little, and its standard error; None if nobody was asked."""
    part = found.parts.get(KEPT)
    return None if part is None else (part.numbers[0] / part.patients, math.sqrt(part.variance) / part.patients)


def circular_estimate(found: PrivateFingerprint, channel: int, what: str) -> Estimate | None:
    """What the angles of all periods say of a number of CT, coarse to fine; None if a step is lost in the noise.

    A step counts if the mean of its angles is longer than three times its noise, and if three errors of the number so
    far are half of its period at most. How far patients are apart follows from how much shorter the mean is at the
    finer period.
    """
    value = error = 0.0
    lengths = []
    for at, (period, _) in enumerate(PERIODS[what]):
        part = found.parts[f"{CT}{channel}.{what}.{period:g}"]
        length, noise = math.hypot(*part.numbers), math.sqrt(part.variance)
        if length < 3 * noise or (at and error > period / 6):
            return None
        turned = math.atan2(part.numbers[1], part.numbers[0]) / (2 * math.pi) * period
        least = value - period / 2 if at else LEAST[what]
        value = least + (turned - least) % period
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
