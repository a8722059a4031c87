"""What a round does: ask every site, check the answers, merge, save. The loop is written once and never subclassed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autofed.algorithms import Algorithm, Average, site_weights
from autofed.exchange import Arrays, Failure, Groups, Message, Release, Request, ServerState, from_bytes, to_bytes
from autofed.federation import metrics, states
from autofed.federation.selection import best_of, moving_average
from autofed.federation.site import TRAIN, VALIDATE, VERIFY
from autofed.plans import Plan
from autofed.privacy import ADAPTATION, Mechanism, adapted
from autofed.problems import Problems, refuse

Transport = Callable[[Mapping[str, bytes]], Mapping[str, bytes]]
"""From one request per site to one answer per site; bytes in, bytes out."""


@dataclass(frozen=True)
class Course:
    """A training as the coordinator sees it: who takes part, by which rules, and the folder that holds its rounds.

    `holds_out` says that some sites hold patients out, so that there is something to score.
    """

    algorithm: Algorithm
    mechanism: Mechanism
    plan: Plan
    transport: Transport
    folder: Path
    run: str
    sites: Sequence[str]
    holds_out: bool = False

    def ask(self, question: str, round: int, shared: Groups) -> list[Release]:
        """The sites' answers; `Problems` names every site that failed or answered what cannot be merged."""
        request = Request(self.run, round, question, shared)
        return _check(self.transport(dict.fromkeys(self.sites, to_bytes(request))), self.sites, request)


def run(course: Course, state: ServerState) -> ServerState:
    """Rounds from `state` until the plan's last; the state after each is saved in folder/round_<r>/.

    `Problems` names every site that failed or answered what cannot be merged; the rounds before are saved.
    """
    rounds = course.plan.agreement.training
    with metrics.Board(course.folder) as board:
        while state.round < rounds.rounds:
            begin = time.monotonic()
            releases = course.ask(TRAIN, state.round + 1, state.shared)
            state = _merge(course, state, releases)
            scores = _validate(course, state) if course.holds_out and rounds.validates(state.round) else []
            seconds, said = time.monotonic() - begin, _said(releases, scores)
            metrics.note(course.folder, state.round, seconds, said)
            _keep_best(course.folder, state)
            states.save(course.folder, state, course.plan)  # last: a round whose state is there is whole
            board.show(state.round, seconds, said)
    return state


def verify(course: Course, state: ServerState) -> list[Release]:
    """What the sites say of the final model on whole held-out cases; see `answers.verify`."""
    best = states.best_weights(course.folder)
    model = best or states.model_of(state)
    return course.ask(VERIFY, state.round, {"weights": model} if model else {})


def _validate(course: Course, state: ServerState) -> list[Release]:
    model = states.model_of(state)
    return course.ask(VALIDATE, state.round, {"weights": model} if model else {})


def _said(releases: Sequence[Release], scores: Sequence[Release]) -> dict[str, dict[str, Any]]:
    """Loss, and Dice by structure, of each site."""
    said: dict[str, dict[str, Any]] = {r.site: {**metrics.means(r.arrays.get("metrics", {}))} for r in releases}
    for release in scores:
        dice = metrics.means(release.arrays.get("dice", {}))
        if dice:
            said.setdefault(release.site, {})["dice"] = dice
    return said


def _keep_best(folder: Path, state: ServerState) -> None:
    """Keep the model of this round if no other scored as well; a model of every site's own is kept by the site."""
    model = states.model_of(state)
    found = best_of(metrics.scores(folder)) if model else None
    if found and found.round == state.round:
        states.save_best(folder, model, found)


def _merge(course: Course, state: ServerState, releases: Sequence[Release]) -> ServerState:
    current = adapted(course.mechanism, state.shared.get(ADAPTATION, {}))
    weights = site_weights(course.plan)
    average = partial(_average, current, {site: weights.get(site, 1.0) for site in course.sites})
    merged = course.algorithm.merge(state, releases, average)
    shared = _with_history(merged.shared, state.shared, releases, average)
    return replace(merged, shared=shared, kept=_with_mean(course, state, merged))


def _with_mean(course: Course, before: ServerState, merged: ServerState) -> Groups:
    """What the coordinator keeps, with the moving average of the common weights if the plan wants one."""
    ema = course.plan.agreement.training.ema
    if not ema or "weights" not in merged.shared:
        return merged.kept
    past = before.kept.get("mean")
    return {**merged.kept, "mean": moving_average(past, merged.shared["weights"], ema, merged.round)}


def _average(
    mechanism: Mechanism, weights: Mapping[str, float], releases: Sequence[Release], group: str
) -> dict[str, np.ndarray]:
    return mechanism.average({r.site: r.arrays[group] for r in releases}, weights)


def _with_history(shared: Groups, before: Groups, releases: Sequence[Release], average: Average) -> Groups:
    """`shared` with the averaged adaptation groups of all rounds so far, if the sites' mechanism releases any."""
    if not all(ADAPTATION in release.arrays for release in releases):
        return shared
    past, now = before.get(ADAPTATION, {}), average(releases, ADAPTATION)
    stacked = {name: np.concatenate([*([past[name]] if name in past else []), now[name][None]]) for name in now}
    return {**shared, ADAPTATION: stacked}


def _check(answers: Mapping[str, bytes], sites: Sequence[str], request: Request) -> list[Release]:
    """The releases, in the order of the sites' names; a site that is silent is as much a problem as one that errs."""
    problems = [f"the site {site} did not answer" for site in sites if site not in answers]
    problems += [f"{site} answered, which is not a site of this run" for site in answers if site not in sites]
    messages: dict[str, Message] = {}
    for site, data in sorted(answers.items()):
        try:
            messages[site] = from_bytes(data)
        except Problems as error:
            problems += [f"the site {site} answered what is no message: {p}" for p in error.problems]
    for site, message in messages.items():
        if isinstance(message, Failure):
            problems.append(f"the site {site} failed with the code {message.code!r}; the details are in its site.log")
        elif not isinstance(message, Release) or (message.run, message.round, message.site) != (
            request.run,
            request.round,
            site,
        ):
            problems.append(f"the site {site} answered another question than that of round {request.round}")
        else:
            problems += [f"the site {site}: {p}" for p in _misfits(message.arrays, request.shared)]
    refuse(f"round {request.round}", problems)
    return [message for message in messages.values() if isinstance(message, Release)]


def _misfits(arrays: Groups, shared: Groups) -> list[str]:
    """An update must look like the weights it updates, and no number may be NaN or infinite."""
    problems = []
    if "update" in arrays and "weights" in shared and _shapes(arrays["update"]) != _shapes(shared["weights"]):
        problems.append("its update has other names, shapes or dtypes than the weights it was sent")
    for group, found in arrays.items():
        if not all(np.isfinite(array).all() for array in found.values()):
            problems.append(f"{group} holds NaN or infinite values")
    return problems


def _shapes(arrays: Arrays) -> dict[str, tuple]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}
