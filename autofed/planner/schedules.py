"""How to train: rounds and steps, optimiser, augmentation."""

from __future__ import annotations

import math

from autofed.planner.grids import ANISOTROPY, Grid
from autofed.planner.hours import Size
from autofed.planner.reasons import Reasons
from autofed.planner.topology import Topology
from autofed.plans import Budget, Rounds, Training, spaced_snapshots

SHORT_TRAINING = 10_000
"""Below so many steps a site the plan departs from nnU-Net's long training: see `_optimiser` and `_mirror_axes`."""


def meetings(steps: int, sites: int, reasons: Reasons) -> tuple[Rounds, int]:
    """The rounds, and the steps at each site in one, for so many steps at each site in all."""
    rounds = max(1, min(steps, round(math.sqrt(2 * steps))))
    per_round = max(1, steps // rounds)
    reasons.say(
        "agreement.training.rounds",
        rounds,
        f"{per_round} steps at each of {sites} sites a round: about twice as many rounds as steps in one, so that "
        "sites do not drift apart",
    )
    snapshots = tuple(spaced_snapshots(rounds))
    reasons.say("agreement.training.snapshots", snapshots, "late and spaced: neighbours are nearly one model")
    return Rounds(rounds=rounds, snapshots=snapshots), per_round


def training(
    grid: Grid, found: Topology, size: Size, per_round: int, batch_dice: bool, budget: Budget, reasons: Reasons
) -> Training:
    """nnU-Net's recipe, and what a short training does differently."""
    rate, momentum = _optimiser(size.steps)
    width = max(found.patch) / found.patch[0]
    made = Training(
        patch_size=found.patch,
        batch_size=size.batch,
        steps_per_round=per_round,
        learning_rate=rate,
        momentum=momentum,
        mirror_axes=_mirror_axes(grid.axes, size.steps),
        rotate_in_plane_only=grid.axes == 3 and width > ANISOTROPY,
        batch_dice=batch_dice,
        precision=budget.precision,
    )
    whys = {
        "momentum": f"learning rate {rate:g}; it starts anew each round, and a training of under {SHORT_TRAINING} "
        "steps a site is too short for .99",
        "mirror_axes": "pictures have no up and down; volumes lie alike in the scanner, and "
        f"under {SHORT_TRAINING} steps a site are too few to also learn their mirror images",
        "rotate_in_plane_only": f"the patch is {width:.1f} times as wide as deep; "
        f"above {ANISOTROPY:g} it is augmented slice by slice",
        "batch_dice": "slices, and patches that see little of a case, often miss a structure: their Dice is taken "
        "over the batch; other patches count one by one",
        "precision": "the faster one where the speed was measured; float32 where it was not",
    }
    for field, why in whys.items():
        reasons.say("local.training." + field, getattr(made, field), why)
    return made


def _optimiser(steps: int) -> tuple[float, float]:
    """Learning rate and momentum: nnU-Net's for a long training, a shorter memory for a short one."""
    return (0.01, 0.99) if steps >= SHORT_TRAINING else (0.1, 0.9)


def _mirror_axes(axes: int, steps: int) -> tuple[int, ...]:
    """All axes (nnU-Net), but none for volumes in a short training."""
    return tuple(range(axes)) if axes == 2 or steps >= SHORT_TRAINING else ()
