"""A patient's row, from the cases of a site; and what a site declares instead."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from autofed.data import Case, Dataset, Declaration
from autofed.data.images import is_picture
from autofed.data.labels import Labels
from autofed.errors import raise_if_any
from autofed.fingerprints.exact import HOUNSFIELD_RANGE, crop_box, is_ct
from autofed.fingerprints.private.features import (
    AXES,
    BINS,
    CT,
    EXTENT,
    KEPT,
    KEPT_BELOW,
    SPACING,
    STDS,
    Feature,
    feature_shares,
    triangular_factor,
)
from autofed.parallel import Progress, each, silent


@dataclass(frozen=True)
class IntensityStatistics:
    """Foreground intensities of a case in a channel: mean, standard deviation, 0.5 and 99.5 percentiles."""

    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class CaseFeatures:
    """What the census asks of one case: axes (z, y, x), the share that cropping keeps, intensities by channel."""

    spacing_mm: tuple[float, float, float]
    extent_mm: tuple[float, float, float]
    kept: float
    values: tuple[IntensityStatistics | None, ...]


def feature_row(parts: Sequence[Feature], facts: CaseFeatures) -> np.ndarray:
    """The numbers of one case, one part after the other; at most 1 long."""
    coded = [math.sqrt(share) * _code(part, facts) for part, share in zip(parts, feature_shares(parts), strict=True)]
    return np.concatenate(coded)


def _code(part: Feature, facts: CaseFeatures) -> np.ndarray:
    """A part of a case: at most 1 long."""
    if part.name == KEPT:
        return np.array([float(facts.kept < KEPT_BELOW)])
    if part.name.startswith(CT):
        return _angle(part.name, facts)
    kind, axis = part.name[:-1], AXES.index(part.name[-1])
    value = (facts.spacing_mm if kind == SPACING else facts.extent_mm)[axis]
    found = np.abs(np.log(BINS[kind]) - math.log(max(value, 1e-9))).argmin()
    return triangular_factor(part.size)[:, found]


def _angle(name: str, facts: CaseFeatures) -> np.ndarray:
    """A point on the unit circle that turns with the number; the middle for a case that does not have it."""
    channel, what, period = name.removeprefix(CT).split(".", 2)
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


def feature_rows(
    dataset: Dataset, parts: Sequence[Feature], *, processes: int = 1, progress: Progress = silent
) -> np.ndarray:
    """The rows of a site's patients (patients, numbers): each the mean over the patient's labelled cases."""
    cases = labelled_cases(dataset)
    alone = [replace(dataset, cases={case: dataset.cases[case]}) for case in cases]
    stage = f"census of {dataset.name}"
    facts = each(partial(_facts, dataset.declaration()), alone, stage=stage, processes=processes, progress=progress)
    return patient_rows(parts, facts, [dataset.patient(case) for case in cases])


def patient_rows(parts: Sequence[Feature], facts: Sequence[CaseFeatures], patients: Sequence[str]) -> np.ndarray:
    """The rows of the patients of these cases: who has several has their mean, and so counts once."""
    coded, often = [feature_row(parts, fact) for fact in facts], Counter(patients)
    found = {patient: np.zeros(sum(part.size for part in parts)) for patient in sorted(often)}
    for patient, numbers in zip(patients, coded, strict=True):
        found[patient] += numbers / often[patient]
    return np.stack(list(found.values()))


def labelled_cases(dataset: Dataset) -> list[str]:
    """The cases that are counted."""
    return [case for case, files in dataset.cases.items() if files.label is not None]


def _facts(declaration: Declaration, dataset: Dataset) -> CaseFeatures:
    (case,) = dataset.cases
    return case_features(dataset.read(case), declaration)


def case_features(case: Case, declaration: Declaration) -> CaseFeatures:
    """What is asked of a case; intensities of its annotated foreground, where a channel is CT."""
    box, whole = crop_box(case.image), case.image.shape[1:]
    size = [edge.stop - edge.start for edge in box]
    foreground = np.zeros(whole, bool) if case.label is None else Labels.of(declaration).is_foreground(case.label)
    z, y, x = (spacing * n for spacing, n in zip(case.spacing_mm, size, strict=True))
    return CaseFeatures(
        spacing_mm=case.spacing_mm,
        extent_mm=(z, y, x),
        kept=math.prod(size) / math.prod(whole),
        values=tuple(
            intensity_statistics(image[foreground]) if is_ct(name) else None
            for image, name in zip(case.image, declaration.channels, strict=True)
        ),
    )


def intensity_statistics(voxels: np.ndarray) -> IntensityStatistics | None:
    """The intensities of a case's foreground in HU; None if it has none."""
    if voxels.size == 0:
        return None
    exact = np.clip(voxels.astype(np.float64), *HOUNSFIELD_RANGE)
    low, high = np.percentile(exact, [0.5, 99.5])
    return IntensityStatistics(float(exact.mean()), float(exact.std()), float(low), float(high))


def declared_features(dataset: Dataset) -> dict[str, float]:
    """The parts whose value dataset.json declares for all cases of a site; pictures' files have no millimetres."""
    flat = dataset.declaration().dimension == 2
    first = next(iter(dataset.cases.values())).images[0]
    protocol = dataset.protocol
    spacing = protocol.get("spacing_mm") or ((1.0, 1.0, 1.0) if flat and is_picture(first) else ())
    size = protocol.get("size", ())
    if size and not spacing:
        example = '"spacing_mm": [3, 1, 1]'
        raise_if_any(dataset.name, [f"`protocol` has a size and no spacing; add one in mm for (z, y, x), as {example}"])
    axes = [axis for axis in range(3) if axis or not flat]
    found = {f"{SPACING}{AXES[axis]}": spacing[axis] for axis in axes} if spacing else {}
    return found | ({f"{EXTENT}{AXES[axis]}": spacing[axis] * size[axis] for axis in axes} if size else {})
