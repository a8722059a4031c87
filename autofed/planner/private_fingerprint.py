"""From a census under noise to the fingerprint that the planner reads; where noise wins, from a prior or a default.

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
"""A median whose rank has a larger standard error than this share of the patients is not believed."""

MOST_RATIO = 2.0
"""Nor is one that a standard error of its rank either way could halve or double: a pooling step."""

MOST_CT_ERROR = 0.2
"""Nor CT numbers with a standard error above this share of a standard deviation of the foreground."""

DEFAULT_SPACING_MM = 1.0
DEFAULT_VOXELS = {2: 512, 3: 128}
"""Where neither census nor prior says anything: isotropic voxels, so many along each axis."""

DEFAULT_CT = Channel(scheme="ct", mean=40.0, std=100.0, percentile_00_5=-160.0, percentile_99_5=240.0)
"""The window of soft tissue."""


@dataclass(frozen=True)
class Prior:
    """What is taken where noise wins: a plan for data of the same kind, or, without one, the defaults of this file."""

    plan: Plan | None
    source: str

    @property
    def name(self) -> str:
        """As reasons call it."""
        return f"the prior {self.source}" if self.plan else "autofed's default"

    def spacing_mm(self, axis: int) -> float:
        """On an axis of the files (z, y, x)."""
        if self.plan is None:
            return DEFAULT_SPACING_MM
        geometry = self.plan.local.geometry
        return geometry.spacing_mm[geometry.transpose.index(axis)]

    def extent_mm(self, axis: int, spacing_mm: float, dimension: int) -> float:
        """On an axis of the files; the default is a number of voxels at the spacing that was found."""
        if self.plan is None:
            return DEFAULT_VOXELS[dimension] * spacing_mm
        geometry = self.plan.local.geometry
        at = geometry.transpose.index(axis)
        return geometry.spacing_mm[at] * geometry.median_shape[at]

    def inside_mask(self) -> bool:
        """Whether z-scores leave out what is zero."""
        return self.plan is not None and self.plan.local.intensity.inside_mask

    def ct(self, channel: int) -> Channel:
        """The numbers of a CT channel."""
        return self.plan.local.intensity.channels[channel] if self.plan else DEFAULT_CT


def complete(census: PrivateFingerprint, plan: Plan | None = None, source: str = "") -> Fingerprint:
    """The fingerprint that a (merged) census stands for; `plan` is the prior, called `source` in the reasons.

    Cases are patients, and every structure that is declared counts as there: neither is asked. `Problems` if the prior
    is a plan for another kind of data.
    """
    raise_if_any("--prior", _prior_problems(census, plan))
    told: Told = {}
    prior, patients = Prior(plan, source), census.patients
    found = _spacings(census, prior, told)
    extents = [_extent(census, axis, found[axis], prior, told) for axis in range(3)]
    return Fingerprint(
        declaration=census.declaration,
        sites=census.sites,
        axes=tuple(_axis(*pair, patients) for pair in zip(found, extents, strict=True)),
        crop_ratio=_crop_ratio(census, prior, told),
        channels=tuple(
            _ct(census, number, name, prior, told) if is_ct(name) else ChannelSums()
            for number, name in enumerate(census.declaration.channels)
        ),
        classes={name: ClassCounts(cases=patients) for name in census.declaration.labels},
        noise=_noise(census, told),
    )


@dataclass(frozen=True)
class Source:
    """Where a value comes from and why, of one axis or of a field as a whole; by the census, or `instead` of it."""

    why: str
    axis: str = ""
    instead: bool = False


Told = dict[str, list[Source]]
"""The sources of each field of the plan."""


def _noise(census: PrivateFingerprint, told: Told) -> NoiseStatement:
    """What is told of each field."""
    return NoiseStatement(
        multiplier=census.noise_multiplier,
        told={field: "; ".join(_sentences(sources)) for field, sources in told.items()},
        missing=tuple(field for field, sources in told.items() if all(source.instead for source in sources)),
    )


def _sentences(sources: list[Source]) -> list[str]:
    """One for all axes of which the same is told."""
    axes: dict[str, list[str]] = {}
    for source in sources:
        axes.setdefault(source.why, []).append(source.axis)
    return [f"{', '.join(names)}: {why}" if any(names) else why for why, names in axes.items()]


def add_noise_reasons(fingerprint: Fingerprint, reasons: Reasons) -> None:
    """Add to the reasons what of the plan rests on noised counts, and what was taken from elsewhere."""
    if fingerprint.noise is None:
        return
    for field, why in fingerprint.noise.told.items():
        reasons.add(field, why, instead=field in fingerprint.noise.missing)
    why = "the fingerprints are noised: a promise of this plan counts them, with a Gaussian of this multiplier"
    reasons.say("agreement.privacy.census_noise", fingerprint.noise.multiplier, why)
    found = "not asked, since a count of each would cost noise: taken as declared, and cases as many as patients"
    reasons.say("agreement.labels", ", ".join(fingerprint.declaration.labels), found)


def _prior_problems(census: PrivateFingerprint, plan: Plan | None) -> list[str]:
    if plan is None:
        return []
    wanted, found = census.declaration, plan.agreement
    problems = []
    if found.dimension != wanted.dimension:
        problems.append(f"it is a plan for {found.dimension}D, the sites have {wanted.dimension}D; name another one")
    if [is_ct(name) for name in found.channels] != [is_ct(name) for name in wanted.channels]:
        listed = f"{', '.join(found.channels)}, the sites {', '.join(wanted.channels)}"
        problems.append(f"it has the channels {listed}; name a plan whose CT channels are the same")
    return problems


# --- medians


def _spacings(census: PrivateFingerprint, prior: Prior, told: Told) -> list[Counts]:
    """Of the axes (z, y, x)."""
    asked = range(3 - census.declaration.dimension, 3)
    sources = told.setdefault("local.geometry.spacing_mm", [])
    found = [
        _believed(one, census.patients, prior.spacing_mm(axis), f"axis {AXES[axis]}", prior, sources)
        for axis, one in zip(asked, spacings(census), strict=True)
    ]
    if len(found) == 2:  # as files of one slice are read
        found.insert(0, _one(PICTURE_SLICE_MM * max(map(_middle, found)), census.patients))
    return found


def _extent(census: PrivateFingerprint, axis: int, spacing: Counts, prior: Prior, told: Told) -> Counts:
    dimension = census.declaration.dimension
    if dimension == 2 and axis == 0:
        return spacing  # one slice
    sources = told.setdefault("local.geometry.median_shape", [])
    instead = prior.extent_mm(axis, _middle(spacing), dimension)
    found = distribution(census, "extent.", axis)
    return _believed(found, census.patients, instead, f"axis {AXES[axis]}", prior, sources)


def _believed(
    found: Distribution, patients: int, instead: float, axis: str, prior: Prior, sources: list[Source]
) -> Counts:
    """What was counted, if its median bears the noise, else the value of the prior; `sources` get which, and why."""
    if not found.error:
        sources.append(Source(f"{axis}: declared as a fact of the protocol"))
        return found.counts(patients)
    why = f"noise of the census in ranks is {found.error * patients:.0f} of {patients} patients"
    low, high = found.quantile(0.5 - found.error), found.quantile(0.5 + found.error)
    if found.error <= MOST_RANK_ERROR and high <= MOST_RATIO * low:
        sources.append(Source(why, axis))
        return found.counts(patients)
    between = "" if found.error > MOST_RANK_ERROR else f", so between {low:.3g} and {high:.3g}"
    sources.append(Source(f"{why}{between}: taken from {prior.name}", axis, instead=True))
    return _one(instead, patients)


def _axis(spacing: Counts, extent: Counts, patients: int) -> AxisCounts:
    """One axis; its size in voxels follows from the medians."""
    size = max(1, round(_middle(extent) / _middle(spacing)))
    return AxisCounts(spacing_mm=spacing, extent_mm=extent, size={str(size): patients})


def _one(value: float, patients: int) -> Counts:
    return {repr(float(value)): patients}


def _middle(counts: Counts) -> float:
    """The median of what was counted."""
    pairs = sorted((float(value), count) for value, count in counts.items())
    upto = np.cumsum([count for _, count in pairs])
    return pairs[int(np.searchsorted(upto, upto[-1] / 2))][0]


# --- intensities


def _crop_ratio(census: PrivateFingerprint, prior: Prior, told: Told) -> Counts:
    """Every patient on the side of the threshold on which the majority is."""
    found = cropped_share(census)
    if found is None:
        return {"1.0000": census.patients}
    share, error = found
    why = f"the share of patients with a smaller part has a standard error of {error:.2f} by the census' noise"
    hidden = error > MOST_RANK_ERROR or abs(share - 0.5) < error
    inside = prior.inside_mask() if hidden else share > 0.5
    source = Source(f"{why}: taken from {prior.name}" if hidden else why, instead=hidden)
    told["local.intensity.inside_mask"] = [source]
    return {f"{KEPT_BELOW / 2 if inside else 1:.4f}": census.patients}


def _ct(census: PrivateFingerprint, number: int, name: str, prior: Prior, told: Told) -> ChannelSums:
    """Mean, standard deviation and percentiles of the mixture of all patients, as sums that say just these."""
    channel, error = _mixture(census, number)
    where = f"local.intensity.channels.{name}"
    if channel is None or error > MOST_CT_ERROR:
        hidden = "hides them" if channel is None else f"is {error:.2f} of a standard deviation"
        why = f"noise of the census of {census.patients} patients {hidden}: taken from {prior.name}"
        told[where] = [Source(why, instead=True)]
        channel = prior.ct(number)
    else:
        why = f"from angles of {census.patients} patients; standard error {error:.2f} of a standard deviation"
        told[where] = [Source(why)]
    return _sums(channel, census.patients)


def _mixture(census: PrivateFingerprint, number: int) -> tuple[Channel | None, float]:
    """The numbers of a channel and the largest standard error of mean and standard deviation, in units of the latter.

    The variance of the mixture is that within patients, whose logarithm is taken as normal, and that between them. Its
    percentiles are as many standard deviations from its mean as those of a patient are.
    """
    found = [circular_estimate(census, number, what) for what in ("mean", "std", "low", "high")]
    if any(one is None for one in found):
        return None, math.inf
    mean, std, low, high = (one for one in found if one is not None)
    whole = math.sqrt(math.exp(2 * std.value + 2 * std.spread**2) + mean.spread**2)
    least, most = (float(np.clip(mean.value + step * whole, *HOUNSFIELD_RANGE)) for step in (-low.value, high.value))
    channel = Channel(
        scheme="ct",
        mean=mean.value,
        std=whole,
        percentile_00_5=min(least, mean.value),
        percentile_99_5=max(most, mean.value),
    )
    return channel, max(mean.error / whole, std.error)


def _sums(channel: Channel, patients: int) -> ChannelSums:
    """As a fingerprint has them."""
    mean, std = _numbers((channel.mean, channel.std))
    low, high = _numbers((channel.percentile_00_5, channel.percentile_99_5))
    masses = {repr(low): 1, repr(mean): 0, repr(high): 1}
    return ChannelSums(
        cases=patients,
        total=round(mean * patients * FIXED_POINT),
        squares=round((mean**2 + std**2) * patients * FIXED_POINT),
        histogram={value: patients * FIXED_POINT // 100 * (n or 98) for value, n in masses.items()},
    )


def _numbers(found: Iterable[float | None]) -> list[float]:
    return [0.0 if number is None else float(number) for number in found]
