"""The moving average of weights over rounds."""

from __future__ import annotations

import numpy as np

from autofed.exchange import Arrays


def moving_average(past: Arrays | None, now: Arrays, ema: float, round: int) -> dict[str, np.ndarray]:
    """ema * past + (1 - ema) * now, array by array in float32.

    At first the plain mean of all rounds so far, until that forgets as fast: so the very first weights do not linger.
    What stays as it is stays so to the bit.
    """
    if past is None:
        return {name: array.copy() for name, array in now.items()}
    kept = np.float32(min(ema, 1 - 1 / round))
    return {
        name: np.where(array == past[name], array, kept * past[name] + (1 - kept) * array)
        for name, array in now.items()
    }
