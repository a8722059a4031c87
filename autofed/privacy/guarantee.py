"""What a plan promises a patient and what its mechanism costs: the same numbers, or there is no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autofed import privacy
from autofed.plans import Plan
from autofed.privacy import accounting
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.private_fingerprint import PrivateFingerprintMechanism, order_of

_TOLERANCE = 1e-6
"""By so much an epsilon may be above the one stated: what another machine's last digits may hide."""


@dataclass(frozen=True)
class Guarantee:
    """What is promised to every patient: `epsilon` at `delta`, for a training and the noised fingerprints before it.

    `census_noise` is the noise multiplier of those fingerprints, None if they were not noised. How an epsilon is told
    of events is decided here alone. Without a census all was fixed beforehand, and loss distributions tell it. What is
    trained after a census follows from it, so that only a filter holds, at an order fixed by the census (`order_of`).
    """

    epsilon: float
    delta: float
    census_noise: float | None = None

    @property
    def before(self) -> tuple[PrivacyEvent, ...]:
        """The noised fingerprints: they were charged when they were counted."""
        return PrivateFingerprintMechanism(self.census_noise).cost() if self.census_noise else ()

    def spent(self, training: Sequence[PrivacyEvent]) -> float:
        """The epsilon of a training that costs these events, with what was before it."""
        return self._epsilon((*self.before, *training))

    def least_noise(self, training: Callable[[float], Sequence[PrivacyEvent]]) -> float:
        """The least noise multiplier that keeps the promise (see `accounting.calibrate`).

        `training` gives what the training costs with a multiplier.
        """

        def events(noise: float) -> tuple[PrivacyEvent, ...]:
            return (*self.before, *training(noise))

        return accounting.calibrate(events, self.epsilon, self.delta, lambda spent, _: self._epsilon(spent))

    def fields(self, noise: float | None = None) -> dict[str, Any]:
        """The fields of a plan that state it, and the noise multiplier if one is given."""
        stated = {} if noise is None else {"noise_multiplier": noise}
        stated |= {"epsilon": self.epsilon, "delta": self.delta}
        return {f"agreement.privacy.{name}": value for name, value in stated.items()}

    def _epsilon(self, events: Sequence[PrivacyEvent]) -> float:
        if self.census_noise is None:
            return accounting.epsilon(events, self.delta)
        return accounting.renyi_epsilon(events, self.delta, order_of(self.census_noise))


def of_plan(plan: Plan) -> Guarantee:
    """What a plan promises; epsilon and delta are 0 if it states none."""
    stated = plan.agreement.privacy
    return Guarantee(stated.epsilon or 0.0, stated.delta or 0.0, stated.census_noise)


def planned(plan: Plan, steps: int) -> tuple[PrivacyEvent, ...]:
    """All that the promise counts of a site that takes so many steps in a round: its training, and what was before."""
    return (*of_plan(plan).before, *to_charge(plan, steps))


def to_charge(plan: Plan, steps: int) -> tuple[PrivacyEvent, ...]:
    """What a whole training will charge: its rounds, and the scores if they are shared."""
    return (*privacy.find_mechanism(plan).planned(plan.agreement.training.rounds, steps), *_after(plan))


def _after(plan: Plan) -> tuple[PrivacyEvent, ...]:
    scores = privacy.score_mechanism(plan, columns=1)
    return scores.cost(0) if scores else ()


def problems(plan: Plan, steps: Mapping[str, int] | None = None) -> list[str]:
    """Why a plan's promise does not hold, for sites (by name) that take so many steps in a round.

    `Problems` if there is no mechanism such as it names.
    """
    stated = plan.agreement.privacy
    if not privacy.find_mechanism(plan).private:
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
    return of_plan(plan).spent(to_charge(plan, steps))


def settled(plan: Plan, epsilon: float | None, delta: float | None, *, noise_is_given: bool) -> dict[str, Any]:
    """The fields that make a plan's noise and its promise one: the noise for an epsilon, or the epsilon of a noise.

    Given neither, the epsilon that the plan states stays, if it states one. Nothing for a plan without privacy.
    """
    stated = plan.agreement.privacy
    if not stated.is_private:
        return {}
    wanted = stated.epsilon if epsilon is None and not noise_is_given else epsilon
    allowed = delta or stated.delta or accounting.default_delta(max(plan.agreement.patients.values()))
    steps = max(plan.steps_at(site) for site in plan.agreement.patients)
    guarantee = Guarantee(wanted or 0.0, allowed, stated.census_noise)
    if wanted is None:
        return replace(guarantee, epsilon=round(guarantee.spent(to_charge(plan, steps)) + 5e-5, 4)).fields()
    return guarantee.fields(guarantee.least_noise(lambda z: to_charge(_with_noise(plan, z), steps)))


def _with_noise(plan: Plan, noise: float) -> Plan:
    stated = plan.agreement.privacy.model_copy(update={"noise_multiplier": noise})
    return plan.model_copy(update={"agreement": plan.agreement.model_copy(update={"privacy": stated})})
