"""Cases on the plan's grid, stored so that a patch can be read alone, and the way back onto the file's own grid."""

from autofed.prepared.cases import Prepared, WayBack, normalise, prepare, restore, restore_labels, restore_regions
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
    "ANNOTATED", "LOCATIONS_PER_CLASS", "Index", "Prepared", "Store", "WayBack", "normalise", "open_store", "pool",
    "prepare", "prepared_sites", "preprocess", "resample", "resample_labels", "restore", "restore_labels",
    "restore_regions",
]  # fmt: skip
