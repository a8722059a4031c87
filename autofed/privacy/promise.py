"""What a plan promises a patient and what its mechanism costs: the same numbers, or there is no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autofed import privacy
from autofed.exchange import Arrays
from autofed.plans import Plan
from autofed.privacy import accounting
from autofed.privacy.census import NoisedCensus, order_of
from autofed.privacy.events import Event

_TOLERANCE = 1e-6
"""By so much an epsilon may be above the one stated: what another machine's last digits may hide."""


def planned(plan: Plan, steps: int) -> tuple[Event, ...]:
    """All that the promise counts for a site that takes so many steps in a round: what it will be charged, and before.

    Where the noise responds to what is released it is what the schedule has without a response.
    """
    return (*_before(plan), *to_charge(plan, steps))


def to_charge(plan: Plan, steps: int) -> tuple[Event, ...]:
    """What a whole training will charge: its rounds, and the scores if they are shared."""
    return (*privacy.find(plan).planned(plan.agreement.training.rounds, steps), *_after(plan))


def _before(plan: Plan) -> tuple[Event, ...]:
    """The noised fingerprint that the plan rests on: it was charged when it was counted."""
    noise = plan.agreement.privacy.census_noise
    return NoisedCensus(noise).cost() if noise else ()


def _after(plan: Plan) -> tuple[Event, ...]:
    scores = privacy.for_scores(plan, columns=1)
    return scores.cost(0) if scores else ()


def problems(plan: Plan, steps: Mapping[str, int] | None = None) -> list[str]:
    """Why a plan's promise does not hold, for sites (by name) that take so many steps in a round.

    `Problems` if there is no mechanism such as it names.
    """
    stated = plan.agreement.privacy
    if not privacy.find(plan).private:
        return []
    if stated.epsilon is None or stated.delta is None:
        return ["a private plan states what it promises; write autofed plan PLAN --epsilon 8 --delta 1e-5 -o PLAN"]
    taken = steps or {site: plan.steps_at(site) for site in plan.agreement.patients}
    known = {n: spent(plan, n) for n in set(taken.values())}
    most = max(plan.agreement.patients.values())
    risky = [
        f"a delta of {stated.delta:g} allows as much as one of {most} patients to be given away; write one far below "
        f"{1 / most:.2g}, such as {accounting.default_delta(most):g}"
    ]
    return (risky if stated.delta >= 1 / most else []) + [
        f"{site}: {n} steps in each of {plan.agreement.training.rounds} rounds spend epsilon {known[n]:.3f} at delta "
        f"{stated.delta:g}, the plan promises {stated.epsilon:g}; calibrate it anew with autofed plan PLAN --epsilon"
        for site, n in taken.items()
        if known[n] > stated.epsilon + _TOLERANCE
    ]


def spent(plan: Plan, steps: int) -> float:
    """The epsilon of a whole training, at the plan's delta, for a site that takes so many steps in a round."""
    return _measure(plan)(planned(plan, steps), float(plan.agreement.privacy.delta or 0))


def is_kept(plan: Plan, steps: int, history: Arrays, round: int) -> bool:
    """Whether a site can still answer this round by the plan's promise, after what was released before (`history`)."""
    if not plan.agreement.privacy.noise_response:
        return True
    return allows(plan, steps, [event for r in range(1, round + 1) for event in _at(plan, history, r).cost(steps)])


def allows(plan: Plan, steps: int, spent: Sequence[Event]) -> bool:
    """Whether a training that has spent this, the coming round included, keeps the plan's promise.

    Only noise that responds to what was released can break it before the end. Then a filter keeps it: the sum of what
    all rounds have cost at one Renyi order, fixed by the plan (Feldman and Zrnic, NeurIPS 2021, theorem 4.3), with what
    the promise counts beside the training.
    """
    stated = plan.agreement.privacy
    if not stated.noise_response or stated.epsilon is None or stated.delta is None:
        return True
    order = _order(plan, planned(plan, steps), stated.delta)
    cost = accounting.renyi_epsilon([*_before(plan), *spent, *_after(plan)], stated.delta, order)
    return cost <= stated.epsilon


def settled(plan: Plan, epsilon: float | None, delta: float | None, *, noise_is_given: bool) -> dict[str, Any]:
    """The fields that make a plan's noise and its promise one: the noise for an epsilon, or the epsilon of a noise.

    Given neither, the epsilon that the plan states stays, if it states one. Nothing for a plan without privacy.
    """
    stated = plan.agreement.privacy
    if not stated.promises:
        return {}
    wanted = stated.epsilon if epsilon is None and not noise_is_given else epsilon
    found = delta or stated.delta or accounting.default_delta(max(plan.agreement.patients.values()))
    steps = max(plan.steps_at(site) for site in plan.agreement.patients)
    if wanted is None:
        return _promise(round(_measure(plan)(planned(plan, steps), found) + 5e-5, 4), found)
    measure = _measure(plan)
    noise = accounting.calibrate(lambda z: planned(_with_noise(plan, z), steps), wanted, found, measure)
    return {"agreement.privacy.noise_multiplier": noise, **_promise(wanted, found)}


def _promise(epsilon: float, delta: float) -> dict[str, Any]:
    return {"agreement.privacy.epsilon": epsilon, "agreement.privacy.delta": delta}


def _measure(plan: Plan) -> Callable[[Sequence[Event], float], float]:
    """How the plan's epsilon is told: by what keeps it."""
    stated = plan.agreement.privacy
    if not stated.noise_response and stated.census_noise is None:
        return accounting.epsilon
    return lambda events, delta: accounting.renyi_epsilon(events, delta, _order(plan, events, delta))


def _order(plan: Plan, events: Sequence[Event], delta: float) -> int:
    """That of the filter: fixed by the census where the plan follows from one, else the best for what is planned."""
    noise = plan.agreement.privacy.census_noise
    return order_of(noise) if noise else accounting.best_order(events, delta)


def _with_noise(plan: Plan, noise: float) -> Plan:
    stated = plan.agreement.privacy.model_copy(update={"noise_multiplier": noise})
    return plan.model_copy(update={"agreement": plan.agreement.model_copy(update={"privacy": stated})})


def _at(plan: Plan, history: Arrays, round: int) -> privacy.Mechanism:
    past = {name: array[: round - 1] for name, array in history.items()}
    return privacy.adapted(privacy.find(plan), past, round)
