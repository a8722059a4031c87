"""No privacy: patients are drawn as nnU-Net draws cases, and everything leaves as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from autofed.messages import ArrayGroups, Arrays
from autofed.privacy import Gradient
from autofed.privacy.events import PrivacyEvent


@dataclass(frozen=True)
class NoPrivacy:
    """The mechanism that promises nothing. `batch_size` patches share a backward pass; a step has `passes` of them."""

    batch_size: int
    passes: int = 1

    name = "none"
    private = False
    adapts: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    protects = ()

    def with_key(self, noise_key: bytes) -> NoPrivacy:
        """The same mechanism: it has nothing to hide."""
        return self

    def sampler(self, patients: Sequence[str], seed: Sequence[int]) -> Iterator[list[list[str]]]:
        """Patients drawn uniformly with replacement, repeatable by the seed."""
        generator = np.random.default_rng(list(seed))
        while True:
            indices = generator.integers(len(patients), size=(self.passes, self.batch_size))
            yield [[patients[i] for i in group] for group in indices]

    def step(self, gradients: Iterable[Gradient], like: Gradient) -> Gradient:
        """The mean over the groups, of which two are in memory at most; zeros for an empty sample."""
        total: Gradient = []
        groups = 0
        for groups, gradient in enumerate(gradients, 1):
            total = gradient if groups == 1 else [sum(parts) for parts in zip(total, gradient, strict=True)]
        if not groups:
            return [parameter * 0 for parameter in like]
        return total if groups == 1 else [part / groups for part in total]

    def release(self, arrays: ArrayGroups) -> ArrayGroups:
        """Everything, as it is."""
        return arrays

    def cost(self, steps: int) -> tuple[PrivacyEvent, ...]:
        """One event that says that nothing bounds what was learned about a patient."""
        return (PrivacyEvent(mechanism="none", steps=steps),)

    def planned(self, rounds: int, steps: int) -> tuple[PrivacyEvent, ...]:
        """The same for a whole training."""
        return self.cost(rounds * steps)

    def adapt(self, released: Arrays) -> NoPrivacy:
        """The same mechanism."""
        return self
