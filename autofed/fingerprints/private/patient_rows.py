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
    """The measurements of one case: axes (z, y, x), the share that cropping keeps, intensities by channel."""

    spacing_mm: tuple[float, float, float]
    extent_mm: tuple[float, float, float]
    kept: float
    values: tuple[IntensityStatistics | None, ...]


def feature_row(features: Sequence[Feature], case: CaseFeatures) -> np.ndarray:
    """The row of one case, its features concatenated; its L2 norm is at most 1."""
    coded = [
        math.sqrt(share) * _encode(feature, case)
        for feature, share in zip(features, feature_shares(features), strict=True)
    ]
    return np.concatenate(coded)


def _encode(feature: Feature, case: CaseFeatures) -> np.ndarray:
    """One feature of a case: an array of L2 norm at most 1."""
    if feature.name == KEPT:
        return np.array([float(case.kept < KEPT_BELOW)])
    if feature.name.startswith(CT):
        return _angle(feature.name, case)
    kind, axis = feature.name[:-1], AXES.index(feature.name[-1])
    value = (case.spacing_mm if kind == SPACING else case.extent_mm)[axis]
    nearest = np.abs(np.log(BINS[kind]) - math.log(max(value, 1e-9))).argmin()
    return triangular_factor(feature.size)[:, nearest]


def _angle(name: str, case: CaseFeatures) -> np.ndarray:
    """A point on the unit circle that turns with the number; the middle for a case that does not have it."""
    channel, what, period = name.removeprefix(CT).split(".", 2)
    values = case.values[int(channel)]
    if values is None:
        return np.zeros(2)
    std = min(max(values.std, STDS[0]), STDS[1])
    number = {
        "mean": values.mean,
        "std": math.log(std),
        "low": (values.mean - values.low) / std,
        "high": (values.high - values.mean) / std,
    }[what]
    angle = 2 * math.pi * number / float(period)
    return np.array([math.cos(angle), math.sin(angle)])


def feature_rows(
    dataset: Dataset, features: Sequence[Feature], *, processes: int = 1, progress: Progress = silent
) -> np.ndarray:
    """The rows of a site's patients (patients, numbers): each the mean over the patient's labelled cases."""
    cases = labelled_cases(dataset)
    single_cases = [replace(dataset, cases={case: dataset.cases[case]}) for case in cases]
    stage = f"private fingerprint of {dataset.name}"
    measurements = each(
        partial(_measure, dataset.declaration()), single_cases, stage=stage, processes=processes, progress=progress
    )
    return patient_rows(features, measurements, [dataset.patient(case) for case in cases])


def patient_rows(
    features: Sequence[Feature], measurements: Sequence[CaseFeatures], patients: Sequence[str]
) -> np.ndarray:
    """The rows of the patients of these cases: who has several has their mean, and so counts once."""
    case_rows, case_counts = [feature_row(features, case) for case in measurements], Counter(patients)
    rows = {patient: np.zeros(sum(feature.size for feature in features)) for patient in sorted(case_counts)}
    for patient, numbers in zip(patients, case_rows, strict=True):
        rows[patient] += numbers / case_counts[patient]
    return np.stack(list(rows.values()))


def labelled_cases(dataset: Dataset) -> list[str]:
    """The cases that are counted."""
    return [case for case, files in dataset.cases.items() if files.label is not None]


def _measure(declaration: Declaration, dataset: Dataset) -> CaseFeatures:
    (case,) = dataset.cases
    return case_features(dataset.read(case), declaration)


def case_features(case: Case, declaration: Declaration) -> CaseFeatures:
    """The measurements of a case; intensities of its annotated foreground, where a channel is CT."""
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
    """The features whose value dataset.json declares for all cases of a site; pictures' files have no millimetres."""
    flat = dataset.declaration().dimension == 2
    first = next(iter(dataset.cases.values())).images[0]
    protocol = dataset.protocol
    spacing = protocol.get("spacing_mm") or ((1.0, 1.0, 1.0) if flat and is_picture(first) else ())
    size = protocol.get("size", ())
    if size and not spacing:
        example = '"spacing_mm": [3, 1, 1]'
        raise_if_any(dataset.name, [f"`protocol` has a size and no spacing; add one in mm for (z, y, x), as {example}"])
    axes = [axis for axis in range(3) if axis or not flat]
    spacings = {f"{SPACING}{AXES[axis]}": spacing[axis] for axis in axes} if spacing else {}
    return spacings | ({f"{EXTENT}{AXES[axis]}": spacing[axis] * size[axis] for axis in axes} if size else {})
