"""Keeping only the largest component of a structure, where scores on held-out cases say that it helps.

nnU-Net's rule (Isensee et al., Nat Methods 18:203, 2021): first all structures as one, taken if the mean Dice rises and
no structure's falls; then each structure by itself, taken if its own Dice rises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from monai.transforms.utils import get_largest_connected_component_mask

from autofed.data.labels import Labels, mask
from autofed.files import Record

RULES = ("nothing", "own", "foreground", "both")
"""What may be done to a structure: nothing, its own largest component, that of all structures as one, or both."""


class Postprocessing(Record):
    """What is done to every prediction: `foreground` to all structures as one, then to each of the `structures`."""

    foreground: bool = False
    structures: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.foreground or bool(self.structures)

    def apply(self, labels: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
        """The label map (any shape of 2 or 3 axes) with what is not the largest component made background."""
        if not self:
            return labels
        processed = _largest_foreground(labels) if self.foreground else labels.copy()
        for name in self.structures:
            structure_mask = processed == values[name]
            processed[structure_mask & ~largest(structure_mask)] = 0
        return processed

    def merged_with(self, other: Postprocessing) -> Postprocessing:
        """What both do."""
        return Postprocessing(
            foreground=self.foreground and other.foreground,
            structures=tuple(name for name in self.structures if name in other.structures),
        )


NOTHING = Postprocessing()


def largest(mask: np.ndarray) -> np.ndarray:
    """The largest component of a mask; voxels that touch by a corner belong together."""
    return np.asarray(get_largest_connected_component_mask(mask)) if mask.any() else mask


def masks_by_rule(label_map: np.ndarray, labels: Labels) -> Iterator[list[np.ndarray]]:
    """The masks of one structure after another in a label map, each after each of the `RULES`.

    The largest component of a region alone is not taken, since other regions share its voxels.
    """
    foreground_map = _largest_foreground(label_map)
    for _, values in labels.structures:
        structure_mask, in_foreground = mask(label_map, values), mask(foreground_map, values)
        yield (
            [structure_mask, structure_mask, in_foreground, in_foreground]
            if labels.is_regions
            else [structure_mask, largest(structure_mask), in_foreground, largest(in_foreground)]
        )


def choose_postprocessing(dice: Mapping[str, np.ndarray]) -> Postprocessing:
    """What to do, from the mean Dice of each structure after each of the `RULES` (shape (4,)); NaN: never scored."""
    scored = {name: scores for name, scores in dice.items() if not np.isnan(scores).any()}
    if not scored:
        return Postprocessing()
    table = np.stack(list(scored.values()))
    foreground_gain = table[:, 2] - table[:, 0]
    foreground = bool(foreground_gain.mean() > 0 and foreground_gain.min() >= 0)
    before, after = (2, 3) if foreground else (0, 1)
    return Postprocessing(
        foreground=foreground,
        structures=tuple(name for name, scores in scored.items() if scores[after] > scores[before]),
    )


def _largest_foreground(labels: np.ndarray) -> np.ndarray:
    return np.where(largest(labels > 0), labels, 0).astype(labels.dtype)
