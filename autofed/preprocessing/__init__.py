"""Cases on the plan's grid, stored so that a patch can be read alone, and the way back onto the file's own grid."""

from autofed.preprocessing.cases import (
    InverseTransform,
    PreprocessedCase,
    normalise,
    preprocess_case,
    preprocess_label,
    restore,
    restore_labels,
    restore_regions,
)
from autofed.preprocessing.public_images import (
    UNKNOWN,
    LabelMaps,
    PublicImages,
    differences,
    find_public,
    open_public,
    public_digests,
)
from autofed.preprocessing.resampling import resample, resample_labels
from autofed.preprocessing.store import (
    ANNOTATED,
    LOCATIONS_PER_CLASS,
    Index,
    Store,
    open_store,
    pool_stores,
    preprocess,
    preprocessed_sites,
)

__all__ = [
    "ANNOTATED",
    "LOCATIONS_PER_CLASS",
    "UNKNOWN",
    "Index",
    "InverseTransform",
    "LabelMaps",
    "PreprocessedCase",
    "PublicImages",
    "Store",
    "differences",
    "find_public",
    "normalise",
    "open_public",
    "open_store",
    "pool_stores",
    "preprocess",
    "preprocess_case",
    "preprocess_label",
    "preprocessed_sites",
    "public_digests",
    "resample",
    "resample_labels",
    "restore",
    "restore_labels",
    "restore_regions",
]  # fmt: skip
