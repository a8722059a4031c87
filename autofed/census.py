"""What a site tells of its data under noise: bounded numbers of each patient, whose noised sums merge by addition.

Each patient has one row of numbers. A row is made of parts (which bin, which angle, whether), each at most 1 long, and
its parts are weighted so that the whole row is at most 1 long too: what a patient can change, counted as one vector.
Which parts there are follows from what is declared alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Self

import numpy as np
from pydantic import Field

from autofed.case import Case, Dataset, Declaration, disagreements
from autofed.files import Record
from autofed.fingerprints import HOUNSFIELD_RANGE, SiteCounts, crop_box, is_ct, site_problems
from autofed.images import is_picture
from autofed.labels import Labels, labels_problems
from autofed.parallel import Progress, each, silent
from autofed.plans import Speed
from autofed.problems import refuse

SPACINGS_MM = (
    0.1, 0.125, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95,
    1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0, 20.0,
)  # fmt: skip
"""The values of the bins of spacing: those of protocols, so that they are told exactly. A case is in the nearest."""

EXTENTS = tuple(2 ** (step / 8) for step in range(2 * 8, 14 * 8 + 1))
"""The values of the bins of extent (mm, in pictures pixels), 9 % apart, from 4 to 16384."""

KEPT_BELOW = 0.75
"""Counted: patients of whose images cropping keeps less than this share (below it nnU-Net masks z-scores)."""

STDS = (1.0, 800.0)
"""HU. Standard deviations outside count as the nearer of these."""

AXES = "zyx"
_SPACING, _EXTENT, _KEPT = "spacing.", "extent.", "kept"
_CT = "ct."


@dataclass(frozen=True)
class Values:
    """Foreground intensities of a case in a channel: mean, standard deviation, 0.5 and 99.5 percentiles."""

    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Facts:
    """What the census asks of one case: axes (z, y, x), the share that cropping keeps, intensities by channel."""

    spacing_mm: tuple[float, float, float]
    extent_mm: tuple[float, float, float]
    kept: float
    values: tuple[Values | None, ...]


class Noised(Record):
    """Of one part the sum over patients, with independent Gaussian noise of this variance in each number."""

    numbers: tuple[float, ...]
    variance: float = Field(gt=0)
    patients: int = Field(ge=0)


class Census(Record):
    """What one site, or several, tell under noise. Every number in it that depends on a patient is in `parts`.

    `declared` are protocol facts: for each part that they stand for, how many patients have which value.
    """

    declaration: Declaration
    sites: dict[str, SiteCounts]
    noise_multiplier: float = Field(gt=0)
    parts: dict[str, Noised]
    declared: dict[str, dict[str, int]] = Field(default_factory=dict)

    @property
    def patients(self) -> int:
        """Of all sites."""
        return sum(site.patients for site in self.sites.values())

    def with_speed(self, speed: Speed) -> Self:
        """The same, with the speed of the machine that will train at its sites."""
        sites = {name: site.model_copy(update={"speed": speed}) for name, site in self.sites.items()}
        return self.model_copy(update={"sites": sites})

    @classmethod
    def parse(cls, value: Any, about: str) -> Self:
        """Check a JSON value that came from outside, also for what no single field can see."""
        found = super().parse(value, about)
        refuse(about, _inconsistencies(found))
        return found


# --- which parts there are


@dataclass(frozen=True)
class Part:
    """A part of a patient's row: its name, its weight beside the others', and how many numbers it has."""

    name: str
    weight: float
    size: int


_BINS = {_SPACING: SPACINGS_MM, _EXTENT: EXTENTS}
_WEIGHTS = {_SPACING: 1.5, _EXTENT: 1.5, _KEPT: 0.4}

PERIODS: Mapping[str, tuple[tuple[float, float], ...]] = {
    "mean": ((5000.0, 0.6), (800.0, 1.0), (160.0, 2.4)),
    "std": ((7.5, 0.6), (1.6, 1.2)),
    "low": ((12.0, 0.3),),
    "high": ((12.0, 0.3),),
}
"""Of CT: the periods of the angles that tell a number, coarse to fine, with their weights.

The mean is in HU, the standard deviation as its logarithm, the percentiles as how many standard deviations they are
from the mean.
"""

_LEAST = {"mean": -1500.0, "std": -0.4, "low": -1.0, "high": -1.0}
"""Where the coarsest period begins: a little below the least number, since noise may turn it back."""


def layout(declaration: Declaration, declared: Sequence[str] = ()) -> tuple[Part, ...]:
    """The parts that a site is asked for, but those that it `declared`: only what the plan needs, since each costs."""
    axes = AXES if declaration.dimension == 3 else AXES[1:]
    bins = [Part(kind + axis, _WEIGHTS[kind], len(_BINS[kind])) for kind in _BINS for axis in axes]
    kept = [Part(_KEPT, _WEIGHTS[_KEPT], 1)] if any(map(_takes_zscore, declaration.channels)) else []
    angles = [
        Part(f"{_CT}{number}.{what}.{period:g}", weight, 2)
        for number, name in enumerate(declaration.channels)
        if is_ct(name)
        for what, periods in PERIODS.items()
        for period, weight in periods
    ]
    return tuple(part for part in (*bins, *kept, *angles) if part.name not in declared)


def _takes_zscore(channel: str) -> bool:
    return channel.lower() not in ("ct", "rescale_to_0_1", "rgb_to_0_1", "nonorm")


def shares(parts: Sequence[Part]) -> tuple[float, ...]:
    """How much of a row's squared length each part may take; they add up to 1."""
    whole = sum(part.weight for part in parts)
    return tuple(part.weight / whole for part in parts)


# --- a patient's row


def row(parts: Sequence[Part], facts: Facts) -> np.ndarray:
    """The numbers of one case, one part after the other; at most 1 long."""
    coded = [math.sqrt(share) * _code(part, facts) for part, share in zip(parts, shares(parts), strict=True)]
    return np.concatenate(coded)


def _code(part: Part, facts: Facts) -> np.ndarray:
    """A part of a case: at most 1 long."""
    if part.name == _KEPT:
        return np.array([float(facts.kept < KEPT_BELOW)])
    if part.name.startswith(_CT):
        return _angle(part.name, facts)
    kind, axis = part.name[:-1], AXES.index(part.name[-1])
    value = (facts.spacing_mm if kind == _SPACING else facts.extent_mm)[axis]
    found = np.abs(np.log(_BINS[kind]) - math.log(max(value, 1e-9))).argmin()
    return ladder(part.size)[:, found]


def _angle(name: str, facts: Facts) -> np.ndarray:
    """A point on the unit circle that turns with the number; the middle for a case that does not have it."""
    channel, what, period = name.removeprefix(_CT).split(".", 2)
    values = facts.values[int(channel)]
    if values is None:
        return np.zeros(2)
    std = min(max(values.std, STDS[0]), STDS[1])
    number = {
        "mean": values.mean,
        "std": math.log(std),
        "low": (values.mean - values.low) / std,
        "high": (values.high - values.mean) / std,
    }[what]
    turned = 2 * math.pi * number / float(period)
    return np.array([math.cos(turned), math.sin(turned)])


@cache
def ladder(size: int) -> np.ndarray:
    """How bins are told, (size, size): the square root of the matrix of prefix sums, its columns at most 1 long.

    Counts up to a bin are then off by little more than a number's own noise, 1 + ln(size) / pi times, where plain
    counts would add up the noise of every bin before (Fichtenberger, Henzinger and Upadhyay 2023).
    """
    first = np.cumprod([1.0, *(1 - 1 / (2 * k) for k in range(1, size))])
    root = np.tril(first[np.maximum(np.subtract.outer(np.arange(size), np.arange(size)), 0)])
    return root / np.linalg.norm(first)


def rows(dataset: Dataset, parts: Sequence[Part], *, processes: int = 1, progress: Progress = silent) -> np.ndarray:
    """The rows of a site's patients (patients, numbers): each the mean over the patient's labelled cases."""
    cases = labelled(dataset)
    alone = [replace(dataset, cases={case: dataset.cases[case]}) for case in cases]
    stage = f"census of {dataset.name}"
    facts = each(partial(_facts, dataset.declaration()), alone, stage=stage, processes=processes, progress=progress)
    return patients_rows(parts, facts, [dataset.patient(case) for case in cases])


def patients_rows(parts: Sequence[Part], facts: Sequence[Facts], patients: Sequence[str]) -> np.ndarray:
    """The rows of the patients of these cases: who has several has their mean, and so counts once."""
    coded, often = [row(parts, fact) for fact in facts], Counter(patients)
    found = {patient: np.zeros(sum(part.size for part in parts)) for patient in sorted(often)}
    for patient, numbers in zip(patients, coded, strict=True):
        found[patient] += numbers / often[patient]
    return np.stack(list(found.values()))


def labelled(dataset: Dataset) -> list[str]:
    """The cases that are counted."""
    return [case for case, files in dataset.cases.items() if files.label is not None]


def _facts(declaration: Declaration, dataset: Dataset) -> Facts:
    (case,) = dataset.cases
    return facts_of(dataset.read(case), declaration)


def facts_of(case: Case, declaration: Declaration) -> Facts:
    """What is asked of a case; intensities of its annotated foreground, where a channel is CT."""
    box, whole = crop_box(case.image), case.image.shape[1:]
    size = [edge.stop - edge.start for edge in box]
    foreground = np.zeros(whole, bool) if case.label is None else Labels.of(declaration).is_foreground(case.label)
    z, y, x = (spacing * n for spacing, n in zip(case.spacing_mm, size, strict=True))
    return Facts(
        spacing_mm=case.spacing_mm,
        extent_mm=(z, y, x),
        kept=math.prod(size) / math.prod(whole),
        values=tuple(
            values_of(image[foreground]) if is_ct(name) else None
            for image, name in zip(case.image, declaration.channels, strict=True)
        ),
    )


def values_of(voxels: np.ndarray) -> Values | None:
    """The intensities of a case's foreground in HU; None if it has none."""
    if voxels.size == 0:
        return None
    exact = np.clip(voxels.astype(np.float64), *HOUNSFIELD_RANGE)
    low, high = np.percentile(exact, [0.5, 99.5])
    return Values(float(exact.mean()), float(exact.std()), float(low), float(high))


# --- what is declared instead


def declared(dataset: Dataset) -> dict[str, float]:
    """The parts whose value dataset.json declares for all cases of a site; pictures' files have no millimetres."""
    flat = dataset.declaration().dimension == 2
    first = next(iter(dataset.cases.values())).images[0]
    protocol = dataset.protocol
    spacing = protocol.get("spacing_mm") or ((1.0, 1.0, 1.0) if flat and is_picture(first) else ())
    size = protocol.get("size", ())
    if size and not spacing:
        example = '"spacing_mm": [3, 1, 1]'
        refuse(dataset.name, [f"`protocol` has a size and no spacing; add one in mm for (z, y, x), as {example}"])
    axes = [axis for axis in range(3) if axis or not flat]
    found = {f"{_SPACING}{AXES[axis]}": spacing[axis] for axis in axes} if spacing else {}
    return found | ({f"{_EXTENT}{AXES[axis]}": spacing[axis] * size[axis] for axis in axes} if size else {})


# --- the record that leaves, and merging


def census(dataset: Dataset, parts: Sequence[Part], sums: np.ndarray, noise_multiplier: float) -> Census:
    """The record of a site from the noised sum of its patients' rows. Its numbers are rounded, after the noise."""
    patients = len({dataset.patient(case) for case in labelled(dataset)})
    counts = SiteCounts(patients=patients, cases=patients, labelled=patients, annotated=dataset.annotated)
    said = {name: {repr(float(value)): patients} for name, value in declared(dataset).items()}
    return assembled(dataset.declaration(), {dataset.name: counts}, parts, sums, noise_multiplier, said)


def assembled(
    declaration: Declaration,
    sites: dict[str, SiteCounts],
    parts: Sequence[Part],
    sums: np.ndarray,
    noise_multiplier: float,
    declared: dict[str, dict[str, int]],
) -> Census:
    """The record of the noised sum of rows, its parts in units of a patient."""
    patients = sum(site.patients for site in sites.values())
    cuts = np.cumsum([part.size for part in parts])[:-1]
    noised = {
        part.name: Noised(
            numbers=tuple(round(float(number) / math.sqrt(share), 3) for number in numbers),
            variance=noise_multiplier**2 / share,
            patients=patients,
        )
        for part, share, numbers in zip(parts, shares(parts), np.split(sums, cuts), strict=True)
    }
    return Census(
        declaration=declaration, sites=sites, noise_multiplier=noise_multiplier, parts=noised, declared=declared
    )


def merge(found: Sequence[Census]) -> Census:
    """All sites together: noised sums, their variances and patients are added. `Problems` if they disagree."""
    names = [name for one in found for name in one.sites]
    noises = {", ".join(one.sites): one.noise_multiplier for one in found}
    problems = [f"the site {n} comes {names.count(n)} times" for n in sorted(set(names)) if names.count(n) > 1]
    problems += disagreements({", ".join(one.sites): one.declaration for one in found})
    if len(set(noises.values())) > 1:
        listed = "; ".join(f"{sites}: {noise:g}" for sites, noise in noises.items())
        problems.append(f"the noise multipliers differ ({listed}); one --epsilon and one --delta at all sites give one")
    refuse("the noised fingerprints", problems)
    return Census(
        declaration=found[0].declaration,
        sites={name: site for one in found for name, site in sorted(one.sites.items())},
        noise_multiplier=found[0].noise_multiplier,
        parts={name: _sum([one.parts[name] for one in found if name in one.parts]) for name in _named(found, "parts")},
        declared={
            name: dict(sum((Counter(one.declared.get(name, {})) for one in found), Counter()))
            for name in _named(found, "declared")
        },
    )


def _named(found: Sequence[Census], field: str) -> Iterator[str]:
    yield from dict.fromkeys(name for one in found for name in getattr(one, field))


def _sum(parts: Sequence[Noised]) -> Noised:
    return Noised(
        numbers=tuple(map(math.fsum, zip(*(part.numbers for part in parts), strict=True))),
        variance=math.fsum(part.variance for part in parts),
        patients=sum(part.patients for part in parts),
    )


def _inconsistencies(found: Census) -> list[str]:
    """Where the parts of a census do not belong together; only what a single site hands over is read from files."""
    declaration = found.declaration
    problems = [
        *site_problems(found.sites),
        *labels_problems(declaration.labels, declaration.regions_class_order),
        *([] if declaration.dimension in (2, 3) else [f"declaration.dimension: found {declaration.dimension}"]),
    ]
    if problems:
        return problems
    asked = {part.name: part.size for part in layout(found.declaration)}
    wanted = set(asked) - set(found.declared)
    if set(found.parts) != wanted:
        problems.append(f"parts: found {sorted(found.parts)}; the declaration asks for {sorted(wanted)}")
    problems += [
        f"parts.{name}: found {len(part.numbers)} numbers of {part.patients} patients; expected {asked[name]} numbers "
        f"of {found.patients} patients"
        for name, part in found.parts.items()
        if name in asked and (len(part.numbers), part.patients) != (asked[name], found.patients)
    ]
    return problems + [
        f"declared.{name}: found {counts}; expected a spacing or an extent of all {found.patients} patients"
        for name, counts in found.declared.items()
        if name not in asked or name[:-1] not in _BINS or not _is_declared(counts, found.patients)
    ]


def _is_declared(counts: Mapping[str, int], patients: int) -> bool:
    try:
        return sum(counts.values()) == patients and all(1e-9 < float(value) < 1e9 for value in counts)
    except ValueError:
        return False


# --- reading it


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


def distribution(found: Census, kind: str, axis: int) -> Distribution:
    """Of the spacings or extents ("spacing." or "extent.") on an axis: noised counts and declared facts together."""
    name, said = f"{kind}{AXES[axis]}", found.declared.get(f"{kind}{AXES[axis]}", {})
    values = np.array(sorted({*_BINS[kind], *map(float, said)} if name in found.parts else {*map(float, said)}))
    upto = np.zeros(len(values))
    for value, patients in said.items():
        upto += patients * (values >= float(value))
    error = 0.0
    if name in found.parts:
        counted, error = _upto(found.parts[name])
        upto += counted[np.searchsorted(_BINS[kind], values, side="right").clip(1) - 1] * (values >= _BINS[kind][0])
    return Distribution(values, upto / upto[-1], error / found.patients)


def spacings(found: Census) -> list[Distribution]:
    """Of the axes that were asked, (z, y, x) or (y, x). Where noise could explain how two differ, both are their mean.

    Voxels are mostly square within slices; then this halves the variance, and the axes come out equal.
    """
    first = 3 - found.declaration.dimension
    alone = [distribution(found, _SPACING, axis) for axis in range(first, 3)]
    return [_mean([other for other in alone if other is one or _are_alike(one, other)]) for one in alone]


def _are_alike(one: Distribution, other: Distribution) -> bool:
    """Whether two standard errors of the difference are more than the largest difference."""
    if not one.error or not other.error or len(one.values) != len(other.values):
        return False
    return bool(np.max(np.abs(one.share - other.share)) <= 2 * math.hypot(one.error, other.error))


def _mean(alike: Sequence[Distribution]) -> Distribution:
    share = np.mean([one.share for one in alike], axis=0)
    return Distribution(alike[0].values, share, alike[0].error / math.sqrt(len(alike)))


def _upto(part: Noised) -> tuple[np.ndarray, float]:
    """How many patients are in a bin or below, rising from 0 to all of them, and the largest standard error.

    All patients are in some bin, and what that says of the noise is taken out of every sum; then the nearest rising
    sums are taken.
    """
    from scipy.optimize import isotonic_regression

    size = len(part.numbers)
    noise = ladder(size) / ladder(size)[0, 0] ** 2  # from bins as they are told to sums
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


def kept(found: Census) -> tuple[float, float] | None:
    """The share of patients of whose images cropping keeps little, and its standard error; None if nobody was asked."""
    part = found.parts.get(_KEPT)
    return None if part is None else (part.numbers[0] / part.patients, math.sqrt(part.variance) / part.patients)


def angle(found: Census, channel: int, what: str) -> Estimate | None:
    """What the angles of all periods say of a number of CT, coarse to fine; None if a step is lost in the noise.

    A step counts if the mean of its angles is longer than three times its noise, and if three errors of the number so
    far are half of its period at most. How far patients are apart follows from how much shorter the mean is at the
    finer period.
    """
    value = error = 0.0
    lengths = []
    for at, (period, _) in enumerate(PERIODS[what]):
        part = found.parts[f"{_CT}{channel}.{what}.{period:g}"]
        length, noise = math.hypot(*part.numbers), math.sqrt(part.variance)
        if length < 3 * noise or (at and error > period / 6):
            return None
        turned = math.atan2(part.numbers[1], part.numbers[0]) / (2 * math.pi) * period
        least = value - period / 2 if at else _LEAST[what]
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
