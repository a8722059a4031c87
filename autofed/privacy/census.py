"""The noised fingerprint: each patient's row is bounded, and noise is added to the sum. Its size and its ceiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np

from autofed.exchange import Groups
from autofed.privacy import accounting
from autofed.privacy.chance import Chance, of_answer
from autofed.privacy.events import Event
from autofed.privacy.shared_scores import OF_PATIENTS

NAME = "census"
"""What ledgers call it: the mechanism, the run and the question."""

MOST_NOISE_MORE = 1.05
"""A census may raise the noise of the training that it is composed with by so much."""


@dataclass(frozen=True)
class NoisedCensus:
    """The sum over patients of rows, each at most 1 long, with noise of `noise_multiplier` in each number, once."""

    noise_multiplier: float
    chance: Chance | None = None

    name = NAME
    private = True

    def keyed(self, secret: bytes) -> Self:
        """The same mechanism for one answer."""
        return replace(self, chance=Chance(secret))

    def release(self, arrays: Groups) -> Groups:
        """The noised sum of rows (patients, numbers); a longer one is cut to length 1, one that is not finite is 0."""
        rows = np.asarray(arrays[OF_PATIENTS]["rows"], np.float64)
        rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)
        noise = of_answer(self.chance).normal(rows.shape[1:])
        return {"sums": {"rows": rows.sum(axis=0) + self.noise_multiplier * noise}}

    def cost(self, steps: int = 0) -> tuple[Event, ...]:
        """One Gaussian mechanism."""
        return (Event(mechanism=self.name, steps=1, noise_multiplier=self.noise_multiplier),)


def noise_for(epsilon: float, delta: float) -> float:
    """The noise multiplier of a census beside a training that together promise `epsilon` at `delta`, rounded up.

    Of a training that draws everyone for every step losses are those of one Gaussian of multiplier s, and 1 / s^2 is
    what there is to share. With noise of 1.05 s it leaves (1 - 1.05^-2) / s^2 to the census. A training that draws
    fewer gains more from more noise, so this is enough for it too (a test asks the accountant).
    """
    import dp_accounting

    alone = float(dp_accounting.get_sigma_gaussian(epsilon, delta))
    return math.ceil(1e4 * alone / math.sqrt(1 - MOST_NOISE_MORE**-2)) / 1e4


TYPICAL = ((0.05, 200), (0.1, 60), (0.2, 300), (1.0, 50))
"""Trainings (sampling rate, steps) that may follow a census: of those between, none is counted much more dearly."""

MARGIN = 1.05
"""So much more the ceiling has than the worst of these needs, for trainings between and a little beyond them."""


@lru_cache
def ceiling_for(epsilon: float, delta: float) -> tuple[float, int]:
    """The ceiling, and the order of its filter, of a ledger that a census for a plan of `epsilon` opens.

    It has room for the census and the one training that comes after it. A plan's epsilon is told by privacy loss
    distributions and the filter counts more; so the ceiling is what the filter counts for the worst of `TYPICAL`
    trainings, each with the noise that just keeps `epsilon` together with the census, at the order where that is least,
    and 5 % more.
    """
    census = NoisedCensus(noise_for(epsilon, delta)).cost()
    planned = [_calibrated(rate, steps, census, epsilon, delta) for rate, steps in TYPICAL]

    def worst(order: int) -> float:
        return max(accounting.renyi_epsilon(events, delta, order) for events in planned)

    orders = sorted({accounting.best_order(events, delta) + shift for events in planned for shift in (-1, 0, 1)})
    best = min((order for order in orders if order >= 2), key=worst)
    return math.ceil(MARGIN * worst(best) * 1e3) / 1e3, best


def _calibrated(rate: float, steps: int, census: Sequence[Event], epsilon: float, delta: float) -> tuple[Event, ...]:
    def events(noise: float) -> tuple[Event, ...]:
        return (*census, Event(mechanism="", steps=steps, noise_multiplier=noise, sampling_rate=rate))

    return events(accounting.calibrate(events, epsilon, delta))
