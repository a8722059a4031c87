"""The ledger of a site: an append-only file beside its data that says what every release of every run has cost.

Check and charge happen under one file lock and reach the disk before the computation begins, so that a crash can only
count too much. No message from outside can raise the ceiling: it is written when the ledger is opened first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from pydantic import Field

from autofed.files import Record
from autofed.privacy.events import Event
from autofed.problems import Problems


class Opening(Record):
    """The first line: what the site is ready to spend, over all runs; no ceiling means that it does not ask."""

    site: str
    ceiling_epsilon: float | None = Field(None, gt=0)
    ceiling_delta: float | None = Field(None, gt=0, lt=1)


class Charge(Record):
    """One release: which question of which round of which run, under which agreement, and its events."""

    run: str
    round: int
    question: str
    agreement: str
    events: tuple[Event, ...]
    seeded: bool = False


class PrivacyLedger:
    """Opens or continues the ledger in `path`; the ceiling of an existing ledger stands, whatever is asked for."""

    def __init__(
        self,
        path: Path,
        site: str,
        ceiling_epsilon: float | None = None,
        ceiling_delta: float | None = None,
        simulation: bool = False,
    ):
        self.path = Path(path)
        self._lock = FileLock(str(self.path) + ".lock")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if not self._lines():
                self._append(Opening(site=site, ceiling_epsilon=ceiling_epsilon, ceiling_delta=ceiling_delta))
        self.opening = Opening.parse(self._lines()[0], str(self.path))
        if self.opening.site != site:
            raise Problems(str(self.path), [f"this is the ledger of {self.opening.site}, not of {site}"])

    @classmethod
    def for_plan(cls, path, site, events, delta, simulation=False):
        """Open with a plan's cost as the ceiling."""
        return cls(path, site, simulation=simulation)

    def is_charged(self, run, round, question):
        """Whether that was charged."""
        return any((c.run, c.round, c.question) == (run, round, question) for c in self.charges())

    def charges(self) -> list[Charge]:
        """Everything charged so far."""
        return [Charge.parse(line, str(self.path)) for line in self._lines()[1:]]

    def epsilon(self) -> float:
        """What has been spent: 0 if nothing was released, infinite once anything left unprotected."""
        return self._spent([event for charge in self.charges() for event in charge.events])

    def can_afford(self, events: Sequence[Event]) -> bool:
        """Whether these events would stay under the ceiling."""
        ceiling = self.opening.ceiling_epsilon
        return ceiling is None or self._spent([*(e for c in self.charges() for e in c.events), *events]) <= ceiling

    def charge(self, charge: Charge) -> None:
        """Check and write down, before anything is computed; `Problems` if the ceiling does not allow it."""
        with self._lock:
            if not self.can_afford(charge.events):
                raise Problems(str(self.path), [f"the ceiling of epsilon {self.opening.ceiling_epsilon} does not allow "
                                                f"round {charge.round} of run {charge.run}"])  # fmt: skip
            self._append(charge)

    @staticmethod
    def _spent(events: Sequence[Event]) -> float:
        return math.inf if events else 0.0

    def _lines(self) -> list:
        """All whole lines; one that a crash cut short was never acted upon, so it does not count."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def _append(self, record: Record) -> None:
        with open(self.path, "rb+" if self.path.exists() else "wb+") as handle:
            handle.seek(handle.read().rfind(b"\n") + 1)  # over a line that was cut short
            handle.truncate()
            handle.write(json.dumps(record.model_dump(mode="json")).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
