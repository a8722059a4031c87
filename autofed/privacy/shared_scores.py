"""Scores that sites tell of their held-out patients: each patient's part is bounded, and noise is added to the sums."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from autofed.messages import ArrayGroups
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.randomness import Randomness, require_randomness

OF_PATIENTS = "of patients"
"""The group of a draft that holds, for each structure, (patients, 2): a patient's score and whether there is one."""


@dataclass(frozen=True)
class SharedScores:
    """Sums of scores and of their counts with noise, once, in the end.

    Of each of K structures a patient has a score in [0, 1] and counts as 0 or 1: as one vector not longer than
    sqrt(2 K). The noise in each number is `noise_multiplier` times that.
    """

    noise_multiplier: float
    columns: int
    randomness: Randomness | None = None

    name = "scores"
    private = True

    def with_key(self, noise_key: bytes) -> Self:
        """The same mechanism for one response."""
        return replace(self, randomness=Randomness(noise_key))

    def release(self, arrays: ArrayGroups) -> ArrayGroups:
        """For each structure (2, columns): the sum of the scores and their number, both noised, in every column."""
        randomness, found = require_randomness(self.randomness), arrays.get(OF_PATIENTS, {})
        std = self.noise_multiplier * math.sqrt(2 * len(found))
        sums = {}
        for name, rows in found.items():
            total = np.clip(np.nan_to_num(rows), 0, 1).sum(0) + std * randomness.normal((2,))
            sums[name] = np.repeat(np.maximum(total, 0)[:, None], self.columns, axis=1).astype(np.float32)
        return {"sums": sums}

    def cost(self, steps: int) -> tuple[PrivacyEvent, ...]:
        """One Gaussian mechanism."""
        return (PrivacyEvent(mechanism=self.name, steps=1, noise_multiplier=self.noise_multiplier),)
