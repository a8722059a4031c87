"""Weights and updates in fewer bytes: all arrays of a group as one flat array, in 8 bits with scales or in bfloat16.

"int8" gives every 256 values of an array the scale of the largest of them: x is sent as q = round(127 x / max|x|) and
read as q max|x| / 127, so that nothing is off by more than max|x| / 254. "bfloat16" keeps the upper half of a float32
(8 exponent bits, 7 of the fraction), rounded to nearest, ties to even. Both are exact rules of IEEE arithmetic: the
same numbers are the same bytes, and mean the same numbers, on every machine. What rounding loses is not lost if its
sender adds it to what it sends next (Seide et al., Interspeech 2014): see `messages.error_feedback`.

Bytes (uint8: pseudo-labels) lose nothing, whatever the plan says of weights: of a map travel the "differences" between
neighbours, packed by zlib, which takes two thirds of the bytes where maps are smooth.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from autofed.errors import ValidationErrors, raise_if_any

Arrays = Mapping[str, np.ndarray]

BLOCK = 256
"""So many values share a scale, which adds 1.6 % to their bytes; a scale is never shared by two arrays."""

_LARGEST = np.nextafter(np.float32(np.finfo(np.float32).max) / np.float32(127), np.float32(0))
"""A scale of which 127 are still finite."""
_SMALLEST = np.finfo(np.float32).tiny
"""Below this a scale has too few digits to divide by: such values are sent as 0."""

DEFLATED = "differences"
"""The precision of groups of bytes; it is lossless, so no caller needs to know of it."""

_MOST_INFLATED = 1032
"""So many bytes zlib makes of one at most: what claims to be more is not read."""


def are_bytes(arrays: Arrays) -> bool:
    """Whether a group is of bytes throughout, and of more than one block."""
    return all(a.dtype == np.uint8 for a in arrays.values()) and sum(a.size for a in arrays.values()) > BLOCK


def is_worth_quantizing(arrays: Arrays) -> bool:
    """Whether quantization saves bytes: float32 throughout, and more values than one block."""
    return all(a.dtype == np.float32 for a in arrays.values()) and sum(a.size for a in arrays.values()) > BLOCK


def encode(arrays: Arrays, precision: str) -> dict[str, np.ndarray]:
    """The values of float32 arrays in their order as one flat array, and what it takes to read it.

    "int8": `values` (n,) int8 and `scales` (blocks,) float32; "bfloat16": `values` (n,) int16, the bits.
    `ValidationErrors` if an array is not float32, or holds NaN or infinity. "differences": `values` (n,) uint8, of
    arrays of uint8.
    """
    if precision == DEFLATED:
        differences = b"".join(_differences(array).tobytes() for array in arrays.values())
        engine = zlib.compressobj(strategy=zlib.Z_RLE)  # of differences as few bytes as by any, in a tenth of the time
        return {"values": np.frombuffer(engine.compress(differences) + engine.flush(), np.uint8)}
    raise_if_any("a message", [
        f"the array {name!r} {what}, which does not travel as {precision}; expected finite float32"
        for name, array in arrays.items()
        for what, wrong in (("is of " + str(array.dtype), array.dtype != np.float32),
                            ("holds NaN or infinite values", not np.isfinite(array).all()))
        if wrong
    ])  # fmt: skip
    flat = np.concatenate([np.zeros(0, np.float32), *(np.ravel(array) for array in arrays.values())])
    return _form(precision).encode(flat, [array.size for array in arrays.values()])


def decode(parts: Arrays, shapes: Mapping[str, Any], precision: str) -> dict[str, np.ndarray]:
    """The arrays of these shapes that were encoded; `ValidationErrors` if they do not fit the parts to the value."""
    if precision == DEFLATED:
        return _inflated(parts, shapes)
    form = _form(precision)
    if {name: a.dtype for name, a in parts.items()} != form.parts or any(a.ndim != 1 for a in parts.values()):
        expected = " and ".join(f"{name} of {dtype}" for name, dtype in form.parts.items())
        raise ValidationErrors(
            "a message", [f"a group in {precision} consists of flat {expected}, which these are not"]
        )
    sizes = _sizes(shapes)
    if sum(sizes) != parts["values"].size:
        count = parts["values"].size
        raise ValidationErrors("a message", [f"{count} values came in {precision}, but their shapes hold {sum(sizes)}"])
    flat = form.decode(parts, sizes)
    if not np.isfinite(flat).all():
        raise ValidationErrors("a message", [f"values in {precision} are NaN or infinite, which are never sent so"])
    return _unflatten(flat, shapes, sizes)


def parts_of(precision: Any) -> list[str]:
    """The names of the flat arrays that a group in this precision consists of; `ValidationErrors` if there is no such
    one.
    """
    return ["values"] if precision == DEFLATED else list(_form(precision).parts)


def shapes_of(arrays: Arrays) -> dict[str, list[int]]:
    """Names and shapes, as words of a message."""
    return {name: list(array.shape) for name, array in arrays.items()}


def quantized(arrays: Arrays, precision: str) -> dict[str, np.ndarray]:
    """What arrives of these arrays."""
    return decode(encode(arrays, precision), shapes_of(arrays), precision)


def _inflated(parts: Arrays, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of bytes; never more of them than their shapes hold, and than so many bytes can be made of."""
    sizes, values = _sizes(shapes), parts["values"]
    expected, engine = sum(sizes), zlib.decompressobj()
    try:
        if values.dtype != np.uint8 or values.ndim != 1 or expected > _MOST_INFLATED * values.size:
            raise zlib.error("it is too short for its shapes")
        flat = engine.decompress(values.tobytes(), expected + 1)
    except zlib.error as error:
        raise ValidationErrors("a message", [f"a group of bytes cannot be read ({error})"]) from None
    if len(flat) != expected or not engine.eof:
        raise ValidationErrors("a message", [f"a group of bytes is cut short or too long; its shapes hold {expected}"])
    differences = _unflatten(np.frombuffer(flat, np.uint8).copy(), shapes, sizes)
    return {name: _sums(array) for name, array in differences.items()}


def _differences(array: np.ndarray) -> np.ndarray:
    """How much more than its neighbour each byte is along the last two axes, modulo 256; `_sums` is the inverse."""
    for axis in range(max(0, array.ndim - 2), array.ndim):
        array = np.diff(array, axis=axis, prepend=np.uint8(0))
    return array


def _sums(array: np.ndarray) -> np.ndarray:
    for axis in range(max(0, array.ndim - 2), array.ndim):
        array = np.cumsum(array, axis=axis, dtype=np.uint8)
    return array


def _sizes(shapes: Mapping[str, Any]) -> list[int]:
    wrong = [name for name, shape in shapes.items() if not _is_shape(shape)]
    raise_if_any(
        "a message", [f"the array {name!r} has the shape {shapes[name]!r}; expected lengths" for name in wrong]
    )
    return [prod(shape) for shape in shapes.values()]


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**31 for n in shape)


def _unflatten(flat: np.ndarray, shapes: Mapping[str, Sequence[int]], sizes: Sequence[int]) -> dict[str, np.ndarray]:
    parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
    try:
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    except ValueError as error:  # an empty array may still claim sides whose product no address reaches
        raise ValidationErrors("a message", [f"an array has a shape that cannot be ({error})"]) from None


@dataclass(frozen=True)
class _Form:
    """A way of writing flat float32 values, given the sizes of the arrays that they are of."""

    parts: Mapping[str, np.dtype]
    encode: Callable[[np.ndarray, Sequence[int]], dict[str, np.ndarray]]
    decode: Callable[[Arrays, Sequence[int]], np.ndarray]


def _to_bfloat16(flat: np.ndarray, sizes: Sequence[int]) -> dict[str, np.ndarray]:
    bits = flat.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    overflown = (nearest & 0x7FFF) == 0x7F80
    return {"values": (nearest - overflown).astype(np.uint16).view(np.int16)}


def _from_bfloat16(parts: Arrays, sizes: Sequence[int]) -> np.ndarray:
    return (parts["values"].view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_int8(flat: np.ndarray, sizes: Sequence[int]) -> dict[str, np.ndarray]:
    starts = _blocks(sizes)
    peaks = np.maximum.reduceat(np.abs(flat), starts) if starts.size else flat
    scales = np.minimum(peaks / np.float32(127), _LARGEST)
    scales[scales < _SMALLEST] = 0
    divisors = np.where(scales > 0, scales, np.float32(1))
    return {"values": np.rint(flat / _spread(divisors, starts, flat.size)).astype(np.int8), "scales": scales}


def _from_int8(parts: Arrays, sizes: Sequence[int]) -> np.ndarray:
    values, scales, starts = parts["values"], parts["scales"], _blocks(sizes)
    if scales.size != starts.size:
        raise ValidationErrors("a message", [f"{scales.size} scales came for {starts.size} blocks of {BLOCK} values"])
    with np.errstate(all="ignore"):  # what a scale that was never sent leads to is found out by the caller
        flat: np.ndarray = values.astype(np.float32) * _spread(scales, starts, values.size)
        return flat


def _blocks(sizes: Sequence[int]) -> np.ndarray:
    """Where the blocks of arrays of these sizes begin."""
    begins = np.cumsum([0, *sizes])
    parts = [np.arange(begin, begin + size, BLOCK) for begin, size in zip(begins[:-1], sizes, strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _spread(scales: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    return np.repeat(scales, np.diff(starts, append=size))


_FORMS = {
    "bfloat16": _Form({"values": np.dtype("int16")}, _to_bfloat16, _from_bfloat16),
    "int8": _Form({"values": np.dtype("int8"), "scales": np.dtype("float32")}, _to_int8, _from_int8),
}


def _form(precision: Any) -> _Form:
    if not isinstance(precision, str) or precision not in _FORMS:
        raise ValidationErrors("a message", [f"found the precision {precision!r}; expected one of {', '.join(_FORMS)}"])
    return _FORMS[precision]
