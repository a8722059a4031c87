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

    A training has acts. Over each the learning rate falls from its first value to 0, since a model that is still on its
    way is a poor teacher (warm restarts: Loshchilov and Hutter, ICLR 2017). Where an act ends, a site's ensemble (its
    model, and snapshots of the act's last rounds: Huang et al., ICLR 2017) says what it sees in every public image and
    how sure it is. The coordinator puts that together, keeps what is sure, and in the next act all learn from it beside
    their own patients. `begin` is the share of the rounds in the first act, of patients alone; the others are equally
    long. `exchanges` is how often sites are asked: where each act ends, or, if once, where the first of two does.
    `members` is the size of the ensemble, of which each looks `dropout_passes` times more with channels dropping out.
    `weight` is that of the agreed labels beside the patients, grown over the share `ramp` of an act. `temperature` is
    that of the uncertainty and `trust` that of the agreement in a site's weight (`pseudo_labels.fuse`,
    `pseudo_labels.trusts`); `confidence`, `doubt` and `share` are the gates (`pseudo_labels.Gates`). When a smaller
    share of labels than `settled` changes, nobody is asked again, and the rounds go on with what is agreed.
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
        found = [f"{name} is {getattr(self, name)}; expected 0 to 1" for name in wrong]
        for name, least in (("exchanges", 1), ("members", 1), ("dropout_passes", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                found.append(f"{name} is {number}; expected a whole number, {least} or more")
        found += [f"{name} is {getattr(self, name)}; expected more than 0" for name in ("temperature", "trust")
                  if getattr(self, name) <= 0]  # fmt: skip
        found += [f"weight is {self.weight}; expected 0 or more"] if self.weight < 0 else []
        raise_if_any("agreement.algorithm.settings", found)

    def plan_problems(self, plan: Plan) -> list[str]:
        """Passes with dropout need a network that has some."""
        if not self.dropout_passes or plan.local.network.dropout:
            return []
        found = f"dropout_passes is {self.dropout_passes}, but no channel of the network drops out"
        return [f"{found}; write --set network.dropout=0.2, or dropout_passes 0"]

    @classmethod
    def passes(cls, settings: Mapping[str, Any], *, private: bool) -> float:
        """After `begin` a step has as many public patches beside the patients'.

        With private teachers a site also trains a model of its own (`ClientContext.fit_unreleased`).
        """
        begin = settings.get("begin", cls.begin)
        if not isinstance(begin, (int, float)) or not 0 <= begin <= 1:
            begin = cls.begin
        return (2 if private else 1) * (2 - begin)

    def start(self, setup: RunSetup) -> ServerState:
        """Nothing is known of any public image."""
        agreement = setup.plan.agreement
        kept = {
            "course": {"rounds": np.array([agreement.training.rounds]), "settled": np.array([0])},
            "labels": {
                "order": np.array(agreement.regions_class_order, np.int64),
                "structures": np.array([len(Labels.of(agreement).structures)]),
            },
        }
        agreed = {name: np.full(grid, UNKNOWN, np.uint8) for name, grid in sorted(setup.grids.items())}
        return ServerState(0, {PSEUDO_LABELS: agreed, "course": self._course(1, kept)}, kept)

    def local(self, site: ClientContext, request: Request) -> ArrayGroups:
        """Learn from patients and agreed labels; if asked, say what is in the public images."""
        agreed, course = request.shared[PSEUDO_LABELS], request.shared["course"]
        weight, asks = float(course["weight"][0]), bool(course["asks"][0])
        own = site.memory() or {"weights": site.start()}
        act = LearningRateCycle(*course["act"].tolist())
        result = site.fit(own["weights"], agreed=agreed, weight=weight, act=act)
        past, model = _past(own, act), site.averaged(result.weights)
        shelf = {request.round: model, **past} if request.round in self._snapshots(act) else past
        site.remember({"weights": result.weights, **{f"{_PAST}{round}": kept for round, kept in shelf.items()}})
        answers = site.label([model, *past.values()], self.dropout_passes) if asks else {}
        site.fit_unreleased(agreed, weight, act)
        return {PREDICTIONS: answers, "metrics": {"loss": result.losses}}

    def misfits(self, arrays: ArrayGroups, shared: ArrayGroups) -> list[str]:
        """An answer holds every public image on its own grid, or nothing if nothing was asked."""
        course, maps = shared["course"], shared[PSEUDO_LABELS]
        found = {name: (array.dtype, array.shape) for name, array in arrays[PREDICTIONS].items()}
        deep = int(course["structures"][0]) + 1
        expected = {name: (array.dtype, (deep, *array.shape)) for name, array in maps.items() if course["asks"][0]}
        if found != expected:
            return ["answered with labels of other images, structures or grids than it was asked for"]
        return []

    def merge(self, state: ServerState, releases: Sequence[Response], average: AverageGroup) -> ServerState:
        """Agree anew on labels if there are answers. `average` has no part: every voxel has weights of its own."""
        settled = int(state.kept["course"]["settled"][0])
        agreed, notes = state.shared[PSEUDO_LABELS], dict[str, float]()
        answers = {release.site: release.arrays[PREDICTIONS] for release in releases if release.arrays[PREDICTIONS]}
        if answers:
            agreed, notes = self._agree(answers, tuple(state.kept["labels"]["order"].tolist()))
            change = pseudo_labels.changed_share(state.shared[PSEUDO_LABELS], agreed)
            settled = int(change < self.settled and pseudo_labels.labelled_shares(agreed)[0] > 0)
            notes |= {"changed": change, "settled": float(settled)}
        kept = {
            **state.kept,
            "course": {**state.kept["course"], "settled": np.array([settled])},
            NOTES: {name: np.array([value]) for name, value in notes.items()},
        }
        shared = {PSEUDO_LABELS: agreed, "course": self._course(state.round + 2, kept)}
        return replace(state, round=state.round + 1, shared=shared, kept=kept)

    def _course(self, round: int, kept: ArrayGroups) -> Arrays:
        """What a round is like: its act, whether sites are asked for labels, and what the agreed ones weigh."""
        rounds, settled = (int(kept["course"][name][0]) for name in ("rounds", "settled"))
        ends = self._ends(rounds)
        nth = min(bisect_left(ends, round), len(ends) - 1)  # rounds that were added at the end belong to the last
        act = LearningRateCycle((0, *ends)[nth], ends[nth])
        asks = not settled and round in ends[: self.exchanges]
        grown = (round - act.after) / max(1.0, self.ramp * (act.last - act.after))
        weight = self.weight * pseudo_labels.ramp(grown) if act.after else 0.0
        return {
            "asks": np.array([asks], np.uint8),
            "weight": np.array([weight], np.float32),
            "act": np.array(act),
            "structures": kept["labels"]["structures"],
        }

    def _ends(self, rounds: int) -> list[int]:
        """The last rounds of the acts; that of the last act asks for labels for the student."""
        begin = min(rounds, max(1, _up(self.begin * rounds)))
        return sorted({*np.linspace(begin, rounds, self.exchanges).round().astype(int).tolist(), rounds})

    def _snapshots(self, act: LearningRateCycle) -> list[int]:
        """Rounds whose models are kept as members: a tenth of the act apart, up to its end."""
        apart = max(1, round((act.last - act.after) / 10))
        return [act.last - apart * i for i in range(1, self.members) if act.last - apart * i > act.after]

    def _agree(self, answers: Mapping[str, Arrays], order: tuple[int, ...]) -> tuple[LabelMaps, dict[str, float]]:
        """The labels that pass the gates, and how far each site is from the whole; image by image."""
        sites, regions = sorted(answers), bool(order)
        images, gates = (
            list(answers[sites[0]]),
            pseudo_labels.ConfidenceThresholds(self.confidence, self.doubt, self.share),
        )
        between = pseudo_labels.PairwiseDice()
        for name in images:
            between.add([pseudo_labels.structure_masks(answers[site][name], is_regions=regions) for site in sites])
        trust = dict(zip(sites, pseudo_labels.site_weights(between.dice(nothing=0), self.trust).tolist(), strict=True))
        agreed, beside = {}, pseudo_labels.PairwiseDice()
        for name in images:
            said = {site: answers[site][name] for site in sites}
            fused = pseudo_labels.fuse(said, trust, self.temperature, is_regions=regions)
            agreed[name] = pseudo_labels.apply_thresholds(fused, order, gates)
            together = pseudo_labels.encode_prediction(fused, np.zeros(fused.shape[1:]), is_regions=regions)
            beside.add(
                [pseudo_labels.structure_masks(found, is_regions=regions) for found in (together, *said.values())]
            )
        pictures, voxels = pseudo_labels.labelled_shares(agreed)
        structures = float(np.mean([pseudo_labels.has_structure(found) for found in agreed.values()]))
        disagreement = dict(zip(sites, (1 - beside.dice()[0, 1:]).tolist(), strict=True))
        return agreed, {
            "kept_images": pictures, "kept_voxels": voxels, "structured_images": structures,
            **{f"trust/{site}": value for site, value in trust.items()},
            **{f"disagreement/{site}": value for site, value in disagreement.items()},
        }  # fmt: skip


_PAST = "past_"
"""Before the round, in the names of the groups that a site remembers: a snapshot."""


def _past(own: ArrayGroups, act: LearningRateCycle) -> dict[int, Arrays]:
    """The snapshots of this act that a site remembers, by round, the latest first."""
    found = {int(name.removeprefix(_PAST)): kept for name, kept in own.items() if name.startswith(_PAST)}
    return {round: found[round] for round in sorted(found, reverse=True) if round > act.after}


def _up(value: float) -> int:
    """The next whole number, of a product that rounding may have put a hair above one."""
    return int(np.ceil(value - 1e-9))
