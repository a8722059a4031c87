"""FedDP: noise on a whole round's update (arXiv:2411.04509), with the clip that gives it a bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from autofed.messages import ArrayGroups, Arrays
from autofed.privacy import Gradient
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.none import NoPrivacy
from autofed.privacy.randomness import Randomness, require_randomness

UPDATE = "update"


@dataclass(frozen=True)
class FedDP:
    """Training as without privacy; of the update, cut to the length `clip` (C), leaves a noised copy.

    As published there is no clip to be found, and without one no bound on what the noise has to hide. Here the update
    is one vector of length C at most, so that it moves by up to 2 C between any two data sets: noise of
    z C is a Gaussian mechanism of multiplier z / 2, and that is what `cost` says. What is protected is all that a site
    holds, and so each of its patients no worse. Arrays whose names begin with one of `frozen` do not learn, and leave
    as zeros.
    """

    clip: float
    noise_multiplier: float
    batch_size: int
    frozen: tuple[str, ...] = ()
    randomness: Randomness | None = None

    name = "feddp"
    private = True
    adapts: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    protects = (UPDATE,)

    def with_key(self, noise_key: bytes) -> Self:
        """The same mechanism for one response."""
        return replace(self, randomness=Randomness(noise_key))

    def sampler(self, patients: Sequence[str], seed: Sequence[int]) -> Iterator[list[list[str]]]:
        """As without privacy."""
        return NoPrivacy(self.batch_size).sampler(patients, seed)

    def step(self, gradients: Iterable[Gradient], like: Gradient) -> Gradient:
        """As without privacy."""
        return NoPrivacy(self.batch_size).step(gradients, like)

    def release(self, arrays: ArrayGroups) -> ArrayGroups:
        """The bounded and noised update, and nothing else."""
        return {UPDATE: self._noised(arrays[UPDATE])} if UPDATE in arrays else {}

    def cost(self, steps: int) -> tuple[PrivacyEvent, ...]:
        """One Gaussian mechanism a round, however many steps it has."""
        return self.planned(1, steps)

    def planned(self, rounds: int, steps: int) -> tuple[PrivacyEvent, ...]:
        """One Gaussian mechanism for each of so many rounds."""
        return (
            PrivacyEvent(mechanism=self.name, steps=rounds, noise_multiplier=self.noise_multiplier / 2, unit="site"),
        )

    def adapt(self, released: Arrays) -> Self:
        """The same mechanism."""
        return self

    def bounded(self, update: Arrays) -> dict[str, np.ndarray]:
        """What learns of the update, cut to the length C, in float64; zero if a number in it is not finite."""
        exact = {name: array.astype(np.float64) for name, array in update.items() if self._learns(name)}
        length = math.sqrt(sum(float(np.square(array).sum()) for array in exact.values()))
        if not math.isfinite(length):
            return {name: np.zeros_like(array) for name, array in exact.items()}
        factor = min(1.0, self.clip / (length * (1 + 1e-6))) if length else 1.0
        return {name: factor * array for name, array in exact.items()}

    def _noised(self, update: Arrays) -> dict[str, np.ndarray]:
        """Rounded once, after the noise."""
        randomness, std = require_randomness(self.randomness), self.noise_multiplier * self.clip
        noisy = {name: array + std * randomness.normal(array.shape) for name, array in self.bounded(update).items()}
        return {name: np.asarray(noisy.get(name, np.zeros_like(was)), was.dtype) for name, was in update.items()}

    def _learns(self, name: str) -> bool:
        return not name.startswith(self.frozen)
