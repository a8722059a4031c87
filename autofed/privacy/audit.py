"""A lower bound of epsilon, measured on a mechanism as it runs: what an attacker who sees its releases can tell.

One run with many canaries, each in or out by a fair coin of its own (Steinke, Nasr and Jagielski, "Privacy auditing
with one (1) training run", NeurIPS 2023, arXiv 2305.08846). An attacker guesses for some of them; if more guesses are
right than the claimed (epsilon, delta) allows, the claim is wrong. A bound below the claim proves nothing: another
attack might do better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autofed.problems import refuse

SHARES = (0.8, 0.3, 0.1)
"""Guesses are made for these shares of the canaries, fixed beforehand; each is held to its part of the p-value."""

_MOST_EPSILON = 64.0
_HALVINGS = 40


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, if the mechanism keeps (epsilon, delta) (Theorem 5.2).

    beta + 2 m delta max_i P[v > B >= v - i] / i with B binomial, r trials of success 1 / (1 + exp(-epsilon)).
    """
    from scipy.stats import binom

    trials = binom(guesses, 1 / (1 + np.exp(-epsilon)))
    below = np.cumsum(trials.pmf(np.arange(right - 1, -1, -1)))  # P[v > B >= v - i] for i = 1 .. v
    worst = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, float(trials.sf(right - 1)) + 2 * canaries * delta * worst)


def lower_bound(canaries: int, guesses: int, right: int, delta: float, alpha: float = 0.05) -> float:
    """The largest epsilon that so many right guesses refute: with a p-value below alpha; 0 if they refute none."""
    low, high = 0.0, _MOST_EPSILON
    if p_value(canaries, guesses, right, low, delta) >= alpha:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, delta) < alpha
        low, high = (middle, high) if refuted else (low, middle)
    return low


@dataclass(frozen=True)
class Trial:
    """What an attacker had to go by, and the truth: one score and one coin (True: in) for every canary."""

    scores: np.ndarray
    included: np.ndarray

    def right(self, guesses: int) -> int:
        """How many of so many guesses are right: the highest scores are guessed in, as many of the lowest out."""
        order = np.argsort(self.scores, kind="stable")
        low, high = guesses - guesses // 2, guesses // 2
        truth = self.included[order]
        return int(np.count_nonzero(~truth[:low]) + np.count_nonzero(truth[len(truth) - high :]))

    def bound(self, delta: float, alpha: float = 0.05, shares: Sequence[float] = SHARES) -> Bound:
        """The best lower bound over a few numbers of guesses, each at alpha over their number (Bonferroni)."""
        refuse("shares", [] if shares else ["no share of the canaries to guess was given"])
        canaries = len(self.scores)
        found = []
        for share in shares:
            guesses = round(share * canaries)
            right = self.right(guesses)
            found.append(Bound(lower_bound(canaries, guesses, right, delta, alpha / len(shares)), guesses, right))
        return max(found, key=lambda bound: bound.epsilon)


@dataclass(frozen=True)
class Bound:
    """A lower bound of epsilon, and the guesses that it rests on."""

    epsilon: float
    guesses: int
    right: int
