"""ADP-FL's idea made rigorous: clip and noise follow the training, and what they follow is paid for.

ADP-FL (arXiv:2604.06518) clips at a percentile of gradient norms and scales its noise to it. The percentile itself is
an answer about patients; so here the clip follows a noised count (Andrew et al., NeurIPS 2021, "Differentially private
learning with adaptive clipping", algorithm 1), taken from the same draw of patients as the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import numpy as np

from autofed.messages import ArrayGroups, Arrays
from autofed.privacy import ADAPTATION
from autofed.privacy.dpsgd import DPSGD
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.randomness import Randomness

BELOW = "below"
"""In the adaptation group: the share of patients whose gradients were not longer than the clip, as released."""

_WIDEST = 100.0
"""So many times larger or smaller than in the first round the clip may become."""


@dataclass(frozen=True)
class Adaptive(DPSGD):
    """DP-SGD whose clip follows the `quantile` of the patients' gradient norms, and whose noise follows a schedule.

    Beside the sum of bounded gradients each step answers sum(b - 1/2) with b = 1 for a gradient not longer than the
    clip: a patient changes it by 1/2 at most. Of the joint multiplier z, `quantile_share` f pays for it: its noise is
    s = z / (2 sqrt(f)), so that its own multiplier is 2 s, and the gradient's is z / sqrt(1 - f). Together these are
    one Gaussian mechanism of multiplier z, since z^-2 = (2 s)^-2 + (z / sqrt(1 - f))^-2.

    Sites release the mean of a round's answers, C <- C exp(-clip_rate (b~ - quantile)) follows for all sites alike: if
    all are clipped, b~ is near 0 and C grows. In round r of `rounds` the noise is z `noise_ratio`^((r-1)/(rounds-1)),
    whatever was released.
    """

    quantile: float = 0.5
    quantile_share: float = 0.05
    clip_rate: float = 0.5
    noise_ratio: float = 1.0
    rounds: int = 1
    round: int = 1
    first_clip: float = 0.0
    first_noise: float = 0.0
    answers: list[float] = field(default_factory=list, compare=False)

    name = "adp"
    adapts: ClassVar[Mapping[str, tuple[int, ...]]] = {BELOW: (1,)}

    def __post_init__(self) -> None:
        if self.round == 1:  # the fields of a frozen dataclass are set once, here
            object.__setattr__(self, "first_clip", self.clip)
            object.__setattr__(self, "first_noise", self.noise_multiplier)

    def with_key(self, noise_key: bytes) -> Self:
        """The same mechanism for one answer, which has not counted anybody yet."""
        return replace(self, randomness=Randomness(noise_key), answers=[])

    @property
    def gradient_noise(self) -> float:
        """The gradient's part of the joint noise, over the clip."""
        return self.noise_multiplier / math.sqrt(1 - self.quantile_share)

    @property
    def count_noise(self) -> float:
        """The standard deviation of the noise on sum(b - 1/2)."""
        return self.noise_multiplier / (2 * math.sqrt(self.quantile_share))

    def _note(self, norms: Sequence[float]) -> None:
        """Answer how many gradients were not longer than the clip."""
        count = sum((norm <= self.clip) - 0.5 for norm in norms)
        noised = count + self.count_noise * float(self._randomness.normal((1,))[0])
        self.answers.append(noised / self.expected + 0.5)

    def release(self, arrays: ArrayGroups) -> ArrayGroups:
        """What is made of steps, and the mean of the round's answers."""
        mean = np.array([np.mean(self.answers)], np.float32) if self.answers else np.array([self.quantile], np.float32)
        return {**super().release(arrays), ADAPTATION: {BELOW: mean}}

    def planned(self, rounds: int, steps: int) -> tuple[PrivacyEvent, ...]:
        """The cost of each round as the schedule has it."""
        noises = [self.first_noise * self._planned(round) for round in range(1, rounds + 1)]
        return tuple(event for z in noises for event in replace(self, noise_multiplier=z).cost(steps))

    def adapt(self, released: Arrays) -> Self:
        """The mechanism of the next round, from the average of what the sites released."""
        below = min(1.0, max(0.0, float(np.mean(released[BELOW]))))
        clip = self.clip * math.exp(-self.clip_rate * (below - self.quantile))
        clip = min(self.first_clip * _WIDEST, max(self.first_clip / _WIDEST, clip))
        noise = self.first_noise * self._planned(self.round + 1)
        return replace(self, clip=clip, noise_multiplier=noise, round=self.round + 1)

    def _planned(self, round: int) -> float:
        """The noise of a round over that of the first, as the schedule has it."""
        return self.noise_ratio ** ((round - 1) / (self.rounds - 1)) if self.rounds > 1 else 1.0
