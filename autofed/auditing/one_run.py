"""A lower bound of epsilon, measured on a mechanism as it runs: what an attacker who sees its releases can tell.

One run with many canaries, each in or out by a fair coin of its own (Steinke, Nasr and Jagielski, "Privacy auditing
with one (1) training run", NeurIPS 2023, arXiv 2305.08846). An attacker guesses for some of them; if more guesses are
right than the claimed (epsilon, delta) allows, the claim is wrong. A bound below the claim proves nothing: another
attack might do better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
from pydantic import Field

from autofed.errors import raise_if_any
from autofed.files import Record
from autofed.messages import Arrays
from autofed.parallel import Progress, silent
from autofed.privacy import ADAPTATION, Gradient, Mechanism
from autofed.privacy.events import PrivacyEvent, Unit
from autofed.privacy.randomness import NOISE_KEY_BYTES

SHARES = (0.8, 0.3, 0.1)
"""Guesses are made for these shares of the canaries, fixed beforehand; each is held to its part of the p-value."""

_MOST_EPSILON = 64.0
_HALVINGS = 40

_LOUD = 1e4
"""How long a canary's gradient is: any clip cuts it."""

LEAST = 10
"""Fewer canaries than these prove next to nothing."""


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, if the mechanism keeps (epsilon, delta) (Theorem 5.2).

    beta + 2 m delta max_i P[v > B >= v - i] / i with B binomial, r trials of success 1 / (1 + exp(-epsilon)).
    """
    from scipy.stats import binom

    trials = binom(guesses, 1 / (1 + np.exp(-epsilon)))
    below = np.cumsum(trials.pmf(np.arange(right - 1, -1, -1)))  # P[v > B >= v - i] for i = 1 .. v
    worst = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, float(trials.sf(right - 1)) + 2 * canaries * delta * worst)


def lower_bound(canaries: int, guesses: int, right: int, delta: float, alpha: float = 0.05) -> float:
    """The largest epsilon that so many right guesses refute, with a p-value below alpha; 0 if they refute none."""
    low, high = 0.0, _MOST_EPSILON
    if p_value(canaries, guesses, right, low, delta) >= alpha:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, delta) < alpha
        low, high = (middle, high) if refuted else (low, middle)
    return low


@dataclass(frozen=True)
class Bound:
    """A lower bound of epsilon, and the guesses that it rests on."""

    epsilon: float
    guesses: int
    right: int


@dataclass(frozen=True)
class Trial:
    """What an attacker had to go by, and the truth: one score and one coin (True: in) for every canary.

    `events` are what the mechanism said that its releases cost.
    """

    scores: np.ndarray
    included: np.ndarray
    events: tuple[PrivacyEvent, ...] = ()

    def right(self, guesses: int) -> int:
        """How many of so many guesses are right: the highest scores are guessed in, as many of the lowest out."""
        truth = self.included[np.argsort(self.scores, kind="stable")]
        outs, ins = guesses - guesses // 2, guesses // 2
        return int(np.count_nonzero(~truth[:outs]) + np.count_nonzero(truth[len(truth) - ins :]))

    def bound(self, delta: float, alpha: float = 0.05, shares: Sequence[float] = SHARES) -> Bound:
        """The best lower bound over a few numbers of guesses, each at alpha over their number (Bonferroni)."""
        canaries, part = len(self.scores), alpha / len(shares)
        bounds = []
        for guesses in (round(share * canaries) for share in shares):
            right = self.right(guesses)
            bounds.append(Bound(lower_bound(canaries, guesses, right, delta, part), guesses, right))
        return max(bounds, key=lambda bound: bound.epsilon)


class Audit(Record):
    """What an audit found: the `bound` beside the `claim`, both epsilons at `delta` for one `unit`.

    `claim` is None where nothing finite is promised. The bound is wrong with probability `alpha` at most. `public` is
    the number of public images whose labels were all that the attacker saw ("labels").
    """

    mechanism: str
    unit: Unit
    kind: Literal["gradient", "update", "image", "labels"]
    canaries: int
    guesses: int
    right: int
    rounds: int
    steps: int
    delta: float = Field(gt=0, lt=1)
    alpha: float
    claim: float | None
    bound: float
    public: int = 0

    @property
    def refuted(self) -> bool:
        """Whether more was told than the claim allows."""
        return self.claim is not None and self.bound > self.claim

    def text(self) -> str:
        """The finding in words: claim, bound, and what they mean."""
        promised = "nothing finite" if self.claim is None else f"epsilon {self.claim:.3g} at delta {self.delta:g}"
        confidence, right = f"{100 * (1 - self.alpha):g} %", f"{self.right} of {self.guesses} guesses"
        lines = [
            f"claim:       {promised}, for one {self.unit}, by {self.mechanism}",
            f"lower bound: epsilon {self.bound:.3g} at delta {self.delta:g}, with confidence {confidence}",
            f"             {right} about {self.canaries} {self._canaries()} were right",
            f"             after {self.rounds} rounds of {self.steps} steps",
        ]
        return "\n".join([*lines, self._meaning()])

    def _canaries(self) -> str:
        if self.kind != "labels":
            return f"{self.kind} canaries"
        return f"image canaries, by the labels of {self.public} public images alone,"

    def _meaning(self) -> str:
        if self.refuted:
            return ("More was told than is claimed: the claim is wrong, or this is one of the audits that err "
                    f"({self.alpha:g} of all). Audit again; if it is so again, do not use this mechanism.")  # fmt: skip
        if self.claim is None and not self.bound:
            return "Nothing is promised. This attack told nothing; that is no promise: a better attack might tell more."
        if self.claim is None:
            return "Nothing is promised, and so much can be told at least."
        return "No more was told than is claimed. That is no proof of the claim: a better attack might tell more."


def attack(
    mechanism: Mechanism,
    *,
    rounds: int,
    steps: int,
    canaries: int,
    generator: np.random.Generator,
    progress: Progress = silent,
) -> Trial:
    """Run a mechanism on canaries for so many rounds of local steps, and score what it releases.

    Of a mechanism that protects patients each canary is one, and the mechanism must be made for so many patients; of
    one that protects whole sites each canary is a run of its own. `generator` tosses the coins and gives the secrets.

    Args:
        mechanism: What is audited.
        rounds: Rounds of the training.
        steps: Local steps of a round.
        canaries: How many there are.
        generator: Tosses the coins and gives the noise keys.
        progress: Is called with what is being done, how many are done, and how many there are.
    """
    of_patients = mechanism.cost(steps)[0].unit == "patient"
    included = generator.random(canaries) < 0.5
    run = _of_patients if of_patients else _of_sites
    scores, events = run(mechanism, rounds, steps, included, generator, progress)
    return Trial(scores, included, events)


Draft = Callable[[Mechanism, int], Arrays]
"""The update that a site computes in a round with the round's mechanism, before it is released."""


def releases(
    mechanism: Mechanism, rounds: int, steps: int, generator: np.random.Generator, draft: Draft
) -> Iterator[tuple[Arrays, tuple[PrivacyEvent, ...]]]:
    """The update that one site releases in each round, as an attacker sees it, and what a round of so many steps costs.

    It is the loop of `federation.rounds` for one site alone, whose answers are their own average. `generator` gives the
    secrets.
    """
    for round in range(1, rounds + 1):
        with_key = mechanism.with_key(generator.bytes(NOISE_KEY_BYTES))
        released = with_key.release({"update": draft(with_key, round)})
        yield released["update"], with_key.cost(steps)
        mechanism = mechanism.adapt(released[ADAPTATION]) if ADAPTATION in released else mechanism


def _of_patients(
    mechanism: Mechanism,
    rounds: int,
    steps: int,
    included: np.ndarray,
    generator: np.random.Generator,
    progress: Progress,
) -> tuple[np.ndarray, tuple[PrivacyEvent, ...]]:
    """Patients whose gradients lie along coordinates of their own, too long for any clip (Dirac canaries)."""
    scores = np.zeros(len(included))
    events: list[PrivacyEvent] = []

    def stepped(with_key: Mechanism, round: int) -> Arrays:
        return {"canaries": _update(with_key, steps, included, round)}

    progress("auditing", 0, rounds)
    for round, (update, cost) in enumerate(releases(mechanism, rounds, steps, generator, stepped), 1):
        events += cost
        scores += _evenly(update)["canaries"]
        progress("auditing", round, rounds)
    return scores, tuple(events)


def _update(mechanism: Mechanism, steps: int, included: np.ndarray, round: int) -> np.ndarray:
    """The sum of a round's steps: a coordinate for every canary."""
    import torch

    places = {f"canary_{i:06d}": i for i in range(len(included))}
    like = [torch.zeros(len(included))]
    total = torch.zeros(len(included))
    for draw in islice(mechanism.sampler(list(places), [round]), steps):
        gradients = (_gradient([places[name] for name in group], included) for group in draw)
        total += mechanism.step(gradients, like)[0]
    return total.numpy()


def _gradient(members: Sequence[int], included: np.ndarray) -> Gradient:
    """The mean gradient of a group that shares a backward pass; who is out contributes zero."""
    import torch

    gradient = torch.zeros(len(included))
    for member in members:
        gradient[member] += _LOUD * float(included[member]) / len(members)
    return [gradient]


def _of_sites(
    mechanism: Mechanism,
    rounds: int,
    steps: int,
    included: np.ndarray,
    generator: np.random.Generator,
    progress: Progress,
) -> tuple[np.ndarray, tuple[PrivacyEvent, ...]]:
    """Sites whose data move every update one way or, if all of it is replaced, the other way."""
    scores = np.zeros(len(included))
    for number, there in enumerate(included):
        progress("auditing", number, len(included))
        loud = {"canaries": np.array([_LOUD if there else -_LOUD], np.float32)}
        for update, _ in releases(mechanism, rounds, steps, generator, partial(_same, loud)):
            scores[number] += float(update["canaries"][0])
    progress("auditing", len(included), len(included))
    return scores, mechanism.cost(steps) * rounds


def _same(update: Arrays, mechanism: Mechanism, round: int) -> Arrays:
    return update


def _evenly(released: Arrays) -> dict[str, np.ndarray]:
    """A round's release at length 1, so that rounds of a large clip do not drown those of a small one."""
    length = float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in released.values())))
    return {name: array / (length or 1.0) for name, array in released.items()}


def too_few(canaries: int) -> str:
    """What is wrong with so few canaries."""
    return f"found {canaries} canaries; expected {LEAST} or more, since few prove nothing"


def claimed(events: Sequence[PrivacyEvent], delta: float) -> float | None:
    """The epsilon that events promise at delta; None if it is not finite."""
    from autofed.privacy.accounting import epsilon

    claim = epsilon(events, delta)
    return claim if np.isfinite(claim) else None


def audit(
    mechanism: Mechanism,
    *,
    rounds: int,
    steps: int,
    delta: float,
    canaries: int = 1000,
    alpha: float = 0.05,
    generator: np.random.Generator,
    progress: Progress = silent,
) -> Audit:
    """The lower bound of epsilon of a mechanism (see `attack`), beside what its own events promise.

    Args:
        mechanism: What is audited.
        rounds: Rounds of the training.
        steps: Local steps of a round.
        delta: That of the claim and of the bound.
        canaries: How many are planted.
        alpha: The probability that the bound is wrong.
        generator: Tosses the coins and gives the noise keys.
        progress: Is called with what is being done, how many are done, and how many there are.
    """
    raise_if_any("--canaries", [] if canaries >= LEAST else [too_few(canaries)])
    lengths: dict[str, Any] = {"rounds": rounds, "steps": steps}
    trial = attack(mechanism, **lengths, canaries=canaries, generator=generator, progress=progress)
    unit = trial.events[0].unit
    kind: Literal["gradient", "update"] = "gradient" if unit == "patient" else "update"
    return report(trial, mechanism.name, kind, delta=delta, alpha=alpha, **lengths)


def report(trial: Trial, mechanism: str, kind: Any, *, rounds: int, steps: int, delta: float, alpha: float) -> Audit:
    """A trial's bound beside the claim of its events.

    Args:
        trial: Scores of the canaries, and who was in.
        mechanism: Its name.
        kind: What was planted: gradient, image or labels.
        rounds: Rounds of the training.
        steps: Local steps of a round.
        delta: That of the claim and of the bound.
        alpha: The probability that the bound is wrong.
    """
    bound = trial.bound(delta, alpha)
    return Audit(
        mechanism=mechanism,
        unit=trial.events[0].unit,
        kind=kind,
        canaries=len(trial.scores),
        guesses=bound.guesses,
        right=bound.right,
        rounds=rounds,
        steps=steps,
        delta=delta,
        alpha=alpha,
        claim=claimed(trial.events, delta),
        bound=bound.epsilon,
    )
