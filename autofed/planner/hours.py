"""What fits the hours: the width of the network, the batch and the number of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autofed.planner.presets import BASE_FEATURES
from autofed.planner.reasons import Reasons
from autofed.planner.topology import NetworkTask, Topology
from autofed.plans import Budget, Network, Shape

NARROWER = (32, 24, 16, 12, 8)
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
    """What was chosen: features of the first stage, patches in a batch, steps of each site."""

    base: int
    batch: int
    steps: int


def size(
    task: NetworkTask, found: Topology, batch: int, passes: Mapping[str, float], budget: Budget, reasons: Reasons
) -> NetworkSize:
    """The widest network that gets enough steps in the hours; nnU-Net's own width and steps where no hours are given.

    `batch` is what memory allows, `passes` what a step computes at each site (`learning.passes`). A batch is made
    smaller before the network is made narrower.
    """
    cap = f"memory and {task.preset.dataset_share:.0%} of the voxels of all sites' labelled cases allow {batch}"
    if budget.hours is None:
        reasons.say("local.network.features", BASE_FEATURES, "no hours were given: nnU-Net's full width")
        reasons.say("local.training.batch_size", batch, cap)
        return NetworkSize(BASE_FEATURES, batch, FULL_TRAINING // len(passes))
    for base, smaller in _candidates(batch):
        seconds = budget.seconds_per_step(task.network(found, base), found.patch, smaller, passes)
        steps = _steps(budget, seconds)
        if steps >= ENOUGH_STEPS:
            break
    steps = min(steps, FULL_TRAINING // len(passes))
    reasons.say("local.network.features", base, _width_reason(steps, seconds, budget))
    halved = "; smaller here, so that enough steps fit the hours" if smaller < batch else ""
    reasons.say("local.training.batch_size", smaller, cap + halved)
    return NetworkSize(base, smaller, max(1, steps))


def fitting_steps(network: Network, patch: Shape, batch: int, passes: Mapping[str, float], budget: Budget) -> int:
    """How many steps of each site with a given network fit the hours, one at least; nnU-Net's where none are given."""
    full = FULL_TRAINING // len(passes)
    if budget.hours is None:
        return full
    return max(1, min(full, _steps(budget, budget.seconds_per_step(network, patch, batch, passes))))


def _steps(budget: Budget, seconds: float) -> int:
    return int((budget.hours or 0) * 3600 * USEFUL_SHARE / seconds)


def _candidates(batch: int) -> Iterator[tuple[int, int]]:
    """Width first, then batch: a smaller batch costs less quality than a narrower network."""
    for base in NARROWER:
        smaller = batch
        while smaller > SMALLEST_BATCH:
            yield base, smaller
            smaller = max(SMALLEST_BATCH, smaller // 2)
        yield base, smaller


def _width_reason(steps: int, seconds: float, budget: Budget) -> str:
    where = ", ".join(budget.devices)
    fits = f"{steps} steps at every site, {seconds:.2g} s for one at each, fit {budget.hours:g} h on {where}"
    if steps < 1:
        return (
            f"not even one step, {seconds:.2g} s for one at each site, fits {budget.hours:g} h on {where}: one is taken"
        )
    if steps < ENOUGH_STEPS:
        return f"{fits}; even the narrowest network gets fewer than the {ENOUGH_STEPS} wished for: give more hours"
    return f"{fits}; of the first stages {NARROWER} the widest that leaves a site {ENOUGH_STEPS} steps"
