"""When arrays are the same."""

from __future__ import annotations

import numpy as np

from autofed.messages import ArrayGroups, Arrays


def same_arrays(one: Arrays, other: Arrays) -> bool:
    """Whether both hold arrays of the same names, at least one, with the same values."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one) and len(one) > 0


def same_bits(one: Arrays, other: Arrays) -> bool:
    """Whether both hold the same names in the same order, and arrays of the same kind, shape and bits."""
    pairs = [(np.asarray(array), np.asarray(other[name])) for name, array in one.items() if name in other]
    return list(one) == list(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs
    )


def same_groups(one: ArrayGroups, other: ArrayGroups) -> bool:
    """Whether both hold the same groups in the same order, with the same bits."""
    return list(one) == list(other) and all(same_bits(arrays, other[group]) for group, arrays in one.items())
