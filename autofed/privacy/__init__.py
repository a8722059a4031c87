"""What may leave a site, and what it cost: mechanisms and the ledger.

A mechanism is one frozen object that samples the patients, bounds what they do to a step and to a release, and states
what that cost; so these cannot disagree. "No privacy" is an ordinary mechanism.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

from autofed.errors import ValidationErrors
from autofed.messages import ArrayGroups, Arrays
from autofed.plans import Plan, mechanisms
from autofed.privacy.events import PrivacyEvent

BatchSample = Sequence[Sequence[str]]
Gradient = list[Any]
"""One tensor per parameter of the network that learns, in its order."""


class OutputMechanism(Protocol):
    """What protects a response: it states what the response costs, and which arrays of it may leave the site."""

    @property
    def name(self) -> str:
        """What plans and ledgers call it."""
        ...

    @property
    def private(self) -> bool:
        """Whether it bounds what can be learned of a patient; each response has a noise key (`with_key`)."""
        ...

    def with_key(self, noise_key: bytes) -> Self:
        """The mechanism for one response: the sampled patients and the noise follow from the noise key alone."""
        ...

    def cost(self, steps: int) -> tuple[PrivacyEvent, ...]:
        """The privacy events of a response after so many local steps, for the ledger."""
        ...

    def release(self, arrays: ArrayGroups) -> ArrayGroups:
        """What may leave of the arrays computed: protected; a group that it has no protection for stays at the site."""
        ...


class Mechanism(OutputMechanism, Protocol):
    """What stands between a site's patients and everything that leaves the site while it trains."""

    @property
    def protects(self) -> Collection[str]:
        """The groups of a release that it has protection for; a private mechanism lets no other leave."""
        ...

    @property
    def adapts(self) -> Mapping[str, tuple[int, ...]]:
        """The arrays, with their shapes, that it releases to become another one in the next round; mostly none."""
        ...

    def sampler(self, patients: Sequence[str], seed: Sequence[int]) -> Iterator[BatchSample]:
        """The patients of one step after another, in groups that share a backward pass, each named once per patch.

        `seed` makes the sampling repeatable; a private mechanism samples by its noise key instead.
        """
        ...

    def step(self, gradients: Iterable[Gradient], like: Gradient) -> Gradient:
        """The gradient to step along, from one gradient per group of the sample (in its order).

        An empty sample has no gradients and is a step all the same; `like` are the parameters, for shapes and device.
        Gradients are taken one by one, so that the next need not be computed before this one is dealt with.
        """
        ...

    def planned(self, rounds: int, steps: int) -> tuple[PrivacyEvent, ...]:
        """What so many rounds of so many steps will cost if nothing is adapted: the sum of their `cost`."""
        ...

    def adapt(self, released: Arrays) -> Mechanism:
        """The mechanism of the next round, given only what was already released (see `adapted_mechanism`)."""
        ...


ADAPTATION = "adaptation"
"""The group of a release that mechanisms adapt to. Its average over sites is shared from the next round on."""


def adapted_mechanism(mechanism: Mechanism, history: Arrays, round: int) -> Mechanism:
    """The mechanism of a round, after those whose averaged adaptation groups are stacked in `history`, oldest first.

    Coordinator and sites rebuild it from what was shared, so a round that is requested again has the same mechanism.
    `ValidationErrors` if a mechanism that adapts lacks a round before this one: its noise depends on how many there
    were.
    """
    before = min((len(array) for array in history.values()), default=0)
    if mechanism.adapts and before != round - 1:
        raise ValidationErrors(ADAPTATION, [f"round {round} follows {before} rounds of it; expected {round - 1}"])
    for past in range(before):
        mechanism = mechanism.adapt({name: array[past] for name, array in history.items()})
    return mechanism


def score_mechanism(plan: Plan, columns: int) -> OutputMechanism | None:
    """What held-out patients' scores pass on their way out; None if a private plan has them stay at the site.

    `columns` are those of a row of scores.
    """
    stated = plan.agreement.privacy
    if not stated.is_private:
        return find_mechanism(plan)
    if stated.score_noise is None:
        return None
    from autofed.privacy.shared_scores import SharedScores

    return SharedScores(stated.score_noise, columns)


def find_mechanism(plan: Plan, patients: int = 0) -> Mechanism:
    """The mechanism that a plan names, for a site that trains on so many patients.

    `ValidationErrors` if there is no mechanism of that name.
    """
    stated, training = plan.agreement.privacy.model_dump(), plan.local.training
    name = plan.agreement.privacy.mechanism
    if name == "none":
        from autofed.privacy.none import NoPrivacy

        return NoPrivacy(training.batch_size)
    if name == "feddp":
        from autofed.privacy.feddp import FedDP

        return FedDP(stated["clip"], stated["noise_multiplier"], training.batch_size, training.frozen)
    shared = {field: stated[field] for field in ("sampling_rate", "patches_per_patient", "clip", "noise_multiplier")}
    shared |= {"patients": patients, "normalised": stated["clipping"] == "normalised"}
    if name == "dp-sgd":
        from autofed.privacy.dpsgd import DPSGD

        return DPSGD(**shared)
    if name == "adp":
        from autofed.privacy.adp_fl import Adaptive

        adaptive = {field: stated[field] for field in ("quantile", "quantile_share", "clip_rate", "noise_ratio")}
        return Adaptive(**shared, **adaptive, rounds=plan.agreement.training.rounds)
    problem = f"there is no mechanism {name!r}; the mechanisms are: {', '.join(mechanisms())}"
    raise ValidationErrors("agreement.privacy.mechanism", [problem])
