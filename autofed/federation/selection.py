"""Which weights are the model: the best of the rounds by a smoothed score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SMOOTHING = 0.5
"""Share of the old value in the smoothed score. nnU-Net takes .9 of ten times as many scores, each on other patches."""


@dataclass(frozen=True)
class Choice:
    """The round whose model scored best, its score, and its smoothed score, by which it was chosen."""

    round: int
    score: float
    smoothed: float

    def words(self) -> dict[str, Any]:
        """For the header of the file with the weights."""
        return asdict(self)


def best_of(scores: Mapping[int, float]) -> Choice | None:
    """The best of the rounds that have a score, the first of equals; None if there is none."""
    best, smoothed = None, None
    for round in sorted(scores):
        smoothed = scores[round] if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * scores[round]
        if best is None or smoothed > best.smoothed:
            best = Choice(round, scores[round], smoothed)
    return best
