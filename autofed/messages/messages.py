"""Everything that ever travels between sites and the coordinator, and its bytes.

A message is a safetensors block (arrays with a declared dtype, shape and size; never pickle) whose header carries the
few words around them as JSON. Arrays come in named groups, since one clip cannot suit weights and counts alike. Their
order survives the journey and the same message is always the same bytes, so that sums come out alike everywhere.
A group may travel in fewer bytes (see `quantization`): `precisions` of a message names it, and it arrives as float32.
Groups of uint8 are deflated on their way, which nobody notices.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from autofed.errors import ValidationErrors, raise_if_any
from autofed.files import write_bytes
from autofed.messages import quantization

Arrays = Mapping[str, np.ndarray]
ArrayGroups = Mapping[str, Arrays]

_DTYPES = {np.dtype(d) for d in ("float32", "float64", "float16", "int64", "int32", "int16", "uint8", "int8", "bool")}


@dataclass(frozen=True)
class ServerState:
    """What the coordinator knows after a round: `shared` goes to the sites, `server_only` never does."""

    round: int
    shared: ArrayGroups
    server_only: ArrayGroups = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a site is to do. (run, round, task) names it: the same request is answered with the same bytes.

    `since` is the last round in which this site's answer was merged, 0 if none was: the site goes on from what it
    remembered then, not from a round whose answer was lost.
    """

    run: str
    round: int
    task: str
    shared: ArrayGroups = field(default_factory=dict)
    since: int = 0
    precisions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """A site's answer: `arrays` have passed the site's mechanism, and nothing else of the site is in it."""

    run: str
    round: int
    site: str
    arrays: ArrayGroups = field(default_factory=dict)
    precisions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A site could not answer. Only a code crosses the door; the details stay in the site's own log."""

    run: str
    round: int
    site: str
    code: str


Message = Request | Response | Failure
_KINDS: dict[str, type] = {"request": Request, "release": Response, "failure": Failure}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_GROUPS = {"request": "shared", "release": "arrays", "failure": ""}
_EMPTY: dict[str, dict[str, Any]] = {"release": {"public": {}}}
"""Words that mean nothing: they are written as ever, so that the same message stays the same bytes, and not read."""
_WIRE_NAMES = {"task": "question"}
"""Fields that have another name in messages, which is that of before."""
_WORDS = {"run": str, "round": int, "since": int, "question": str, "site": str, "code": str, "public": dict}


def to_bytes(message: Message) -> bytes:
    """The message as one block of bytes."""
    kind = _NAMES[type(message)]
    apart = (_GROUPS[kind], "precisions")
    fields = [name for name in message.__dataclass_fields__ if name not in apart]
    words = {_WIRE_NAMES.get(name, name): getattr(message, name) for name in fields}
    groups, precisions = getattr(message, _GROUPS[kind], {}), getattr(message, "precisions", {})
    return pack(groups, {"kind": kind, **words, **_EMPTY.get(kind, {})}, precisions)


def from_bytes(data: bytes) -> Message:
    """The message in a block of bytes; `ValidationErrors` if it is not one, is cut short, or holds a kind that is not
    known.
    """
    groups, words, precisions = _unpack(data)
    kind = words.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValidationErrors("a message", [f"its kind is {kind!r}; expected one of {', '.join(_KINDS)}"])
    raise_if_any(
        "a message", [f"its {k} is {v!r}; expected {_WORDS[k].__name__}" for k, v in words.items() if not _fits(k, v)]
    )
    if groups and not _GROUPS[kind]:
        raise ValidationErrors("a message", [f"a {kind} carries no arrays, but this one has {', '.join(groups)}"])
    words = {name: value for name, value in words.items() if name not in _EMPTY.get(kind, {})}
    fields = {wire: name for name, wire in _WIRE_NAMES.items()} | _WIRE_NAMES  # so that "task" is no word of a message
    words = {fields.get(name, name): value for name, value in words.items()}
    apart = {_GROUPS[kind]: groups, "precisions": precisions} if _GROUPS[kind] else {}
    try:
        message: Message = _KINDS[kind](**words, **apart)
    except TypeError as error:
        raise ValidationErrors("a message", [f"its words do not make a {kind} ({error})"]) from None
    return message


def _fits(word: str, value: Any) -> bool:
    return word not in _WORDS or type(value) is _WORDS[word]


def pack(groups: ArrayGroups, words: Mapping[str, Any], precisions: Mapping[str, str] | None = None) -> bytes:
    """Groups of arrays and a JSON object as one safetensors block, some groups in another precision than their own."""
    raise_if_any(
        "a message", [f"the group {group!r} may not have a slash in its name" for group in groups if "/" in group]
    )
    flat: dict[str, np.ndarray] = {}
    around: dict[str, Any] = {}
    for group, arrays in groups.items():
        precision = (precisions or {}).get(group) or (quantization.DEFLATED if quantization.are_bytes(arrays) else None)
        sent = quantization.encode(arrays, precision) if precision else arrays
        for name, array in sent.items():
            value = np.asarray(array, order="C")
            if value.dtype not in _DTYPES:
                raise ValidationErrors("a message", [f"arrays of {value.dtype} do not travel; expected numbers"])
            flat[f"{group}/{name}"] = value
        around[group] = (
            {"precision": precision, "shapes": quantization.shapes_of(arrays)} if precision else list(arrays)
        )
    # One entry only: safetensors writes several in an order that changes from call to call.
    return save(flat, metadata={"autofed": json.dumps({"words": dict(words), "groups": around})})


def unpack(data: bytes) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Undo `pack`; `ValidationErrors` if the block is not whole."""
    groups, words, _ = _unpack(data)
    return groups, words


def _unpack(data: bytes) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any], dict[str, str]]:
    """The groups, the words, and the precisions of the groups that came in another than their own."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        around = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["autofed"])
        flat = load(data)
        coded = {g: (said["precision"], dict(said["shapes"])) for g, said in around["groups"].items() if _coded(said)}
        listed = {
            g: quantization.parts_of(coded[g][0]) if g in coded else names for g, names in around["groups"].items()
        }
        groups = {g: {n: flat.pop(f"{g}/{n}") for n in names} for g, names in listed.items()}
        words = dict(around["words"])
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValidationErrors("a message", [f"it is not whole or not one of autofed's ({error})"]) from None
    strange = [*flat, *(n for arrays in groups.values() for n, a in arrays.items() if a.dtype not in _DTYPES)]
    raise_if_any("a message", [f"the array {name!r} has no place or no kind that travels" for name in strange])
    read = {g: quantization.decode(groups[g], shapes, precision) for g, (precision, shapes) in coded.items()}
    return (
        groups | read,
        words,
        {g: precision for g, (precision, _) in coded.items() if precision != quantization.DEFLATED},
    )


def _coded(said: Any) -> bool:
    return isinstance(said, Mapping)


def save_groups(path: Path, groups: ArrayGroups, words: Mapping[str, Any] | None = None) -> None:
    """Write groups of arrays as a safetensors file, whole or not at all."""
    write_bytes(path, pack(groups, words or {}))


def load_groups(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Read what `save_groups` wrote; `ValidationErrors` if it is missing or not whole."""
    try:
        return unpack(Path(path).read_bytes())
    except FileNotFoundError:
        raise ValidationErrors(str(path), ["there is no such file"]) from None
    except ValidationErrors as error:
        raise ValidationErrors(str(path), error.problems) from None


def read_header(path: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The names in each group of such a file, and its words, from its header alone; `ValidationErrors` as
    `load_groups`.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = file.read(min(length, os.fstat(file.fileno()).st_size))  # the length may be anything
            around = json.loads(json.loads(header)["__metadata__"]["autofed"])
        return dict(around["groups"]), dict(around["words"])
    except FileNotFoundError:
        raise ValidationErrors(str(path), ["there is no such file"]) from None
    except (struct.error, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValidationErrors(str(path), [f"it is not whole or not one of autofed's ({error})"]) from None
