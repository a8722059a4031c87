"""What a site computes for each task. None of this leaves by itself: `Site.answer` is the release boundary."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from autofed.algorithms import Algorithm, LearningRateCycle
from autofed.data.labels import Labels
from autofed.federation.model_selection import best_round, moving_average
from autofed.federation.public_labelling import Labeller
from autofed.files import digest, read_json, write_json
from autofed.inference.validation import SHARE, case_dice, patch_dice
from autofed.messages import ArrayGroups, Arrays, Request, load_groups, save_groups
from autofed.plans import Plan, RoundSchedule
from autofed.preprocessing import LabelMaps, PublicImages, Store
from autofed.privacy import Mechanism
from autofed.privacy.none import NoPrivacy
from autofed.privacy.shared_scores import OF_PATIENTS
from autofed.training.effective_steps import effective_steps
from autofed.training.fit import AuxiliaryLoss, Compute, GradientTerms, LocalResult, Schedule, fit
from autofed.training.network import build, normalisation, weights_of

SITE_ONLY = "own"
"""In a site's folder: the model that a private training leaves to the site alone. No answer is made of it."""

SITE_ONLY_MARK = "for_the_site_alone"
"""In the header of its files, by which a copy is known too."""


class SiteState(Protocol):
    """What answering needs of a site (`federation.site.Site`)."""

    name: str
    stream: str
    store: Store
    held: Store
    plan: Plan
    folder: Path
    memory: ClientMemory
    algorithm: Algorithm
    steps: int
    compute: Compute
    public: PublicImages | None
    on_image: Callable[[int, int], None]

    def log(self, request: Request, error: Exception) -> None:
        """Write to the site's own log."""


class SiteContext:
    """The site as an algorithm sees it in one round (`ClientContext`)."""

    def __init__(self, site: SiteState, request: Request, mechanism: Mechanism):
        self._site, self._request = site, request
        self._round, self._since = request.round, request.since
        self._mechanism = mechanism
        self._charged_steps = site.steps
        self._remembered: dict[str, Arrays] = {}

    @property
    def name(self) -> str:
        """The site's name."""
        return self._site.name

    @cached_property
    def normalisation(self) -> frozenset[str]:
        """The names of the weights of normalisation layers."""
        return normalisation(self._site.plan.local.network)

    def start(self) -> Arrays:
        """Weights of the site's own network to start from, which no other site has."""
        seed = digest([self._site.plan.local.training.seed, self._site.stream])
        return weights_of(build(self._site.plan.local.network, seed=int(seed[:8], 16)))

    def fit(
        self,
        weights: Arrays,
        *,
        proximal: float = 0.0,
        correction: Arrays | None = None,
        agreed: LabelMaps | None = None,
        weight: float = 0.0,
        act: LearningRateCycle | None = None,
    ) -> LocalResult:
        """Train, once in the round, for the steps that it was charged for; a private mechanism keeps losses here.

        Args:
            weights: What to start from, by name.
            proximal: FedProx's mu.
            correction: SCAFFOLD's correction, by the names of the weights.
            agreed: Label maps (Z, Y, X) of public images, by image.
            weight: The weight of their gradient beside that of the patients.
            act: The rounds over which the learning rate falls to 0; a private mechanism keeps to all
                rounds.
        """
        if not self._charged_steps:
            raise RuntimeError("the steps that this round was charged for have been taken")
        self._charged_steps = 0
        keeps_momentum = self._site.plan.local.training.keep_momentum and not self._site.algorithm.resets_momentum
        site, private = self._site, self._mechanism.private
        result = fit(
            weights,
            site.store,
            site.plan.local,
            self._mechanism,
            self._schedule(None if private else act),  # rate, noise and number of steps were planned together
            terms=GradientTerms(proximal, correction, self._auxiliary(agreed or {}, weight)),
            momentum=(self.memory() or {}).get("momentum") if keeps_momentum else None,
            labels=self._labels,
            compute=site.compute,
        )
        if keeps_momentum:
            self.remember({"momentum": result.momentum})
        if not private:
            return result
        self._log_losses(result.losses)
        return replace(result, losses=np.zeros(0, np.float32))

    def label(self, members: Sequence[Arrays], passes: int = 0) -> dict[str, np.ndarray]:
        """The predictions of an ensemble for every public image, over mirrored views; `ArithmeticError` if not finite.

        Each member makes so many `passes` more, with channels dropping out.
        """
        site, public = self._site, self._site.public
        if public is None:
            return {}
        return Labeller(public, site.plan, site.folder / "said", site.compute.device, passes, site.on_image).label(
            members
        )

    def fit_unreleased(self, agreed: LabelMaps, weight: float, act: LearningRateCycle) -> None:
        """Train a model of the site's own, for as many steps as `fit`, where that is private; see `ClientContext`.

        The patients' gradients are unprotected here. So its weights are in no memory that a response is made of; errors
        go to the site's log alone, since a failure that leaves the site would depend on them.
        """
        site, own = self._site, ClientMemory(self._site.folder / SITE_ONLY, {SITE_ONLY_MARK: True})
        if not self._mechanism.private or own.path(self._round).is_file():
            return
        try:
            before = own.recall(own.latest(self._since)) or {"weights": self.start()}
            result = fit(
                before["weights"],
                site.store,
                site.plan.local,
                NoPrivacy(site.plan.local.training.batch_size, site.plan.batches_at(self.name)),
                self._schedule(act),
                terms=GradientTerms(auxiliary=self._auxiliary(agreed, weight)),
                momentum=before.get("momentum"),
                labels=self._labels,
                compute=Compute(site.compute.device, site.compute.loader),  # `on_step` counts the steps of `fit` alone
            )
            momentum = {"momentum": result.momentum} if site.plan.local.training.keep_momentum else {}
            own.keep(self._round, {"weights": result.weights, **momentum}, self._since, site.plan.agreement.training)
        except Exception as error:
            with contextlib.suppress(OSError):  # a full disk takes no log either
                site.log(self._request, error)

    def _auxiliary(self, agreed: LabelMaps, weight: float) -> AuxiliaryLoss | None:
        """The loss on public images in this round, if there is any."""
        public = self._site.public
        if not weight or not public or not agreed:
            return None
        store = public.labelled(agreed, self._site.folder / "public")
        plan, private = self._site.plan, self._mechanism.private
        clip = plan.agreement.privacy.clip if private else None  # patients' gradients are no longer than that
        return AuxiliaryLoss(store, public.labels, weight, plan.batches_at(self.name), clip) if store.patients else None

    def _schedule(self, act: LearningRateCycle | None) -> Schedule:
        """The steps of this round, by the plan's learning rates."""
        site, before = self._site, self._round - 1
        return Schedule(
            site.steps,
            lambda done: _rate(site.plan.agreement.training, before + done, act),
            (site.plan.local.training.seed, _number(site.stream), self._round),
        )

    @property
    def _labels(self) -> Labels:
        """What the values of the site's own label maps mean."""
        return Labels.of(self._site.plan.agreement).with_annotated(self._site.store.annotated)

    def _log_losses(self, losses: np.ndarray) -> None:
        """Losses are of patients: the site may look at its own, and nothing that an algorithm makes can hold them."""
        path = self._site.folder / "losses.json"
        means = read_json(path) if path.is_file() else {}
        mean = round(float(losses.mean()), 6) if len(losses) else None
        write_json(path, {**means, str(self._round): mean})

    def mean_effective_steps(self, proximal: float = 0.0) -> float:
        """How far the steps of all sites reach in this round, on average; a site that is not in the plan is alone."""
        site, plan = self._site, self._site.plan
        weights = plan.agreement.site_weights if site.name in plan.agreement.patients else {site.name: 1.0}
        effective = {
            name: self._effective_steps(plan.steps_at(name) if len(weights) > 1 else site.steps, proximal)
            for name in weights
        }
        return sum(weights[name] * steps for name, steps in effective.items()) / sum(weights.values())

    def _effective_steps(self, steps: int, proximal: float) -> float:
        training, before = self._site.plan.local.training, self._round - 1
        schedule = self._site.plan.agreement.training
        rates = [training.learning_rate * schedule.rate_at(before + step / steps) for step in range(steps)]
        return effective_steps(rates, training.momentum, training.momentum > 0, proximal)

    def averaged(self, weights: Arrays) -> Arrays:
        """With `training.ema` the moving average of the site's own models up to these, which are this round's."""
        ema = self._site.plan.agreement.training.ema
        return self._site.memory.averaged(self._round, weights, self._since, ema) if ema else weights

    def memory(self) -> ArrayGroups | None:
        """What the site remembered in the last round in which its response was merged."""
        return self._site.memory.recall(self._since)

    def remember(self, groups: ArrayGroups) -> None:
        """Store groups of arrays on the site's disk, with what it has stored in this round already."""
        self._remembered |= groups
        self._site.memory.keep(self._round, self._remembered, self._since, self._site.plan.agreement.training)


@dataclass(frozen=True)
class ClientMemory:
    """What a site stores of its rounds, and the best model of its own; `folder` is the site's in this run.

    `words` are in the header of each round.
    """

    folder: Path
    words: Mapping[str, Any] = field(default_factory=dict)

    def path(self, round: int) -> Path:
        """Where the arrays of a round are."""
        return self.folder / f"round_{round:05d}.safetensors"

    @property
    def best(self) -> Path:
        """The model of the site's own that scored best on the patients that it held out."""
        return self.folder / "best.safetensors"

    def latest(self, round: int) -> int:
        """The last round up to this one of which there is something; 0 if there is none."""
        stored = (int(path.stem.split("_")[1]) for path in self.folder.glob("round_*.safetensors"))
        return max((number for number in stored if number <= round), default=0)

    def recall(self, round: int) -> ArrayGroups | None:
        """The groups of a round, or None."""
        path = self.path(round)
        return load_groups(path)[0] if path.is_file() else None

    def keep(self, round: int, groups: ArrayGroups, since: int, rounds: RoundSchedule) -> None:
        """Write the groups of a round that goes on from round `since`, and forget what nothing will need again."""
        if rounds.ema and "weights" in groups:
            groups = {**groups, "mean": self.averaged(round, groups["weights"], since, rounds.ema)}
        save_groups(self.path(round), groups, self.words)
        for path in self.folder.glob("round_*.safetensors"):
            if int(path.stem.split("_")[1]) not in {round, since, *rounds.snapshots}:
                path.unlink()

    def averaged(self, round: int, weights: Arrays, since: int, ema: float) -> Arrays:
        """The moving average of the models up to this one, of a round that goes on from round `since`."""
        return moving_average((self.recall(since) or {}).get("mean"), weights, ema, round)

    def model(self, round: int) -> Arrays:
        """The weights of the site's own model after a round."""
        groups = self.recall(round) or {}
        return groups.get("mean") or groups.get("weights", {})

    def record_scores(self, round: int, dice: Mapping[str, float]) -> None:
        """Store how the own model of a round scored, and the model if it is the best so far."""
        path = self.folder / "scores.json"
        earlier = {int(r): v for r, v in (read_json(path) if path.is_file() else {}).items() if int(r) < round}
        scores = earlier | ({round: float(np.mean(list(dice.values())))} if dice else {})
        write_json(path, scores)
        best = best_round(scores)
        if best and best.round == round:
            save_groups(self.best, {"weights": self.model(round)}, best.words())


def _rate(rounds: RoundSchedule, done: float, act: LearningRateCycle | None) -> float:
    """The share of the first learning rate after so many rounds, in an act or in the whole training."""
    if act is None or not act.after <= done < act.last:  # more rounds than were planned
        return rounds.rate_at(done)
    return rounds.rate_at(rounds.rounds * (done - act.after) / (act.last - act.after))


def validate(site: SiteState, request: Request) -> ArrayGroups:
    """Dice of each structure over patches of the patients held out, of the model sent or of the site's own."""
    if not site.held.patients:
        return {}
    rounds, training = site.plan.agreement.training, site.plan.local.training
    trained = site.steps * training.batch_size * rounds.validate_every
    own = "weights" not in request.shared
    weights = site.memory.model(request.since) if own else request.shared["weights"]
    if not weights:  # none of its responses has been merged yet
        return {}
    dice = patch_dice(weights, site.held, site.plan, round(SHARE * trained), site.compute.device)
    if own:
        site.memory.record_scores(request.since, dice)
    return {"dice": {name: np.array([score], np.float32) for name, score in dice.items()}}


def verify(site: SiteState, request: Request) -> ArrayGroups:
    """Mean Dice of whole held-out cases and their number, for each structure and rule of postprocessing: (2, rules).

    Every case's own scores stay in the site's folder. Where scores pass a private mechanism, the draft holds those of
    each patient instead (`privacy.shared_scores`).
    """
    weights = _final_weights(site, request)
    private = site.plan.agreement.privacy.is_private
    if not weights or not (site.held.patients or private):
        return {}
    scores = case_dice(weights, site.held, site.plan, site.compute.device)
    names = Labels.of(site.plan.agreement).names
    write_json(site.folder / "validation.json", {
        case: {names[k]: None if np.isnan(row[0]) else round(float(row[0]), 6) for k, row in enumerate(table)}
        for case, table in scores.items()
    })  # fmt: skip
    if private:
        return {OF_PATIENTS: _by_patient(scores, site.held, names)}
    table = np.stack(list(scores.values()))
    counts = (~np.isnan(table)).sum(0)
    sums = np.nansum(table, 0)
    return {"sums": {name: np.stack([sums[k], counts[k]]).astype(np.float32) for k, name in enumerate(names)}}


def _by_patient(scores: Mapping[str, np.ndarray], held: Store, names: Sequence[str]) -> Arrays:
    """For each structure (patients, 2): the mean of a patient's cases without postprocessing, and 1 if there is one."""
    tables = [np.stack([scores[case][:, 0] for case in cases]) for _, cases in sorted(held.patients.items())]
    rows = [[table[~np.isnan(table[:, k]), k] for table in tables] for k in range(len(names))]
    return {
        name: np.array([(dice.mean(), 1.0) if len(dice) else (0.0, 0.0) for dice in by_patient]).reshape(-1, 2)
        for name, by_patient in zip(names, rows, strict=True)
    }


def _final_weights(site: SiteState, request: Request) -> Arrays:
    if "weights" in request.shared:
        return request.shared["weights"]
    if site.memory.best.is_file():
        return load_groups(site.memory.best)[0]["weights"]
    return site.memory.model(request.since)


def _number(name: str) -> int:
    """A name as a number, the same on every machine: part of the seed of what the site draws."""
    return int(digest(name)[:16], 16)
