"""What would mend a private plan that is not sound: found by asking for other plans, not by rule of thumb."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from autofed.planner.coarser_grids import grid_candidates
from autofed.planner.forecast import EXPECTED_LEARNING, SOUND, STRAINED, Grade, forecast
from autofed.planner.private_search import Candidate, SearchProblem
from autofed.plans import Plan

_TIMES = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""So many times more patients, or a larger epsilon, are looked at."""

_CLEARLY = 0.8
"""The planner's own choice is told only if its ratio is so much smaller: a search knows noise to some percent."""

_MOST_EPSILON = 100.0
"""An epsilon above this is no promise any more, and is not proposed."""


def suggestions(plan: Plan) -> tuple[str, ...]:
    """What would make a private plan sound, or at least possible; nothing for one that is sound, or cannot be told."""
    told = forecast(plan)
    if told is None or told.grade == "sound":
        return ()
    return tuple(_remedies(_question_of(plan), told.whole))


def _question_of(plan: Plan) -> SearchProblem:
    """What a private plan was asked for."""
    stated = plan.agreement.privacy
    return SearchProblem.of(plan, float(stated.epsilon or 0), float(stated.delta or 0), grid_candidates(plan))


def infeasible_reason(question: SearchProblem, best: Candidate) -> str:
    """Why too little would be learned, and what would help, a line each."""
    reason = (
        f"hardly anything would be learned from {_numbers(question)} patients at epsilon {question.epsilon:g} (delta "
        f"{question.delta:g}): over all steps the noise is {best.whole:.2g} times as strong as the patients' signal"
    )
    evidence = (
        f"  that is of the best plan ({describe_candidate(best)}); above {STRAINED:g} networks learned little more "
        "than one threshold, or one map for all images, gives without any training"
    )
    suggestions = [*_remedies(question, best.whole), "or plan it all the same: --even-if-hopeless"]
    return "\n".join([reason, evidence, "  what would help:", *(f"    {suggestion}" for suggestion in suggestions)])


def describe_candidate(candidate: Candidate) -> str:
    """A candidate in a few words."""
    build = candidate.build
    drawn = f"patches per patient {build.patches}, sampling rate {candidate.rate:g}"
    return f"{build.network.parameters} parameters, {drawn}, {candidate.steps} steps"


def _remedies(question: SearchProblem, whole: float) -> Iterator[str]:
    """Each alone, all else as it was asked for; each begins with how much is then expected to be learned."""
    grade: Grade = "strained" if whole > STRAINED else "sound"
    then, wanted = f"{EXPECTED_LEARNING[grade]} learning", STRAINED if whole > STRAINED else SOUND
    best = question.search()[0]
    if best.whole <= min(wanted, _CLEARLY * whole):
        yield f"{then} as autofed plans it by itself: {describe_candidate(best)}"
        return
    if times := _first(lambda t: _with_patients(question, t), wanted):
        yield f"{then} with about {times:g} times as many patients ({_numbers(_with_patients(question, times))})"
    if question.epsilon < _MOST_EPSILON:
        enough = next((e for e in larger(question.epsilon) if _reaches(replace(question, epsilon=e), wanted)), None)
        yield f"{then} with --epsilon {enough:g}" if enough else f"no epsilon up to {_MOST_EPSILON:g} would do"
    hours = question.hours
    if hours and (times := _first(lambda t: replace(question, hours=hours * t), wanted)):
        yield f"{then} with --hours {hours * times:g}"
    if question.averages and len(question.patients) > 1 and _reaches(replace(question, coordinator_adds=True), wanted):
        yield f"{then} if all sites trusted one coordinator to add the noise once, which autofed does not offer"
    if whole > STRAINED:
        yield "without a promise: --algorithm dcfed, where pseudo-labels travel and no weights, is no formal guarantee"


def larger(epsilon: float) -> Iterator[float]:
    """The epsilons that are looked at, to the largest that is proposed."""
    found = [epsilon * times for times in _TIMES]
    while found[-1] < _MOST_EPSILON:
        found.append(2 * found[-1])
    yield from (one for one in found if one < _MOST_EPSILON)
    yield _MOST_EPSILON


def _first(changed: Callable[[float], SearchProblem], wanted: float) -> float | None:
    """The first factor that reaches a ratio of noise to signal."""
    return next((times for times in _TIMES if _reaches(changed(times), wanted)), None)


def _reaches(question: SearchProblem, wanted: float) -> bool:
    found = question.search()
    return bool(found) and found[0].whole <= wanted


def _with_patients(question: SearchProblem, times: float) -> SearchProblem:
    return replace(question, more=times)


def _numbers(question: SearchProblem) -> str:
    return ", ".join(str(round(question.more * n)) for n in question.patients.values())
