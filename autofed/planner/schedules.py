"""How to train: rounds and steps, optimiser, augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autofed.planner.hours import NetworkSize
from autofed.planner.reasons import Reasons
from autofed.planner.topology import Topology
from autofed.plans import ANISOTROPY, Budget, FaultSettings, RoundSchedule, Training, spaced_snapshots

SHORT_TRAINING = 40_000
"""With fewer steps of all sites together the plan departs from nnU-Net's recipe for long trainings."""

VALIDATIONS = 25
"""How often in a training the sites score the model on their held-out patients."""


def rounds_and_steps(steps: int) -> tuple[int, int]:
    """Rounds, and steps of a site in each, whose product is `steps` or a few fewer."""
    rounds = max(1, min(steps, round(math.sqrt(2 * steps))))
    return rounds, max(1, steps // rounds)


def rounds_reason(steps_per_round: int, sites: int) -> str:
    """The reason for the number of rounds."""
    return (
        f"{steps_per_round} steps at each of {sites} sites a round: about twice as many rounds as steps in one, so "
        "that sites do not drift apart"
    )


def communication_rounds(steps: int, sites: int, reasons: Reasons) -> tuple[RoundSchedule, int]:
    """The round schedule, and the steps per round at each site, for `steps` at each site in all."""
    rounds, steps_per_round = rounds_and_steps(steps)
    reasons.record("agreement.training.rounds", rounds, rounds_reason(steps_per_round, sites))
    snapshots = tuple(spaced_snapshots(rounds))
    reasons.record("agreement.training.snapshots", snapshots, "late and spaced: neighbours are nearly one model")
    every = max(1, round(rounds / VALIDATIONS))
    reasons.record(
        "agreement.training.validate_every", every, f"about {VALIDATIONS} scores tell a model that got worse"
    )
    return RoundSchedule(rounds=rounds, snapshots=snapshots, validate_every=every), steps_per_round


def fault_settings(sites: int, reasons: Reasons) -> FaultSettings:
    """The number of sites whose responses make a round count."""
    least = sites // 2 + 1
    reasons.record("agreement.faults.least_sites", least, "more than half of the sites, or a round is asked again")
    return FaultSettings(least_sites=least)


@dataclass(frozen=True)
class TrainingLength:
    """How long a training is: steps of a site in one round, and steps of all sites in all rounds."""

    steps_per_round: int
    total_steps: int

    @property
    def is_short(self) -> bool:
        """Whether it departs from nnU-Net's recipe, which is made for 250 000 steps."""
        return self.total_steps < SHORT_TRAINING


def training_recipe(
    topology: Topology,
    size: NetworkSize,
    length: TrainingLength,
    batch_dice: bool,
    dimension: int,
    budget: Budget,
    reasons: Reasons,
) -> Training:
    """nnU-Net's recipe, and what a short training does differently.

    Args:
        topology: Patch, kernels and strides.
        size: Width of the network, batch and steps of each site.
        length: Steps per round and of all sites; decides whether the training is short.
        batch_dice: Whether Dice is taken over the batch.
        dimension: Of the data: 2 for pictures, 3 for volumes.
        budget: Its precision is that of the training.
        reasons: Where the decisions are recorded.
    """
    rate, momentum = (0.1, 0.9) if length.is_short else (0.01, 0.99)
    axes = len(topology.patch)
    recipe = Training(
        patch_size=topology.patch,
        batch_size=size.batch,
        steps_per_round=length.steps_per_round,
        learning_rate=rate,
        momentum=momentum,
        keep_momentum=length.is_short,
        mirror_axes=() if length.is_short and dimension == 3 else tuple(range(axes)),
        rotate_in_plane_only=axes == 3 and max(topology.patch) / topology.patch[0] > ANISOTROPY,
        batch_dice=batch_dice,
        precision=budget.precision,
    )
    for field, why in _recipe_reasons(topology, length, rate, dimension).items():
        reasons.record("local.training." + field, getattr(recipe, field), why)
    return recipe


def _recipe_reasons(topology: Topology, length: TrainingLength, rate: float, dimension: int) -> dict[str, str]:
    short = f"{length.total_steps} steps in all are fewer than {SHORT_TRAINING}"
    momentum, mirror, keep_momentum = "as nnU-Net", "as nnU-Net", "long rounds gather it anew"
    if length.is_short:
        keep_momentum = "rounds are too short to gather it anew; fednova and scaffold do so all the same"
        momentum = f"{short}, too few for .99"
        mirror = f"volumes lie alike in the scanner, and {short}, too few to also learn their mirror images"
    reasons_by_field = {
        "momentum": f"learning rate {rate:g}; {momentum}",
        "keep_momentum": keep_momentum,
        "mirror_axes": "pictures have no up and down" if dimension == 2 else mirror,
        "batch_dice": "slices, and patches that see little of a case, often miss a structure: their Dice is taken "
        "over the batch; other patches count one by one",
        "precision": "the faster one where the speed was measured; float32 where it was not",
    }
    if len(topology.patch) == 3:
        width = max(topology.patch) / topology.patch[0]
        reasons_by_field["rotate_in_plane_only"] = (
            f"the patch is {width:.1f} times as wide as deep; above {ANISOTROPY:g} it is augmented slice by slice"
        )
    return reasons_by_field
