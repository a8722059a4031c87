"""Patches for training: sampled from patients, rotated, scaled, mirrored, augmented, and loaded ahead of time.

`patches` samples where a patch comes from, `spatial_transforms` rotates, scales and mirrors it, `intensities` augments
its values, and `loader` does the work in the calling thread, a thread of its own or processes.
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
