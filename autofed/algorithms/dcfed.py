"""DCFed: pseudo-labels travel and weights do not, in the manner of JBHI 2025, doi 10.1109/JBHI.2025.3622934.

Its code and settings are not public: what is ours is written down in docs/decisions/0011-pseudo-labels.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from autofed.algorithms import (
    NOTES,
    PREDICTIONS,
    PSEUDO_LABELS,
    Algorithm,
    AverageGroup,
    ClientContext,
    LearningRateCycle,
    RunSetup,
)
from autofed.data.labels import Labels
from autofed.errors import raise_if_any
from autofed.inference import pseudo_labels
from autofed.messages import ArrayGroups, Arrays, Request, Response, ServerState
from autofed.plans import Plan
from autofed.preprocessing import UNKNOWN, LabelMaps


@dataclass(frozen=True)
class DCFed(Algorithm):
    """Sites label public images for each other; weights never travel, and networks may differ.

    A training has learning-rate cycles. Over each the rate falls from its first value to 0, since a model that has not
    converged is a poor teacher (warm restarts: Loshchilov and Hutter, ICLR 2017). At the end of a cycle a site's
    ensemble (its model, and snapshots of the cycle's last rounds: Huang et al., ICLR 2017) predicts every public image,
    with its uncertainty. The coordinator fuses the predictions, keeps the confident ones, and in the next cycle all
    sites learn from these as well as from their own patients. `begin` is the share of the rounds in the first cycle, of
    patients alone; the others are equally long. `exchanges` is how often sites predict: at the end of each cycle, or,
    if once, at the end of the first of two. `members` is the size of the ensemble, each of which makes `dropout_passes`
    more passes with channels dropping out. `weight` is that of the pseudo-labels' loss, ramped up over the share `ramp`
    of a cycle. `temperature` is that of the uncertainty and `trust` that of the agreement in a site's weight
    (`pseudo_labels.fuse`, `pseudo_labels.site_weights`); `confidence`, `doubt` and `share` are the thresholds
    (`pseudo_labels.ConfidenceThresholds`). When a smaller share of labels than `settled` changes, the labels have
    converged: no site predicts again.
    """

    personalised: ClassVar[bool] = True
    shares_pseudo_labels: ClassVar[bool] = True
    is_dp_postprocessing: ClassVar[bool] = True
    preset: ClassVar[str] = "dcfed"
    released: ClassVar[Mapping[str, str]] = {PREDICTIONS: PREDICTIONS}

    begin: float = 0.6
    exchanges: int = 2
    members: int = 3
    weight: float = 1.0
    ramp: float = 0.1
    temperature: float = 0.3
    trust: float = 0.1
    confidence: float = 0.75
    doubt: float = 0.85
    share: float = 0.5
    settled: float = 0.02
    dropout_passes: int = 0

    def __post_init__(self) -> None:
        shares = ("begin", "ramp", "confidence", "doubt", "share", "settled")
        wrong = [name for name in shares if not 0 <= getattr(self, name) <= 1]
        problems = [f"{name} is {getattr(self, name)}; expected 0 to 1" for name in wrong]
        for name, least in (("exchanges", 1), ("members", 1), ("dropout_passes", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                problems.append(f"{name} is {number}; expected a whole number, {least} or more")
        problems += [f"{name} is {getattr(self, name)}; expected more than 0" for name in ("temperature", "trust")
                  if getattr(self, name) <= 0]  # fmt: skip
        problems += [f"weight is {self.weight}; expected 0 or more"] if self.weight < 0 else []
        raise_if_any("agreement.algorithm.settings", problems)

    def plan_problems(self, plan: Plan) -> list[str]:
        """Passes with dropout need a network that has some."""
        if not self.dropout_passes or plan.local.network.dropout:
            return []
        found = f"dropout_passes is {self.dropout_passes}, but no channel of the network drops out"
        return [f"{found}; write --set network.dropout=0.2, or dropout_passes 0"]

    @classmethod
    def passes(cls, settings: Mapping[str, Any], *, private: bool) -> float:
        """After `begin` a step has as many public patches as patients' patches.

        With private teachers a site also trains a model of its own (`ClientContext.fit_unreleased`).
        """
        setting = settings.get("begin", cls.begin)
        begin = float(setting) if isinstance(setting, (int, float)) and 0 <= setting <= 1 else cls.begin
        return (2 if private else 1) * (2 - begin)

    def start(self, setup: RunSetup) -> ServerState:
        """No public image has a label."""
        agreement = setup.plan.agreement
        server_only = {
            "course": {"rounds": np.array([agreement.training.rounds]), "settled": np.array([0])},
            "labels": {
                "order": np.array(agreement.regions_class_order, np.int64),
                "structures": np.array([len(Labels.of(agreement).structures)]),
            },
        }
        agreed = {name: np.full(grid, UNKNOWN, np.uint8) for name, grid in sorted(setup.grids.items())}
        return ServerState(0, {PSEUDO_LABELS: agreed, "course": self._schedule(1, server_only)}, server_only)

    def local(self, site: ClientContext, request: Request) -> ArrayGroups:
        """Learn from patients and pseudo-labels; if the round asks for it, predict the public images."""
        agreed, schedule = request.shared[PSEUDO_LABELS], request.shared["course"]
        weight, predicts = float(schedule["weight"][0]), bool(schedule["asks"][0])
        own = site.memory() or {"weights": site.start()}
        cycle = LearningRateCycle(*schedule["act"].tolist())
        result = site.fit(own["weights"], agreed=agreed, weight=weight, act=cycle)
        past, model = _past(own, cycle), site.averaged(result.weights)
        snapshots = {request.round: model, **past} if request.round in self._snapshots(cycle) else past
        site.remember({"weights": result.weights, **{f"{_PAST}{n}": weights for n, weights in snapshots.items()}})
        predictions = site.label([model, *past.values()], self.dropout_passes) if predicts else {}
        site.fit_unreleased(agreed, weight, cycle)
        return {PREDICTIONS: predictions, "metrics": {"loss": result.losses}}

    def misfits(self, arrays: ArrayGroups, shared: ArrayGroups) -> list[str]:
        """A response holds every public image on its own grid, or nothing in a round that asks for no predictions."""
        schedule, maps = shared["course"], shared[PSEUDO_LABELS]
        shapes = {name: (array.dtype, array.shape) for name, array in arrays[PREDICTIONS].items()}
        depth = int(schedule["structures"][0]) + 1
        expected = {name: (array.dtype, (depth, *array.shape)) for name, array in maps.items() if schedule["asks"][0]}
        if shapes != expected:
            return ["answered with labels of other images, structures or grids than it was asked for"]
        return []

    def merge(self, state: ServerState, responses: Sequence[Response], average: AverageGroup) -> ServerState:
        """Agree on new labels if there are predictions. `average` is not used: every voxel has weights of its own."""
        settled = int(state.server_only["course"]["settled"][0])
        agreed, notes = state.shared[PSEUDO_LABELS], dict[str, float]()
        predictions = {r.site: r.arrays[PREDICTIONS] for r in responses if r.arrays[PREDICTIONS]}
        if predictions:
            agreed, notes = self._agree(predictions, tuple(state.server_only["labels"]["order"].tolist()))
            change = pseudo_labels.changed_share(state.shared[PSEUDO_LABELS], agreed)
            settled = int(change < self.settled and pseudo_labels.labelled_shares(agreed)[0] > 0)
            notes |= {"changed": change, "settled": float(settled)}
        server_only = {
            **state.server_only,
            "course": {**state.server_only["course"], "settled": np.array([settled])},
            NOTES: {name: np.array([value]) for name, value in notes.items()},
        }
        shared = {PSEUDO_LABELS: agreed, "course": self._schedule(state.round + 2, server_only)}
        return replace(state, round=state.round + 1, shared=shared, server_only=server_only)

    def _schedule(self, round: int, server_only: ArrayGroups) -> Arrays:
        """The settings of a round: its learning-rate cycle, whether sites predict, and the weight of pseudo-labels."""
        rounds, settled = (int(server_only["course"][name][0]) for name in ("rounds", "settled"))
        ends = self._ends(rounds)
        nth = min(bisect_left(ends, round), len(ends) - 1)  # rounds that were added at the end belong to the last
        cycle = LearningRateCycle((0, *ends)[nth], ends[nth])
        asks = not settled and round in ends[: self.exchanges]
        share = (round - cycle.after) / max(1.0, self.ramp * (cycle.last - cycle.after))
        weight = self.weight * pseudo_labels.ramp(share) if cycle.after else 0.0
        return {
            "asks": np.array([asks], np.uint8),
            "weight": np.array([weight], np.float32),
            "act": np.array(cycle),
            "structures": server_only["labels"]["structures"],
        }

    def _ends(self, rounds: int) -> list[int]:
        """The last rounds of the cycles; in that of the last cycle sites predict for the student."""
        begin = min(rounds, max(1, _up(self.begin * rounds)))
        return sorted({*np.linspace(begin, rounds, self.exchanges).round().astype(int).tolist(), rounds})

    def _snapshots(self, cycle: LearningRateCycle) -> list[int]:
        """Rounds whose models are members of the ensemble: a tenth of the cycle apart, up to its end."""
        apart = max(1, round((cycle.last - cycle.after) / 10))
        return [cycle.last - apart * i for i in range(1, self.members) if cycle.last - apart * i > cycle.after]

    def _agree(self, predictions: Mapping[str, Arrays], order: tuple[int, ...]) -> tuple[LabelMaps, dict[str, float]]:
        """The labels that pass the thresholds, and how far each site is from the consensus; image by image."""
        sites, regions = sorted(predictions), bool(order)
        images, thresholds = (
            list(predictions[sites[0]]),
            pseudo_labels.ConfidenceThresholds(self.confidence, self.doubt, self.share),
        )
        overlaps = pseudo_labels.PairwiseDice()
        for name in images:
            overlaps.add([pseudo_labels.structure_masks(predictions[site][name], is_regions=regions) for site in sites])
        trust = dict(zip(sites, pseudo_labels.site_weights(overlaps.dice(nothing=0), self.trust).tolist(), strict=True))
        agreed, consensus_overlaps = {}, pseudo_labels.PairwiseDice()
        for name in images:
            image_predictions = {site: predictions[site][name] for site in sites}
            fused = pseudo_labels.fuse(image_predictions, trust, self.temperature, is_regions=regions)
            agreed[name] = pseudo_labels.apply_thresholds(fused, order, thresholds)
            together = pseudo_labels.encode_prediction(fused, np.zeros(fused.shape[1:]), is_regions=regions)
            consensus_overlaps.add(
                [
                    pseudo_labels.structure_masks(found, is_regions=regions)
                    for found in (together, *image_predictions.values())
                ]
            )
        pictures, voxels = pseudo_labels.labelled_shares(agreed)
        structures = float(np.mean([pseudo_labels.has_structure(found) for found in agreed.values()]))
        disagreement = dict(zip(sites, (1 - consensus_overlaps.dice()[0, 1:]).tolist(), strict=True))
        return agreed, {
            "kept_images": pictures, "kept_voxels": voxels, "structured_images": structures,
            **{f"trust/{site}": value for site, value in trust.items()},
            **{f"disagreement/{site}": value for site, value in disagreement.items()},
        }  # fmt: skip


_PAST = "past_"
"""Before the round, in the names of the groups that a site remembers: a snapshot."""


def _past(own: ArrayGroups, cycle: LearningRateCycle) -> dict[int, Arrays]:
    """The snapshots of this cycle that a site remembers, by round, the latest first."""
    snapshots = {int(name.removeprefix(_PAST)): weights for name, weights in own.items() if name.startswith(_PAST)}
    return {round: snapshots[round] for round in sorted(snapshots, reverse=True) if round > cycle.after}


def _up(value: float) -> int:
    """The next whole number, of a product that rounding may have put slightly above one."""
    return int(np.ceil(value - 1e-9))
