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
"""Multiples of the spacing of the finest axes; axes that are as coarse already stay."""

FEWEST_ACROSS = 6
"""A structure keeps this many voxels across: below, the estimate of the Dice that a coarse outline costs fails."""

ASSUMED_SHARE = 0.125
"""Width that structures are assumed to have under private fingerprints, as a share of the median case's shortest edge.
"""

SHORTEST_EDGE = 8
"""In 2D a deepest stage with a shorter edge is left out: it holds most of the parameters, each of which gets noise."""


@dataclass(frozen=True)
class GridCandidate:
    """A grid with its patch and pooling; `outline_loss` is the Dice that its coarser outlines are predicted to cost.

    `factor` is its spacing over the plan's, `trained` says which weights learn. `fixed_network` is the network itself
    where no other is allowed.
    """

    factor: float
    geometry: TargetGrid
    topology: Topology
    outline_loss: float
    task: NetworkTask
    trained: Trained = "all"
    fixed_network: Network | None = None

    def network(self, width: int) -> Network:
        """The network on this grid, with `width` features in its first stage."""
        return self.fixed_network or self.task.network(self.topology, width)


def unchanged_grid(plan: Plan) -> GridCandidate:
    """The plan's own grid and network."""
    training, network = plan.local.training, plan.local.network
    topology = Topology(training.patch_size, network.kernels, network.strides)
    return GridCandidate(1.0, plan.local.geometry, topology, 0.0, network_task_of(plan), training.trained, network)


def grid_candidates(plan: Plan, fingerprint: Fingerprint | None = None) -> Iterator[GridCandidate]:
    """The plan's own grid and, where the fingerprint says how large the structures are, coarser ones."""
    unchanged = unchanged_grid(plan)
    finest = replace(unchanged, topology=_without_tiny_stages(unchanged.topology), fixed_network=None)
    yield finest
    width = _structure_width(plan, fingerprint) if fingerprint else None
    if fingerprint and fingerprint.noise:  # a count of voxels would cost noise
        width = ASSUMED_SHARE * min(plan.local.geometry.median_shape[-plan.local.axes :])
    for factor in FACTORS[1:] if width else ():
        coarser = _coarser(plan, factor)
        if coarser and width and width >= factor * FEWEST_ACROSS:
            geometry, topology = coarser
            loss = (factor - 1) / width
            yield replace(finest, factor=factor, geometry=geometry, topology=topology, outline_loss=loss)


def network_task_of(plan: Plan) -> NetworkTask:
    """The inputs and outputs of a plan's network."""
    network, entries = plan.local.network, len(plan.agreement.labels)
    return NetworkTask(network.in_channels, network.classes, PRESETS[plan.budget.preset], entries - network.classes)


def _coarser(plan: Plan, factor: float) -> tuple[TargetGrid, Topology] | None:
    """The grid of `factor` times the spacing, with nnU-Net's patch and pooling for it; None if it is too small."""
    geometry = plan.local.geometry
    axes = range(3 - plan.local.axes, 3)
    coarsest = factor * min(geometry.spacing_mm[axis] for axis in axes)
    z, y, x = (max(s, coarsest) if axis in axes else s for axis, s in enumerate(geometry.spacing_mm))
    spacing = (z, y, x)
    z, y, x = (n * old / new for n, old, new in zip(geometry.median_shape, geometry.spacing_mm, spacing, strict=True))
    grid = Grid(geometry.configuration, geometry.transpose, spacing, (z, y, x))
    try:
        topology = patch_for_memory(grid, network_task_of(plan), plan.budget.memory_gb)
    except ValidationErrors:
        return None
    size = tuple(max(1, round(n)) for n in (z, y, x))
    return geometry.model_copy(update={"spacing_mm": spacing, "median_shape": size}), _without_tiny_stages(topology)


def _without_tiny_stages(topology: Topology) -> Topology:
    """In 2D without the stages whose edges are very short; volumes need them to tell apart what looks alike."""
    while len(topology.patch) == 2 and len(topology.strides) > 2 and _shortest_edge(topology) < SHORTEST_EDGE:
        topology = Topology(topology.patch, topology.kernels[:-1], topology.strides[:-1])
    return topology


def _shortest_edge(topology: Topology) -> float:
    return min(edge / step for edge, step in zip(topology.patch, topology.divisor, strict=True))


def _structure_width(plan: Plan, fingerprint: Fingerprint) -> float | None:
    """Width of a connected component of a structure in voxels of the plan's grid: the harmonic mean over structures.

    Each is taken for a ball (a disk in 2D). A surface that is off by e moves the Dice of a ball of width D by 3 e / D,
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
