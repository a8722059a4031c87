"""How to train: rounds and steps, optimiser, augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autofed.planner.hours import NetworkSize
from autofed.planner.reasons import Reasons
from autofed.planner.topology import Topology
from autofed.plans import ANISOTROPY, Budget, FaultSettings, RoundSchedule, Training, spaced_snapshots

SHORT_TRAINING = 40_000
"""Below so many steps of all sites together the plan departs from nnU-Net's long training."""


VALIDATIONS = 25
"""So often in a training the sites score the model on the patients that they held out."""


def divided(steps: int) -> tuple[int, int]:
    """The rounds, and the steps of a site in one, that so many steps in all are made of: as many, or a few fewer."""
    rounds = max(1, min(steps, round(math.sqrt(2 * steps))))
    return rounds, max(1, steps // rounds)


def why_rounds(per_round: int, sites: int) -> str:
    """The reason for the number of rounds."""
    return (
        f"{per_round} steps at each of {sites} sites a round: about twice as many rounds as steps in one, so that "
        "sites do not drift apart"
    )


def communication_rounds(steps: int, sites: int, reasons: Reasons) -> tuple[RoundSchedule, int]:
    """The rounds, and the steps at each site in one, for so many steps at each site in all."""
    rounds, per_round = divided(steps)
    reasons.say("agreement.training.rounds", rounds, why_rounds(per_round, sites))
    snapshots = tuple(spaced_snapshots(rounds))
    reasons.say("agreement.training.snapshots", snapshots, "late and spaced: neighbours are nearly one model")
    every = max(1, round(rounds / VALIDATIONS))
    reasons.say("agreement.training.validate_every", every, f"about {VALIDATIONS} scores tell a model that got worse")
    return RoundSchedule(rounds=rounds, snapshots=snapshots, validate_every=every), per_round


def fault_settings(sites: int, reasons: Reasons) -> FaultSettings:
    """How many of so many sites make a round."""
    least = sites // 2 + 1
    reasons.say("agreement.faults.least_sites", least, "more than half of the sites, or a round is asked again")
    return FaultSettings(least_sites=least)


@dataclass(frozen=True)
class TrainingLength:
    """How long a training is: steps of a site in one round, and steps of all sites in all."""

    per_round: int
    in_all: int

    @property
    def is_short(self) -> bool:
        """Whether it departs from nnU-Net's recipe, which is made for 250 000 steps."""
        return self.in_all < SHORT_TRAINING


def training(
    found: Topology,
    size: NetworkSize,
    length: TrainingLength,
    batch_dice: bool,
    dimension: int,
    budget: Budget,
    reasons: Reasons,
) -> Training:
    """nnU-Net's recipe, and what a short training does differently. `dimension` is that of the data, 2 for pictures."""
    rate, momentum = (0.1, 0.9) if length.is_short else (0.01, 0.99)
    axes = len(found.patch)
    made = Training(
        patch_size=found.patch,
        batch_size=size.batch,
        steps_per_round=length.per_round,
        learning_rate=rate,
        momentum=momentum,
        keep_momentum=length.is_short,
        mirror_axes=() if length.is_short and dimension == 3 else tuple(range(axes)),
        rotate_in_plane_only=axes == 3 and max(found.patch) / found.patch[0] > ANISOTROPY,
        batch_dice=batch_dice,
        precision=budget.precision,
    )
    for field, why in _whys(found, length, rate, dimension).items():
        reasons.say("local.training." + field, getattr(made, field), why)
    return made


def _whys(found: Topology, length: TrainingLength, rate: float, dimension: int) -> dict[str, str]:
    short = f"{length.in_all} steps in all are fewer than {SHORT_TRAINING}"
    momentum, mirror, kept = "as nnU-Net", "as nnU-Net", "long rounds gather it anew"
    if length.is_short:
        kept = "rounds are too short to gather it anew; fednova and scaffold do so all the same"
        momentum = f"{short}, too few for .99"
        mirror = f"volumes lie alike in the scanner, and {short}, too few to also learn their mirror images"
    whys = {
        "momentum": f"learning rate {rate:g}; {momentum}",
        "keep_momentum": kept,
        "mirror_axes": "pictures have no up and down" if dimension == 2 else mirror,
        "batch_dice": "slices, and patches that see little of a case, often miss a structure: their Dice is taken "
        "over the batch; other patches count one by one",
        "precision": "the faster one where the speed was measured; float32 where it was not",
    }
    if len(found.patch) == 3:
        width = max(found.patch) / found.patch[0]
        whys["rotate_in_plane_only"] = (
            f"the patch is {width:.1f} times as wide as deep; above {ANISOTROPY:g} it is augmented slice by slice"
        )
    return whys
