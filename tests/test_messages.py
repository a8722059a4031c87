from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from autofed.errors import ValidationErrors
from autofed.messages import (
    Failure,
    Request,
    Response,
    ServerState,
    from_bytes,
    load_groups,
    messages,
    pack,
    quantization,
    save_groups,
    to_bytes,
    unpack,
)
from tests.equality import same_groups

GROUPS = {
    "weights": {"z.last": np.arange(6, dtype=np.float32).reshape(2, 3), "a/first": np.float64(2.5)},
    "empty": {},
    "counts": {"n": np.zeros((0, 4), np.int64), "seen": np.array([True, False])},
}
MESSAGES = [
    Request("run 1", 3, "train", GROUPS),
    Response("run 1", 3, "alpha", GROUPS),
    Failure("run 1", 3, "alpha", "budget-spent"),
]
CODED = {"weights": {"k": np.linspace(-1, 1, 900, dtype=np.float32).reshape(3, 300), "b": np.ones(4, np.float32)}}

DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]
NAMES = st.text(min_size=0, max_size=6)
ARRAYS = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
WORDS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def words_of(message) -> dict:
    return {k: v for k, v in vars(message).items() if k not in ("shared", "arrays")}


def block(words: object, groups: object = None, **metadata: str) -> bytes:
    """A well-formed block whose words may be anything."""
    return save({}, metadata={"autofed": json.dumps({"words": words, "groups": groups or {}}), **metadata})


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_goes_both_ways(message):
    data = to_bytes(message)
    again = from_bytes(data)
    assert type(again) is type(message)
    assert words_of(again) == words_of(message)
    assert same_groups(
        getattr(message, "shared", getattr(message, "arrays", {})),
        getattr(again, "shared", getattr(again, "arrays", {})),
    )
    assert to_bytes(again) == data


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(NAMES.filter(lambda n: "/" not in n), st.dictionaries(NAMES, ARRAYS, max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4), WORDS, max_size=3),
)
def test_any_groups_and_words_go_both_ways(groups, words):
    data = pack(groups, words)
    again, said = unpack(data)
    assert same_groups(again, groups)
    assert said == words
    assert pack(again, said) == data


def test_the_same_message_is_the_same_bytes_in_every_process():
    script = (
        "import sys, numpy as np; from autofed.messages.messages import pack;"
        "sys.stdout.buffer.write(pack({g: {str(i): np.full(2, i) for i in range(9)} for g in 'abc'}, {'x': 1, 'y': 2}))"
    )
    runs = {subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout for _ in range(3)}
    here = {pack({g: {str(i): np.full(2, i) for i in range(9)} for g in "abc"}, {"x": 1, "y": 2}) for _ in range(20)}
    assert runs == here
    assert len(here) == 1


def test_arrays_that_do_not_lie_row_by_row_are_sent_as_they_read():
    fortran, strided = np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(9)[::2]
    groups, _ = unpack(pack({"g": {"f": fortran, "s": strided}}, {}))
    assert np.array_equal(groups["g"]["f"], fortran)
    assert np.array_equal(groups["g"]["s"], strided)


def test_what_arrives_may_be_written_to():
    groups, _ = unpack(pack({"g": {"a": np.ones(3)}}, {}))
    groups["g"]["a"] += 1
    assert groups["g"]["a"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_cut_short_anywhere_is_refused(message):
    data = to_bytes(message)
    for end in range(len(data)):
        with pytest.raises(ValidationErrors, match="not whole"):
            from_bytes(data[:end])
    with pytest.raises(ValidationErrors, match="not whole"):
        from_bytes(data + b"\0")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64))
def test_noise_is_refused(data):
    with pytest.raises(ValidationErrors):
        from_bytes(data)


@pytest.mark.parametrize(
    "header",
    ["[" * 100_000, "null", "{}", '{"__metadata__": 3}', '{"__metadata__": {"autofed": "3"}}'],
    ids=["deep", "null", "empty", "number", "inner number"],
)
def test_a_forged_header_is_refused(header):
    with pytest.raises(ValidationErrors, match="not whole or not one of autofed's"):
        unpack(struct.pack("<Q", len(header)) + header.encode())


@pytest.mark.parametrize("words", [3, [1], ["ab", 4], None, "text"])
def test_words_that_are_no_object_are_refused(words):
    with pytest.raises(ValidationErrors):
        from_bytes(block(words))


@pytest.mark.parametrize("kind", ["letter", None, ["release"], {}])
def test_an_unknown_kind_is_refused_and_the_known_ones_are_named(kind):
    with pytest.raises(ValidationErrors, match="expected one of request, release, failure"):
        from_bytes(block({"kind": kind, "run": "r", "round": 1}))


def failure(**changed) -> dict:
    words = {"kind": "failure", "run": "r", "round": 1, "site": "alpha", "code": "late", **changed}
    return {k: v for k, v in words.items() if v is not ...}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (failure(colour="red"), "colour"),
        (failure(code=...), "code"),
        (failure(round="1"), "its round is '1'; expected int"),
        (failure(round=True), "its round is True; expected int"),
        (failure(round=1.0), "its round is 1.0; expected int"),
        (failure(site=["alpha"]), "its site is"),
        (failure(run=None), "its run is None; expected str"),
        ({"kind": "request", "run": "r", "round": 1, "question": "q", "shared": {"w": 1}}, "do not make a request"),
        ({"kind": "request", "run": "r", "round": 1, "task": "q"}, "do not make a request"),
        ({"kind": "release", "run": "r", "round": 1, "site": "a", "public": [1]}, "its public is"),
    ],
)
def test_words_that_do_not_fit_are_named(words, said):
    with pytest.raises(ValidationErrors) as caught:
        from_bytes(block(words))
    assert said in str(caught.value)


def test_a_failure_carries_no_arrays():
    with pytest.raises(ValidationErrors, match="a failure carries no arrays, but this one has weights"):
        from_bytes(pack({"weights": {"a": np.ones(1)}}, failure()))


def test_arrays_that_are_not_announced_or_not_numbers_are_refused():
    around = {"autofed": json.dumps({"words": {}, "groups": {"g": ["a"]}})}
    with pytest.raises(ValidationErrors, match="the array 'g/b' has no place"):
        unpack(save({"g/a": np.ones(1), "g/b": np.ones(1)}, metadata=around))
    with pytest.raises(ValidationErrors, match="no kind that travels"):
        unpack(save({"g/a": np.ones(1, np.uint64)}, metadata=around))
    with pytest.raises(ValidationErrors, match="not whole"):
        unpack(save({}, metadata=around))


@pytest.mark.parametrize(
    "array", [np.array([None]), np.array(["text"]), np.array([1j]), np.ones(1, ">f4"), np.uint64(1)]
)
def test_what_is_not_plain_numbers_does_not_travel(array):
    with pytest.raises(ValidationErrors, match="do not travel"):
        to_bytes(Request("r", 1, "q", {"g": {"a": array}}))


def test_a_group_may_not_have_a_slash_in_its_name():
    with pytest.raises(ValidationErrors, match="the group 'a/b'"):
        pack({"a/b": {}}, {})


def test_what_the_server_keeps_is_no_message():
    with pytest.raises(KeyError):
        to_bytes(ServerState(1, GROUPS))  # type: ignore[arg-type]


def test_groups_go_to_disk_and_back(tmp_path):
    save_groups(tmp_path / "w.safetensors", GROUPS, {"round": 3})
    groups, words = load_groups(tmp_path / "w.safetensors")
    assert same_groups(groups, GROUPS)
    assert words == {"round": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_file_that_is_missing_or_cut_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValidationErrors, match="there is no such file") as caught:
        load_groups(path)
    assert caught.value.about == str(path)
    save_groups(path, GROUPS)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValidationErrors, match="not whole") as caught:
        load_groups(path)
    assert caught.value.about == str(path)


def test_a_file_says_what_is_in_it_without_being_read(tmp_path):
    groups = {"weights": {"b": np.ones(3, np.float32), "a": np.zeros(2)}, "empty": {}}
    messages.save_groups(tmp_path / "x.safetensors", groups, {"round": 4})
    assert messages.read_header(tmp_path / "x.safetensors") == ({"weights": ["b", "a"], "empty": []}, {"round": 4})
    (tmp_path / "cut").write_bytes((tmp_path / "x.safetensors").read_bytes()[:40])
    (tmp_path / "text").write_text("a length that no memory holds")
    for name, says in (("cut", "not whole"), ("text", "not whole"), ("none", "no such file")):
        with pytest.raises(ValidationErrors, match=says):
            messages.read_header(tmp_path / name)


# --- groups in fewer bytes


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "make", [lambda g, p: Request("r", 1, "train", g, 0, p), lambda g, p: Response("r", 1, "a", g, precisions=p)]
)
def test_a_message_with_a_coded_group_goes_both_ways(make, precision):
    message = make({**GROUPS, **CODED}, {"weights": precision})
    again = from_bytes(to_bytes(message))
    assert again.precisions == {"weights": precision}
    found = getattr(again, "shared", None) or again.arrays
    assert list(found) == ["weights", "empty", "counts"]
    assert same_groups({"weights": found["weights"]}, {"weights": quantization.quantized(CODED["weights"], precision)})
    assert same_groups({"counts": found["counts"]}, {"counts": GROUPS["counts"]})
    assert len(to_bytes(message)) < len(to_bytes(make({**GROUPS, **CODED}, {})))
    assert to_bytes(message) == to_bytes(message)


def test_a_message_without_a_precision_is_what_it_was():
    """Nothing is added to a message that travels in float32: it is the same bytes as before there was a choice."""
    data = to_bytes(Request("r", 1, "q", {"g": {"a": np.ones(2, np.float32)}}))
    (length,) = struct.unpack("<Q", data[:8])
    around = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["autofed"])
    assert around["groups"] == {"g": ["a"]} and "precisions" not in around["words"]
    assert from_bytes(data).precisions == {}


def test_a_coded_message_cut_short_anywhere_is_refused():
    data = to_bytes(Request("r", 1, "q", CODED, 0, {"weights": "int8"}))
    for end in range(0, len(data), 7):
        with pytest.raises(ValidationErrors, match="not whole"):
            from_bytes(data[:end])


PARTS = {"g/values": np.ones(300, np.int8), "g/scales": np.ones(2, np.float32)}


def coded(said: object, parts: object = None, **words) -> bytes:
    around = {"words": {"kind": "request", "run": "r", "round": 1, "question": "q", **words}, "groups": {"g": said}}
    return save(PARTS if parts is None else parts, metadata={"autofed": json.dumps(around)})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (coded({"precision": "int4", "shapes": {"a": [300]}}), "int4"),
        (coded({"precision": None, "shapes": {"a": [300]}}), "None"),
        (coded({"precision": ["int8"], "shapes": {"a": [300]}}), "int8"),
        (coded({"precision": "int8"}), "not whole"),
        (coded({"precision": "int8", "shapes": 3}), "not whole"),
        (coded({"precision": "int8", "shapes": {"a": [10**9]}}), "but their shapes hold"),
        (coded({"precision": "int8", "shapes": {"a": [2**62, 4]}}), "expected lengths"),
        (coded({"precision": "bfloat16", "shapes": {"a": [300]}}), "has no place"),
        (coded({"precision": "int8", "shapes": {"a": [300]}}, {}), "not whole"),
        (coded({"precision": "int8", "shapes": {"a": [300]}}, precisions={}), "do not make a request"),
    ],
)
def test_a_forged_coded_group_is_refused(data, says):
    with pytest.raises(ValidationErrors, match=says):
        from_bytes(data)


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.none() | st.integers(-2, 2**70) | st.sampled_from(["int8", "bfloat16", "a"]),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["precision", "shapes", "a"]), inner, max_size=3),
                    max_leaves=8),
       st.dictionaries(st.sampled_from(["g/values", "g/scales", "g/a"]), ARRAYS, max_size=3))  # fmt: skip
def test_whatever_is_said_of_a_group_is_read_or_refused(said, parts):
    try:
        message = from_bytes(coded(said, parts))
    except ValidationErrors:
        return
    assert isinstance(message, Request) and all(a.size <= 27 for a in message.shared["g"].values())


def test_what_is_not_finite_is_not_coded():
    with pytest.raises(ValidationErrors, match="NaN"):
        to_bytes(Request("r", 1, "q", {"weights": {"k": np.full(300, np.nan, np.float32)}}, 0, {"weights": "int8"}))


def test_a_word_of_older_sites_is_read_and_left_alone():
    words = {"kind": "release", "run": "r", "round": 1, "site": "a"}
    known = Response("r", 1, "a")
    assert from_bytes(pack({}, {**words, "public": {"age": 61}})) == from_bytes(pack({}, words)) == known
    assert to_bytes(known) == pack({}, {**words, "public": {}})
