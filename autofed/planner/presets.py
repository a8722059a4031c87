"""The presets of nnU-Net's planners: kind of network, reference memory, and how large it may grow there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from autofed.plans import PresetName

BASE_FEATURES = 32
MOST_FEATURES = {2: 512, 3: 320}


@dataclass(frozen=True)
class PresetRules:
    """`elements` outputs of all convolutions at batch size `batch` fill `memory_gb`, by dimension of the patch.

    A patch must leave room for `least_batch` patches; `dataset_share` of the voxels of all cases may be in one batch.
    """

    kind: Literal["unet", "resenc", "dcfed"]
    memory_gb: float
    elements: Mapping[int, float]
    least_batch: Mapping[int, int]
    dataset_share: float

    batch: ClassVar[Mapping[int, int]] = MappingProxyType({2: 12, 3: 2})

    def allowed(self, dimension: int, memory_gb: float) -> float:
        """Output elements at the reference batch size that fit the given memory: nnU-Net scales linearly."""
        return self.elements[dimension] * memory_gb / self.memory_gb


PRESETS: dict[PresetName, PresetRules] = {
    "plain": PresetRules("unet", 8, {2: 85e6, 3: 560e6}, {2: 2, 3: 2}, 0.05),
    "resenc-m": PresetRules("resenc", 8, {2: 135e6, 3: 680e6}, {2: 12, 3: 2}, 1.0),
    "resenc-l": PresetRules("resenc", 24, {2: 380e6, 3: 2.1e9}, {2: 12, 3: 2}, 1.0),
    "resenc-xl": PresetRules("resenc", 40, {2: 560e6, 3: 3.6e9}, {2: 12, 3: 2}, 1.0),
    "dcfed": PresetRules("dcfed", 8, {2: 135e6, 3: 680e6}, {2: 2, 3: 2}, 0.05),
}
"""nnU-Net 2.8.1: ExperimentPlanner, nnUNetPlannerResEncM, L and XL; DCFed's network counts like a ResEncM."""
