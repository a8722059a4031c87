"""The rule that ranks private plans: the Dice that their noise and their shortness are likely to cost."""

from __future__ import annotations


def foretold(whole: float, steps: int, width: int, patches: int) -> float:
    """The Dice that a private training stays below a long one of a wide network without noise."""
    return 0.3 * (100 / steps) ** 0.7 + 0.14 * whole + 0.1 / width + 0.02 / patches


def learning_rate(ratio: float, steps: int) -> float:
    """The first learning rate: as far as noise may carry the weights in all, and never above .2."""
    return float(f"{min(0.2, 12 / (ratio * steps**0.5)):.2g}")
