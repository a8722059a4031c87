"""What may leave a site, and what it cost: mechanisms and the ledger.

A mechanism is one frozen object that draws the patients, bounds what they do to a step and to a release, and states
what that cost; so these cannot disagree. "No privacy" is an ordinary mechanism.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from autofed.exchange import Arrays, Groups
from autofed.plans import Plan
from autofed.privacy.events import Event
from autofed.problems import Problems

Draw = Sequence[Sequence[str]]
Gradient = list[Any]
"""One tensor per parameter of the network, in its order."""


class Mechanism(Protocol):
    """What stands between a site's patients and everything that leaves the site."""

    def sampler(self, patients: Sequence[str], seed: Sequence[int]) -> Iterator[Draw]:
        """The patients of one step after another, in groups that share a backward pass, each named once per patch.

        `seed` makes the drawing repeatable; a private mechanism draws from the operating system's randomness instead.
        """
        ...

    def step(self, gradients: Iterable[Gradient], like: Gradient) -> Gradient:
        """The gradient to step along, from one gradient per group of the draw (in the draw's order).

        An empty draw has no gradients and is a step all the same; `like` are the parameters, for shapes and device.
        """
        ...

    def release(self, arrays: Groups) -> Groups:
        """What may leave of the arrays computed: protected; a group that it has no protection for stays at the site."""
        ...

    def average(self, releases: Mapping[str, Arrays], weights: Mapping[str, float]) -> dict[str, Any]:
        """The weighted average over sites (site -> arrays), the same to the bit whatever the order of the sites."""
        ...

    def cost(self, steps: int) -> tuple[Event, ...]:
        """What a release after so many local steps costs a patient, for the ledger."""
        ...

    def adapt(self, released: Arrays) -> Mechanism:
        """The mechanism of the next round, given only what was already released (see `adapted`)."""
        ...


ADAPTATION = "adaptation"
"""The group of a release that mechanisms adapt to. Its average over sites is shared from the next round on."""


def adapted(mechanism: Mechanism, history: Arrays) -> Mechanism:
    """The mechanism after all rounds whose averaged adaptation groups are stacked in `history`, oldest first.

    Coordinator and sites rebuild it from what was shared, so a round that is asked again has the same mechanism.
    """
    rounds = min((len(array) for array in history.values()), default=0)
    for round in range(rounds):
        mechanism = mechanism.adapt({name: array[round] for name, array in history.items()})
    return mechanism


def find(plan: Plan, patients: int = 0) -> Mechanism:
    """The mechanism and the rule for averages that a plan names, for a site of so many patients.

    `Problems` if there is no mechanism of that name.
    """
    from autofed.privacy.none import NoPrivacy
    from autofed.privacy.robust import around

    name = plan.agreement.privacy.mechanism
    if name != "none":
        raise Problems("agreement.privacy.mechanism", [f"there is no mechanism {name!r}; the mechanisms are: none"])
    return around(NoPrivacy(batch_size=plan.local.training.batch_size), plan.agreement.average)
