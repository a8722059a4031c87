"""Coarser grids for a private plan: fewer voxels and stages cost less time and less noise, and some of the outline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from autofed.data.labels import Labels
from autofed.errors import ValidationErrors
from autofed.fingerprints import FIXED_POINT, Fingerprint
from autofed.planner.grids import Grid
from autofed.planner.presets import PRESETS
from autofed.planner.topology import NetworkTask, Topology, patch_for_memory
from autofed.plans import Network, Plan, TargetGrid, Trained

FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""So many times the spacing of the finest axes; axes that are as coarse already stay."""

FEWEST_ACROSS = 6
"""A structure keeps this many voxels across: below, the estimate of what a coarse outline costs does not hold."""

ASSUMED_SHARE = 0.125
"""Of the shortest edge of the median case: how wide a structure is taken to be where fingerprints were noised."""

SHORTEST_EDGE = 8
"""In 2D a deepest stage with a shorter edge is left out: it holds most of the parameters, each of which gets noise."""


@dataclass(frozen=True)
class GridCandidate:
    """A grid with the patch and the pooling for it; `lost` is the share of Dice that its coarser outline costs.

    `trained` says which weights learn. `own` is the network itself where it may be no other.
    """

    factor: float
    geometry: TargetGrid
    shape: Topology
    lost: float
    task: NetworkTask
    trained: Trained = "all"
    own: Network | None = None

    def network(self, width: int) -> Network:
        """The network on this grid, with so many features in its first stage."""
        return self.own or self.task.network(self.shape, width)


def unchanged_grid(plan: Plan) -> GridCandidate:
    """The plan's own grid and network."""
    training, network = plan.local.training, plan.local.network
    shape = Topology(training.patch_size, network.kernels, network.strides)
    return GridCandidate(1.0, plan.local.geometry, shape, 0.0, network_task_of(plan), training.trained, network)


def grid_candidates(plan: Plan, fingerprint: Fingerprint | None = None) -> Iterator[GridCandidate]:
    """The plan's own grid and, where the fingerprint tells how large the structures are, coarser ones."""
    whole = unchanged_grid(plan)
    own = replace(whole, shape=_shallow(whole.shape), own=None)
    yield own
    across = _voxels_across(plan, fingerprint) if fingerprint else None
    if fingerprint and fingerprint.noise:  # a count of voxels would cost noise
        across = ASSUMED_SHARE * min(plan.local.geometry.median_shape[-plan.local.axes :])
    for factor in FACTORS[1:] if across else ():
        found = _coarser(plan, factor)
        if found and across and across >= factor * FEWEST_ACROSS:
            geometry, shape = found
            yield replace(own, factor=factor, geometry=geometry, shape=shape, lost=(factor - 1) / across)


def network_task_of(plan: Plan) -> NetworkTask:
    """What a plan's network takes and gives."""
    network, entries = plan.local.network, len(plan.agreement.labels)
    return NetworkTask(network.in_channels, network.classes, PRESETS[plan.budget.preset], entries - network.classes)


def _coarser(plan: Plan, factor: float) -> tuple[TargetGrid, Topology] | None:
    """The grid of so many times the spacing, with nnU-Net's patch and pooling for it; None if it is too small."""
    geometry = plan.local.geometry
    axes = range(3 - plan.local.axes, 3)
    coarsest = factor * min(geometry.spacing_mm[axis] for axis in axes)
    z, y, x = (max(s, coarsest) if axis in axes else s for axis, s in enumerate(geometry.spacing_mm))
    spacing = (z, y, x)
    z, y, x = (n * old / new for n, old, new in zip(geometry.median_shape, geometry.spacing_mm, spacing, strict=True))
    grid = Grid(geometry.configuration, geometry.transpose, spacing, (z, y, x))
    try:
        found = patch_for_memory(grid, network_task_of(plan), plan.budget.memory_gb)
    except ValidationErrors:
        return None
    size = tuple(max(1, round(n)) for n in (z, y, x))
    return geometry.model_copy(update={"spacing_mm": spacing, "median_shape": size}), _shallow(found)


def _shallow(shape: Topology) -> Topology:
    """In 2D without the stages whose edges are very short; volumes need them to tell apart what looks alike."""
    while len(shape.patch) == 2 and len(shape.strides) > 2 and _shortest_edge(shape) < SHORTEST_EDGE:
        shape = Topology(shape.patch, shape.kernels[:-1], shape.strides[:-1])
    return shape


def _shortest_edge(shape: Topology) -> float:
    return min(edge / step for edge, step in zip(shape.patch, shape.divisor, strict=True))


def _voxels_across(plan: Plan, fingerprint: Fingerprint) -> float | None:
    """How many voxels of the plan's grid a piece of a structure is wide: the harmonic mean over structures.

    As if each were a ball (a disk in 2D). A surface that is off by e moves the Dice of a ball of width D by 3 e / D,
    and a grid that is f times coarser puts it off by about (f - 1) / 3 voxels of the finer one.
    """
    spacing = plan.local.geometry.spacing_mm
    flat = plan.agreement.dimension == 2
    voxel = 1.0 if flat else math.prod(spacing)
    widths = []
    for name in Labels.of(fingerprint.declaration).names:
        counts = fingerprint.classes[name]
        if counts.volume and counts.components:
            volume = counts.volume / FIXED_POINT / counts.components / voxel
            widths.append((4 * volume / math.pi) ** 0.5 if plan.local.axes == 2 else (6 * volume / math.pi) ** (1 / 3))
    return len(widths) / math.fsum(1 / width for width in widths) if widths else None
