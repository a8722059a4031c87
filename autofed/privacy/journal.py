"""A file of records, one a line: only ever appended to, by one process at a time, and read on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from autofed.errors import ValidationErrors
from autofed.files import Record


class Journal:
    """The file `path` and its lock; the folder is made. Append and sync under the lock, after `fresh`.

    A line that a crash cut short was never acted upon: it is not read, and the next one is written over it.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(str(self.path) + ".lock")
        self._offset = 0

    @contextmanager
    def fresh(self) -> Iterator[list[bytes]]:
        """The whole lines that are new; the same ones come again if the block that takes them in fails.

        `ValidationErrors` if the file became shorter.
        """
        data = self._new_lines()
        yield data.split(b"\n")[:-1]
        self._offset += len(data)

    def _new_lines(self) -> bytes:
        if not self._offset and not self.path.exists():
            return b""
        with open(self.path, "rb") as handle:
            if handle.seek(0, os.SEEK_END) < self._offset:
                raise ValidationErrors(
                    str(self.path), ["it became shorter, but nothing is ever taken out of it; restore it from a copy"]
                )
            handle.seek(self._offset)
            data = handle.read()
        return data[: data.rfind(b"\n") + 1]

    def append(self, record: Record) -> None:
        """Write a record down; when this returns it is on the disk, and so is the name of the file."""
        line = json.dumps(record.model_dump(mode="json")).encode()
        with open(self.path, "rb+" if self.path.exists() else "wb+") as handle:
            handle.truncate(self._offset)
            handle.seek(self._offset)
            handle.write(line + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        if not self._offset:
            sync_folder(self.path.parent)

    def sync(self) -> None:
        """Have what was read reach the disk: who wrote it may have been killed before it did."""
        with open(self.path, "rb+") as handle:
            os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """For the name of a new file; systems that open no folders (Windows) keep it by themselves."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
