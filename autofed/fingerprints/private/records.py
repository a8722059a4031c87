"""The record that leaves a site, and what several say together."""

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
    """Of one part the sum over patients, with independent Gaussian noise of this variance in each number."""

    numbers: tuple[float, ...]
    variance: float = Field(gt=0)
    patients: int = Field(ge=0)


class PrivateFingerprint(Record):
    """What one site, or several, tell under noise. Every number in it that depends on a patient is in `parts`.

    `declared_features` are protocol facts: for each part that they stand for, how many patients have which value.
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
        found = super().parse(value, about)
        raise_if_any(about, _inconsistencies(found))
        return found


def private_fingerprint(
    dataset: Dataset, parts: Sequence[Feature], sums: np.ndarray, noise_multiplier: float
) -> PrivateFingerprint:
    """The record of a site from the noised sum of its patients' rows. Its numbers are rounded, after the noise."""
    patients = len({dataset.patient(case) for case in labelled_cases(dataset)})
    counts = SiteCounts(patients=patients, cases=patients, labelled=patients, annotated=dataset.annotated)
    said = {name: {repr(float(value)): patients} for name, value in declared_features(dataset).items()}
    return assemble(dataset.declaration(), {dataset.name: counts}, parts, sums, noise_multiplier, said)


def assemble(
    declaration: Declaration,
    sites: dict[str, SiteCounts],
    parts: Sequence[Feature],
    sums: np.ndarray,
    noise_multiplier: float,
    declared: dict[str, dict[str, int]],
) -> PrivateFingerprint:
    """The record of the noised sum of rows, its parts in units of a patient."""
    patients = sum(site.patients for site in sites.values())
    cuts = np.cumsum([part.size for part in parts])[:-1]
    noised = {
        part.name: NoisySums(
            numbers=tuple(round(float(number) / math.sqrt(share), 3) for number in numbers),
            variance=noise_multiplier**2 / share,
            patients=patients,
        )
        for part, share, numbers in zip(parts, feature_shares(parts), np.split(sums, cuts), strict=True)
    }
    return PrivateFingerprint(
        declaration=declaration, sites=sites, noise_multiplier=noise_multiplier, parts=noised, declared=declared
    )


def merge(found: Sequence[PrivateFingerprint]) -> PrivateFingerprint:
    """All sites together: noised sums, their variances and patients are added. `Problems` if they disagree."""
    names = [name for one in found for name in one.sites]
    noises = {", ".join(one.sites): one.noise_multiplier for one in found}
    problems = [f"the site {n} comes {names.count(n)} times" for n in sorted(set(names)) if names.count(n) > 1]
    problems += disagreements({", ".join(one.sites): one.declaration for one in found})
    if len(set(noises.values())) > 1:
        listed = "; ".join(f"{sites}: {noise:g}" for sites, noise in noises.items())
        problems.append(f"the noise multipliers differ ({listed}); one --epsilon and one --delta at all sites give one")
    raise_if_any("the noised fingerprints", problems)
    return PrivateFingerprint(
        declaration=found[0].declaration,
        sites={name: site for one in found for name, site in sorted(one.sites.items())},
        noise_multiplier=found[0].noise_multiplier,
        parts={name: _sum([one.parts[name] for one in found if name in one.parts]) for name in _named(found, "parts")},
        declared={
            name: dict(sum((Counter(one.declared.get(name, {})) for one in found), Counter()))
            for name in _named(found, "declared")
        },
    )


def _named(found: Sequence[PrivateFingerprint], field: str) -> Iterator[str]:
    yield from dict.fromkeys(name for one in found for name in getattr(one, field))


def _sum(parts: Sequence[NoisySums]) -> NoisySums:
    return NoisySums(
        numbers=tuple(map(math.fsum, zip(*(part.numbers for part in parts), strict=True))),
        variance=math.fsum(part.variance for part in parts),
        patients=sum(part.patients for part in parts),
    )


def _inconsistencies(found: PrivateFingerprint) -> list[str]:
    """Where the parts of a census do not belong together; only what a single site hands over is read from files."""
    declaration = found.declaration
    problems = [
        *site_problems(found.sites),
        *labels_problems(declaration.labels, declaration.regions_class_order),
        *([] if declaration.dimension in (2, 3) else [f"declaration.dimension: found {declaration.dimension}"]),
    ]
    if problems:
        return problems
    asked = {part.name: part.size for part in feature_layout(found.declaration)}
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
        if name not in asked or name[:-1] not in BINS or not _is_declared(counts, found.patients)
    ]


def _is_declared(counts: Mapping[str, int], patients: int) -> bool:
    try:
        return sum(counts.values()) == patients and all(1e-9 < float(value) < 1e9 for value in counts)
    except ValueError:
        return False
