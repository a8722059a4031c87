"""What may leave a site, and what it cost: mechanisms and the ledger.

A mechanism is one frozen object that draws the patients, bounds what they do to a step and to a release, and states
what that cost; so these cannot disagree. "No privacy" is an ordinary mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

from autofed.errors import ValidationErrors
from autofed.messages import ArrayGroups, Arrays
from autofed.plans import Plan
from autofed.privacy.events import PrivacyEvent

BatchSample = Sequence[Sequence[str]]
Gradient = list[Any]
"""One tensor per parameter of the network that learns, in its order."""


class OutputMechanism(Protocol):
    """What stands before the door: it says what an answer costs, and what of it may leave."""

    @property
    def name(self) -> str:
        """What plans and ledgers call it."""
        ...

    @property
    def private(self) -> bool:
        """Whether it bounds what can be told of a patient: then every answer has a secret of its own (`with_key`)."""
        ...

    def with_key(self, secret: bytes) -> Self:
        """The same for one answer: who is drawn and which noise is added follow from the secret alone."""
        ...

    def cost(self, steps: int) -> tuple[PrivacyEvent, ...]:
        """What an answer after so many local steps costs a patient, for the ledger."""
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

        `seed` makes the drawing repeatable; a private mechanism draws by its secret instead.
        """
        ...

    def step(self, gradients: Iterable[Gradient], like: Gradient) -> Gradient:
        """The gradient to step along, from one gradient per group of the draw (in the draw's order).

        An empty draw has no gradients and is a step all the same; `like` are the parameters, for shapes and device.
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

    Coordinator and sites rebuild it from what was shared, so a round that is asked again has the same mechanism.
    `ValidationErrors` if a mechanism that adapts is not told of every round before: its noise depends on how many there
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
    privacy = plan.agreement.privacy
    if privacy.mechanism not in _MAKERS:
        names = ", ".join(_MAKERS)
        found = f"there is no mechanism {privacy.mechanism!r}; the mechanisms are: {names}"
        raise ValidationErrors("agreement.privacy.mechanism", [found])
    return _MAKERS[privacy.mechanism](plan, patients)


def _none(plan: Plan, patients: int) -> Mechanism:
    from autofed.privacy.none import NoPrivacy

    return NoPrivacy(plan.local.training.batch_size)


def _dpsgd(plan: Plan, patients: int) -> Mechanism:
    from autofed.privacy.dpsgd import DPSGD

    return DPSGD(**_steps(plan, patients))


def _adaptive(plan: Plan, patients: int) -> Mechanism:
    from autofed.privacy.adp_fl import Adaptive

    own = ("quantile", "quantile_share", "clip_rate", "noise_ratio")
    chosen = {name: getattr(plan.agreement.privacy, name) for name in own}
    return Adaptive(**_steps(plan, patients), **chosen, rounds=plan.agreement.training.rounds)


def _feddp(plan: Plan, patients: int) -> Mechanism:
    from autofed.privacy.feddp import FedDP

    given = plan.agreement.privacy.model_dump()
    training = plan.local.training
    return FedDP(given["clip"], given["noise_multiplier"], training.batch_size, training.frozen)


def _steps(plan: Plan, patients: int) -> dict[str, Any]:
    given = plan.agreement.privacy.model_dump()
    shared = ("sampling_rate", "patches_per_patient", "clip", "noise_multiplier")
    return {"patients": patients, "normalised": given["clipping"] == "normalised", **{n: given[n] for n in shared}}


_MAKERS: Mapping[str, Callable[[Plan, int], Mechanism]] = {
    "none": _none,
    "dp-sgd": _dpsgd,
    "adp": _adaptive,
    "feddp": _feddp,
}
