"""The ledger of a site: an append-only file beside its data that says what every release of every run has cost.

Check and charge happen under one file lock and reach the disk before the computation begins, so that a crash can only
count too much. No message from outside can raise the ceiling: it is written when the ledger is opened first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, model_validator

from autofed import __version__
from autofed.errors import ValidationErrors, raise_if_any
from autofed.files import Record
from autofed.privacy import accounting
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.journal import Journal

NAME = "ledger.jsonl"
"""The file, in the folder of a site's prepared data."""

USUAL_DELTA, USUAL_ORDER = 1e-5, 8
"""Those of figures where the ledger was opened without a ceiling."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class LedgerOpening(Record):
    """The first line: what the site is ready to spend, over all runs; no ceiling means that it does not ask.

    The ceiling is a Renyi filter at one `order`, which proves its epsilon at its delta. In a `simulation` nobody's
    patients are protected, so the noise may be drawn from a seed.
    """

    site: str
    ceiling_epsilon: float | None = Field(None, gt=0)
    ceiling_delta: float | None = Field(None, gt=0, lt=1)
    order: int | None = Field(None, ge=2)
    simulation: bool = False
    version: str = __version__
    time: str = Field(default_factory=_now)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        ceiling = (self.ceiling_epsilon, self.ceiling_delta, self.order)
        if any(part is None for part in ceiling) and any(part is not None for part in ceiling):
            raise ValueError("a ceiling needs its epsilon, its delta and its order; give all three or none")
        return self


class LedgerEntry(Record):
    """One release: which question of which round of which run, under which agreement, and its events.

    `seeded` noise is drawn from a test seed, so that it protects nothing. Where the events follow from what was
    released before, as older versions let noise respond to the training, only the figure of a filter holds
    (`follows`). Where the data named no patients each case counted as one (`case_is_patient`), and who has several is
    protected less.
    """

    run: str
    round: int
    question: str
    agreement: str
    events: tuple[PrivacyEvent, ...]
    seeded: bool = False
    follows: bool = False
    case_is_patient: bool = False
    time: str = Field(default_factory=_now)

    @property
    def name(self) -> tuple[str, int, str]:
        """What is charged once."""
        return self.run, self.round, self.question

    @property
    def protects(self) -> bool:
        """Whether there was noise that nobody knows."""
        return not self.seeded and all(event.noise_multiplier is not None for event in self.events)

    def same(self, other: LedgerEntry) -> bool:
        """Whether it charges the same, at whatever time."""
        return self.model_copy(update={"time": other.time}) == other


Line = TypeVar("Line", LedgerOpening, LedgerEntry)


class PrivacyLedger:
    """Opens or continues the ledger in `path`; the ceiling of an existing ledger stands, whatever is asked for.

    A new one without a ceiling never refuses. With one, `order` is that of its filter; by default the one that leaves
    most room for typical plans (`accounting.roomy_order`).
    """

    def __init__(
        self,
        path: Path,
        site: str,
        ceiling_epsilon: float | None = None,
        ceiling_delta: float | None = None,
        *,
        order: int | None = None,
        simulation: bool = False,
    ):
        """Open the ledger, or begin it with a budget if there is none.

        Args:
            path: The file.
            site: Whose ledger it is.
            ceiling_epsilon: The budget over all trainings to come; None for none.
            ceiling_delta: Its delta.
            order: The Renyi order of the filter that keeps the budget.
            simulation: Whether it protects no real patient.
        """
        self.path = Path(path)
        self._journal = Journal(self.path)
        self._opening: LedgerOpening | None = None
        self._charges: list[LedgerEntry] = []
        self._by_name: dict[tuple[str, int, str], LedgerEntry] = {}
        self._spent: tuple[PrivacyEvent, ...] = ()
        self._read()
        if self._opening is None:
            if order is None and ceiling_epsilon is not None and ceiling_delta is not None:
                order = accounting.roomy_order(ceiling_epsilon, ceiling_delta)
            ceiling = {"ceiling_epsilon": ceiling_epsilon, "ceiling_delta": ceiling_delta, "order": order}
            self._open(LedgerOpening.parse({"site": site, **ceiling, "simulation": simulation}, str(self.path)))
        if self.opening.site != site:
            raise ValidationErrors(str(self.path), [f"this is the ledger of {self.opening.site}, not of {site}"])

    @classmethod
    def existing(cls, path: Path) -> PrivacyLedger:
        """The ledger in `path`, whosever it is; `ValidationErrors` if there is none."""
        with suppress(FileNotFoundError), open(path, "rb") as handle:
            first = handle.readline()
            if first.endswith(b"\n"):
                return cls(path, _parse(LedgerOpening, f"{path}, line 1", first).site)
        raise ValidationErrors(str(path), ["there is no ledger; the first training makes one, or write: "
                                   "autofed ledger SITE --open --epsilon E --delta D"])  # fmt: skip

    @classmethod
    def for_plan(
        cls, path: Path, site: str, events: Sequence[PrivacyEvent], delta: float, *, simulation: bool = False
    ) -> PrivacyLedger:
        """The ledger for a training that costs these events in all; an existing one stands as it is.

        A new one gets as its ceiling what they cost at the order that is best for them, so that this training fits
        and nothing more. Events without protection leave it without a ceiling.
        """
        order = accounting.best_order(events, delta)
        cost = accounting.renyi_epsilon(events, delta, order)
        if not 0 < cost < math.inf:
            return cls(path, site, simulation=simulation)
        ceiling = math.ceil(cost * 1e6) / 1e6
        return cls(path, site, ceiling, delta, order=order, simulation=simulation)

    @property
    def opening(self) -> LedgerOpening:
        """The first line."""
        assert self._opening is not None
        return self._opening

    @property
    def delta(self) -> float:
        """The delta of the figures: that of the ceiling, if there is one."""
        return self.opening.ceiling_delta or USUAL_DELTA

    def charges(self) -> list[LedgerEntry]:
        """Everything charged so far."""
        self._read()
        return list(self._charges)

    def is_charged(self, run: str, round: int, question: str) -> bool:
        """Whether this release is charged already."""
        self._read()
        return (run, round, question) in self._by_name

    def epsilon(self, charges: Sequence[LedgerEntry] | None = None, delta: float | None = None) -> float:
        """The epsilon of some charges together, or of all: 0 for none, infinite if anything left unprotected.

        Privacy loss distributions compose what was fixed beforehand. Several runs were not: who plans one has seen the
        results of those before. For them, and for noise that followed from releases, the filter's epsilon holds.
        """
        charges = self.charges() if charges is None else charges
        if not all(charge.protects for charge in charges):
            return math.inf
        events = [event for charge in charges for event in charge.events]
        if any(charge.follows for charge in charges) or len({(c.run, c.agreement) for c in charges}) > 1:
            return accounting.renyi_epsilon(events, delta or self.delta, self.opening.order or USUAL_ORDER)
        return accounting.epsilon(events, delta or self.delta)

    def counted(self, events: Iterable[PrivacyEvent] = ()) -> float:
        """The epsilon that the filter of the ceiling has counted, with these events too; 0 without a ceiling."""
        self._read()
        opening = self.opening
        if opening.order is None or opening.ceiling_delta is None:
            return 0.0
        return accounting.renyi_epsilon((*self._spent, *events), opening.ceiling_delta, opening.order)

    def can_afford(self, events: Sequence[PrivacyEvent], seeded: bool = False) -> bool:
        """Whether these events would stay under the ceiling (Feldman and Zrnic 2021: they may follow from releases).

        Noise from a test seed protects nobody: a ceiling allows it in a simulation only.
        """
        ceiling = self.opening.ceiling_epsilon
        if ceiling is None:
            return True
        return (self.opening.simulation or not seeded) and self.counted(events) <= ceiling

    def charge(self, charge: LedgerEntry) -> None:
        """Check and write down, before anything is computed; what is charged already is not charged again.

        `ValidationErrors` if the ceiling does not allow it, or if the same question was charged with other content.
        """
        with self._journal.lock:
            self._read()
            before = self._by_name.get(charge.name)
            if before is None:
                raise_if_any(str(self.path), self._ceiling_problems(charge))
                self._journal.append(charge)
                self._read()  # so that a file that loses this line is refused
            elif before.same(charge):
                self._journal.sync()
            else:
                raise ValidationErrors(
                    str(self.path),
                    [
                        f"{charge.question} of round {charge.round} of run {charge.run} was "
                        "charged with other content; begin a new run"
                    ],
                )

    def _open(self, opening: LedgerOpening) -> None:
        with self._journal.lock:
            self._read()
            if self._opening is None:
                self._journal.append(opening)
                self._read()

    def _ceiling_problems(self, charge: LedgerEntry) -> list[str]:
        if self.can_afford(charge.events, charge.seeded):
            return []
        refused = f"the ceiling of epsilon {self.opening.ceiling_epsilon} does not allow round {charge.round} of run "
        why = f": {self.counted():.4g} is counted" if charge.protects else ", which has no noise that nobody knows"
        return [refused + charge.run + why]

    def _read(self) -> None:
        """Take in what is new, from whichever process, or refuse all of it."""
        with self._journal.fresh() as lines:
            before = len(self._charges) + (self._opening is not None)
            named = [(f"{self.path}, line {number}", line) for number, line in enumerate(lines, start=before + 1)]
            opening = self._opening or (_parse(LedgerOpening, *named.pop(0)) if named else None)
            charges = [_parse(LedgerEntry, *entry) for entry in named]
        self._opening = opening
        self._charges += charges
        self._by_name |= {charge.name: charge for charge in charges}
        self._spent = accounting.merged((*self._spent, *(event for charge in charges for event in charge.events)))


def _parse(kind: type[Line], about: str, line: bytes) -> Line:
    """Nothing is skipped: what cannot be read may have cost something."""
    try:
        return kind.parse(json.loads(line), about)
    except ValidationErrors as error:
        problem = "; ".join(error.problems)
    except ValueError as error:
        problem = f"it is not JSON ({error})"
    raise ValidationErrors(about, [f"{problem}; nothing can be charged until the line is restored from a copy"])
