"""The private fingerprint: bounded features of each patient, whose noisy sums merge by addition.

Each patient has one row of numbers. A row is a concatenation of features (a bin, an angle, a yes or no), each of L2
norm at most 1 and weighted so that the whole row has norm at most 1 too: that is the sensitivity to one patient.
Which features there are follows from the declaration alone.
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
