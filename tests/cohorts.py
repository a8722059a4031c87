"""Made-up cohorts of any size: patients drawn from the gallery's histograms, or from what is usual in a kind of scan.

What is drawn are a case's facts (spacing, extent, cropping, intensities); nothing is written and nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autofed import planner
from autofed.data import Declaration
from autofed.fingerprints import AxisCounts, ChannelSums, ClassCounts, Fingerprint, SiteCounts, exact, is_ct
from autofed.fingerprints import private as private_fingerprints
from autofed.fingerprints.private import CaseFeatures, PrivateFingerprint
from autofed.planner.private_fingerprint import to_fingerprint
from autofed.plans import Budget, Plan
from autofed.privacy.private_fingerprint import OF_PATIENTS, PrivateFingerprintMechanism

GALLERY = Path(__file__).parent.parent / "plans"
TASKS = ("dermoscopy", "breast-ultrasound", "histology", "kidney-ct-simulated", "brain-mri", "hippocampus")
BUDGET = Budget(device="cuda")
BETWEEN, SCALES = 0.45, 0.1
"""How far patients' mean intensities are apart, in standard deviations, and their standard deviations (log)."""


@dataclass(frozen=True)
class Cohort:
    """The patients of one site, one case each, with the foreground voxels of CT (or None)."""

    site: str
    declaration: Declaration
    facts: tuple[CaseFeatures, ...]
    voxels: tuple[np.ndarray | None, ...]

    @property
    def counts(self) -> dict[str, SiteCounts]:
        n = len(self.facts)
        return {self.site: SiteCounts(patients=n, cases=n, labelled=n)}


Draw = Callable[[int, np.random.Generator], tuple[list[CaseFeatures], list[np.ndarray | None]]]


def federation(task: str, sites: int, patients: int, rng: np.random.Generator) -> list[Cohort]:
    """Cohorts of a task of the gallery or of `SYNTHETIC`."""
    declaration, draw = SYNTHETIC[task] if task in SYNTHETIC else _like_gallery(task)
    drawn = [draw(patients, rng) for _ in range(sites)]
    return [Cohort(f"site_{i}", declaration, tuple(f), tuple(v)) for i, (f, v) in enumerate(drawn)]


def open_plan(cohorts: Sequence[Cohort]) -> Plan:
    """The plan of the counts as they are."""
    return planner.make(exact.merge([_fingerprint(cohort) for cohort in cohorts]), BUDGET)


def released(cohort: Cohort, noise_multiplier: float, rng: np.random.Generator) -> PrivateFingerprint:
    """What a site of these patients tells under noise."""
    flat = cohort.declaration.dimension == 2
    said = {"spacing.y": 1.0, "spacing.x": 1.0} if flat else {}
    parts = private_fingerprints.feature_layout(cohort.declaration, list(said))
    rows = private_fingerprints.patient_rows(parts, cohort.facts, [str(i) for i in range(len(cohort.facts))])
    mechanism = PrivateFingerprintMechanism(noise_multiplier).with_key(rng.bytes(32))
    sums = mechanism.release({OF_PATIENTS: {"rows": rows}})["sums"]["rows"]
    declared = {name: {repr(value): len(rows)} for name, value in said.items()}
    return private_fingerprints.assemble(cohort.declaration, cohort.counts, parts, sums, noise_multiplier, declared)


def private_plan(
    cohorts: Sequence[Cohort], noise_multiplier: float, rng: np.random.Generator, prior: Plan | None = None
) -> Plan:
    """The plan of one draw of the noise."""
    merged = private_fingerprints.merge([released(cohort, noise_multiplier, rng) for cohort in cohorts])
    return planner.make(to_fingerprint(merged, prior, "a prior"), BUDGET)


# --- how far a private plan is from the open one


def same_dimensionality(made: Plan, private: Plan) -> bool:
    """Whether they learn slice by slice, or both in volumes."""
    return made.local.geometry.configuration == private.local.geometry.configuration


def patch_error(made: Plan, private: Plan) -> float:
    """By how many pooling steps the patch is off on the worst axis: in multiples of what a patch is a multiple of."""
    here, there = made.local, private.local
    if here.axes != there.axes:
        return float("inf")
    sides = zip(here.training.patch_size, there.training.patch_size, strict=True)
    steps = zip(here.network.divisor, there.network.divisor, strict=True)
    return max(abs(a - b) / max(d, e) for (a, b), (d, e) in zip(sides, steps, strict=True))


def poolings_error(made: Plan, private: Plan) -> float:
    """By how many halvings the patch is off on the worst axis: its edges and how often they are halved."""
    here, there = made.local, private.local
    if here.axes != there.axes:
        return float("inf")
    sides = zip(here.training.patch_size, there.training.patch_size, strict=True)
    steps = zip(here.network.divisor, there.network.divisor, strict=True)
    return max(abs(np.log2(a / b)) for a, b in (*sides, *steps))


def intensity_error(made: Plan, private: Plan, cohorts: Sequence[Cohort]) -> float:
    """By how many standard deviations normalised foreground is off, root mean square; infinite for another scheme.

    Also mean and standard deviation count, each by itself, in standard deviations.
    """
    here, there = made.local.intensity, private.local.intensity
    if here.inside_mask != there.inside_mask or [c.scheme for c in here.channels] != [c.scheme for c in there.channels]:
        return float("inf")
    worst = 0.0
    for a, b in zip(here.channels, there.channels, strict=True):
        if a.scheme == "ct":
            voxels = np.concatenate([v for cohort in cohorts for v in cohort.voxels if v is not None])
            off = _normalised(voxels, a) - _normalised(voxels, b)
            worst = max(worst, np.sqrt(np.mean(off**2)), abs(a.mean - b.mean) / a.std, abs(a.std - b.std) / a.std)
    return float(worst)


def _normalised(voxels, channel):
    return (np.clip(voxels, channel.percentile_00_5, channel.percentile_99_5) - channel.mean) / channel.std


# --- counts as they are


def _fingerprint(cohort: Cohort) -> Fingerprint:
    n = len(cohort.facts)
    return Fingerprint(
        declaration=cohort.declaration,
        sites=cohort.counts,
        axes=tuple(_axis([f.spacing_mm[a] for f in cohort.facts], [f.extent_mm[a] for f in cohort.facts])
                   for a in range(3)),
        crop_ratio=_often([f"{f.kept:.4f}" for f in cohort.facts]),
        channels=tuple(_sums(cohort, name) for name in cohort.declaration.channels),
        classes={name: ClassCounts(cases=n) for name in cohort.declaration.labels},
    )  # fmt: skip


def _axis(spacings, extents) -> AxisCounts:
    sizes = [str(max(1, round(e / s))) for e, s in zip(extents, spacings, strict=True)]
    return AxisCounts(spacing_mm=_often(map(repr, spacings)), extent_mm=_often(map(repr, extents)), size=_often(sizes))


def _often(keys) -> dict[str, int]:
    keys = list(keys)
    return {key: keys.count(key) for key in sorted(set(keys), key=float)}


def _sums(cohort: Cohort, name: str) -> ChannelSums:
    if not is_ct(name):
        return ChannelSums(cases=len(cohort.facts), histogram={"0": len(cohort.facts) << 24})
    parts = [exact._channel(voxels, name) for voxels in cohort.voxels]
    summed = parts[0]
    for part in parts[1:]:
        summed = exact._add_fields(summed, part)
    return summed


# --- drawing


def _like_gallery(task: str) -> tuple[Declaration, Draw]:
    """Spacings of a patient's axes are drawn together, since they go with a scanner; extents each by itself."""
    found = Fingerprint.load(GALLERY / task / "fingerprint.json")

    def draw(n, rng):
        scanner = rng.random(n)
        spacings = [_drawn(axis.spacing_mm, scanner) for axis in found.axes]
        extents = [_drawn(axis.extent_mm, rng.random(n)) for axis in found.axes]
        kept = _drawn(found.crop_ratio, rng.random(n))
        base = _quantiles(found.channels[0].histogram) if is_ct(found.declaration.channels[0]) else None
        return _facts(spacings, extents, kept, base, found.declaration, rng)

    return found.declaration, draw


def _drawn(counts, at):
    return np.quantile(exact.values(counts), at, method="inverted_cdf")


def _quantiles(histogram, points=400):
    pairs = sorted((float(v), m) for v, m in histogram.items())
    share = np.cumsum([m for _, m in pairs]) / sum(m for _, m in pairs)
    return np.array([pairs[np.searchsorted(share, p)][0] for p in (np.arange(points) + 0.5) / points])


def _facts(spacings, extents, kept, base, declaration, rng):
    voxels = [None if base is None else _patient(base, rng) for _ in kept]
    facts = [
        CaseFeatures(
            tuple(float(s[i]) for s in spacings),
            tuple(float(e[i]) for e in extents),
            float(kept[i]),
            tuple(
                private_fingerprints.intensity_statistics(voxels[i]) if is_ct(name) else None
                for name in declaration.channels
            ),
        )
        for i in range(len(kept))
    ]
    return facts, voxels


def _patient(base, rng):
    """One patient's foreground: the mixture's, narrower, shifted and scaled by chance."""
    scale = np.sqrt(1 - BETWEEN**2) * np.exp(rng.normal(0, SCALES))
    moved = base.mean() + scale * (base - base.mean()) + rng.normal(0, BETWEEN * base.std())
    return np.clip(np.round(moved), -1024, 3071)


def _abdomen(n, rng):
    """CT of an abdomen: slices of 0.7 to 5 mm, mostly thin, 512 pixels of any size, contrast in several phases."""
    return _ct(rng.choice([0.7, 0.8, 1.0, 1.25, 1.5, 2.5, 5.0], n, p=[0.1, 0.15, 0.3, 0.15, 0.1, 0.1, 0.1]), rng)


def _thick(n, rng):
    """The same with slices of 1 to 5 mm: their median is 3 times the pixels, just where nnU-Net's rule changes."""
    return _ct(rng.choice([1.0, 1.25, 2.0, 2.5, 3.0, 5.0], n, p=[0.2, 0.15, 0.15, 0.15, 0.2, 0.15]), rng)


def _ct(thick, rng):
    plane = rng.uniform(0.6, 0.98, len(thick))
    height = np.ceil(np.exp(rng.normal(np.log(430), 0.25, len(thick))) / thick) * thick
    parts = [rng.normal(105, 22, 3000), rng.normal(60, 35, 800), rng.normal(-20, 60, 200)]
    base = np.quantile(np.concatenate(parts), (np.arange(400) + 0.5) / 400)
    extents = [height, 512 * plane, 512 * plane]
    return _facts([thick, plane, plane], extents, np.ones(len(thick)), base, ABDOMEN, rng)


def _heart(n, rng):
    """Cine MRI of the heart: 6 to 18 slices, 5 to 10 mm thick."""
    thick, plane = rng.choice([5.0, 8.0, 10.0], n, p=[0.2, 0.2, 0.6]), rng.uniform(1.25, 1.7, n)
    slices, size = rng.integers(6, 19, n), rng.choice([216, 224, 256], n)
    return _facts(
        [thick, plane, plane], [slices * thick, size * plane, 1.1 * size * plane], np.ones(n), None, HEART, rng
    )


def _head(n, rng):
    """MRI of the head without its skull: 1 mm, a third of the volume is left."""
    one = np.ones(n)
    extents = [np.round(rng.normal(mean, 6, n)) for mean in (138, 171, 138)]
    return _facts([one] * 3, extents, rng.normal(0.36, 0.03, n), None, HEAD, rng)


_ORGAN = {"background": 0, "organ": 1, "tumour": 2}
ABDOMEN = Declaration(channels=("CT",), labels=_ORGAN, dimension=3)
HEART = Declaration(channels=("cine",), labels=_ORGAN, dimension=3)
HEAD = Declaration(channels=("T1", "FLAIR"), labels=_ORGAN, dimension=3)
SYNTHETIC: dict[str, tuple[Declaration, Draw]] = {
    "abdomen-ct (made up)": (ABDOMEN, _abdomen),
    "thick-ct (made up)": (ABDOMEN, _thick),
    "heart-mri (made up)": (HEART, _heart),
    "head-mri (made up)": (HEAD, _head),
}
