"""How much one patient may move a step: a bound on the length of a whole gradient, all layers as one vector."""

from __future__ import annotations

import math

import torch

from autofed.privacy import Gradient

_ROUNDING = 1e-6
"""Lengths are computed in float32: a gradient is cut to so much less than the clip that it stays below all the same."""

_SMOOTHING = 0.01
"""Gradients much shorter than this are not blown up to the length of the clip (Bu et al., NeurIPS 2023)."""


def length(gradient: Gradient) -> float:
    """The Euclidean length over all arrays; infinite where a number is not finite or the length overflows."""
    norms = torch._foreach_norm(gradient)
    found = float(torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms])))
    return found if math.isfinite(found) else math.inf


def share(norm: float, clip: float, *, normalised: bool) -> float:
    """What a gradient of that length is multiplied by, so that none is longer than `clip`; 0 if it is not finite.

    Flat: min(1, C / norm) (Abadi et al., CCS 2016). Normalised: C / (norm + .01), which makes C no more than a
    learning rate (Bu et al., NeurIPS 2023, "AUTO-S").
    """
    if math.isinf(norm):
        return 0.0
    if normalised:
        return clip / (norm * (1 + _ROUNDING) + _SMOOTHING)
    return min(1.0, clip / (norm * (1 + _ROUNDING))) if norm > 0 else 1.0
