"""How much one patient may move a step: a bound on the length of a whole gradient, all layers as one vector."""

from __future__ import annotations

import math

import torch

from autofed.privacy import Gradient

_ROW = 1024
"""So many squares are added up in float32, and such rows in float64: a float32 sum of millions of squares made lengths
too small, and the clip as much too long (tests/test_sensitivity.py). In float64 alone it takes many times as long."""

_ROUNDING = 1e-4
"""By so much less than the clip a gradient is cut: more than rounding can add (1024 times 6e-8 in a row)."""

_SMOOTHING = 0.01
"""Gradients much shorter than this are not blown up to the length of the clip (Bu et al., NeurIPS 2023)."""

_LONGEST = 1e30
"""What is longer counts as not finite: float32 could not hold the factor that would cut it."""


def length(gradient: Gradient) -> float:
    """The Euclidean length over all arrays; infinite where a number is not finite or it is longer than 1e30."""
    norm = math.hypot(*(_norm(part) for part in gradient))
    return norm if norm <= _LONGEST else math.inf  # also if it is not a number


def _norm(part: torch.Tensor) -> float:
    flat = part.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    return math.hypot(float(torch.linalg.vector_norm(_exact(rows))), float(torch.linalg.vector_norm(flat[whole:])))


def _exact(part: torch.Tensor) -> torch.Tensor:
    return part.cpu().double() if part.device.type == "mps" else part.double()  # MPS has no float64


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
