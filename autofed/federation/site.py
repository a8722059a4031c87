"""A hospital: bytes in, bytes out. Whatever leaves it leaves through `Site.answer`."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from autofed import algorithms, privacy
from autofed.exchange import (
    Arrays,
    Failure,
    Groups,
    Release,
    Request,
    from_bytes,
    load_groups,
    save_groups,
    to_bytes,
)
from autofed.files import digest, write_bytes
from autofed.fit import Fitted, fit
from autofed.labels import Labels
from autofed.plans import Plan
from autofed.prepared import Store
from autofed.privacy import ADAPTATION, Mechanism
from autofed.privacy.ledger import Charge, PrivacyLedger
from autofed.problems import Problems

CODES = ("bad-request", "not-affordable", "out-of-memory", "disk-full", "failed")
"""All that a site ever says about a failure; the details are in its own log."""


QUESTIONS = ("train",)
"""What a site may be asked. One answer a round to each."""


class Site:
    """A site's data, memory, ledger and door in one run.

    `folder` is the site's own in this run: the log, what it remembers between rounds, and its last release. The same
    request is answered with the same bytes from there, uncharged and with the same noise. `ledgers` maps the hospitals
    whose data this is to their ledgers: one, except where a simulation pools them. `trusted` are the algorithms outside
    autofed that this site allows a plan to name.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        plan: Plan,
        folder: Path,
        ledgers: Mapping[str, Path],
        *,
        run: str,
        device: str = "cpu",
        trusted: Collection[str] = (),
        on_step: Callable[[], None] = lambda: None,
    ):
        self.name = name
        self.store = store
        self.plan = plan
        self.folder = Path(folder)
        self.ledgers = [PrivacyLedger(path, site) for site, path in ledgers.items()]
        self.run = run
        self.steps = plan.local.training.steps_per_round * len(ledgers)
        self.device = device
        self.on_step = on_step
        self.algorithm = algorithms.make(plan.agreement.algorithm, trusted)
        self.mechanism = privacy.find(plan, len(store.patients))

    def answer(self, data: bytes) -> bytes:
        """The one door. A release is charged before it is computed, protected, stored, and only then sent."""
        request = Request(self.run, 0, "")
        try:
            request = self._read(data)
            path = self._release_path(request, data)
            if path.is_file():
                return path.read_bytes()
            self._refuse_repeated_or_past(request)
            mechanism = privacy.adapted(self.mechanism, request.shared.get(ADAPTATION, {}))
            self._charge(request, mechanism)
            draft = self.algorithm.local(_View(self, request, mechanism), request)
            release = to_bytes(Release(self.run, request.round, self.name, mechanism.release(draft)))
            self._store(path, release)
            return release
        except Exception as error:  # whatever went wrong inside, only a code may cross the door
            with contextlib.suppress(OSError):  # a full disk takes no log either
                self._log(request, error)
            return to_bytes(Failure(request.run, request.round, self.name, _code(error)))

    def remembered(self, round: int) -> Path:
        """Where the site keeps what it remembers of a round."""
        return self.folder / "memory" / f"round_{round:05d}.safetensors"

    def _read(self, data: bytes) -> Request:
        message = from_bytes(data)
        if not isinstance(message, Request) or message.run != self.run:
            raise _BadRequest(f"expected a request of run {self.run}")
        if not 1 <= message.round <= self.plan.agreement.training.rounds:
            raise _BadRequest(f"found round {message.round}, the plan has {self.plan.agreement.training.rounds}")
        if message.question not in QUESTIONS:
            raise _BadRequest(f"found the question {message.question!r}, expected one of {', '.join(QUESTIONS)}")
        return message

    def _refuse_repeated_or_past(self, request: Request) -> None:
        """A round is answered once: not with other content under the same name, nor after a later round."""
        stored = sorted(p.name for p in self.folder.glob("releases/round_*.bin"))
        if stored and stored[-1] >= _release_name(request):
            raise _BadRequest(f"round {request.round} comes after {stored[-1]} was answered, or with other content")

    def _charge(self, request: Request, mechanism: Mechanism) -> None:
        charge = Charge(
            run=request.run,
            round=request.round,
            question=request.question,
            agreement=self.plan.agreement.digest(),
            events=mechanism.cost(self.steps),
        )
        try:
            for ledger in self.ledgers:
                ledger.charge(charge)
        except Problems as error:
            raise _NotAffordable(str(error)) from None

    def _release_path(self, request: Request, data: bytes) -> Path:
        name = f"{_release_name(request)}_{hashlib.sha256(data).hexdigest()[:16]}.bin"
        return self.folder / "releases" / name

    def _store(self, path: Path, release: bytes) -> None:
        """Keep this release; those of earlier rounds will not be asked for again."""
        write_bytes(path, release)
        for old in path.parent.glob("round_*.bin"):
            if old.name < path.name:
                old.unlink()

    def _log(self, request: Request, error: Exception) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(self.folder / "site.log")
        log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        record = logging.LogRecord("site", logging.ERROR, __file__, 0, "round %s: %s", (request.round, error), None)
        record.exc_info = (type(error), error, error.__traceback__)
        log.emit(record)
        log.close()


class _View:
    """The site as an algorithm sees it in one round."""

    def __init__(self, site: Site, request: Request, mechanism: Mechanism):
        self._site = site
        self._round = request.round
        self._mechanism = mechanism
        self._charged_steps = site.steps

    @property
    def name(self) -> str:
        return self._site.name

    def fit(self, weights: Arrays) -> Fitted:
        site, steps = self._site, self._charged_steps
        if not steps:
            raise RuntimeError("the steps that this round was charged for have been taken")
        self._charged_steps = 0
        rounds = site.plan.agreement.training.rounds
        return fit(
            weights,
            site.store,
            site.plan.local,
            self._mechanism,
            steps=steps,
            begun=(self._round - 1) / rounds,
            share=1 / rounds,
            seed=(site.plan.local.training.seed, _number(site.name), self._round),
            labels=Labels.of(site.plan.agreement),
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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk-full"
    return "failed"


def _release_name(request: Request) -> str:
    """Sorts by round, and is the same for whatever claims to be the same question."""
    return f"round_{request.round:05d}_{request.question}"


def _number(name: str) -> int:
    """A name as a number, the same on every machine: part of the seed of what the site draws."""
    return int(digest(name)[:16], 16)
