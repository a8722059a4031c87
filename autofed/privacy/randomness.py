"""The randomness of one private response: which patients are sampled for it and which noise is added to it."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

NOISE_KEY_BYTES = 32


def require_randomness(randomness: Randomness | None) -> Randomness:
    """The randomness of a mechanism that has a noise key; `RuntimeError` if it has none."""
    if randomness is None:
        raise RuntimeError("a private response needs a noise key: call `with_key` first")
    return randomness


class Randomness:
    """All that is random in a response, from a `noise_key` of 32 bytes that nobody but the site ever knows.

    A site takes the noise key from the operating system and never from a seed of the training, which everyone has: who
    can draw the noise again can take it away again. The samples of patients are secret, too: that nobody knows who took
    part in a step is what Poisson sampling gains its epsilon by. Both are streams of Philox, a counter-based generator
    with a key of 128 bits. The same noise key gives the same response, so that one that was cut off is finished
    with the noise that it was charged for.
    """

    def __init__(self, noise_key: bytes):
        self._noise_key = noise_key

    @cached_property
    def draws(self) -> np.random.Generator:
        """Which patients are sampled."""
        return self._stream(b"draws")

    @cached_property
    def noise(self) -> np.random.Generator:
        """The noise that is added."""
        return self._stream(b"noise")

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Independent standard normal numbers, float64.

        They are to be added in float64 and the sum rounded: numpy's float32 ones are multiples of one of 256 widths, so
        that the last digits of a sum show whether anything was added to them (Mironov, CCS 2012).
        """
        return self.noise.standard_normal(shape)

    def _stream(self, name: bytes) -> np.random.Generator:
        key = hashlib.blake2b(name, key=self._noise_key, digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
