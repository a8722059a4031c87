"""What travels, in Flower's records."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

Words = Mapping[str, str]


def packed(words: Words, data: bytes = b"") -> RecordDict:
    """Some words and a block of bytes as Flower's records: as an array, which travels in pieces whatever its size."""
    block = Array(dtype="uint8", shape=(len(data),), stype="autofed", data=data)
    return RecordDict({"words": ConfigRecord(dict(words)), "block": ArrayRecord({"bytes": block})})


def unpacked(content: RecordDict) -> tuple[Words, bytes]:
    """Undo `packed`."""
    words = {name: str(value) for name, value in content.config_records["words"].items()}
    return words, content.array_records["block"]["bytes"].data
