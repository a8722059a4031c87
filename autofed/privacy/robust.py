"""Averages that sites which lie cannot pull wherever they like: another mechanism in all but its `average`.

A liar is a site that releases anything at all, and knows what the others release. Each rule says how many it bears.
None of them bears a majority, and two sites alone cannot tell which of them lies. What sites with other data than most
have to tell is partly lost too, so the plain mean is the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from autofed.exchange import Arrays, Groups
from autofed.plans import Average
from autofed.privacy import Draw, Gradient, Mechanism
from autofed.privacy.events import Event

Releases = Mapping[str, Arrays]


@dataclass(frozen=True)
class Around:
    """Another mechanism, `inner`, in all that it does."""

    inner: Mechanism

    @property
    def name(self) -> str:
        """As the inner mechanism."""
        return self.inner.name

    @property
    def private(self) -> bool:
        """As the inner mechanism."""
        return self.inner.private

    @property
    def protects(self) -> Collection[str]:
        """As the inner mechanism."""
        return self.inner.protects

    @property
    def adapts(self) -> Mapping[str, tuple[int, ...]]:
        """As the inner mechanism."""
        return self.inner.adapts

    def keyed(self, secret: bytes) -> Self:
        """Around the inner mechanism for one answer."""
        return replace(self, inner=self.inner.keyed(secret))

    def sampler(self, patients: Sequence[str], seed: Sequence[int]) -> Iterator[Draw]:
        """As the inner mechanism."""
        return self.inner.sampler(patients, seed)

    def step(self, gradients: Iterable[Gradient], like: Gradient) -> Gradient:
        """As the inner mechanism."""
        return self.inner.step(gradients, like)

    def release(self, arrays: Groups) -> Groups:
        """As the inner mechanism."""
        return self.inner.release(arrays)

    def average(self, releases: Releases, weights: Mapping[str, float]) -> dict[str, Any]:
        """As the inner mechanism."""
        return self.inner.average(releases, weights)

    def cost(self, steps: int) -> tuple[Event, ...]:
        """As the inner mechanism."""
        return self.inner.cost(steps)

    def planned(self, rounds: int, steps: int) -> tuple[Event, ...]:
        """As the inner mechanism."""
        return self.inner.planned(rounds, steps)

    def adapt(self, released: Arrays) -> Self:
        """Around what the inner mechanism becomes."""
        return replace(self, inner=self.inner.adapt(released))


@dataclass(frozen=True)
class Median(Around):
    """In each coordinate the middle one of the sites' answers (Yin et al., ICML 2018, option I).

    Fewer than half of the sites may lie, (n - 1) // 2 of n: every coordinate stays between two honest answers. Sites
    count once, whatever the plan says of their patients: the proof counts machines, the number of patients is what a
    site said of itself, and the one that claimed most of them would be the median by itself.
    """

    def average(self, releases: Releases, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The median over sites; the mean of the two in the middle if their number is even."""
        return _by_coordinate(releases, cut=(len(releases) - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean(Around):
    """In each coordinate the mean without the share `trim` at either end (Yin et al., ICML 2018, option II).

    So many sites may lie as are left out at one end: ceil(trim * n) of n, but fewer than half. Then a lie is left out,
    or lies between two honest answers. It is rounded up, so that the share promised is kept also with few sites: of
    three sites one may lie, and the rule is the median. Sites count once, for the reason that `Median` gives.
    """

    trim: float

    def average(self, releases: Releases, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The mean over the sites that are left in each coordinate."""
        sites = len(releases)
        share = math.ceil(round(self.trim * sites, 9))  # 0.28 * 25 is 7.000000000000001
        return _by_coordinate(releases, cut=min(share, (sites - 1) // 2))


@dataclass(frozen=True)
class NormBound(Around):
    """The mean of answers, each shrunk to at most `bound` times the median of their norms (after Sun et al. 2019).

    Sun et al. ("Can you really backdoor federated learning?") shrink every update to a norm chosen beforehand; here the
    sites' own norms choose it, round by round. Half of the sites may lie, n // 2 of n: the bound stays at most `bound`
    times the norm of an honest answer, since of an even number the lower middle one is taken. A liar still counts: it
    pulls the mean by up to its share of the patients times that bound, wherever it likes. So an update that is a
    thousand times too large loses its force, and a lie of ordinary size does not. The norm is that of all arrays of the
    group together; weights are the plan's, as without the rule.
    """

    bound: float

    def average(self, releases: Releases, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The inner mechanism's average of the shrunk answers."""
        norms = {site: _norm(arrays) for site, arrays in releases.items()}
        allowed = self.bound * sorted(norms.values())[(len(norms) - 1) // 2]
        factors = {site: min(1.0, allowed / norm) if norm else 1.0 for site, norm in norms.items()}
        return _by_name(releases, lambda parts: self._mean(parts, factors, weights))

    def _mean(self, parts: Mapping[str, np.ndarray], factors: Mapping[str, float], weights: Mapping[str, float]) -> Any:
        shrunk = {site: {"": _exact(part) * factors[site]} for site, part in parts.items()}
        return self.inner.average(shrunk, weights)[""]


def around(mechanism: Mechanism, average: Average) -> Mechanism:
    """The mechanism with the plan's rule for averages."""
    match average.rule:
        case "median":
            return Median(mechanism)
        case "trimmed-mean":
            return TrimmedMean(mechanism, average.trim)
        case "norm-bound":
            return NormBound(mechanism, average.bound)
        case _:
            return mechanism


def _by_coordinate(releases: Releases, cut: int) -> dict[str, np.ndarray]:
    """The mean of each coordinate without the `cut` smallest and the `cut` largest."""

    def middle(parts: Mapping[str, np.ndarray]) -> np.ndarray:
        left = np.sort(np.stack([_exact(part) for part in parts.values()]), axis=0)[cut : len(parts) - cut]
        return left[0] + (left - left[0]).mean(axis=0)  # equal answers are their mean to the bit

    return _by_name(releases, middle)


def _by_name(releases: Releases, mean: Callable[[Mapping[str, np.ndarray]], Any]) -> dict[str, np.ndarray]:
    """The mean of each array, in its dtype: one name after the other, so that little is in memory in float64."""
    sites = sorted(releases)
    first = releases[sites[0]]
    return {
        name: np.asarray(mean({site: releases[site][name] for site in sites})).astype(array.dtype)
        for name, array in first.items()
    }


def _norm(arrays: Arrays) -> float:
    return math.sqrt(sum(float(np.square(_exact(array)).sum()) for array in arrays.values()))


def _exact(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)
