"""Cases on the plan's grid, stored so that a patch can be read alone, and the way back onto the file's own grid."""

from autofed.prepared.cases import (
    Prepared,
    WayBack,
    normalise,
    prepare,
    prepare_label,
    restore,
    restore_labels,
    restore_regions,
)
from autofed.prepared.public import UNKNOWN, Maps, PublicImages, differences, find_public, open_public, public_digests
from autofed.prepared.resampling import resample, resample_labels
from autofed.prepared.store import (
    ANNOTATED,
    LOCATIONS_PER_CLASS,
    Index,
    Store,
    open_store,
    pool,
    prepared_sites,
    preprocess,
)

__all__ = [
    "ANNOTATED", "LOCATIONS_PER_CLASS", "UNKNOWN", "Index", "Maps", "Prepared", "PublicImages", "Store", "WayBack",
    "differences", "find_public", "normalise", "open_public", "open_store", "pool", "prepare", "prepare_label",
    "prepared_sites", "preprocess", "public_digests", "resample", "resample_labels", "restore", "restore_labels",
    "restore_regions",
]  # fmt: skip
