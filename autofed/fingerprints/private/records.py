"""The private fingerprint that leaves a site, and the merged one of several sites."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field

from autofed.data import Dataset, Declaration, disagreements
from autofed.data.labels import labels_problems
from autofed.errors import raise_if_any
from autofed.files import Record
from autofed.fingerprints.exact import SiteCounts, site_problems
from autofed.fingerprints.private.features import BINS, Feature, feature_layout, feature_shares
from autofed.fingerprints.private.patient_rows import declared_features, labelled_cases
from autofed.plans import Speed


class NoisySums(Record):
    """The sum over patients of one feature, with independent Gaussian noise of this variance in each number."""

    numbers: tuple[float, ...]
    variance: float = Field(gt=0)
    patients: int = Field(ge=0)


class PrivateFingerprint(Record):
    """The private fingerprint of one site or, merged, of several. Every number that depends on a patient is in `parts`.

    `declared` are facts of the protocol: for each feature that they replace, how many patients have which value.
    """

    declaration: Declaration
    sites: dict[str, SiteCounts]
    noise_multiplier: float = Field(gt=0)
    parts: dict[str, NoisySums]
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
        fingerprint = super().parse(value, about)
        raise_if_any(about, _inconsistencies(fingerprint))
        return fingerprint


def private_fingerprint(
    dataset: Dataset, features: Sequence[Feature], sums: np.ndarray, noise_multiplier: float
) -> PrivateFingerprint:
    """The record of a site from the noisy sum of its patients' rows. Its numbers are rounded, after the noise."""
    patients = len({dataset.patient(case) for case in labelled_cases(dataset)})
    counts = SiteCounts(patients=patients, cases=patients, labelled=patients, annotated=dataset.annotated)
    declared = {name: {repr(float(value)): patients} for name, value in declared_features(dataset).items()}
    return assemble(dataset.declaration(), {dataset.name: counts}, features, sums, noise_multiplier, declared)


def assemble(
    declaration: Declaration,
    sites: dict[str, SiteCounts],
    features: Sequence[Feature],
    sums: np.ndarray,
    noise_multiplier: float,
    declared: dict[str, dict[str, int]],
) -> PrivateFingerprint:
    """The private fingerprint of a noisy sum of rows, its features in units of one patient.

    Args:
        declaration: what the sites declare alike.
        sites: their numbers of patients and cases, which are public.
        features: those of a row, in its order.
        sums: the noisy sum of the rows (numbers,).
        noise_multiplier: standard deviation of the noise in each number of `sums`; a row has norm at most 1.
        declared: by feature that the protocol states, how many patients have which value."""
    patients = sum(site.patients for site in sites.values())
    cuts = np.cumsum([feature.size for feature in features])[:-1]
    noisy_sums = {
        feature.name: NoisySums(
            numbers=tuple(round(float(number) / math.sqrt(share), 3) for number in numbers),
            variance=noise_multiplier**2 / share,
            patients=patients,
        )
        for feature, share, numbers in zip(features, feature_shares(features), np.split(sums, cuts), strict=True)
    }
    return PrivateFingerprint(
        declaration=declaration, sites=sites, noise_multiplier=noise_multiplier, parts=noisy_sums, declared=declared
    )


def merge(fingerprints: Sequence[PrivateFingerprint]) -> PrivateFingerprint:
    """All sites together: noisy sums, their variances and patients are added; `ValidationErrors` if they disagree."""
    names = [name for fingerprint in fingerprints for name in fingerprint.sites]
    noises = {", ".join(fingerprint.sites): fingerprint.noise_multiplier for fingerprint in fingerprints}
    problems = [f"the site {n} comes {names.count(n)} times" for n in sorted(set(names)) if names.count(n) > 1]
    problems += disagreements({", ".join(fingerprint.sites): fingerprint.declaration for fingerprint in fingerprints})
    if len(set(noises.values())) > 1:
        listed = "; ".join(f"{sites}: {noise:g}" for sites, noise in noises.items())
        problems.append(f"the noise multipliers differ ({listed}); one --epsilon and one --delta at all sites give one")
    raise_if_any("the private fingerprints", problems)
    return PrivateFingerprint(
        declaration=fingerprints[0].declaration,
        sites={name: site for fingerprint in fingerprints for name, site in sorted(fingerprint.sites.items())},
        noise_multiplier=fingerprints[0].noise_multiplier,
        parts={
            name: _sum([fingerprint.parts[name] for fingerprint in fingerprints if name in fingerprint.parts])
            for name in _names_in(fingerprints, "parts")
        },
        declared={
            name: dict(sum((Counter(fingerprint.declared.get(name, {})) for fingerprint in fingerprints), Counter()))
            for name in _names_in(fingerprints, "declared")
        },
    )


def _names_in(fingerprints: Sequence[PrivateFingerprint], field: str) -> Iterator[str]:
    yield from dict.fromkeys(name for fingerprint in fingerprints for name in getattr(fingerprint, field))


def _sum(parts: Sequence[NoisySums]) -> NoisySums:
    return NoisySums(
        numbers=tuple(map(math.fsum, zip(*(part.numbers for part in parts), strict=True))),
        variance=math.fsum(part.variance for part in parts),
        patients=sum(part.patients for part in parts),
    )


def _inconsistencies(fingerprint: PrivateFingerprint) -> list[str]:
    """Where a private fingerprint contradicts itself; only those of single sites are read from files."""
    declaration = fingerprint.declaration
    problems = [
        *site_problems(fingerprint.sites),
        *labels_problems(declaration.labels, declaration.regions_class_order),
        *([] if declaration.dimension in (2, 3) else [f"declaration.dimension: found {declaration.dimension}"]),
    ]
    if problems:
        return problems
    sizes = {sums.name: sums.size for sums in feature_layout(fingerprint.declaration)}
    expected = set(sizes) - set(fingerprint.declared)
    if set(fingerprint.parts) != expected:
        problems.append(f"parts: found {sorted(fingerprint.parts)}; the declaration asks for {sorted(expected)}")
    problems += [
        f"parts.{name}: found {len(sums.numbers)} numbers of {sums.patients} patients; expected {sizes[name]} numbers "
        f"of {fingerprint.patients} patients"
        for name, sums in fingerprint.parts.items()
        if name in sizes and (len(sums.numbers), sums.patients) != (sizes[name], fingerprint.patients)
    ]
    return problems + [
        f"declared.{name}: found {counts}; expected a spacing or an extent of all {fingerprint.patients} patients"
        for name, counts in fingerprint.declared.items()
        if name not in sizes or name[:-1] not in BINS or not _is_declared(counts, fingerprint.patients)
    ]


def _is_declared(counts: Mapping[str, int], patients: int) -> bool:
    try:
        return sum(counts.values()) == patients and all(1e-9 < float(value) < 1e9 for value in counts)
    except ValueError:
        return False
