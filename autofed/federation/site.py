"""A hospital: bytes in, bytes out. Whatever leaves it leaves through `Site.answer`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from autofed import algorithms, privacy
from autofed.exchange import (
    Arrays,
    Failure,
    Groups,
    Request,
    from_bytes,
    load_groups,
    save_groups,
    to_bytes,
)
from autofed.files import digest, write_bytes
from autofed.fit import Fitted, fit
from autofed.plans import Plan
from autofed.prepared import Store
from autofed.privacy.ledger import Charge, PrivacyLedger
from autofed.problems import Problems

CODES = ("bad-request", "not-affordable", "out-of-memory", "failed")
"""All that a site ever says about a failure; the details are in its own log."""


class Site:
    """A site's data, memory, ledger and door.

    `folder` is the site's own: the log, what it remembers between rounds, and the releases it has made. The same
    request is answered with the same bytes from there, uncharged and with the same noise.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        plan: Plan,
        folder: Path,
        ledger: Path,
        *,
        members: int = 1,
        device: str = "cpu",
        on_step: Callable[[], None] = lambda: None,
    ):
        self.name = name
        self.store = store
        self.plan = plan
        self.folder = Path(folder)
        self.ledger = PrivacyLedger(ledger, name)
        self.steps = plan.local.training.steps_per_round * members
        self.device = device
        self.on_step = on_step
        self.algorithm = algorithms.make(plan.agreement.algorithm)
        self.mechanism = privacy.find(plan)
        self.folder.mkdir(parents=True, exist_ok=True)

    def answer(self, data: bytes) -> bytes:
        """The one door. A release is charged before it is computed, protected, stored, and only then sent."""
        request = Request("", 0, "")
        try:
            request = self._read(data)
            stored = self._stored(request)
            if stored is not None:
                return stored
            self._charge(request)
            draft = self.algorithm.local(_View(self, request), request)
            release = to_bytes(replace(draft, arrays=self.mechanism.release(draft.arrays)))
            self._store(request, release)
            return release
        except Exception as error:  # whatever went wrong inside, only a code may cross the door
            self._log(request, error)
            return to_bytes(Failure(request.run, request.round, self.name, _code(error)))

    def remembered(self, round: int) -> Path:
        """Where the site keeps what it remembers of a round."""
        return self.folder / "memory" / f"round_{round:05d}.safetensors"

    def _read(self, data: bytes) -> Request:
        message = from_bytes(data)
        if not isinstance(message, Request) or not 1 <= message.round <= self.plan.agreement.training.rounds:
            raise _BadRequest("expected a request for a round of the plan")
        return message

    def _charge(self, request: Request) -> None:
        events = self.mechanism.cost(self.steps)
        agreement = self.plan.agreement.digest()
        charge = Charge(
            run=request.run, round=request.round, question=request.question, agreement=agreement, events=events
        )
        try:
            self.ledger.charge(charge)
        except Problems as error:
            raise _NotAffordable(str(error)) from None

    def _release_path(self, request: Request) -> Path:
        name = digest([request.run, request.round, request.question])[:16]
        return self.folder / "releases" / f"round_{request.round:05d}_{name}.bin"

    def _stored(self, request: Request) -> bytes | None:
        path = self._release_path(request)
        return path.read_bytes() if path.is_file() else None

    def _store(self, request: Request, release: bytes) -> None:
        """Keep this release; those of earlier rounds will not be asked for again."""
        path = self._release_path(request)
        write_bytes(path, release)
        for old in path.parent.glob("round_*.bin"):
            if old.name[:11] < path.name[:11]:
                old.unlink()

    def _log(self, request: Request, error: Exception) -> None:
        log = logging.FileHandler(self.folder / "site.log")
        log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        record = logging.LogRecord("site", logging.ERROR, __file__, 0, "round %s: %s", (request.round, error), None)
        record.exc_info = (type(error), error, error.__traceback__)
        log.emit(record)
        log.close()


class _View:
    """The site as an algorithm sees it."""

    def __init__(self, site: Site, request: Request):
        self._site = site
        self._round = request.round

    @property
    def name(self) -> str:
        return self._site.name

    def fit(self, weights: Arrays) -> Fitted:
        site = self._site
        rounds = site.plan.agreement.training.rounds
        return fit(
            weights,
            site.store,
            site.plan.local,
            site.mechanism,
            steps=site.steps,
            begun=(self._round - 1) / rounds,
            share=1 / rounds,
            seed=(site.plan.local.training.seed, _number(site.name), self._round),
            device=site.device,
            on_step=site.on_step,
        )

    def memory(self, round: int) -> Groups | None:
        path = self._site.remembered(round)
        return load_groups(path)[0] if path.is_file() else None

    def remember(self, groups: Groups) -> None:
        save_groups(self._site.remembered(self._round), groups)
        keep = {self._round, self._round - 1, *self._site.plan.agreement.training.snapshots}
        for path in self._site.remembered(0).parent.glob("round_*.safetensors"):
            if int(path.stem.split("_")[1]) not in keep:
                path.unlink()


class _BadRequest(ValueError):
    pass


class _NotAffordable(ValueError):
    pass


def _code(error: Exception) -> str:
    if isinstance(error, _BadRequest | Problems):
        return "bad-request"
    if isinstance(error, _NotAffordable):
        return "not-affordable"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "out-of-memory"
    return "failed"


def _number(name: str) -> int:
    """A name as a number, the same on every machine: part of the seed of what the site draws."""
    return int(digest(name)[:16], 16)
