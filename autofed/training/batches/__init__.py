"""Patches for training: drawn from patients, turned, scaled, mirrored, augmented, and made ahead of time.

`patches` says where a patch comes from, `views` how it is looked at, `intensities` what happens to its values, and
`feeders` who does the work: the calling thread, a thread of its own or processes.
"""

from autofed.training.batches.loader import AHEAD, PatchLoader, WorkerKilled, Workers, memory_bytes, stream
from autofed.training.batches.patches import BatchSample, PatchBatch, make_step_batches, sample_patch
from autofed.training.batches.spatial_transforms import IDENTITY, SpatialTransform, sample_transform

__all__ = [
    "AHEAD",
    "IDENTITY",
    "BatchSample",
    "PatchBatch",
    "PatchLoader",
    "SpatialTransform",
    "WorkerKilled",
    "Workers",
    "make_step_batches",
    "memory_bytes",
    "sample_patch",
    "sample_transform",
    "stream",
]
