"""A site's census: charged to its ledger, then counted, noised and stored; asked again, the same comes again."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from autofed.data import Dataset
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation.node import ledger_path
from autofed.files import PathLike, Record, digest
from autofed.fingerprints import private as private_fingerprints
from autofed.fingerprints.private import Feature, PrivateFingerprint
from autofed.parallel import Progress, silent
from autofed.privacy import accounting
from autofed.privacy.journal import sync_folder
from autofed.privacy.ledger import LedgerEntry, PrivacyLedger
from autofed.privacy.private_fingerprint import NAME, PrivateFingerprintMechanism, noise_for, order_of
from autofed.privacy.randomness import NOISE_KEY_BYTES
from autofed.privacy.shared_scores import OF_PATIENTS

FOLDER = "census"
"""Beside a site's ledger: what was released, and the secret of what was charged and is not yet released."""


class PrivacyTarget(Record):
    """What a census is made for: epsilon and delta of the plan to come, and the noise multiplier that follows."""

    epsilon: float
    delta: float
    noise_multiplier: float


class StoredRelease(Record):
    """A census as it was released, of which data, and for which promise. Only the census leaves the site."""

    census: PrivateFingerprint
    promise: PrivacyTarget
    data: str


class PendingRelease(Record):
    """A census that is charged, or about to be, and not yet stored: its noise follows from the secret.

    Nothing of it has left, so it may be finished with data that were mended since: it is one release all the same.
    """

    promise: PrivacyTarget
    secret: str
    charge: LedgerEntry


def take_private_fingerprint(
    dataset: Dataset,
    work: PathLike,
    epsilon: float | None,
    delta: float | None = None,
    *,
    simulation: bool = False,
    processes: int = 1,
    progress: Progress = silent,
) -> PrivateFingerprint:
    """The census of a site for a plan of `epsilon`, charged to WORK/<site>/ledger.jsonl before anything is counted.

    The same data and the same promise give the release that is stored, uncharged. One that was cut off after its charge
    is finished with the noise that it was charged for. Where there is no ledger this opens one, whose ceiling is the
    promise: room for the census and for the training that comes after it. `ValidationErrors` if another census is
    stored, or if the ceiling does not allow one.

    Args:
        dataset: The site's data.
        work: WORK: the ledger is in `WORK/<site>`.
        epsilon: That of the plan to come.
        delta: That of the plan to come; by default the smaller of 1e-5 and a tenth of one over the site's
            patients.
        simulation: Whether the ledger counts for no real patient.
        processes: How many read the cases.
        progress: Is called with what is being done, how many are done, and how many there are.
    """
    folder = ledger_path(Path(work), dataset.name).parent / FOLDER
    promise = _promise(dataset, epsilon, delta)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if (folder / "release.json").is_file():
            return _again(folder / "release.json", promise, dataset)
        ledger = _ledger(Path(work), dataset.name, promise, simulation)
        parts, data = (
            private_fingerprints.feature_layout(
                dataset.declaration(), list(private_fingerprints.declared_features(dataset))
            ),
            dataset.raw_digest(),
        )
        pending = _pending(folder / "secret.json", promise, ledger, dataset, parts)
        ledger.charge(pending.charge)
        mechanism = PrivateFingerprintMechanism(promise.noise_multiplier).with_key(bytes.fromhex(pending.secret))
        rows = private_fingerprints.feature_rows(dataset, parts, processes=processes, progress=progress)
        sums = mechanism.release({OF_PATIENTS: {"rows": rows}})["sums"]["rows"]
        fingerprint = private_fingerprints.private_fingerprint(dataset, parts, sums, promise.noise_multiplier)
        StoredRelease(census=fingerprint, promise=promise, data=data).save(folder / "release.json")
        _forget(folder / "secret.json")
    return fingerprint


def _promise(dataset: Dataset, epsilon: float | None, delta: float | None) -> PrivacyTarget:
    patients = len({dataset.patient(case) for case in private_fingerprints.labelled_cases(dataset)})
    delta = delta or accounting.default_delta(patients)
    problems = []
    if epsilon is None or not 0 < epsilon < math.inf:
        problems.append("a private fingerprint belongs to the guarantee of the plan to come; write its --epsilon, as 8")
    if not 0 < delta < 1 / patients:
        problems.append(f"found a delta of {delta:g} for {patients} patients; write one far below {1 / patients:.2g}")
    raise_if_any("--private-census", problems)
    assert epsilon is not None
    return PrivacyTarget(epsilon=epsilon, delta=delta, noise_multiplier=noise_for(epsilon, delta))


def _again(path: Path, promise: PrivacyTarget, dataset: Dataset) -> PrivateFingerprint:
    """What was released before, if it is the same that is asked."""
    stored = StoredRelease.load(path)
    problems = []
    if stored.promise != promise:
        then = f"epsilon {stored.promise.epsilon:g} and delta {stored.promise.delta:g}"
        problems.append(f"the private fingerprint that this site released was computed for {then}; ask for these")
    if stored.data != dataset.raw_digest():
        problems.append("the data changed since this site's census was released; plan with that one as it is")
    if problems:
        problems.append("or move this file away: then another one is computed, and charged beside the first")
    raise_if_any(str(path), problems)
    return stored.census


def _ledger(work: Path, site: str, promise: PrivacyTarget, simulation: bool) -> PrivacyLedger:
    path = ledger_path(work, site)
    if not path.is_file():
        order = order_of(promise.noise_multiplier)
        return PrivacyLedger(path, site, promise.epsilon, promise.delta, order=order, simulation=simulation)
    ledger = PrivacyLedger(path, site)
    if ledger.opening.simulation != simulation:
        found = "of a simulation; add --simulation" if ledger.opening.simulation else "the site's own; leave it out"
        raise ValidationErrors(str(path), [f"--simulation: the ledger is {found}, or name another --work"])
    return ledger


def _pending(
    path: Path, promise: PrivacyTarget, ledger: PrivacyLedger, dataset: Dataset, parts: Sequence[Feature]
) -> PendingRelease:
    """The census that was cut off, to be finished with its own noise, or a new one with a secret that is on disk."""
    if path.is_file():
        pending = PendingRelease.load(path)
        if pending.promise == promise:
            return pending
        if ledger.is_charged(*pending.charge.name):
            options = f"--epsilon {pending.promise.epsilon:g} --delta {pending.promise.delta:g}"
            raise ValidationErrors(
                str(path), [f"a private fingerprint for {options} was charged and is not finished; ask for that one"]
            )
    number = 1 + sum(charge.run == NAME for charge in ledger.charges())
    charge = _charge(dataset, number, promise, parts)
    pending = PendingRelease(promise=promise, secret=secrets.token_bytes(NOISE_KEY_BYTES).hex(), charge=charge)
    path.parent.chmod(0o700)
    pending.save(path)
    sync_folder(path.parent)
    return pending


def _charge(dataset: Dataset, number: int, promise: PrivacyTarget, parts: Sequence[Feature]) -> LedgerEntry:
    cases = private_fingerprints.labelled_cases(dataset)
    return LedgerEntry(
        run=NAME,
        round=number,
        question=NAME,
        agreement=digest([dataset.declaration().model_dump(mode="json"), [part.name for part in parts]]),
        events=PrivateFingerprintMechanism(promise.noise_multiplier).cost(),
        case_is_patient=all(dataset.patient(case) == case for case in cases),
    )


def _forget(path: Path) -> None:
    """The release is stored, for good: its secret would only tell what its noise was."""
    sync_folder(path.parent)
    path.unlink()
