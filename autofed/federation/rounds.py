"""What a round does: ask every site, check the answers, merge, save. The loop is written once and never subclassed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autofed import privacy
from autofed.algorithms import NOTES, Algorithm
from autofed.data.labels import Labels
from autofed.errors import ValidationErrors
from autofed.federation import checkpoints, metrics
from autofed.federation.aggregation import Aggregator
from autofed.federation.model_selection import best_round, moving_average
from autofed.federation.screening import Responses, screen_responses
from autofed.federation.site import TRAIN, VALIDATE, VERIFY
from autofed.messages import ArrayGroups, Arrays, Request, Response, ServerState, to_bytes
from autofed.messages.error_feedback import Broadcast, is_state_lost, make_broadcast
from autofed.plans import Plan
from autofed.privacy import ADAPTATION

_log = logging.getLogger(__name__)

_ANSWERED = "answered"
"""The group that the coordinator keeps: the last round in which each site's answer was merged."""

Transport = Callable[[Mapping[str, bytes]], Mapping[str, bytes]]
"""From one request per site to one answer per site; bytes in, bytes out. Who is silent is not in it."""


@dataclass(frozen=True)
class RunContext:
    """A training as the coordinator sees it: who takes part, by which rules, and the folder that holds its rounds.

    The `aggregator` makes one state of the answers of a round. `holds_out` says that some sites hold patients out, so
    that there is something to score.
    """

    algorithm: Algorithm
    aggregator: Aggregator
    plan: Plan
    transport: Transport
    folder: Path
    run: str
    sites: Sequence[str]
    holds_out: bool = False

    def ask(self, question: str, round: int, sent: Broadcast, since: Mapping[str, int]) -> Responses:
        """The answers that count; while they are fewer than the plan's least number, the other sites are asked again.

        `since` is the last round in which each site's answer was merged. `ValidationErrors` says what was wrong at
        every site if there are too few after as many attempts as the plan allows.
        """
        faults, answers = self.plan.agreement.faults, Responses((), dict.fromkeys(self.sites, ""))
        least = min(faults.least_sites, len(self.sites))
        for _ in range(faults.attempts):
            answers = answers.merged_with(self._ask_once(question, round, sent, since, tuple(answers.left_out)))
            answers = answers.without_outliers(_released(self, question))
            for site, why in answers.left_out.items():
                _log.warning("round %d (%s) without the site %s: it %s", round, question, site, why)
            if len(answers.releases) >= least:
                return answers
        found = f"{len(answers.releases)} of {len(self.sites)} sites answered in {faults.attempts} attempts"
        raise ValidationErrors(f"round {round}", [f"{found}; the plan wants {least}", *_named(answers.left_out)])

    def _ask_once(
        self, question: str, round: int, sent: Broadcast, since: Mapping[str, int], sites: Sequence[str]
    ) -> Responses:
        request = Request(self.run, round, question, sent.whole)
        ages = {since.get(site, 0) for site in sites}
        data = {s: to_bytes(sent.request(self.run, round, question, s)) for s in ages}
        answers = dict(self.transport({site: data[since.get(site, 0)] for site in sites}))
        again = {s: since.get(s, 0) for s, answer in answers.items() if s in sites and is_state_lost(answer)}
        whole = {s: to_bytes(sent.request(self.run, round, question, r, anew=True)) for s, r in again.items()}
        answers |= self.transport(whole) if whole else {}
        adapts = privacy.find_mechanism(self.plan).adapts if question == TRAIN else {}
        checks = (self.algorithm.misfits,) if question == TRAIN else ()
        labels = Labels.of(self.plan.agreement)
        return screen_responses(answers, sites, request, _released(self, question), labels, adapts, *checks)


def _released(course: RunContext, question: str) -> Mapping[str, str]:
    return course.algorithm.released if question == TRAIN else {}


def run_rounds(course: RunContext, state: ServerState) -> ServerState:
    """Rounds from `state` until the plan's last; the state after each is saved in folder/round_<r>/.

    A site that fails is named, left out of the round, and asked again in the next. `ValidationErrors` if too few sites
    answer; the rounds before are saved.
    """
    with metrics.MetricsBoard(course.folder) as board:
        if state.round:
            _finish(course, state, board)  # a run that was cut off may have left its last round unscored
        while state.round < course.plan.agreement.training.rounds:
            state = _round(course, state)
            _finish(course, state, board)
    return state


def _round(course: RunContext, state: ServerState) -> ServerState:
    """Have the sites train, and save what they come to. From here on the round is what it is, whoever asks again."""
    begin, meter = time.monotonic(), metrics.TrafficMeter(course.transport)
    sent = make_broadcast(state, course.algorithm.released.values(), course.plan.agreement.wire)
    answers = replace(course, transport=meter).ask(TRAIN, state.round + 1, sent, _answered(state))
    state = _merge(course, state, answers.releases)
    state = replace(state, kept=sent.keep(state.kept))
    line = {"round": state.round, "seconds": time.monotonic() - begin, "sites": _losses(answers.releases),
            "bytes": meter.traffic}  # fmt: skip
    line = metrics.with_notes(line, state.kept.get(NOTES, {}))
    checkpoints.save(
        course.folder, state, course.plan, {**line, **({"left_out": answers.left_out} if answers.left_out else {})}
    )
    return state


def _finish(course: RunContext, state: ServerState, board: metrics.MetricsBoard) -> None:
    """Score a saved round if the plan wants it, note what is known of it, and keep its model if it is the best."""
    if metrics.last_round(course.folder) < state.round:
        begin, line = time.monotonic(), checkpoints.line(course.folder, state.round)
        validates = course.holds_out and course.plan.agreement.training.validates(state.round)
        said = _with_scores(line["sites"], _validate(course, state) if validates else ())
        line |= {"sites": said, "seconds": round(line["seconds"] + time.monotonic() - begin, 2)}
        metrics.append_line(course.folder, line)
        _log.info(metrics.in_words(course.folder, course.plan.agreement.training.rounds))
        board.show(state.round, line["seconds"], said)
    _keep_best(course, state)


def verify(course: RunContext, state: ServerState) -> Sequence[Response]:
    """What the sites say of the final model on whole held-out cases; see `answers.verify`."""
    return _ask_to_score(course, VERIFY, state, checkpoints.best_weights(course.folder) or checkpoints.model_of(state))


def _validate(course: RunContext, state: ServerState) -> Sequence[Response]:
    return _ask_to_score(course, VALIDATE, state, checkpoints.model_of(state))


def _ask_to_score(course: RunContext, question: str, state: ServerState, model: Arrays) -> Sequence[Response]:
    """Have the common model scored, or, where there is none or every site has its own, each site's own."""
    shared = {"weights": model} if model and not course.algorithm.personalised else {}
    return course.ask(question, state.round, Broadcast(shared, shared), _answered(state)).releases


def _answered(state: ServerState) -> dict[str, int]:
    return {site: int(round[0]) for site, round in state.kept.get(_ANSWERED, {}).items()}


def _named(left_out: Mapping[str, str]) -> list[str]:
    return [f"the site {site} {why}" for site, why in left_out.items()]


def _losses(releases: Sequence[Response]) -> dict[str, dict[str, Any]]:
    """What each site says of its training: its loss, and whatever else an algorithm has sites say."""
    return {r.site: metrics.means(r.arrays.get("metrics", {})) for r in releases}


def _with_scores(said: Mapping[str, Any], scores: Sequence[Response]) -> dict[str, dict[str, Any]]:
    """The same with each site's Dice by structure."""
    said = dict(said)
    for release in scores:
        dice = metrics.means(release.arrays.get("dice", {}))
        if dice:
            said.setdefault(release.site, {})["dice"] = dice
    return said


def _keep_best(course: RunContext, state: ServerState) -> None:
    """Keep the model of this round if no other scored as well; where sites have their own, each keeps its own best."""
    model = {} if course.algorithm.personalised else checkpoints.model_of(state)
    found = best_round(metrics.scores(course.folder)) if model else None
    if found and found.round == state.round:
        checkpoints.save_best(course.folder, model, found)


def _merge(course: RunContext, state: ServerState, releases: Sequence[Response]) -> ServerState:
    merged = course.aggregator.merge(course.algorithm, state, releases)
    shared = _with_history(merged.shared, state.shared, releases, course.aggregator)
    answered = {**state.kept.get(_ANSWERED, {}), **{r.site: np.array([merged.round]) for r in releases}}
    return replace(merged, shared=shared, kept={**_with_mean(course, state, merged), _ANSWERED: answered})


def _with_mean(course: RunContext, before: ServerState, merged: ServerState) -> ArrayGroups:
    """What the coordinator keeps, with the moving average of the common weights if the plan wants one."""
    ema = course.plan.agreement.training.ema
    if not ema or "weights" not in merged.shared:
        return merged.kept
    past = before.kept.get("mean")
    return {**merged.kept, "mean": moving_average(past, merged.shared["weights"], ema, merged.round)}


def _with_history(
    shared: ArrayGroups, before: ArrayGroups, releases: Sequence[Response], aggregator: Aggregator
) -> ArrayGroups:
    """`shared` with the averaged adaptation groups of all rounds so far, if the sites' mechanism releases any."""
    if not all(ADAPTATION in release.arrays for release in releases):
        return shared
    past, now = before.get(ADAPTATION, {}), aggregator.average(releases, ADAPTATION)
    stacked = {name: np.concatenate([*([past[name]] if name in past else []), now[name][None]]) for name in now}
    return {**shared, ADAPTATION: stacked}
