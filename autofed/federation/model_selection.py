"""Which weights are the model: a moving average over the rounds, and the best of the rounds by a smoothed score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autofed.messages import Arrays

SMOOTHING = 0.5
"""Share of the old value in the smoothed score. nnU-Net takes .9 of ten times as many scores, each on other patches."""


@dataclass(frozen=True)
class BestRound:
    """The round whose model scored best, its score, and its smoothed score, by which it was chosen."""

    round: int
    score: float
    smoothed: float

    def words(self) -> dict[str, Any]:
        """For the header of the file with the weights."""
        return asdict(self)


def best_round(scores: Mapping[int, float]) -> BestRound | None:
    """The best of the rounds that have a score, the first of equals; None if there is none."""
    best, smoothed = None, None
    for round in sorted(scores):
        smoothed = scores[round] if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * scores[round]
        if best is None or smoothed > best.smoothed:
            best = BestRound(round, scores[round], smoothed)
    return best


def moving_average(past: Arrays | None, now: Arrays, ema: float, round: int) -> dict[str, np.ndarray]:
    """ema * past + (1 - ema) * now, array by array in float32.

    At first the plain mean of all rounds so far, until that forgets as fast: so the very first weights do not linger.
    What stays as it is stays so to the bit.
    """
    if past is None:
        return {name: array.copy() for name, array in now.items()}
    kept = np.float32(min(ema, 1 - 1 / round))
    return {
        name: np.where(array == past[name], array, kept * past[name] + (1 - kept) * array)
        for name, array in now.items()
    }
