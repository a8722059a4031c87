"""A site: bytes in, bytes out. Whatever leaves it is returned by `Site.answer`, the release boundary."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from filelock import FileLock

from autofed import algorithms, privacy
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation.client import ClientMemory, SiteContext, validate, verify
from autofed.files import write_bytes
from autofed.inference.postprocessing import RULES
from autofed.messages import Failure, Request, Response, from_bytes, to_bytes
from autofed.messages.error_feedback import STATE_LOST, ErrorFeedbackBuffer, StateLost
from autofed.plans import Plan
from autofed.preprocessing import PublicImages, Store
from autofed.privacy import ADAPTATION, Mechanism, OutputMechanism, guarantee
from autofed.privacy.ledger import LedgerEntry, PrivacyLedger
from autofed.privacy.private_fingerprint import PrivateFingerprintMechanism
from autofed.privacy.randomness import NOISE_KEY_BYTES
from autofed.training.batches import WorkerKilled
from autofed.training.fit import Compute
from autofed.training.network import build, coupling_layers

CODES = ("bad-request", "not-affordable", "spent", "out-of-memory", "disk-full", STATE_LOST, "failed")
"""All that a site ever sends about a failure; the details are in its own log."""

TRAIN, VALIDATE, VERIFY = TASKS = ("train", "validate", "verify")
"""What a site may be asked to do, in this order: to train, to score a round's model on patches of held-out patients,
and to score the final one on their whole cases. One response a round to each."""


@dataclass(frozen=True)
class SiteIdentity:
    """Who a site is in a run.

    `run` names the requests that it answers. `stream` seeds its random streams, and is the site's name unless there
    are several folds.
    """

    name: str
    run: str
    stream: str = ""


@dataclass(frozen=True)
class SiteData:
    """What a site has: the patients to train on, those `held` out, and public images if the algorithm labels them."""

    train: Store
    held: Store | None = None
    public: PublicImages | None = None


@dataclass(frozen=True)
class SiteStorage:
    """Where a site keeps what it must not forget.

    `folder` is its own in this run: the log, what it remembers between rounds, and its last responses. `ledgers` maps
    the sites whose data this is to their ledgers: one, except where a simulation pools them. In a `simulation` they
    say that they count for no real site.
    """

    folder: Path
    ledgers: Mapping[str, Path]
    simulation: bool = False


class Site:
    """A site's data, memory, ledger and release boundary in one run.

    The same request is answered with the same bytes from its folder, uncharged and with the same noise. All randomness
    of a private response follows from a noise key, which is on disk from before the charge until the response is
    stored: a response that was interrupted in between is computed again with the noise that it was charged for.
    """

    def __init__(
        self,
        identity: SiteIdentity,
        plan: Plan,
        data: SiteData,
        storage: SiteStorage,
        compute: Compute | None = None,
        *,
        trusted: Collection[str] = (),
        noise_seed: int | None = None,
        on_image: Callable[[int, int], None] = lambda done, total: None,
    ):
        """Open a site; `ValidationErrors` if it cannot take part.

        Args:
            identity: Who it is in the run.
            plan: The run's plan, or the site's own where networks may differ.
            data: The patients, and the public images.
            storage: Its folder and its ledgers.
            compute: What it trains on, and what is called after every step; a CPU by default.
            trusted: The algorithms outside autofed that this site allows a plan to name.
            noise_seed: Makes the noise keys of private responses repeatable, for tests: then the ledger says that
                nothing is protected.
            on_image: Is called with how many forward passes over public images are done, of how many.
        """
        name = identity.name
        self.name, self.run, self.stream = name, identity.run, identity.stream or name
        self.plan = plan
        self.store, self.public = data.train, data.public
        self.held = data.held or data.train.only(())
        self.folder = Path(storage.folder)
        self.memory = ClientMemory(self.folder / "memory")
        self.compute = compute or Compute()
        self.on_image = on_image
        self.steps = sum(plan.steps_at(site) for site in storage.ledgers)
        self.algorithm = algorithms.make(plan.agreement.algorithm, trusted)
        raise_if_any(name, [*self.algorithm.plan_problems(plan), *privacy_problems(plan, self.algorithm)])
        raise_if_any(name, guarantee.problems(plan, {name: self.steps}))
        self.ledgers = [
            open_ledger(path, site, plan, self.steps, storage.simulation) for site, path in storage.ledgers.items()
        ]
        raise_if_any(name, [p for ledger in self.ledgers for p in _private_fingerprint_problems(plan, ledger)])
        self.noise_seed = noise_seed
        self.mechanism = privacy.find_mechanism(plan, len(self.store.patients))
        self.error_feedback = ErrorFeedbackBuffer(self.folder / "wire", self.algorithm.released, plan.agreement.wire)

    def answer(self, data: bytes) -> bytes:
        """The release boundary: all that leaves a site is returned here.

        An update is charged before it is computed, then protected, stored, and only then sent.
        """
        request = Request(self.run, 0, "")
        try:
            request = self._read(data)
            path = self._response_path(request, data)
            with self._lock():
                if path.is_file():
                    self._forget_noise_keys(request)
                    return path.read_bytes()
                request = self.error_feedback.received(request)  # first: a site that lost its state gets a new request
                self._refuse_repeated_or_past(request)
                mechanism = self._output_mechanism(request)
                noise_key = self._noise_key(request) if mechanism.private else b""
                self._charge(request, mechanism)
                mechanism = mechanism.with_key(noise_key)
                if request.task == TRAIN:
                    arrays = self.algorithm.local(SiteContext(self, request, cast(Mechanism, mechanism)), request)
                else:
                    arrays = (validate if request.task == VALIDATE else verify)(self, request)
                arrays = {group: arrays[group] for group in arrays if group not in self._withheld(mechanism)}
                arrays, precisions = self.error_feedback.release(request, mechanism.release(arrays))
                response = to_bytes(Response(self.run, request.round, self.name, arrays, precisions=precisions))
                write_bytes(path, response)
                self._forget_earlier_responses(path)
                self._forget_noise_keys(request)
                return response
        except Exception as error:  # whatever went wrong inside, only a code may leave the site
            with contextlib.suppress(OSError):  # a full disk takes no log either
                self.log(request, error)
            return to_bytes(Failure(request.run, request.round, self.name, _code(error)))

    def _lock(self) -> FileLock:
        """One request at a time: another process with the same request waits, and finds the response of this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / "lock")

    def _output_mechanism(self, request: Request) -> OutputMechanism:
        """What the response to this request passes; it depends on the plan and on what was released before."""
        if request.task != TRAIN:
            scores = privacy.score_mechanism(self.plan, len(RULES))
            if scores is None:
                raise _BadRequest("scores stay at the site")
            return scores
        return privacy.adapted_mechanism(self.mechanism, request.shared.get(ADAPTATION, {}), request.round)

    def _withheld(self, mechanism: OutputMechanism) -> Collection[str]:
        """The groups that do not leave although the mechanism has protection for them (`is_dp_postprocessing`)."""
        return {algorithms.PREDICTIONS} if mechanism.private and not self.algorithm.is_dp_postprocessing else set()

    def _noise_key(self, request: Request) -> bytes:
        """The noise key of this response: a new one, or that of one that was cut off. It serves one request alone."""
        if self.noise_seed is not None:
            seed = f"{self.noise_seed}/{self.name}/{_response_name(request)}"
            return hashlib.sha256(seed.encode()).digest()
        path, content = self._noise_key_path(request), hashlib.sha256(to_bytes(request)).digest()
        if path.is_file():
            noise_key, charged_content = path.read_bytes()[:NOISE_KEY_BYTES], path.read_bytes()[NOISE_KEY_BYTES:]
            if charged_content != content:
                raise _Spent(f"round {request.round} was charged for another request")
            return noise_key
        if any(ledger.is_charged(request.run, request.round, request.task) for ledger in self.ledgers):
            raise _Spent(f"round {request.round} was charged, but its noise is not in {path} any more")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        noise_key = secrets.token_bytes(NOISE_KEY_BYTES)
        write_bytes(path, noise_key + content)
        return noise_key

    def _forget_noise_keys(self, request: Request) -> None:
        """A response is stored: its noise key, and those of earlier ones, would only tell what its noise was."""
        for path in self._noise_key_path(request).parent.glob("round_*.bin"):
            if path.name <= self._noise_key_path(request).name:
                path.unlink(missing_ok=True)

    def _noise_key_path(self, request: Request) -> Path:
        return self.folder / "secrets" / f"{_response_name(request)}.bin"

    def _read(self, data: bytes) -> Request:
        message = from_bytes(data)
        if not isinstance(message, Request) or message.run != self.run:
            raise _BadRequest(f"expected a request of run {self.run}")
        if not 1 <= message.round <= self.plan.agreement.training.rounds:
            raise _BadRequest(f"found round {message.round}, the plan has {self.plan.agreement.training.rounds}")
        if not 0 <= message.since <= message.round - (message.task == TRAIN):
            raise _BadRequest(f"found an answer of round {message.since} to go on from in round {message.round}")
        if message.task not in TASKS:
            raise _BadRequest(f"found the task {message.task!r}, expected one of {', '.join(TASKS)}")
        shares_scores = message.task == VERIFY and self.plan.agreement.privacy.score_noise is not None
        if message.task != TRAIN and not shares_scores and not self.plan.agreement.training.validates(message.round):
            raise _BadRequest(f"found {message.task!r} of round {message.round}, which the plan does not score")
        if message.task == VERIFY and message.round != self.plan.agreement.training.rounds:
            raise _BadRequest(f"found {VERIFY!r} of round {message.round}, which is not the last")
        expected = {self.plan.agreement.wire} if message.task == TRAIN else set()
        if not set(message.precisions.values()) <= expected - {"float32"}:
            raise _BadRequest(f"found groups in {message.precisions}, the plan has {self.plan.agreement.wire}")
        return message

    def _refuse_repeated_or_past(self, request: Request) -> None:
        """A round is answered once: not with other content under the same name, nor after a later round."""
        stored = sorted(p.name for p in self.folder.glob("releases/round_*.bin"))
        if stored and stored[-1] >= _response_name(request):
            raise _BadRequest(f"round {request.round} comes after {stored[-1]} was answered, or with other content")

    def _charge(self, request: Request, mechanism: OutputMechanism) -> None:
        entry = LedgerEntry(
            run=request.run,
            round=request.round,
            question=request.task,
            agreement=self.plan.agreement.digest(),
            events=mechanism.cost(self.steps if request.task == TRAIN else 0),
            seeded=mechanism.private and self.noise_seed is not None,
            case_is_patient=all(cases == (patient,) for patient, cases in self.store.patients.items()),
        )
        try:
            for ledger in self.ledgers:
                ledger.charge(entry)
        except ValidationErrors as error:
            raise _NotAffordable(str(error)) from None

    def _response_path(self, request: Request, data: bytes) -> Path:
        name = f"{_response_name(request)}_{hashlib.sha256(data).hexdigest()[:16]}.bin"
        return self.folder / "releases" / name

    def _forget_earlier_responses(self, path: Path) -> None:
        """Remove the responses of earlier rounds than this one's, which will not be asked for again."""
        for old in path.parent.glob("round_*.bin"):
            if _round_of(old.name) < _round_of(path.name):
                old.unlink()

    def log(self, request: Request, error: Exception) -> None:
        """Write what went wrong to the site's own log, which nobody else reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(self.folder / "site.log")
        log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        record = logging.LogRecord("site", logging.ERROR, __file__, 0, "round %s: %s", (request.round, error), None)
        record.exc_info = (type(error), error, error.__traceback__)
        log.emit(record)
        log.close()


def open_ledger(path: Path, site: str, plan: Plan, steps: int, simulation: bool) -> PrivacyLedger:
    """A site's ledger; a new one gets as its budget what a private plan will cost, and no more."""
    settings = plan.agreement.privacy
    if not (settings.is_private and settings.delta):
        return PrivacyLedger(path, site, simulation=simulation)
    events = guarantee.training_events(plan, steps)
    return PrivacyLedger.for_plan(path, site, events, settings.delta, simulation=simulation)


def _private_fingerprint_problems(plan: Plan, ledger: PrivacyLedger) -> list[str]:
    """Why a plan's guarantee counts another private fingerprint than the one that this site was charged."""
    noise = plan.agreement.privacy.census_noise
    charged = {
        e.noise_multiplier
        for c in ledger.charges()
        for e in c.events
        if e.mechanism == PrivateFingerprintMechanism.name
    }
    if noise is None or not charged or noise in charged:
        return []
    found = ", ".join(f"{multiplier:g}" for multiplier in sorted(filter(None, charged)))
    return [f"the plan counts a census with noise {noise:g}, this site was charged one with {found}; plan from its own"]


def privacy_problems(plan: Plan, algorithm: algorithms.Algorithm) -> list[str]:
    """Why the plan's mechanism cannot protect a training of this network by this algorithm."""
    mechanism = privacy.find_mechanism(plan)
    problems = []
    if plan.agreement.privacy.by_patient:
        problems += [
            f"the layer {layer} couples patients, so {mechanism.name} cannot bound each; plan another network"
            for layer in coupling_layers(build(plan.local.network))
        ]
    protected = set(mechanism.protects) - (set() if algorithm.is_dp_postprocessing else {algorithms.PREDICTIONS})
    unprotected = sorted(set(algorithm.released) - protected) if mechanism.private else []
    if unprotected:
        found = f"{plan.agreement.algorithm.name} releases {', '.join(unprotected)}"
        problems.append(f"{found}, and {mechanism.name} has no protection for it; write dp-sgd, or another algorithm")
    return problems


class _BadRequest(ValueError):
    pass


class _NotAffordable(ValueError):
    pass


class _Spent(ValueError):
    pass


def _code(error: Exception) -> str:
    if isinstance(error, WorkerKilled):
        return "failed"
    if isinstance(error, _BadRequest | ValidationErrors):
        return "bad-request"
    if isinstance(error, StateLost):
        return STATE_LOST
    if isinstance(error, _NotAffordable):
        return "not-affordable"
    if isinstance(error, _Spent):
        return "spent"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "out-of-memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk-full"
    return "failed"


def _response_name(request: Request) -> str:
    """Sorts by round, and is the same for whatever claims to be the same request."""
    return f"round_{request.round:05d}_{TASKS.index(request.task)}_{request.task}"


def _round_of(name: str) -> int:
    return int(name.split("_")[1])
