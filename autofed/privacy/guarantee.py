"""The guarantee that a plan states, and what its mechanism costs: the same numbers, or there is no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autofed import privacy
from autofed.plans import Plan
from autofed.privacy import accounting
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.private_fingerprint import PrivateFingerprintMechanism, order_of

NOISE, EPSILON, DELTA = (f"agreement.privacy.{name}" for name in ("noise_multiplier", "epsilon", "delta"))
"""The fields of a plan that state its guarantee."""

_TOLERANCE = 1e-6
"""By so much an epsilon may be above the one stated: what another machine's last digits may hide."""


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta)-differential privacy of every patient, for a training and the private fingerprints before it.

    `census_noise` is the noise multiplier of those fingerprints, None where they were computed without noise. Which
    accountant computes an epsilon is decided here alone. Without private fingerprints all was fixed beforehand, and
    privacy loss distributions compose it. A training that follows from private fingerprints is adaptive: only a filter
    bounds it, at a Renyi order that follows from their noise (`order_of`).
    """

    epsilon: float
    delta: float
    census_noise: float | None = None

    @property
    def before(self) -> tuple[PrivacyEvent, ...]:
        """The events of the private fingerprints: they were charged when those were computed."""
        return PrivateFingerprintMechanism(self.census_noise).cost() if self.census_noise else ()

    def epsilon_of(self, events: Sequence[PrivacyEvent]) -> float:
        """The epsilon of all these events together, those `before` among them."""
        if self.census_noise is None:
            return accounting.epsilon(events, self.delta)
        return accounting.renyi_epsilon(events, self.delta, order_of(self.census_noise))

    def least_noise(self, training: Callable[[float], Sequence[PrivacyEvent]]) -> float:
        """The least noise multiplier that keeps the guarantee (see `accounting.calibrate`).

        `training` gives the events of the training with a multiplier.
        """
        return accounting.calibrate(
            lambda noise: (*self.before, *training(noise)),
            self.epsilon,
            self.delta,
            lambda events, _: self.epsilon_of(events),
        )


def planned(plan: Plan, steps: int) -> tuple[PrivacyEvent, ...]:
    """All events of a site that takes so many steps in a round: its private fingerprint, and its training."""
    return (*_stated(plan).before, *training_events(plan, steps))


def training_events(plan: Plan, steps: int) -> tuple[PrivacyEvent, ...]:
    """All that a training will charge to a site's ledger: its rounds, and the scores if they are shared."""
    rounds = privacy.find_mechanism(plan).planned(plan.agreement.training.rounds, steps)
    scores = privacy.score_mechanism(plan, columns=1)
    return (*rounds, *scores.cost(0)) if scores else rounds


def _stated(plan: Plan) -> Guarantee:
    """The guarantee of a plan; epsilon and delta are 0 if it states none."""
    stated = plan.agreement.privacy
    return Guarantee(stated.epsilon or 0.0, stated.delta or 0.0, stated.census_noise)


def problems(plan: Plan, steps: Mapping[str, int] | None = None) -> list[str]:
    """Why a plan's guarantee does not hold, for sites (by name) that take so many steps in a round.

    `ValidationErrors` if there is no mechanism of the plan's name.
    """
    stated = plan.agreement.privacy
    if not privacy.find_mechanism(plan).private:
        return []
    if stated.epsilon is None or stated.delta is None:
        return ["a private plan states what it promises; write autofed plan PLAN --epsilon 8 --delta 1e-5 -o PLAN"]
    guarantee = Guarantee(stated.epsilon, stated.delta, stated.census_noise)
    site_steps = steps or {site: plan.steps_at(site) for site in plan.agreement.patients}
    costs = {n: guarantee.epsilon_of((*guarantee.before, *training_events(plan, n))) for n in set(site_steps.values())}
    most = max(plan.agreement.patients.values())
    large_delta = [
        f"a delta of {stated.delta:g} allows as much as one of {most} patients to be given away; write one far below "
        f"{1 / most:.2g}, such as {accounting.default_delta(most):g}"
    ]
    return (large_delta if stated.delta >= 1 / most else []) + [
        f"{site}: {n} steps in each of {plan.agreement.training.rounds} rounds spend epsilon {costs[n]:.3f} at delta "
        f"{stated.delta:g}, the plan promises {stated.epsilon:g}; calibrate it anew with autofed plan PLAN --epsilon"
        for site, n in site_steps.items()
        if costs[n] > stated.epsilon + _TOLERANCE
    ]


def training_epsilon(plan: Plan, steps: int) -> float:
    """The epsilon of a whole training, at the plan's delta, for a site that takes so many steps in a round."""
    return _stated(plan).epsilon_of(planned(plan, steps))


def consistent_fields(
    plan: Plan, epsilon: float | None, delta: float | None, *, noise_is_given: bool
) -> dict[str, float]:
    """Fields of a plan so that noise and guarantee agree: the noise for an epsilon, or the epsilon of a noise.

    Given neither, the epsilon that the plan states stays, if it states one. Nothing for a plan without privacy.
    """
    stated = plan.agreement.privacy
    if not stated.is_private:
        return {}
    if epsilon is None and not noise_is_given:
        epsilon = stated.epsilon
    delta = delta or stated.delta or accounting.default_delta(max(plan.agreement.patients.values()))
    steps = max(plan.steps_at(site) for site in plan.agreement.patients)
    guarantee = Guarantee(epsilon or 0.0, delta, stated.census_noise)
    if epsilon is None:
        return {EPSILON: round(guarantee.epsilon_of(planned(plan, steps)) + 5e-5, 4), DELTA: delta}
    noise = guarantee.least_noise(lambda z: training_events(_with_noise(plan, z), steps))
    return {NOISE: noise, EPSILON: epsilon, DELTA: delta}


def _with_noise(plan: Plan, noise: float) -> Plan:
    stated = plan.agreement.privacy.model_copy(update={"noise_multiplier": noise})
    return plan.model_copy(update={"agreement": plan.agreement.model_copy(update={"privacy": stated})})
