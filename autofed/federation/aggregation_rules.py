"""The average of what sites released: the weighted mean, and three rules robust to Byzantine sites.

A Byzantine site releases anything at all, and knows what the others release. Each rule says how many it tolerates. None
of them tolerates a majority, and of two sites alone nobody can tell which is wrong. Part of what sites with unusual
data contribute is lost too, so the plain mean is the default.

Every rule gives the same result to the bit whatever the order of the sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from autofed.messages import Arrays
from autofed.plans import AverageSettings

SiteArrays = Mapping[str, Arrays]
"""By site: one group of the arrays that it released."""


class AggregationRule(Protocol):
    """A way to average the responses of all sites."""

    def average(self, released: SiteArrays, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The average over sites, each array in the dtype of the first site's; `weights` are the sites'."""
        ...


@dataclass(frozen=True)
class Mean:
    """The weighted mean (McMahan et al., AISTATS 2017, algorithm 1). It tolerates no Byzantine site."""

    def average(self, released: SiteArrays, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The weighted mean in float64, summed in the order of the sites' names."""
        sites = sorted(released)
        total = sum(weights[site] for site in sites)
        mean = {}
        for name, first in released[sites[0]].items():
            exact = np.zeros(first.shape, dtype=np.float64)
            for site in sites:
                exact += released[site][name].astype(np.float64) * (weights[site] / total)
            mean[name] = exact.astype(first.dtype)
        return mean


@dataclass(frozen=True)
class Median:
    """In each coordinate the median of the sites' values (Yin et al., ICML 2018, option I).

    Fewer than half of the sites may be Byzantine, (n - 1) // 2 of n: every coordinate stays between two honest values.
    Sites count once, whatever the plan says of their patients: the proof counts machines, the number of patients is
    what a site said of itself, and the one that claimed most of them would be the median by itself.
    """

    def average(self, released: SiteArrays, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The median over sites; the mean of the two in the middle if their number is even."""
        return _by_coordinate(released, cut=(len(released) - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean:
    """In each coordinate the mean without the share `trim` at either end (Yin et al., ICML 2018, option II).

    As many sites may be Byzantine as are left out at one end: ceil(trim * n) of n, but fewer than half. Then a wrong
    value is left out, or is between two honest ones. It is rounded up, so that the share holds also with few sites: of
    three sites one may be Byzantine, and the rule is the median. Sites count once, for the reason that `Median` gives.
    """

    trim: float

    def average(self, released: SiteArrays, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The mean over the sites that are left in each coordinate."""
        sites = len(released)
        share = math.ceil(round(self.trim * sites, 9))  # 0.28 * 25 is 7.000000000000001
        return _by_coordinate(released, cut=min(share, (sites - 1) // 2))


@dataclass(frozen=True)
class NormBound:
    """The mean of updates, each shrunk to at most `bound` times the median of their norms (after Sun et al. 2019).

    Sun et al. ("Can you really backdoor federated learning?") shrink every update to a norm chosen beforehand; here the
    sites' own norms choose it, round by round. Half of the sites may be Byzantine, n // 2 of n: the bound stays at most
    `bound` times the norm of an honest update, since of an even number the lower middle one is taken. A Byzantine site
    still counts: it moves the mean by up to its share of the patients times that bound, in any direction. So an update
    that is a thousand times too large loses its force, and a wrong one of ordinary size does not. The norm is that of
    all arrays of the group together; weights are the plan's, as without the rule.
    """

    bound: float

    def average(self, released: SiteArrays, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The weighted mean of the shrunk updates."""
        norms = {site: _norm(arrays) for site, arrays in released.items()}
        allowed = self.bound * sorted(norms.values())[(len(norms) - 1) // 2]
        factors = {site: min(1.0, allowed / norm) if norm else 1.0 for site, norm in norms.items()}

        def mean(parts: Mapping[str, np.ndarray]) -> np.ndarray:
            shrunk = {site: {"": _exact(part) * factors[site]} for site, part in parts.items()}
            return Mean().average(shrunk, weights)[""]

        return _by_name(released, mean)


def rule_of(average: AverageSettings) -> AggregationRule:
    """The rule that a plan names, with its parameters."""
    match average.rule:
        case "median":
            return Median()
        case "trimmed-mean":
            return TrimmedMean(average.trim)
        case "norm-bound":
            return NormBound(average.bound)
        case _:
            return Mean()


def _by_coordinate(released: SiteArrays, cut: int) -> dict[str, np.ndarray]:
    """The mean of each coordinate without the `cut` smallest and the `cut` largest."""

    def middle(parts: Mapping[str, np.ndarray]) -> np.ndarray:
        values = np.sort(np.stack([_exact(part) for part in parts.values()]), axis=0)[cut : len(parts) - cut]
        mean: np.ndarray = values[0] + (values - values[0]).mean(axis=0)  # equal values are their mean to the bit
        return mean

    return _by_name(released, middle)


def _by_name(released: SiteArrays, mean: Callable[[Mapping[str, np.ndarray]], Any]) -> dict[str, np.ndarray]:
    """The mean of each array, in its dtype: one name after the other, so that little is in memory in float64."""
    sites = sorted(released)
    return {
        name: np.asarray(mean({site: released[site][name] for site in sites})).astype(array.dtype)
        for name, array in released[sites[0]].items()
    }


def _norm(arrays: Arrays) -> float:
    return math.sqrt(sum(float(np.square(_exact(array)).sum()) for array in arrays.values()))


def _exact(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)
