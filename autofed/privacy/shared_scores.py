"""Scores that sites tell of their held-out patients: each patient's part is bounded, and noise is added to the sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, Self

import numpy as np

from autofed.exchange import Arrays, Groups
from autofed.privacy.chance import Chance
from autofed.privacy.events import Event

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
    chance: Chance | None = None

    name = "scores"
    private = True
    adapts = False
    protects = ("sums",)

    def keyed(self, secret: bytes) -> Self:
        """The same mechanism for one answer."""
        return replace(self, chance=Chance(secret))

    def release(self, arrays: Groups) -> Groups:
        """For each structure (2, columns): the sum of the scores and their number, both noised, in every column."""
        if self.chance is None:
            raise RuntimeError("a private answer needs a secret: call `keyed` first")
        found = arrays.get(OF_PATIENTS, {})
        std = self.noise_multiplier * math.sqrt(2 * len(found))
        sums = {}
        for name, rows in found.items():
            total = np.clip(np.nan_to_num(rows), 0, 1).sum(0) + std * self.chance.normal((2,))
            sums[name] = np.repeat(np.maximum(total, 0)[:, None], self.columns, axis=1).astype(np.float32)
        return {"sums": sums}

    def cost(self, steps: int) -> tuple[Event, ...]:
        """One Gaussian mechanism."""
        return (Event(mechanism=self.name, steps=1, noise_multiplier=self.noise_multiplier),)

    def planned(self, rounds: int, steps: int) -> tuple[Event, ...]:
        """They are told once."""
        return self.cost(steps)

    def adapt(self, released: Arrays) -> Self:
        """The same mechanism."""
        return self

    def average(self, releases: Mapping[str, Arrays], weights: Mapping[str, float]) -> NoReturn:
        """Scores are not averaged by it."""
        raise NotImplementedError

    def sampler(self, patients: Sequence[str], seed: Sequence[int]) -> Iterator[list[list[str]]]:
        """Nobody is trained on."""
        raise NotImplementedError

    def step(self, gradients: Iterable[list], like: list) -> NoReturn:
        """Nothing is trained."""
        raise NotImplementedError
