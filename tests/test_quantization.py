"""Fewer bytes for the same weights: what is lost, what never is, and what is refused."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from autofed.errors import ValidationErrors
from autofed.messages import messages, quantization
from tests.equality import same_bits

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = st.dictionaries(
    st.text(max_size=3),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=FLOATS)
    ),
    max_size=4,
)
CODED = ("bfloat16", "int8")


@settings(max_examples=200, deadline=None)
@given(ARRAYS, st.sampled_from(CODED))
def test_names_shapes_and_order_arrive_and_the_numbers_nearly(arrays, precision):
    found = quantization.quantized(arrays, precision)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].shape == array.shape and found[name].dtype == np.float32
        exact, error = array.astype(np.float64), found[name].astype(np.float64) - array
        tiny = 127 * float(np.finfo(np.float32).tiny)
        if precision == "int8":  # of the largest in its block, which is at most the largest of the array
            assert (np.abs(error) <= np.abs(exact).max(initial=0) / 254 * (1 + 1e-5) + tiny).all()
        else:  # half a step of the last of 8 binary digits
            assert (np.abs(error) <= np.abs(exact) * 2.0**-8 + tiny).all()


def test_int8_steps_are_those_of_each_block_by_itself():
    """A large value costs its own block its precision, and neither the next block nor the next array."""
    noise = np.random.default_rng(0).normal(size=3 * quantization.BLOCK).astype(np.float32)
    arrays = {"a": noise.copy(), "b": noise[: quantization.BLOCK // 2].copy()}
    arrays["a"][-1] = 1e6
    found = quantization.quantized(arrays, "int8")
    blocks = [*np.split(arrays["a"], 3), arrays["b"]]
    for sent, came in zip(blocks, [*np.split(found["a"], 3), found["b"]], strict=True):
        assert np.abs(came - sent).max() <= np.abs(sent).max() / 254 * 1.00001
    assert quantization.encode(arrays, "int8")["scales"].size == 4
    assert np.abs(found["a"][: -quantization.BLOCK] - arrays["a"][: -quantization.BLOCK]).max() < 0.02


@pytest.mark.parametrize("precision", CODED)
def test_zeros_and_the_largest_and_smallest_numbers_arrive_finite(precision):
    info = np.finfo(np.float32)
    values = [0, -0.0, info.max, -info.max, info.tiny, info.smallest_subnormal, 1e-40, 3e38]
    for value in values:
        array = np.full(quantization.BLOCK + 1, value, np.float32)
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            found = quantization.quantized({"a": array}, precision)["a"]
        assert np.isfinite(found).all()
        assert np.allclose(found, array, rtol=2**-8, atol=float(127 * info.tiny))


def test_bfloat16_is_rounded_to_nearest_with_ties_to_even_as_torch_does_it():
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    array = generator.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    array = np.concatenate([array[np.isfinite(array)], (np.arange(1000, dtype=np.uint32) << 15).view(np.float32)])
    array = array[np.abs(array) < 3e38]
    expected = torch.from_numpy(array).to(torch.bfloat16).float().numpy()
    assert same_bits(quantization.quantized({"a": array}, "bfloat16"), {"a": expected})


@pytest.mark.parametrize("precision", CODED)
def test_what_arrived_may_be_written_to_and_sent_on(precision):
    array = np.linspace(-1, 1, 1000, dtype=np.float32).reshape(10, 100)
    found = quantization.quantized({"f": np.asfortranarray(array), "s": array[::2]}, precision)
    assert np.abs(found["f"] - array).max() < 0.005 and np.abs(found["s"] - array[::2]).max() < 0.005
    found["f"] += 1
    assert np.abs(found["s"] - array[::2]).max() < 0.005


@pytest.mark.parametrize(("precision", "bytes_a_value"), [("bfloat16", 2), ("int8", 1 + 4 / quantization.BLOCK)])
def test_bytes(precision, bytes_a_value):
    parts = quantization.encode({"a": np.ones((40, quantization.BLOCK), np.float32)}, precision)
    assert sum(p.nbytes for p in parts.values()) == bytes_a_value * 40 * quantization.BLOCK


@pytest.mark.parametrize("precision", CODED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(precision, value):
    with pytest.raises(ValidationErrors, match="'bad' holds NaN or infinite"):
        quantization.encode({"good": np.ones(3, np.float32), "bad": np.array([1, value], np.float32)}, precision)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValidationErrors) as caught:
        quantization.encode({"a": np.ones(3), "b": np.full(2, np.nan, np.float32)}, "int8")
    assert len(caught.value.problems) == 2 and "float64" in str(caught.value)
    for ask in (lambda p: quantization.encode({}, p), quantization.parts_of, lambda p: quantization.decode({}, {}, p)):
        for precision in ("int4", "float32", None, ["int8"]):
            with pytest.raises(ValidationErrors, match="expected one of bfloat16, int8"):
                ask(precision)


GOOD = {"values": np.ones(300, np.int8), "scales": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("parts", "shapes", "says"),
    [
        ({**GOOD, "values": np.ones(300, np.uint8)}, {"a": [300]}, "flat values of int8"),
        ({**GOOD, "values": np.ones((300, 1), np.int8)}, {"a": [300]}, "flat values of int8"),
        ({**GOOD, "scales": np.ones(2)}, {"a": [300]}, "scales of float32"),
        ({"values": GOOD["values"]}, {"a": [300]}, "and scales"),
        (GOOD, {"a": [299]}, "300 values came in int8, but their shapes hold 299"),
        (GOOD, {"a": [2**30] * 30}, "but their shapes hold"),
        (GOOD, {"a": [300], "b": [2**31 - 1] * 30 + [0]}, "cannot be"),
        (GOOD, {"a": [300], "b": [1] * 33}, "expected lengths"),
        (GOOD, {"a": [-300]}, "expected lengths"),
        (GOOD, {"a": [300.0]}, "expected lengths"),
        (GOOD, {"a": [True, 300]}, "expected lengths"),
        (GOOD, {"a": 300}, "expected lengths"),
        (GOOD, {"a": [100], "b": [200]}, None),
        (GOOD, {"a": [100], "b": [100], "c": [100]}, "2 scales came for 3 blocks"),
        ({**GOOD, "scales": np.float32([1, np.nan])}, {"a": [300]}, "NaN or infinite"),
        ({**GOOD, "scales": np.float32([1, 3e38]), "values": np.full(300, 2, np.int8)}, {"a": [300]}, "NaN or inf"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_made_of_them(parts, shapes, says):
    if says is None:
        assert quantization.decode(parts, shapes, "int8")["b"].shape == (200,)
        return
    with pytest.raises(ValidationErrors, match=says):
        quantization.decode(parts, shapes, "int8")


def test_what_gains_by_it():
    large, small = np.ones(300, np.float32), np.ones(200, np.float32)
    assert quantization.is_worth_quantizing({"a": large}) and quantization.is_worth_quantizing({"a": small, "b": small})
    assert (
        not quantization.is_worth_quantizing({"a": small})
        and not quantization.is_worth_quantizing({})
        and not quantization.is_worth_quantizing({"a": large, "n": np.ones(3)})
    )


def test_bytes_arrive_as_they_were_in_fewer():
    maps = {"a": np.zeros((1, 40, 40), np.uint8), "b": np.arange(300, dtype=np.uint8).reshape(3, 100)}
    maps["a"][0, 10:20, 5:9] = 255
    parts = quantization.encode(maps, quantization.DEFLATED)
    assert same_bits(quantization.decode(parts, quantization.shapes_of(maps), quantization.DEFLATED), maps)
    assert parts["values"].size < 0.3 * sum(array.size for array in maps.values())
    assert quantization.are_bytes(maps) and not quantization.are_bytes({**maps, "c": np.ones(3, np.float32)})
    assert not quantization.are_bytes({"a": np.ones(9, np.uint8)}) and not quantization.are_bytes({})
    message = messages.pack({"labels": maps, "n": {"n": np.ones(2)}}, {"kind": "x"})
    assert len(message) < 900
    groups, _, precisions = messages._unpack(message)
    assert same_bits(groups["labels"], maps) and precisions == {}


@pytest.mark.parametrize("shape", [(300,), (20, 30), (2, 3, 5, 7), (0, 4)])
def test_bytes_of_any_shape_lose_nothing(shape):
    maps = {"a": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
    assert same_bits(
        quantization.decode(
            quantization.encode(maps, quantization.DEFLATED), quantization.shapes_of(maps), quantization.DEFLATED
        ),
        maps,
    )


def test_a_smooth_map_takes_fewer_bytes_than_zlib_alone_makes_of_it():
    coarse = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(64, 64)), 2)
    smooth = (255 * ndimage.zoom(1 / (1 + np.exp(-3 * coarse / coarse.std())), 4, order=1)).astype(np.uint8)
    assert quantization.encode({"a": smooth}, quantization.DEFLATED)["values"].size < 0.7 * len(
        zlib.compress(smooth.tobytes())
    )


@pytest.mark.parametrize(
    ("change", "shapes", "says"),
    [
        (lambda v: v[:-3], [900], "cut short or too long"),
        (lambda v: v, [899], "cut short or too long"),
        (lambda v: v, [901], "cut short or too long"),
        (lambda v: v, [2**30, 2**30], "too short for its shapes"),
        (lambda v: v.astype(np.int16), [900], "too short"),
        (lambda v: v[::-1].copy(), [900], "cannot be read"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(change, shapes, says):
    values = quantization.encode({"a": np.zeros(900, np.uint8)}, quantization.DEFLATED)["values"]
    with pytest.raises(ValidationErrors, match=says):
        quantization.decode({"values": change(values)}, {"a": shapes}, quantization.DEFLATED)


def test_no_more_is_inflated_than_the_shapes_hold():
    """However much was deflated: 64 MB are 64 kB."""
    values = np.frombuffer(zlib.compress(bytes(1 << 26)), np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(ValidationErrors, match="its shapes hold 900"):
            quantization.decode({"values": values}, {"a": [900]}, quantization.DEFLATED)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
