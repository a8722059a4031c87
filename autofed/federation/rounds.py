"""What a round does: send requests, screen the responses, merge, save. One loop, never subclassed."""

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
from autofed.federation import checkpoints, metrics, server_optimiser
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
"""From one request per site to one response per site; bytes in, bytes out. A silent site is not in it."""


@dataclass(frozen=True)
class RunContext:
    """A training as the coordinator sees it: who takes part, by which rules, and the folder that holds its rounds.

    The `aggregator` averages the responses of a round. `holds_out` says that some sites hold patients out, so
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

    def ask(
        self, task: str, round: int, broadcast: Broadcast, since: Mapping[str, int], meter: metrics.TrafficMeter
    ) -> Responses:
        """The responses that count; while they are too few, the other sites are asked again.

        Args:
            task: What the sites are to do (`site.TASKS`).
            round: In which round.
            broadcast: The common state for the sites.
            since: The last round in which each site's response was merged.
            meter: Counts the bytes that travel.

        Raises:
            ValidationErrors: What was wrong at every site, if fewer than the plan's least number of sites responded in
                as many attempts as it allows.
        """
        faults, responses = self.plan.agreement.faults, Responses.none_from(self.sites)
        least = min(faults.least_sites, len(self.sites))
        is_training, labels = task == TRAIN, Labels.of(self.plan.agreement)
        released = self.algorithm.released if is_training else {}
        adapts = privacy.find_mechanism(self.plan).adapts if is_training else {}
        checks = (self.algorithm.misfits,) if is_training else ()
        whole = Request(self.run, round, task, broadcast.whole)
        for _ in range(faults.attempts):
            last_merged = {site: since.get(site, 0) for site in responses.left_out}
            requests = self._requests(task, round, broadcast, last_merged)
            replies = dict(self.transport(requests))
            meter.count(requests, replies)
            lost = {site: last_merged[site] for site in requests if site in replies and is_state_lost(replies[site])}
            if lost:
                requests = self._requests(task, round, broadcast, lost, anew=True)
                again = self.transport(requests)
                meter.count(requests, again)
                replies |= again
            responses = screen_responses(responses, replies, whole, released, labels, adapts, *checks)
            for site, why in responses.left_out.items():
                _log.warning("round %d (%s) without the site %s: it %s", round, task, site, why)
            if len(responses.accepted) >= least:
                return responses
        found = f"{len(responses.accepted)} of {len(self.sites)} sites answered in {faults.attempts} attempts"
        raise ValidationErrors(f"round {round}", [f"{found}; the plan wants {least}", *_named(responses.left_out)])

    def _requests(
        self, task: str, round: int, broadcast: Broadcast, since: Mapping[str, int], *, anew: bool = False
    ) -> dict[str, bytes]:
        """The request to each site, given the last round in which its response was merged; equal ones share memory."""
        by_age = {
            age: to_bytes(broadcast.request(self.run, round, task, age, anew=anew)) for age in set(since.values())
        }
        return {site: by_age[age] for site, age in since.items()}


def run_rounds(context: RunContext, state: ServerState) -> ServerState:
    """Rounds from `state` until the plan's last; the state after each is saved in folder/round_<r>/.

    A site that fails is named, left out of the round, and asked again in the next. `ValidationErrors` if too few sites
    answer; the rounds before are saved.
    """
    with metrics.MetricsBoard(context.folder) as board:
        if state.round:
            _finish(context, state, board)  # a run that was cut off may have left its last round unscored
        while state.round < context.plan.agreement.training.rounds:
            state = _round(context, state)
            _finish(context, state, board)
    return state


def _round(context: RunContext, state: ServerState) -> ServerState:
    """Have the sites train, and save the merged state. From here on the round is what it is, whoever asks again."""
    begin, meter, aggregator = time.monotonic(), metrics.TrafficMeter(), context.aggregator
    broadcast = make_broadcast(state, context.algorithm.released.values(), context.plan.agreement.wire)
    last_merged = _last_merged(state)
    responses = context.ask(TRAIN, state.round + 1, broadcast, last_merged, meter)
    merged = context.algorithm.merge(state, responses.accepted, aggregator.average)
    merged = server_optimiser.step(aggregator.server, state, merged)
    last_merged |= dict.fromkeys((response.site for response in responses.accepted), merged.round)
    answered = {site: np.array([round]) for site, round in last_merged.items()}
    shared = {**merged.shared, **_adaptation_history(state, responses.accepted, aggregator)}
    server_only = {**merged.server_only, **_moving_average(context.plan, state, merged), _ANSWERED: answered}
    line = {"round": merged.round, "seconds": time.monotonic() - begin, "sites": _losses(responses.accepted),
            "bytes": meter.traffic}  # fmt: skip
    line = metrics.with_notes(line, server_only.get(NOTES, {}))
    line |= {"left_out": responses.left_out} if responses.left_out else {}
    state = replace(merged, shared=shared, server_only=broadcast.keep(server_only))
    checkpoints.save(context.folder, state, context.plan, line)
    return state


def _finish(context: RunContext, state: ServerState, board: metrics.MetricsBoard) -> None:
    """Score a saved round if the plan says so, append its metrics, and save its model if it is the best."""
    if metrics.last_round(context.folder) < state.round:
        begin, line = time.monotonic(), checkpoints.line(context.folder, state.round)
        validates = context.holds_out and context.plan.agreement.training.validates(state.round)
        sites = _with_scores(line["sites"], _validate(context, state) if validates else ())
        line |= {"sites": sites, "seconds": round(line["seconds"] + time.monotonic() - begin, 2)}
        metrics.append_line(context.folder, line)
        _log.info(metrics.in_words(context.folder, context.plan.agreement.training.rounds))
        board.show(state.round, line["seconds"], sites)
    _keep_best(context, state)


def verify(context: RunContext, state: ServerState) -> Sequence[Response]:
    """The sites' scores of the final model on whole held-out cases; see `client.verify`."""
    return _ask_to_score(
        context, VERIFY, state, checkpoints.best_weights(context.folder) or checkpoints.model_of(state)
    )


def _validate(context: RunContext, state: ServerState) -> Sequence[Response]:
    return _ask_to_score(context, VALIDATE, state, checkpoints.model_of(state))


def _ask_to_score(context: RunContext, task: str, state: ServerState, model: Arrays) -> Sequence[Response]:
    """Have the common model scored, or, where there is none or every site has its own, each site's own."""
    shared = {"weights": model} if model and not context.algorithm.personalised else {}
    broadcast, meter = Broadcast(shared, shared), metrics.TrafficMeter()
    return context.ask(task, state.round, broadcast, _last_merged(state), meter).accepted


def _last_merged(state: ServerState) -> dict[str, int]:
    """The last round in which each site's response was merged."""
    return {site: int(round[0]) for site, round in state.server_only.get(_ANSWERED, {}).items()}


def _named(left_out: Mapping[str, str]) -> list[str]:
    return [f"the site {site} {why}" for site, why in left_out.items()]


def _losses(responses: Sequence[Response]) -> dict[str, dict[str, Any]]:
    """Each site's training metrics: its loss, and whatever else an algorithm has sites report."""
    return {response.site: metrics.means(response.arrays.get("metrics", {})) for response in responses}


def _with_scores(sites: Mapping[str, Any], responses: Sequence[Response]) -> dict[str, dict[str, Any]]:
    """The metrics of the sites with each site's Dice by structure."""
    with_scores = dict(sites)
    for response in responses:
        dice = metrics.means(response.arrays.get("dice", {}))
        if dice:
            with_scores.setdefault(response.site, {})["dice"] = dice
    return with_scores


def _keep_best(context: RunContext, state: ServerState) -> None:
    """Save the model of this round if it scored best; where sites have their own, each saves its own best."""
    model = {} if context.algorithm.personalised else checkpoints.model_of(state)
    best = best_round(metrics.scores(context.folder)) if model else None
    if best and best.round == state.round:
        checkpoints.save_best(context.folder, model, best)


def _moving_average(plan: Plan, before: ServerState, merged: ServerState) -> ArrayGroups:
    """The moving average of the common weights, if the plan has one."""
    ema = plan.agreement.training.ema
    if not ema or "weights" not in merged.shared:
        return {}
    return {"mean": moving_average(before.server_only.get("mean"), merged.shared["weights"], ema, merged.round)}


def _adaptation_history(before: ServerState, responses: Sequence[Response], aggregator: Aggregator) -> ArrayGroups:
    """The averaged adaptation groups of all rounds so far, if the sites' mechanism releases any."""
    if not all(ADAPTATION in response.arrays for response in responses):
        return {}
    past, now = before.shared.get(ADAPTATION, {}), aggregator.average(responses, ADAPTATION)
    stacked = {name: np.concatenate([*([past[name]] if name in past else []), now[name][None]]) for name in now}
    return {ADAPTATION: stacked}
