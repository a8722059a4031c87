"""What would make an infeasible private plan feasible: found by searching for other plans, not by rule of thumb."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from autofed.planner.coarser_grids import grid_candidates
from autofed.planner.forecast import EXPECTED_LEARNING, SOUND, STRAINED, Grade, forecast
from autofed.planner.private_search import Candidate, SearchProblem
from autofed.plans import Plan

_FACTORS = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Multiples of patients, epsilon and hours that are tried."""

_CLEARLY_BETTER = 0.8
"""The planner's own choice is suggested only if it lowers the ratio to this share: the search estimates noise only."""

_MOST_EPSILON = 100.0
"""A larger epsilon guarantees nothing any more, and is not suggested."""


def suggestions(plan: Plan) -> tuple[str, ...]:
    """What would raise the grade of a private plan; nothing for a sound plan, or one without a forecast."""
    expected = forecast(plan)
    if expected is None or expected.grade == "sound":
        return ()
    return tuple(_suggestions(_problem_of(plan), expected.total_ratio))


def _problem_of(plan: Plan) -> SearchProblem:
    """The search that a private plan could come from."""
    stated = plan.agreement.privacy
    return SearchProblem.of(plan, float(stated.epsilon or 0), float(stated.delta or 0), grid_candidates(plan))


def infeasible_reason(problem: SearchProblem, best: Candidate) -> str:
    """Why too little would be learned, and what would help, a line each."""
    reason = (
        f"hardly anything would be learned from {_patient_counts(problem)} patients at epsilon "
        f"{problem.guarantee.epsilon:g} (delta {problem.guarantee.delta:g}): over all steps the noise is "
        f"{best.total_ratio:.2g} times as strong as the patients' signal"
    )
    evidence = (
        f"  that is of the best plan ({describe_candidate(best)}); above {STRAINED:g} networks learned little more "
        "than one threshold, or one map for all images, gives without any training"
    )
    suggestions = [*_suggestions(problem, best.total_ratio), "or plan it all the same: --even-if-hopeless"]
    return "\n".join([reason, evidence, "  what would help:", *(f"    {suggestion}" for suggestion in suggestions)])


def describe_candidate(candidate: Candidate) -> str:
    """A candidate in a few words."""
    configuration = candidate.configuration
    sampling = f"patches per patient {configuration.patches}, sampling rate {candidate.sampling_rate:g}"
    return f"{configuration.network.parameters} parameters, {sampling}, {candidate.steps} steps"


def _suggestions(problem: SearchProblem, total_ratio: float) -> Iterator[str]:
    """Each changes one thing alone; each begins with how much is then expected to be learned."""
    grade: Grade = "strained" if total_ratio > STRAINED else "sound"
    outcome, target = f"{EXPECTED_LEARNING[grade]} learning", STRAINED if total_ratio > STRAINED else SOUND
    best = problem.search()[0]
    if best.total_ratio <= min(target, _CLEARLY_BETTER * total_ratio):
        yield f"{outcome} as autofed plans it by itself: {describe_candidate(best)}"
        return
    if factor := _first_factor(lambda f: _with_patients(problem, f), target):
        counts = _patient_counts(_with_patients(problem, factor))
        yield f"{outcome} with about {factor:g} times as many patients ({counts})"
    if problem.guarantee.epsilon < _MOST_EPSILON:
        larger = larger_epsilons(problem.guarantee.epsilon)
        epsilons = (e for e in larger if _reaches(with_epsilon(problem, e), target))
        epsilon = next(epsilons, None)
        yield f"{outcome} with --epsilon {epsilon:g}" if epsilon else f"no epsilon up to {_MOST_EPSILON:g} would do"
    hours = problem.hours
    if hours and (factor := _first_factor(lambda f: replace(problem, hours=hours * f), target)):
        yield f"{outcome} with --hours {hours * factor:g}"
    if _is_averaged(problem) and _reaches(replace(problem, coordinator_adds_noise=True), target):
        yield f"{outcome} if all sites trusted one coordinator to add the noise once, which autofed does not offer"
    if total_ratio > STRAINED:
        yield "without a promise: --algorithm dcfed, where pseudo-labels travel and no weights, is no formal guarantee"


def larger_epsilons(epsilon: float) -> Iterator[float]:
    """The epsilons that are tried, to the largest that is suggested."""
    epsilons = [epsilon * factor for factor in _FACTORS]
    while epsilons[-1] < _MOST_EPSILON:
        epsilons.append(2 * epsilons[-1])
    yield from (larger for larger in epsilons if larger < _MOST_EPSILON)
    yield _MOST_EPSILON


def _first_factor(scaled: Callable[[float], SearchProblem], target: float) -> float | None:
    """The first factor whose search reaches a total noise-to-signal ratio."""
    return next((factor for factor in _FACTORS if _reaches(scaled(factor), target)), None)


def _reaches(problem: SearchProblem, target: float) -> bool:
    candidates = problem.search()
    return bool(candidates) and candidates[0].total_ratio <= target


def _is_averaged(problem: SearchProblem) -> bool:
    return problem.averages_updates and len(problem.patients) > 1


def with_epsilon(problem: SearchProblem, epsilon: float) -> SearchProblem:
    """The same search for another epsilon."""
    return replace(problem, guarantee=replace(problem.guarantee, epsilon=epsilon))


def _with_patients(problem: SearchProblem, factor: float) -> SearchProblem:
    return replace(problem, patients_factor=factor)


def _patient_counts(problem: SearchProblem) -> str:
    return ", ".join(str(round(problem.patients_factor * n)) for n in problem.patients.values())
