"""The noised fingerprint: each patient's row is bounded, and noise is added to the sum; and how it is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from autofed.errors import ValidationErrors
from autofed.messages import ArrayGroups
from autofed.privacy import accounting
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.randomness import Randomness, require_randomness
from autofed.privacy.shared_scores import OF_PATIENTS

NAME = "census"
"""What ledgers call it: the mechanism, the run and the question."""

MOST_NOISE_MORE = 1.05
"""A census may raise the noise of the training that it is composed with by so much."""


@dataclass(frozen=True)
class PrivateFingerprintMechanism:
    """The sum over patients of rows, each at most 1 long, with noise of `noise_multiplier` in each number, once."""

    noise_multiplier: float
    randomness: Randomness | None = None

    name = NAME
    private = True

    def with_key(self, noise_key: bytes) -> Self:
        """The same mechanism for one response."""
        return replace(self, randomness=Randomness(noise_key))

    def release(self, arrays: ArrayGroups) -> ArrayGroups:
        """The noised sum of rows (patients, numbers); a longer one is cut to length 1, one that is not finite is 0."""
        rows = np.asarray(arrays[OF_PATIENTS]["rows"], np.float64)
        rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)
        noise = require_randomness(self.randomness).normal(rows.shape[1:])
        return {"sums": {"rows": rows.sum(axis=0) + self.noise_multiplier * noise}}

    def cost(self, steps: int = 0) -> tuple[PrivacyEvent, ...]:
        """One Gaussian mechanism."""
        return (PrivacyEvent(mechanism=self.name, steps=1, noise_multiplier=self.noise_multiplier),)


def order_of(noise_multiplier: float) -> int:
    """The Renyi order at which a census and all that follows from it are counted: a rule of its noise alone.

    What is trained after a census follows from it: patch, steps and noise are chosen by who has seen it. A sum of
    privacy losses does not bound that; a filter at an order that was fixed before the census does (Feldman and Zrnic
    2021, theorem 4.3). This one is the best for Gaussians of that noise at epsilon 1 to 10, or next to it.
    """
    return max(2, round(1 + 1.25 * noise_multiplier))


def noise_for(epsilon: float, delta: float) -> float:
    """The least noise multiplier of a census beside a training that together promise `epsilon` at `delta`, rounded up.

    Of what the filter has room for at its order, the census takes 1 - 1.05^-2: a training that draws everyone for every
    step then needs 1.05 times the noise, and one that draws fewer does not need more (a test asks the accountant).
    """
    share = 1 - MOST_NOISE_MORE**-2
    found = []
    for order in range(2, accounting.LARGEST_ORDER):
        room = accounting.renyi_room(epsilon, delta, order)
        if room > 0:
            least = math.sqrt(order / (2 * share * room))
            noise = math.ceil(1e4 * max(least, (order - 1.499) / 1.25)) / 1e4
            found += [noise] if order_of(noise) == order else []
    if not found:
        raise ValidationErrors(
            "--private-census",
            [f"no noise leaves room for a training at epsilon {epsilon:g} and delta {delta:g}; give more of either"],
        )
    return min(found)
