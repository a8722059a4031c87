"""What fits the hours: the width of the network, the batch and the number of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autofed.planner.presets import BASE_FEATURES
from autofed.planner.reasons import Reasons
from autofed.planner.topology import NetworkTask, Topology
from autofed.plans import Budget, Network, Shape

NETWORK_WIDTHS = (32, 24, 16, 12, 8)
"""Widths of the first stage, tried from the left until enough steps fit into the hours."""

FULL_TRAINING = 250_000
"""Steps of a full training (nnU-Net: 1000 epochs of 250)."""

ENOUGH_STEPS = 2000
"""Fewer steps than this at a site, and a narrower network or a smaller batch learns more in the same hours."""

SMALLEST_BATCH = 2

USEFUL_SHARE = 0.8
"""Share of the hours that is planned; the rest is for averaging, saving and whatever else the machine does."""


@dataclass(frozen=True)
class NetworkSize:
    """Size of network and training: features of the first stage, patches in a batch, steps of each site."""

    base_features: int
    batch: int
    steps: int


def network_size(
    task: NetworkTask, topology: Topology, batch: int, passes: Mapping[str, float], budget: Budget, reasons: Reasons
) -> NetworkSize:
    """The widest network that gets enough steps in the hours; nnU-Net's own width and steps where no hours are given.

    The batch is made smaller before the network is made narrower.

    Args:
        task: Inputs, outputs and preset of the network.
        topology: Patch, kernels and strides.
        batch: Patches that the memory allows.
        passes: What a step computes at each site, in passes over the batch (`passes_per_step`).
        budget: Its hours and speeds.
        reasons: Where the reasons for width and batch are recorded.
    """
    cap = f"memory and {task.preset.dataset_share:.0%} of the voxels of all sites' labelled cases allow {batch}"
    if budget.hours is None:
        reasons.record("local.network.features", BASE_FEATURES, "no hours were given: nnU-Net's full width")
        reasons.record("local.training.batch_size", batch, cap)
        return NetworkSize(BASE_FEATURES, batch, FULL_TRAINING // len(passes))
    for base_features, smaller_batch in _widths_and_batches(batch):
        seconds = budget.seconds_per_step(task.network(topology, base_features), topology.patch, smaller_batch, passes)
        steps = _steps_in_hours(budget, seconds)
        if steps >= ENOUGH_STEPS:
            break
    steps = min(steps, FULL_TRAINING // len(passes))
    reasons.record("local.network.features", base_features, _width_reason(steps, seconds, budget))
    halved = "; smaller here, so that enough steps fit the hours" if smaller_batch < batch else ""
    reasons.record("local.training.batch_size", smaller_batch, cap + halved)
    return NetworkSize(base_features, smaller_batch, max(1, steps))


def fitting_steps(network: Network, patch: Shape, batch: int, passes: Mapping[str, float], budget: Budget) -> int:
    """Steps of each site that fit the hours with a given network, at least one; nnU-Net's where no hours are given."""
    full = FULL_TRAINING // len(passes)
    if budget.hours is None:
        return full
    return max(1, min(full, _steps_in_hours(budget, budget.seconds_per_step(network, patch, batch, passes))))


def _steps_in_hours(budget: Budget, seconds: float) -> int:
    return int((budget.hours or 0) * 3600 * USEFUL_SHARE / seconds)


def _widths_and_batches(batch: int) -> Iterator[tuple[int, int]]:
    """Wide networks first, each with ever smaller batches: those cost less quality than a narrower network."""
    for base_features in NETWORK_WIDTHS:
        smaller_batch = batch
        while smaller_batch > SMALLEST_BATCH:
            yield base_features, smaller_batch
            smaller_batch = max(SMALLEST_BATCH, smaller_batch // 2)
        yield base_features, smaller_batch


def _width_reason(steps: int, seconds: float, budget: Budget) -> str:
    where = ", ".join(budget.devices)
    fits = f"{steps} steps at every site, {seconds:.2g} s for one at each, fit {budget.hours:g} h on {where}"
    if steps < 1:
        return (
            f"not even one step, {seconds:.2g} s for one at each site, fits {budget.hours:g} h on {where}: one is taken"
        )
    if steps < ENOUGH_STEPS:
        return f"{fits}; even the narrowest network gets fewer than the {ENOUGH_STEPS} wished for: give more hours"
    return f"{fits}; of the first stages {NETWORK_WIDTHS} the widest that leaves a site {ENOUGH_STEPS} steps"
