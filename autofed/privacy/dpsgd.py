"""Patient-level DP-SGD (Abadi et al., CCS 2016, algorithm 1), a patient's patches being one example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from autofed.messages import ArrayGroups, Arrays
from autofed.privacy import Gradient
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.randomness import Randomness, require_randomness


@dataclass(frozen=True)
class DPSGD:
    """Steps along sums of bounded gradients, one a patient, with Gaussian noise.

    In a step each of the site's `patients` (n) takes part with probability `sampling_rate` (q), by a coin of their own.
    The gradient of the mean loss over `patches_per_patient` (K) patches of a patient is one vector, cut to the length
    `clip` (C); to the sum is added N(0, (zC)^2) in every coordinate, and all is divided by the expected number of
    patients, q n, never by the drawn one. So a patient who is replaced by nothing changes the sum by C at most, and
    that is what `cost` says. A gradient that is not finite counts as zero.

    What is computed from such steps alone may leave as it is: updates, control variates, and predictions for public
    images (the group `answers`). Losses may not.
    """

    patients: int
    sampling_rate: float
    patches_per_patient: int
    clip: float
    noise_multiplier: float
    normalised: bool = False
    randomness: Randomness | None = None

    name = "dp-sgd"
    private = True
    adapts: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    protects = ("update", "control", "answers")

    def with_key(self, noise_key: bytes) -> Self:
        """The same mechanism for one response."""
        return replace(self, randomness=Randomness(noise_key))

    def sampler(self, patients: Sequence[str], seed: Sequence[int]) -> Iterator[list[list[str]]]:
        """For every step each patient or not, by a coin from the noise key; `seed`, which others know, is not used.

        `ValueError` if these are not as many patients as the noise was made for.
        """
        if len(patients) != self.patients:
            raise ValueError(f"found {len(patients)} patients, the mechanism is made for {self.patients}")
        names, draws = sorted(patients), self._randomness.draws
        while True:
            coins = draws.random(len(names))
            yield [
                [name] * self.patches_per_patient
                for name, coin in zip(names, coins, strict=True)
                if coin < self.sampling_rate
            ]

    def step(self, gradients: Iterable[Gradient], like: Gradient) -> Gradient:
        """The noised sum of the bounded gradients over the expected number of patients; noise alone if there are none.

        One gradient after the other is added up, so that two are in memory at most.
        """
        import torch

        total = [torch.zeros_like(parameter, requires_grad=False) for parameter in like]
        self._note([self._add(total, gradient) for gradient in gradients])
        std = self.gradient_noise * self.clip
        for part in total:
            noised = torch.from_numpy(np.asarray(self._randomness.normal(tuple(part.shape)))).mul_(std).add_(part.cpu())
            part.copy_(noised.mul_(1 / self.expected))  # rounded once, after the noise
        return total

    @property
    def expected(self) -> float:
        """The expected number of patients in a step."""
        return self.sampling_rate * self.patients

    @property
    def gradient_noise(self) -> float:
        """The standard deviation of the noise over the clip."""
        return self.noise_multiplier

    def _add(self, total: Gradient, gradient: Gradient) -> float:
        import torch

        from autofed.privacy.clipping import length, share

        norm = length(gradient)
        factor = share(norm, self.clip, normalised=self.normalised)
        if factor:  # a zero times infinity would not be a zero
            torch._foreach_add_(total, list(gradient), alpha=factor)
        return norm

    def _note(self, norms: Sequence[float]) -> None:
        """What else a step releases of its sample: nothing."""

    def release(self, arrays: ArrayGroups) -> ArrayGroups:
        """What is computed from steps alone; losses, and whatever else an algorithm computes, stay at the site."""
        return {group: values for group, values in arrays.items() if group in self.protects}

    def cost(self, steps: int) -> tuple[PrivacyEvent, ...]:
        """So many Gaussian mechanisms, each on a Poisson sample of the patients."""
        return (
            PrivacyEvent(
                mechanism=self.name,
                steps=steps,
                noise_multiplier=self.noise_multiplier,
                sampling_rate=self.sampling_rate,
            ),
        )

    def planned(self, rounds: int, steps: int) -> tuple[PrivacyEvent, ...]:
        """The cost of all steps of a training."""
        return self.cost(rounds * steps)

    def adapt(self, released: Arrays) -> Self:
        """The same mechanism: nothing is adapted."""
        return self

    @property
    def _randomness(self) -> Randomness:
        return require_randomness(self.randomness)
