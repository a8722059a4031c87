"""Uncertainty of an ensemble: entropy of its mean and mutual information between its members.

Both are divided by ln K (K classes), so that they lie in [0, 1]. The entropy of the mean is the total uncertainty; the
part of it that comes from members contradicting each other is the mutual information (Smith and Gal, UAI 2018, eq. 4).

Regions overlap, so each of them is a binary variable of its own, whose entropy is divided by ln 2. A voxel has the
largest value over the regions, of both measures: other regions that are certain make an uncertain one no more certain.
"""

from __future__ import annotations

import math

import torch


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy over the first axis of (K, ...), as a share of ln K."""
    nats: torch.Tensor = torch.special.entr(probabilities).sum(0)
    return nats / math.log(probabilities.shape[0])


def binary_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of being in a region or not, as a share of ln 2: of each region (K, ...) by itself."""
    nats: torch.Tensor = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return nats / math.log(2)


class Ensemble:
    """Running sums over members, so that memory does not grow with their number.

    A member is one set of weights applied to one mirrored image: (K, *grid) probabilities, which sum to 1 unless they
    are of regions.
    """

    def __init__(self, *, is_regions: bool = False) -> None:
        self.members = 0
        self._entropy = binary_entropy if is_regions else lambda p: entropy(p)[None]
        self._probabilities: torch.Tensor | None = None
        self._entropies: torch.Tensor | None = None

    def add(self, probabilities: torch.Tensor) -> None:
        """Count a member."""
        entropies = self._entropy(probabilities)
        if self._probabilities is None or self._entropies is None:
            self._probabilities, self._entropies = probabilities.clone(), entropies
        else:
            self._probabilities += probabilities
            self._entropies += entropies
        self.members += 1

    @property
    def mean(self) -> torch.Tensor:
        """Mean probabilities (K, *grid)."""
        assert self._probabilities is not None, "no member was added"
        return self._probabilities / self.members

    @property
    def entropy(self) -> torch.Tensor:
        """Entropy of the mean (*grid)."""
        return self._entropy(self.mean).amax(0)

    @property
    def mutual_information(self) -> torch.Tensor:
        """Entropy of the mean less the mean entropy (*grid); never below 0."""
        assert self._entropies is not None, "no member was added"
        return (self._entropy(self.mean) - self._entropies / self.members).amax(0).clamp_min(0)
