"""What lies on disk is whole or absent: atomic files and folders, JSON records, digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from autofed.errors import ValidationErrors

PathLike = Path | str


def _part_of(path: Path) -> Path:
    """A fresh name in the same folder, so that the rename that follows never crosses a file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def is_part(name: str) -> bool:
    """Whether a file or folder of this name is what a program that was cut off left unfinished."""
    return bool(re.fullmatch(r"\.[0-9a-f]{8}\.part\..+|\..+\.[0-9a-f]{8}\.part", name))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; it becomes `path` only if the block ends well, and is removed if it does not.

    The name ends like `path`, since writers choose their format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex[:8]}.part.{path.name}")
    try:
        yield part
        with open(part, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes `path` (replacing one that is there) only if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    part.mkdir()
    try:
        yield part
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write all of `data` or nothing."""
    with whole_file(Path(path)) as part:
        part.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON value in `path`; `ValidationErrors` if there is no such file or it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValidationErrors(str(path), ["there is no such file"]) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValidationErrors(str(path), [f"it is not JSON ({error})"]) from None


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form (sorted keys, no spaces), in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Record(BaseModel):
    """A value that is saved as JSON: frozen, its numbers finite, and refusing keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def save(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record; `ValidationErrors` names every field that is unknown, missing or of the wrong kind."""
        return cls.parse(read_json(path), str(path))

    @classmethod
    def parse(cls, value: Any, about: str) -> Self:
        """Check a JSON value; `about` names its origin in the error."""
        try:
            return cls.model_validate_json(json.dumps(value))
        except ValidationError as error:
            raise ValidationErrors(about, [_sentence(e) for e in error.errors()]) from None

    def digest(self) -> str:
        """SHA-256 of the record's canonical JSON."""
        return digest(self.model_dump(mode="json"))


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file as a whole"
    if error["type"] == "extra_forbidden":
        return f"{where}: this key is not known here; remove it or correct its name"
    if error["type"] == "missing":
        return f"{where}: this key is missing"
    if error["type"] == "value_error":  # one of our own checks, whose sentence says what was found
        return f"{where}: {error['ctx']['error']}" if error["loc"] else str(error["ctx"]["error"])
    return f"{where}: found {error['input']!r}; {error['msg']}"
