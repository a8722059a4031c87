"""Patches for training: drawn from patients, turned, scaled, mirrored, augmented, and made ahead of time.

`patches` says where a patch comes from, `views` how it is looked at, `intensities` what happens to its values, and
`feeders` who does the work: the calling thread, a thread of its own or processes.
"""

from autofed.batches.feeders import AHEAD, Feeder, Killed, Workers, memory_bytes, stream
from autofed.batches.patches import Draw, Patches, draw_patch, make_step
from autofed.batches.views import STRAIGHT, View, draw_view

__all__ = [
    "AHEAD",
    "STRAIGHT",
    "Draw",
    "Feeder",
    "Killed",
    "Patches",
    "View",
    "Workers",
    "draw_patch",
    "draw_view",
    "make_step",
    "memory_bytes",
    "stream",
]
