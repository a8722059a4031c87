"""From a private fingerprint to one that the planner reads; too noisy values come from a prior or a default.

Only noised sums and declared facts are read, so all of it is post-processing: it costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from autofed.data.images import PICTURE_SLICE_MM
from autofed.errors import raise_if_any
from autofed.fingerprints import (
    FIXED_POINT,
    HOUNSFIELD_RANGE,
    AxisCounts,
    ChannelSums,
    ClassCounts,
    Counts,
    Fingerprint,
    NoiseStatement,
    is_ct,
)
from autofed.fingerprints.private import (
    AXES,
    KEPT_BELOW,
    Distribution,
    PrivateFingerprint,
    circular_estimate,
    cropped_share,
    distribution,
    spacings,
)
from autofed.planner.reasons import Reasons
from autofed.plans import Channel, Plan

MOST_RANK_ERROR = 0.25
"""A median is not used if its rank has a larger standard error than this share of the patients."""

MOST_RATIO = 2.0
"""Nor if it changes by more than this factor (a pooling step) between one standard error of its rank either way."""

MOST_CT_ERROR = 0.2
"""CT numbers are not used if their standard error is above this share of a standard deviation of the foreground."""

DEFAULT_SPACING_MM = 1.0
DEFAULT_VOXELS = {2: 512, 3: 128}
"""With neither private fingerprint nor prior: isotropic voxels, so many along each axis, by dimension."""

DEFAULT_CT = Channel(scheme="ct", mean=40.0, std=100.0, percentile_00_5=-160.0, percentile_99_5=240.0)
"""The window of soft tissue."""


@dataclass(frozen=True)
class Prior:
    """What replaces values that are too noisy: a plan for data of the same kind, or else the defaults of this file."""

    plan: Plan | None
    source: str

    @property
    def name(self) -> str:
        """What reasons call it."""
        return f"the prior {self.source}" if self.plan else "autofed's default"

    def spacing_mm(self, axis: int) -> float:
        """The spacing of an axis of the files (z, y, x)."""
        if self.plan is None:
            return DEFAULT_SPACING_MM
        geometry = self.plan.local.geometry
        return geometry.spacing_mm[geometry.transpose.index(axis)]

    def extent_mm(self, axis: int, spacing_mm: float, dimension: int) -> float:
        """The extent of an axis of the files; the default is a number of voxels at `spacing_mm`."""
        if self.plan is None:
            return DEFAULT_VOXELS[dimension] * spacing_mm
        geometry = self.plan.local.geometry
        at = geometry.transpose.index(axis)
        return geometry.spacing_mm[at] * geometry.median_shape[at]

    def inside_mask(self) -> bool:
        """Whether z-scores leave out voxels that are zero."""
        return self.plan is not None and self.plan.local.intensity.inside_mask

    def ct(self, channel: int) -> Channel:
        """The statistics of a CT channel."""
        return self.plan.local.intensity.channels[channel] if self.plan else DEFAULT_CT


def to_fingerprint(private: PrivateFingerprint, plan: Plan | None = None, source: str = "") -> Fingerprint:
    """The fingerprint that a (merged) private one stands for; `plan` is the prior, called `source` in the reasons.

    Cases are counted as patients, and every declared structure as present in all: a private fingerprint has neither.
    `ValidationErrors` if the prior is a plan for another kind of data.
    """
    raise_if_any("--prior", _prior_problems(private, plan))
    sources: SourcesByField = {}
    prior, patients = Prior(plan, source), private.patients
    spacings_mm = _spacings(private, prior, sources)
    extents = [_extent(private, axis, spacings_mm[axis], prior, sources) for axis in range(3)]
    return Fingerprint(
        declaration=private.declaration,
        sites=private.sites,
        axes=tuple(_axis(*pair, patients) for pair in zip(spacings_mm, extents, strict=True)),
        crop_ratio=_crop_ratio(private, prior, sources),
        channels=tuple(
            _ct_sums(private, number, name, prior, sources) if is_ct(name) else ChannelSums()
            for number, name in enumerate(private.declaration.channels)
        ),
        classes={name: ClassCounts(cases=patients) for name in private.declaration.labels},
        noise=_noise_statement(private, sources),
    )


@dataclass(frozen=True)
class Source:
    """Why a value (of one axis, or of a whole field) is what it is; `instead`: not from the private fingerprint."""

    why: str
    axis: str = ""
    instead: bool = False


SourcesByField = dict[str, list[Source]]
"""The sources of each field of the plan."""


def _noise_statement(private: PrivateFingerprint, sources_by_field: SourcesByField) -> NoiseStatement:
    """The noise, and the sources of each field as the fingerprint states them."""
    return NoiseStatement(
        multiplier=private.noise_multiplier,
        told={field: "; ".join(_joined_by_reason(sources)) for field, sources in sources_by_field.items()},
        missing=tuple(
            field for field, sources in sources_by_field.items() if all(source.instead for source in sources)
        ),
    )


def _joined_by_reason(sources: list[Source]) -> list[str]:
    """One sentence for all axes with the same source."""
    axes: dict[str, list[str]] = {}
    for source in sources:
        axes.setdefault(source.why, []).append(source.axis)
    return [f"{', '.join(names)}: {why}" if any(names) else why for why, names in axes.items()]


def add_noise_reasons(fingerprint: Fingerprint, reasons: Reasons) -> None:
    """Add to the reasons which fields rest on noised counts, and which on a prior or default instead."""
    if fingerprint.noise is None:
        return
    for field, why in fingerprint.noise.told.items():
        reasons.amend(field, why, instead=field in fingerprint.noise.missing)
    why = "the fingerprints are noised: a promise of this plan counts them, with a Gaussian of this multiplier"
    reasons.record("agreement.privacy.census_noise", fingerprint.noise.multiplier, why)
    declared = "not asked, since a count of each would cost noise: taken as declared, and cases as many as patients"
    reasons.record("agreement.labels", ", ".join(fingerprint.declaration.labels), declared)


def _prior_problems(private: PrivateFingerprint, plan: Plan | None) -> list[str]:
    if plan is None:
        return []
    declaration, prior = private.declaration, plan.agreement
    problems = []
    if prior.dimension != declaration.dimension:
        problems.append(
            f"it is a plan for {prior.dimension}D, the sites have {declaration.dimension}D; name another one"
        )
    if [is_ct(name) for name in prior.channels] != [is_ct(name) for name in declaration.channels]:
        listed = f"{', '.join(prior.channels)}, the sites {', '.join(declaration.channels)}"
        problems.append(f"it has the channels {listed}; name a plan whose CT channels are the same")
    return problems


# --- medians


def _spacings(private: PrivateFingerprint, prior: Prior, sources_by_field: SourcesByField) -> list[Counts]:
    """The spacings of each axis (z, y, x)."""
    released_axes = range(3 - private.declaration.dimension, 3)
    sources = sources_by_field.setdefault("local.geometry.spacing_mm", [])
    counts = [
        _released_or_prior(released, private.patients, prior.spacing_mm(axis), f"axis {AXES[axis]}", prior, sources)
        for axis, released in zip(released_axes, spacings(private), strict=True)
    ]
    if len(counts) == 2:  # as files of one slice are read
        counts.insert(0, _single_value(PICTURE_SLICE_MM * max(map(_median, counts)), private.patients))
    return counts


def _extent(
    private: PrivateFingerprint, axis: int, spacing: Counts, prior: Prior, sources_by_field: SourcesByField
) -> Counts:
    dimension = private.declaration.dimension
    if dimension == 2 and axis == 0:
        return spacing  # one slice
    sources = sources_by_field.setdefault("local.geometry.median_shape", [])
    prior_extent = prior.extent_mm(axis, _median(spacing), dimension)
    released = distribution(private, "extent.", axis)
    return _released_or_prior(released, private.patients, prior_extent, f"axis {AXES[axis]}", prior, sources)


def _released_or_prior(
    released: Distribution, patients: int, prior_value: float, axis: str, prior: Prior, sources: list[Source]
) -> Counts:
    """The released counts if their median is precise enough, else `prior_value`; which and why goes to `sources`.

    Args:
        released: The estimated distribution over patients.
        patients: Patients of all sites.
        prior_value: What the prior says.
        axis: Its name in the source.
        prior: Named in the source.
        sources: The list that the source is appended to.
    """
    if not released.error:
        sources.append(Source(f"{axis}: declared as a fact of the protocol"))
        return released.counts(patients)
    why = f"noise of the census in ranks is {released.error * patients:.0f} of {patients} patients"
    low, high = released.quantile(0.5 - released.error), released.quantile(0.5 + released.error)
    if released.error <= MOST_RANK_ERROR and high <= MOST_RATIO * low:
        sources.append(Source(why, axis))
        return released.counts(patients)
    interval = "" if released.error > MOST_RANK_ERROR else f", so between {low:.3g} and {high:.3g}"
    sources.append(Source(f"{why}{interval}: taken from {prior.name}", axis, instead=True))
    return _single_value(prior_value, patients)


def _axis(spacing: Counts, extent: Counts, patients: int) -> AxisCounts:
    """One axis; its size in voxels follows from the medians."""
    size = max(1, round(_median(extent) / _median(spacing)))
    return AxisCounts(spacing_mm=spacing, extent_mm=extent, size={str(size): patients})


def _single_value(value: float, patients: int) -> Counts:
    return {repr(float(value)): patients}


def _median(counts: Counts) -> float:
    """The median of counted values."""
    pairs = sorted((float(value), count) for value, count in counts.items())
    cumulative = np.cumsum([count for _, count in pairs])
    return pairs[int(np.searchsorted(cumulative, cumulative[-1] / 2))][0]


# --- intensities


def _crop_ratio(private: PrivateFingerprint, prior: Prior, sources_by_field: SourcesByField) -> Counts:
    """Every patient on the side of the threshold on which the majority is."""
    estimate = cropped_share(private)
    if estimate is None:
        return {"1.0000": private.patients}
    share, error = estimate
    why = f"the share of patients with a smaller part has a standard error of {error:.2f} by the census' noise"
    is_hidden = error > MOST_RANK_ERROR or abs(share - 0.5) < error
    inside = prior.inside_mask() if is_hidden else share > 0.5
    source = Source(f"{why}: taken from {prior.name}" if is_hidden else why, instead=is_hidden)
    sources_by_field["local.intensity.inside_mask"] = [source]
    return {f"{KEPT_BELOW / 2 if inside else 1:.4f}": private.patients}


def _ct_sums(
    private: PrivateFingerprint, number: int, name: str, prior: Prior, sources_by_field: SourcesByField
) -> ChannelSums:
    """Sums from which the planner computes mean, standard deviation and percentiles of the mixture of all patients."""
    channel, error = _mixture_statistics(private, number)
    field = f"local.intensity.channels.{name}"
    if channel is None or error > MOST_CT_ERROR:
        finding = "hides them" if channel is None else f"is {error:.2f} of a standard deviation"
        why = f"noise of the census of {private.patients} patients {finding}: taken from {prior.name}"
        sources_by_field[field] = [Source(why, instead=True)]
        channel = prior.ct(number)
    else:
        why = f"from angles of {private.patients} patients; standard error {error:.2f} of a standard deviation"
        sources_by_field[field] = [Source(why)]
    return _channel_sums(channel, private.patients)


def _mixture_statistics(private: PrivateFingerprint, number: int) -> tuple[Channel | None, float]:
    """A channel's statistics, and the largest standard error of its mean and standard deviation in units of the latter.

    The variance of the mixture is that within patients, whose logarithm is taken as normal, and that between them. Its
    percentiles are as many standard deviations from its mean as those of a patient are.
    """
    estimates = [circular_estimate(private, number, what) for what in ("mean", "std", "low", "high")]
    if any(estimate is None for estimate in estimates):
        return None, math.inf
    mean, std, low, high = (estimate for estimate in estimates if estimate is not None)
    total_std = math.sqrt(math.exp(2 * std.value + 2 * std.spread**2) + mean.spread**2)
    least, most = (
        float(np.clip(mean.value + step * total_std, *HOUNSFIELD_RANGE)) for step in (-low.value, high.value)
    )
    channel = Channel(
        scheme="ct",
        mean=mean.value,
        std=total_std,
        percentile_00_5=min(least, mean.value),
        percentile_99_5=max(most, mean.value),
    )
    return channel, max(mean.error / total_std, std.error)


def _channel_sums(channel: Channel, patients: int) -> ChannelSums:
    """The statistics of a channel in the form of a fingerprint."""
    mean, std = _without_none((channel.mean, channel.std))
    low, high = _without_none((channel.percentile_00_5, channel.percentile_99_5))
    masses = {repr(low): 1, repr(mean): 0, repr(high): 1}
    return ChannelSums(
        cases=patients,
        total=round(mean * patients * FIXED_POINT),
        squares=round((mean**2 + std**2) * patients * FIXED_POINT),
        histogram={value: patients * FIXED_POINT // 100 * (n or 98) for value, n in masses.items()},
    )


def _without_none(numbers: Iterable[float | None]) -> list[float]:
    return [0.0 if number is None else float(number) for number in numbers]
