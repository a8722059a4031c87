"""The utility model that ranks private plans: the Dice that their noise and their shortness are likely to cost.

Fitted to trainings on breast-ultrasound and hippocampus (tests/benchmarks/private_rule.py; docs/decisions/0012).
"""

from __future__ import annotations

import math

_REFERENCE_PARAMETERS = 30_000
"""Of the network that the rule was fitted to first."""


def total_noise_ratio(ratio: float, parameters: int, steps: int) -> float:
    """The noise-to-signal ratio of a whole training, from the `ratio` of one averaged step.

    The signal adds up with the steps, noise with their square root. The length of the noise is the square root of the
    number of parameters, but a wider network also learns from more of its directions: of equal noise in each, networks
    of 8 to 120 thousand parameters came to the same Dice. So it counts with the fourth root, and 1 is that of 30
    thousand.
    """
    return ratio / math.sqrt(steps) * float((_REFERENCE_PARAMETERS / parameters) ** 0.25)


def predicted_loss(total_ratio: float, steps: int, width: int, patches: int) -> float:
    """The Dice that a private training stays below a long one of a wide network without noise.

    In this order: noise, shortness, a narrow network, and the noise of a patient's own few patches.
    """
    return 0.12 * total_ratio + 0.08 * float((100 / steps) ** 0.7) + 0.12 / width + 0.005 / patches


def learning_rate(total_ratio: float, steps: int) -> float:
    """The first learning rate: as far as noise may carry the weights in all, and never above .2."""
    return float(f"{min(0.2, 12 / (total_ratio * steps)):.2g}")
