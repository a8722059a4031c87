"""The randomness of one private answer: who is drawn for it and which noise is added to it."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

NOISE_KEY_BYTES = 32


def require_randomness(chance: Randomness | None) -> Randomness:
    """The chance of a mechanism that was given a secret; `RuntimeError` if it was not."""
    if chance is None:
        raise RuntimeError("a private answer needs a secret: call `with_key` first")
    return chance


class Randomness:
    """All that an answer leaves to chance, from a `secret` of 32 bytes that nobody but the site ever knows.

    A site takes the secret from the operating system and never from a seed of the training, which everyone has: who
    can draw the noise again can take it away again. The draws of patients are secret, too: that nobody knows who took
    part in a step is what Poisson sampling gains its epsilon by. Both are streams of Philox, a counter-based generator
    with a key of 128 bits. The same secret gives the same answer, so that one that was cut off is finished with the
    noise that it was charged for.
    """

    def __init__(self, secret: bytes):
        self._secret = secret

    @cached_property
    def draws(self) -> np.random.Generator:
        """Who is drawn."""
        return self._stream(b"draws")

    @cached_property
    def noise(self) -> np.random.Generator:
        """What is added."""
        return self._stream(b"noise")

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Independent standard normal numbers, float64.

        They are to be added in float64 and the sum rounded: numpy's float32 ones are multiples of one of 256 widths, so
        that the last digits of a sum show whether anything was added to them (Mironov, CCS 2012).
        """
        return self.noise.standard_normal(shape)

    def _stream(self, name: bytes) -> np.random.Generator:
        key = hashlib.blake2b(name, key=self._secret, digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
