"""The exact fingerprint of a site's data: counts and sums that merge exactly, and no list of cases.

Every number is an integer (sums in fixed point), so that merging is associative and commutative to the bit: a site, a
process and a single case are merged by the same function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any, Self, TypeVar

import numpy as np
from pydantic import Field

from autofed.data import Case, Dataset, Declaration, disagreements, site_name_problem
from autofed.data.labels import (
    BACKGROUND,
    IGNORE,
    Labels,
    Structures,
    annotated_problems,
    labels_problems,
    mask,
    voxel_counts,
)
from autofed.errors import raise_if_any
from autofed.files import Record
from autofed.parallel import Progress, silent, total
from autofed.plans import Speed

FIXED_POINT = 1 << 24
"""One unit in the fixed-point sums of intensities; a case's foreground has this mass in a histogram."""

HOUNSFIELD_RANGE = (-1024, 3071)
"""The agreed range of CT histograms, in bins of 1 HU; values outside count in the first and the last bin.

Elsewhere a value counts in the bin of its nearest bfloat16 (8 significant bits, so within 0.4 %): every number of
every scanner has such a bin, and sites need not agree on a range first.
"""

FLOAT_RANGE = (-3.4e38, 3.4e38)

Counts = dict[str, int]
"""How many cases have a value; values are written so that they read back exactly."""


Tally = TypeVar("Tally", bound=Record)
"""A record whose fields are counts and sums."""


class SiteCounts(Record):
    """How much a site has; the number of patients is public. `patients` counts those with a labelled case.

    `annotated` are the structures that its dataset.json says were annotated; none: it says nothing, and all were.
    `speed` is that of the machine that will train there, if it was measured.
    """

    patients: int = Field(ge=0)
    cases: int = Field(ge=0)
    labelled: int = Field(ge=0)
    annotated: Structures = ()
    speed: Speed | None = None


class AxisCounts(Record):
    """One axis (z, y or x): spacing in mm, extent in mm and size in voxels of the cases, after cropping."""

    spacing_mm: Counts = Field(default_factory=dict)
    extent_mm: Counts = Field(default_factory=dict)
    size: Counts = Field(default_factory=dict)


class ChannelSums(Record):
    """Foreground intensities of a channel. Each case counts alike, as nnU-Net draws equally from each.

    `total` and `squares` are sums over cases of the mean and the mean square, in units of 1 / FIXED_POINT;
    `histogram` maps a bin to mass in the same units (see HOUNSFIELD_RANGE).
    """

    cases: int = 0
    total: int = 0
    squares: int = 0
    histogram: Counts = Field(default_factory=dict)


class ClassCounts(Record):
    """One structure: the cases that have it, its voxels, its volume in mm^3 (fixed point; pixels for pictures).

    `components` counts its connected pieces, corner to corner, over all cases; 0 for the background and for ignore,
    which are counted beside the structures.
    """

    cases: int = 0
    voxels: int = 0
    volume: int = 0
    components: int = 0


class NoiseStatement(Record):
    """Of a fingerprint estimated from a private one: its noise multiplier, and what the fields of a plan are based on.

    `told` maps a field to a sentence: estimated from so many patients with so much noise, or taken from a prior where
    noise hides the data. The `missing` fields could not be estimated well enough.
    """

    multiplier: float = Field(gt=0)
    told: dict[str, str] = Field(default_factory=dict)
    missing: tuple[str, ...] = ()


class Fingerprint(Record):
    """The data of one site or, merged, of a federation. Axes are (z, y, x) as in the files.

    With `noise` it is not counted but estimated from a private fingerprint, and has only what a plan needs.
    """

    declaration: Declaration
    sites: dict[str, SiteCounts]
    axes: tuple[AxisCounts, AxisCounts, AxisCounts]
    crop_ratio: Counts
    channels: tuple[ChannelSums, ...]
    classes: dict[str, ClassCounts]
    noise: NoiseStatement | None = None

    @property
    def cases(self) -> int:
        """The number of cases over all sites."""
        return sum(site.cases for site in self.sites.values())

    def labelled(self, structure: str) -> int:
        """How many cases have a label that shows the structure if it is there: those of sites that annotated it."""
        return sum(site.labelled for site in self.sites.values() if structure in (site.annotated or (structure,)))

    def with_speed(self, speed: Speed) -> Self:
        """The same, with the speed of the machine that will train at its sites."""
        sites = {name: site.model_copy(update={"speed": speed}) for name, site in self.sites.items()}
        return self.model_copy(update={"sites": sites})

    @classmethod
    def parse(cls, value: Any, about: str) -> Self:
        """Check a JSON value that came from outside, also for what no single field can see."""
        fingerprint = super().parse(value, about)
        raise_if_any(about, _inconsistencies(fingerprint))
        return fingerprint


def measure(dataset: Dataset, *, processes: int = 1, progress: Progress = silent) -> Fingerprint:
    """The fingerprint of a site, in one pass over its cases; `ValidationErrors` names every faulty case."""
    declaration = dataset.declaration()
    case_sums = total(
        partial(_measure, declaration),
        [
            replace(dataset, cases={case: files}) for case, files in dataset.cases.items()
        ],  # a worker receives one case only
        _add,
        stage=f"fingerprint of {dataset.name}",
        processes=processes,
        progress=progress,
    )
    labelled = [case for case, files in dataset.cases.items() if files.label is not None]
    counts = SiteCounts(
        patients=len({dataset.patient(case) for case in labelled}),
        cases=len(dataset.cases),
        labelled=len(labelled),
        annotated=dataset.annotated,
    )
    labels = Labels.of(dataset).with_annotated(dataset.annotated)
    unannotated = {name: ClassCounts() for name in labels.names if not labels.is_annotated(name)}
    classes = case_sums.classes | unannotated  # a region may share its values with one that was annotated
    fingerprint = case_sums.model_copy(update={"sites": {dataset.name: counts}, "classes": classes})
    raise_if_any(dataset.name, [] if dataset.annotated else _foreground_problems(fingerprint))
    return fingerprint


def merge(fingerprints: Sequence[Fingerprint]) -> Fingerprint:
    """The fingerprint of all the data together; `ValidationErrors` if the sites disagree or one comes twice."""
    names = [name for f in fingerprints for name in f.sites]
    problems = [f"the site {n} comes {names.count(n)} times" for n in sorted(set(names)) if names.count(n) > 1]
    if not all(f.sites for f in fingerprints) or not names:
        problems.append("there is no site, or a fingerprint that names none; merge those that the sites handed over")
    problems += disagreements({", ".join(f.sites): f.declaration for f in fingerprints})
    problems += [
        f"{', '.join(f.sites)}: this was estimated from private fingerprints; merge those"
        for f in fingerprints
        if f.noise
    ]
    raise_if_any("the fingerprints", problems)
    return reduce(_add, fingerprints)


def _foreground_problems(fingerprint: Fingerprint) -> list[str]:
    """A mask may be empty, but a site where all are has the wrong files, unless it says that it looked."""
    structures = Labels.of(fingerprint.declaration).names
    if any(fingerprint.classes[name].cases for name in structures):
        return []
    quoted = ", ".join(f'"{name}"' for name in structures)
    return [
        f"no label map holds any {' or '.join(structures)}; look whether labelsTr is right, or leave the site out; if "
        f'all were looked for and none was there, say so in dataset.json: "annotated": [{quoted}]'
    ]


def _inconsistencies(fingerprint: Fingerprint) -> list[str]:
    """Where the parts of a fingerprint do not belong together."""
    labels = _declaration_problems(fingerprint)
    annotated = [] if labels else _annotated_problems(fingerprint)
    return [*site_problems(fingerprint.sites), *labels, *annotated, *_count_problems(fingerprint)]


def _annotated_problems(fingerprint: Fingerprint) -> list[str]:
    return [
        f"sites.{name}: {problem}"
        for name, site in fingerprint.sites.items()
        if site.annotated
        for problem in annotated_problems(site.annotated, fingerprint.declaration.labels)
    ]


def site_problems(sites: Mapping[str, SiteCounts]) -> list[str]:
    """What is wrong with the sites that a fingerprint names, and with their numbers."""
    problems = [] if sites else ["sites: there is none; expected the fingerprint that a site handed over"]
    problems += [problem for site in sites if (problem := site_name_problem(site))]
    for name, site in sites.items():
        if not site.patients <= site.labelled <= site.cases or (site.labelled > 0 and site.patients == 0):
            problems.append(
                f"sites.{name}: found {site.patients} patients, {site.labelled} labelled cases and {site.cases} cases; "
                "expected a patient or more with labels, and each number no larger than the next"
            )
    return problems


def _declaration_problems(fingerprint: Fingerprint) -> list[str]:
    declaration = fingerprint.declaration
    problems = labels_problems(declaration.labels, declaration.regions_class_order)
    if declaration.dimension not in (2, 3):
        problems.append(f"declaration.dimension: found {declaration.dimension}, expected 2 or 3")
    if len(fingerprint.channels) != len(declaration.channels):
        problems.append(f"channels: found {len(fingerprint.channels)}, the declaration has {len(declaration.channels)}")
    if set(fingerprint.classes) != set(declaration.labels):
        problems.append(
            f"classes: found {sorted(fingerprint.classes)}, the declaration has {sorted(declaration.labels)}"
        )
    structures = Labels.of(declaration).names
    most = max((c.cases for name, c in fingerprint.classes.items() if name in structures), default=0)
    for name, sums in zip(declaration.channels, fingerprint.channels, strict=False):
        too_few = sums.cases < most and not fingerprint.noise  # which has only what a plan needs
        if too_few or (sums.cases and not any(sums.histogram.values())):
            problems.append(f"channels.{name}: the intensities of {most} cases with a structure are expected")
    return problems


def _count_problems(fingerprint: Fingerprint) -> list[str]:
    problems = []
    for where, counts, low, high in _all_counts(fingerprint):
        wrong = [key for key, count in counts.items() if not _is_within(key, low, high) or count < 0]
        if wrong:
            problems.append(f"{where}: found {wrong[:3]}; expected numbers from {low:g} to {high:g}, counted 0 or more")
        elif not where.startswith("channels") and sum(counts.values()) != fingerprint.cases:
            problems.append(
                f"{where}: {sum(counts.values())} cases are counted, but the sites have {fingerprint.cases}"
            )
    return problems


def _all_counts(fingerprint: Fingerprint) -> Iterator[tuple[str, Counts, float, float]]:
    """All histograms: where each is, and between which numbers its values lie."""
    tiny, huge = 1e-9, 1e9
    for name, axis in zip("zyx", fingerprint.axes, strict=True):
        for field in AxisCounts.model_fields:
            yield f"axes.{name}.{field}", getattr(axis, field), tiny, huge
    yield "crop_ratio", fingerprint.crop_ratio, 0, 1
    for name, sums in zip(fingerprint.declaration.channels, fingerprint.channels, strict=False):
        yield f"channels.{name}.histogram", sums.histogram, *(HOUNSFIELD_RANGE if is_ct(name) else FLOAT_RANGE)


def _is_within(number: str, low: float, high: float) -> bool:
    try:
        return low <= float(number) <= high
    except ValueError:
        return False


def values(counts: Counts) -> np.ndarray:
    """The counted values in ascending order, each as often as it was counted."""
    pairs = sorted((float(value), count) for value, count in counts.items())
    return np.repeat([value for value, _ in pairs], [count for _, count in pairs])


def crop_box(image: np.ndarray) -> tuple[slice, slice, slice]:
    """The bounding box of the voxels that are not zero in some channel of (C, Z, Y, X); everything if none are."""
    filled = (image != 0).any(axis=0)
    if not filled.any():
        return tuple(slice(0, n) for n in filled.shape)  # type: ignore[return-value]
    box = []
    for axis in range(3):
        line = np.flatnonzero(filled.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(line[0]), int(line[-1]) + 1))
    return tuple(box)  # type: ignore[return-value]


def is_ct(channel: str) -> bool:
    """Whether a channel's name says that its values are Hounsfield units (nnU-Net's rule)."""
    return channel.lower() == "ct"


def _measure(declaration: Declaration, dataset: Dataset) -> Fingerprint:
    (case,) = dataset.cases
    return measure_case(dataset.read(case), declaration)


def measure_case(case: Case, declaration: Declaration) -> Fingerprint:
    """The fingerprint of a single case; it names no site.

    Intensities are those of annotated foreground; nnU-Net counts ignored voxels as foreground too.
    """
    box, labels = crop_box(case.image), Labels.of(declaration)
    shape = [s.stop - s.start for s in box]
    foreground = np.zeros(case.image.shape[1:], bool) if case.label is None else labels.is_foreground(case.label)
    return Fingerprint(
        declaration=declaration,
        sites={},
        axes=tuple(_axis(spacing, size) for spacing, size in zip(case.spacing_mm, shape, strict=True)),
        crop_ratio={f"{np.prod(shape) / np.prod(case.image.shape[1:]):.4f}": 1},
        channels=tuple(
            _channel(image[foreground], name) for image, name in zip(case.image, declaration.channels, strict=True)
        ),
        classes=_classes(case, declaration.labels, labels),
    )


def _axis(spacing_mm: float, size: int) -> AxisCounts:
    return AxisCounts(
        spacing_mm={repr(float(spacing_mm)): 1}, extent_mm={repr(float(spacing_mm) * size): 1}, size={str(size): 1}
    )


def _channel(voxels: np.ndarray, name: str) -> ChannelSums:
    if voxels.size == 0:
        return ChannelSums()
    exact = voxels.astype(np.float64)
    return ChannelSums(
        cases=1,
        total=round(float(exact.mean()) * FIXED_POINT),
        squares=round(float(np.square(exact).mean()) * FIXED_POINT),
        histogram=_histogram(*(_hounsfield(voxels) if is_ct(name) else _bfloat16(voxels))),
    )


def _histogram(bins: np.ndarray, counts: np.ndarray) -> Counts:
    """Bins that hold something, with their share of a case's mass."""
    masses = np.round(counts * (FIXED_POINT / counts.sum())).astype(int)
    return {repr(b): m for b, m in zip(bins.tolist(), masses.tolist(), strict=True) if m}


def _hounsfield(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = HOUNSFIELD_RANGE
    counts = np.bincount((np.clip(np.round(voxels), low, high) - low).astype(np.int64))
    filled = np.flatnonzero(counts)
    return filled + low, counts[filled]


def _bfloat16(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper half of a float32's bits, rounded; -0 is 0."""
    bits = np.ascontiguousarray(voxels + np.float32(0), np.float32).view(np.uint32)
    counts = np.bincount((bits + np.uint32(0x8000)) >> 16)
    filled = np.flatnonzero(counts)
    return (filled.astype(np.uint32) << 16).view(np.float32), counts[filled]


def _classes(case: Case, declared: Iterable[str], labels: Labels) -> dict[str, ClassCounts]:
    if case.label is None:
        return {name: ClassCounts() for name in declared}
    counts = voxel_counts(case.label, labels.highest_value + 1)
    values = {BACKGROUND: (0,), IGNORE: (labels.ignore or 0,), **dict(labels.structures)}
    voxels = {name: int(counts[list(values[name])].sum()) for name in declared}
    unit = case.geometry.voxel_mm3 * FIXED_POINT
    return {
        name: ClassCounts(
            cases=int(count > 0),
            voxels=count,
            volume=round(count * unit),
            components=_count_components(mask(case.label, values[name])) if count and name in labels.names else 0,
        )
        for name, count in voxels.items()
    }


def _count_components(structure: np.ndarray) -> int:
    """Connected pieces of a mask, within its bounding box; voxels that touch at a corner are one piece."""
    from scipy import ndimage  # takes as long to import as a small case to measure

    return int(ndimage.label(structure[crop_box(structure[None])], np.ones((3, 3, 3)))[1])


def _add(a: Fingerprint, b: Fingerprint) -> Fingerprint:
    return Fingerprint(
        declaration=a.declaration,
        sites=dict(sorted({**a.sites, **b.sites}.items())),
        axes=tuple(_add_fields(x, y) for x, y in zip(a.axes, b.axes, strict=True)),
        crop_ratio=_add_counts(a.crop_ratio, b.crop_ratio),
        channels=tuple(_add_fields(x, y) for x, y in zip(a.channels, b.channels, strict=True)),
        classes={name: _add_fields(a.classes[name], b.classes[name]) for name in a.classes},
    )


def _add_fields(a: Tally, b: Tally) -> Tally:
    """Two records of counts and sums, field by field."""
    pairs = ((name, getattr(a, name), getattr(b, name)) for name in type(a).model_fields)
    return type(a)(**{name: _add_counts(x, y) if isinstance(x, dict) else x + y for name, x, y in pairs})


def _add_counts(a: Counts, b: Counts) -> Counts:
    keys: Iterable[str] = sorted({*a, *b}, key=float)
    return {key: a.get(key, 0) + b.get(key, 0) for key in keys}
