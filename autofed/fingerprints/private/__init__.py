"""What a site tells of its data under noise: bounded numbers of each patient, whose noised sums merge by addition.

Each patient has one row of numbers. A row is made of parts (which bin, which angle, whether), each at most 1 long, and
its parts are weighted so that the whole row is at most 1 long too: what a patient can change, counted as one vector.
Which parts there are follows from what is declared alone.
"""

from autofed.fingerprints.private.estimates import (
    Distribution,
    Estimate,
    circular_estimate,
    cropped_share,
    distribution,
    spacings,
)
from autofed.fingerprints.private.features import (
    AXES,
    EXTENTS,
    KEPT_BELOW,
    PERIODS,
    SPACINGS_MM,
    STDS,
    Feature,
    feature_layout,
    feature_shares,
    triangular_factor,
)
from autofed.fingerprints.private.patient_rows import (
    CaseFeatures,
    IntensityStatistics,
    case_features,
    declared_features,
    feature_row,
    feature_rows,
    intensity_statistics,
    labelled_cases,
    patient_rows,
)
from autofed.fingerprints.private.records import NoisySums, PrivateFingerprint, assemble, merge, private_fingerprint

__all__ = [
    "AXES",
    "EXTENTS",
    "KEPT_BELOW",
    "PERIODS",
    "SPACINGS_MM",
    "STDS",
    "CaseFeatures",
    "Distribution",
    "Estimate",
    "Feature",
    "IntensityStatistics",
    "NoisySums",
    "PrivateFingerprint",
    "assemble",
    "case_features",
    "circular_estimate",
    "cropped_share",
    "declared_features",
    "distribution",
    "feature_layout",
    "feature_row",
    "feature_rows",
    "feature_shares",
    "intensity_statistics",
    "labelled_cases",
    "merge",
    "patient_rows",
    "private_fingerprint",
    "spacings",
    "triangular_factor",
]  # fmt: skip
