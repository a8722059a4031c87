"""What a site's ledger says to a person: what was spent on what, what is left, and what that promises."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation.node import ledger_path, run_id_of
from autofed.federation.run_folder import Run
from autofed.files import PathLike, Record
from autofed.privacy import accounting
from autofed.privacy.events import PrivacyEvent, Unit
from autofed.privacy.ledger import NAME, LedgerEntry, PrivacyLedger
from autofed.privacy.private_fingerprint import NAME as CENSUS

_LITTLE_PROTECTION = 10.0
"""An epsilon above this is told to be little protection."""

_SIMULATION = "This is the ledger of a simulation: nobody's privacy rests on it."


class Spent(Record):
    """What one mechanism cost in one run; no `epsilon` where nothing protects."""

    mechanism: str
    unit: Unit
    rounds: int
    steps: int
    epsilon: float | None


class RunSpent(Record):
    """What one run cost at the site; `since` is the time of its first charge, `seeded` if its noise was a test's."""

    run: str
    since: str
    seeded: bool
    epsilon: float | None
    mechanisms: tuple[Spent, ...]


class Ceiling(Record):
    """What the site is ready to spend: the filter has `counted` so much, `left` is the share that remains."""

    epsilon: float
    delta: float
    order: int
    counted: float
    left: float


class Statement(Record):
    """All that a ledger says. Without an `epsilon` nothing is promised, since `unprotected_since`, a run.

    `success_rate` is the best that anyone can do at telling whether a patient was used, where guessing gives 0.5.
    """

    site: str
    ledger: str
    opened: str
    simulation: bool
    delta: float
    epsilon: float | None
    success_rate: float | None
    unprotected_since: str | None
    ceiling: Ceiling | None
    runs: tuple[RunSpent, ...]
    promise: str
    notes: tuple[str, ...]


# --- finding and opening


def find_ledger(site: PathLike) -> PrivacyLedger:
    """The ledger of a site, from its folder WORK/SITE or the file itself; `ValidationErrors` says what to write
    instead.
    """
    path = _path(site)
    beside = sorted(p.parent.name for p in Path(site).glob(f"*/{NAME}")) if not path.exists() else []
    if beside:
        found = f"found the ledgers of {', '.join(beside)}"
        raise ValidationErrors(str(site), [f"{found}; name one of them: {Path(site) / beside[0]}"])
    return PrivacyLedger.existing(path)


def open_ledger(site: PathLike, epsilon: float | None, delta: float | None, simulation: bool = False) -> PrivacyLedger:
    """Open the ledger of a site with a ceiling over all runs to come; `ValidationErrors` if there is one, which
    stands.
    """
    path = _path(site)
    problems = []
    with suppress(ValidationErrors):
        PrivacyLedger.existing(path)
        problems.append("the ledger is open already, and nothing changes its ceiling; leave out --open to see it")
    if not path.parent.is_dir():
        problems.append(f"there is no folder {path.parent}; prepare the site's data first: autofed preprocess")
    if epsilon is None or delta is None:
        problems.append("a ceiling needs both; give --epsilon, such as 8, and --delta, such as 1e-5")
    elif not (0 < epsilon < math.inf and 0 < delta < 1):
        problems.append(
            f"found epsilon {epsilon:g} and delta {delta:g}; give an epsilon above 0, a delta between 0 and 1"
        )
    elif accounting.renyi_room(epsilon, delta, accounting.LARGEST_ORDER) <= 0:
        problems.append(f"nothing fits under epsilon {epsilon:g} at delta {delta:g}; give more of either")
    raise_if_any(str(path), problems)
    name = path.resolve().parent.name if path.name == NAME else path.stem
    return PrivacyLedger(path, name, epsilon, delta, simulation=simulation)


def _path(site: PathLike) -> Path:
    return Path(site) if Path(site).name.endswith(".jsonl") else Path(site) / NAME


# --- what it says


def ledger_statement(ledger: PrivacyLedger) -> Statement:
    """Everything that a ledger says, as figures and as sentences."""
    charges, opening, delta = ledger.charges(), ledger.opening, ledger.delta
    epsilon = _finite(ledger.epsilon())
    return Statement(
        site=opening.site,
        ledger=str(ledger.path),
        opened=opening.time,
        simulation=opening.simulation,
        delta=delta,
        epsilon=epsilon,
        success_rate=None if epsilon is None else accounting.success_rate(epsilon, delta),
        unprotected_since=next((charge.run for charge in charges if not charge.protects), None),
        ceiling=_ceiling(ledger),
        runs=tuple(_run(ledger, run, charges) for run in dict.fromkeys(charge.run for charge in charges)),
        promise=_guarantee_sentence(epsilon, delta, charges),
        notes=tuple(_notes(ledger, epsilon, charges)),
    )


def of_run(run: Run, work: PathLike | None) -> list[str]:
    """What a finished private run cost each of its sites, and what their ledgers promise; nothing without privacy.

    `work` holds the sites' own ledgers; a simulation has its own, and over Flower every site keeps its own.
    """
    if not run.plan().agreement.privacy.is_private:
        return []
    sites = sorted(run.plan().agreement.patients)
    if run.identity().simulation:
        paths = [run.ledgers_folder / f"{site}.jsonl" for site in sites]
    else:
        paths = [ledger_path(Path(work), site) for site in sites] if work else []
    ledgers = [PrivacyLedger.existing(path) for path in paths]
    costs = [line for ledger in ledgers for line in summary(ledger, run.identity().id)]
    return list(dict.fromkeys([*costs, *(ledger_statement(ledger).promise for ledger in ledgers)]))  # one line for all


def summary(ledger: PrivacyLedger, run: str | None = None) -> list[str]:
    """A line or two on what a run cost, in all its folds, and what is left; on all runs if none is named."""
    every = ledger.charges()
    mine = [charge for charge in every if run is None or _belongs(charge, run)]
    what = "all runs together" if run is None else "this run"
    parts = [_cost_in_words(ledger, what, mine)]
    if len(mine) < len(every):
        parts.append(_cost_in_words(ledger, "all runs together", every))
    ceiling = _ceiling(ledger)
    if ceiling:
        left = max(0.0, ceiling.epsilon - ceiling.counted)
        parts.append(f"of its ceiling {ceiling.epsilon:.4g} are left {left:.2g} ({_floor(100 * ceiling.left)} %)")
    lines = [f"{ledger.opening.site}: {'; '.join(parts)}"]
    return [*lines, _SIMULATION] if ledger.opening.simulation else lines


def _cost_in_words(ledger: PrivacyLedger, what: str, charges: Sequence[LedgerEntry]) -> str:
    epsilon, delta = ledger.epsilon(charges), ledger.delta
    if math.isinf(epsilon):
        return f"nothing is promised for {what}, since {_why(charges)}"
    return f"{what} cost epsilon {accounting.rounded_up(epsilon)} at delta {delta:g}"


def _belongs(charge: LedgerEntry, run: str) -> bool:
    return run_id_of(charge.run) == run


def _events(charges: Iterable[LedgerEntry]) -> list[PrivacyEvent]:
    return [event for charge in charges for event in charge.events]


def _run(ledger: PrivacyLedger, run: str, charges: Iterable[LedgerEntry]) -> RunSpent:
    mine = [charge for charge in charges if charge.run == run]
    kinds = dict.fromkeys((event.mechanism, event.unit) for event in _events(mine))
    return RunSpent(
        run=run,
        since=mine[0].time,
        seeded=any(charge.seeded for charge in mine),
        epsilon=_finite(ledger.epsilon(mine)),
        mechanisms=tuple(_mechanism(ledger, mechanism, unit, mine) for mechanism, unit in kinds),
    )


def _mechanism(ledger: PrivacyLedger, mechanism: str, unit: Unit, charges: Iterable[LedgerEntry]) -> Spent:
    mine = [charge for charge in (_only(charge, mechanism, unit) for charge in charges) if charge.events]
    return Spent(
        mechanism=mechanism,
        unit=unit,
        rounds=len({charge.round for charge in mine}),
        steps=sum(event.steps for event in _events(mine)),
        epsilon=_finite(ledger.epsilon(mine)),
    )


def _only(charge: LedgerEntry, mechanism: str, unit: Unit) -> LedgerEntry:
    events = tuple(event for event in charge.events if (event.mechanism, event.unit) == (mechanism, unit))
    return charge.model_copy(update={"events": events})


def _ceiling(ledger: PrivacyLedger) -> Ceiling | None:
    opening = ledger.opening
    if opening.ceiling_epsilon is None or opening.ceiling_delta is None or opening.order is None:
        return None
    room = accounting.renyi_room(opening.ceiling_epsilon, opening.ceiling_delta, opening.order)
    used = accounting.renyi(_events(ledger.charges()), opening.order)
    return Ceiling(
        epsilon=opening.ceiling_epsilon,
        delta=opening.ceiling_delta,
        order=opening.order,
        counted=ledger.counted(),
        left=max(0.0, 1 - used / room) if room > 0 else 0.0,
    )


# --- in words


def _guarantee_sentence(epsilon: float | None, delta: float, charges: Sequence[LedgerEntry]) -> str:
    """What a privacy officer wants to know, in one sentence."""
    if not charges:
        return "Nothing has left this hospital in a training yet."
    if epsilon is None:
        first = next(charge for charge in charges if not charge.protects)
        return (f"Nothing is promised to any patient of this hospital: {_why(charges)}, for the first time in round "
                f"{first.round} of run {first.run}.")  # fmt: skip
    census = [charge.run == CENSUS for charge in charges]
    what = "the census" if all(census) else "the census and the trainings" if any(census) else "the trainings"
    rate = accounting.percent_at_most(accounting.success_rate(epsilon, delta))
    figures = f"epsilon {accounting.rounded_up(epsilon)} at delta {delta:g}"
    return (f"Someone who sees everything that left this hospital in {what} of this ledger can tell whether a "
            f"given patient's scans were used with a success rate of at most {rate} %, where guessing gives 50 % "
            f"({figures}).")  # fmt: skip


def _why(charges: Iterable[LedgerEntry]) -> str:
    first = next(charge for charge in charges if not charge.protects)
    return "the noise followed from a test seed" if first.seeded else "something left unprotected"


def _notes(ledger: PrivacyLedger, epsilon: float | None, charges: Sequence[LedgerEntry]) -> Iterable[str]:
    if ledger.opening.simulation:
        yield _SIMULATION
    if epsilon is not None and epsilon > _LITTLE_PROTECTION:
        yield (f"An epsilon above {_LITTLE_PROTECTION:g} is little protection against such a test; the noise may still "
               "keep scans from being restored.")  # fmt: skip
    if epsilon is not None and any(charge.case_is_patient for charge in charges):
        yield ("Its data names no patients (`patients` in dataset.json), so that one case counts as one: who has "
               "several is protected less.")  # fmt: skip
    whole = sorted({event.mechanism for event in _events(charges) if event.unit == "site"})
    if whole and epsilon is not None:
        yield (f"The unit of {', '.join(whole)} is all that the hospital holds at once, each patient included; "
               "that of anything else is one patient.")  # fmt: skip
    ceiling = _ceiling(ledger)
    if ceiling and epsilon is not None:
        yield (f"The ceiling is epsilon {ceiling.epsilon:.4g} at delta {ceiling.delta:g}, and no training passes it, "
               f"also if it follows from earlier results. Counted against it: {ceiling.counted:.4g}; "
               f"{_floor(100 * ceiling.left)} % of what may be spent are left.")  # fmt: skip
    elif epsilon is not None:
        yield "There is no ceiling: any further training is answered, and its cost comes on top."
    if any(charge.run == CENSUS for charge in charges):
        yield ("The noised fingerprint that was handed over for planning is in this ledger, as the census. One without "
               "noise is not.")  # fmt: skip
    else:
        yield ("Fingerprints handed over for planning are not in this ledger: they are counts and sums without noise. "
               "With --private-census they are noised and charged.")  # fmt: skip


def _floor(percent: float) -> str:
    return f"{math.floor(percent * 10) / 10:.1f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
