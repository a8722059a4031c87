"""The ledger of a site: paid once, never past its ceiling, whoever asks at once and whoever is killed."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofed.errors import ValidationErrors
from autofed.federation.node import ledger_path
from autofed.privacy import accounting, journal, ledger
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.ledger import LedgerOpening, PrivacyLedger
from tests.charges_made import STEP, charge

DELTA = 1e-5
UNPROTECTED = PrivacyEvent(mechanism="none", steps=20)


@pytest.fixture
def path(tmp_path):
    return tmp_path / ledger.NAME


# --- opening


def test_a_plan_opens_a_ledger_that_it_fits_and_nothing_more(path):
    opened = PrivacyLedger.for_plan(path, "alpha", [STEP] * 10, DELTA)
    for round in range(10):
        opened.charge(charge(round))
    assert 0 < opened.opening.ceiling_epsilon - opened.counted() < 1e-5
    with pytest.raises(ValidationErrors, match=r"does not allow round 10 of run r: 8\.774 is counted"):
        opened.charge(charge(10, events=[STEP.model_copy(update={"steps": 1})]))


def test_an_open_ledger_stands_as_it_is(path):
    first = PrivacyLedger.for_plan(path, "alpha", [STEP], DELTA).opening
    assert PrivacyLedger.for_plan(path, "alpha", [STEP] * 100, DELTA, simulation=True).opening == first
    assert PrivacyLedger(path, "alpha", 1e9, DELTA, order=2).opening == first


def test_without_protection_or_cost_there_is_no_ceiling(tmp_path):
    for name, events in (("none", [STEP, UNPROTECTED]), ("nothing", [])):
        assert PrivacyLedger.for_plan(tmp_path / name, "alpha", events, DELTA).opening.ceiling_epsilon is None


def test_a_ceiling_opened_by_hand_has_the_roomiest_order(path):
    opening = PrivacyLedger(path, "alpha", 3.0, DELTA).opening
    assert opening.order == accounting.roomy_order(3.0, DELTA)


def test_half_a_ceiling_is_refused_and_leaves_no_file(path):
    with pytest.raises(ValidationErrors, match="its epsilon, its delta and its order"):
        PrivacyLedger(path, "alpha", 3.0)
    assert not path.exists()


def test_the_place_is_the_one_where_trainings_look():
    assert ledger_path(Path("work"), "alpha") == Path("work/alpha") / ledger.NAME


def test_existing_takes_the_site_from_the_ledger(path):
    with pytest.raises(ValidationErrors, match=r"there is no ledger; .* --open"):
        PrivacyLedger.existing(path)
    assert not path.exists()
    PrivacyLedger(path, "alpha")
    assert PrivacyLedger.existing(path).opening.site == "alpha"


# --- charging


def test_what_is_paid_for_is_not_paid_for_again(path):
    opened = PrivacyLedger(path, "alpha")
    stale = PrivacyLedger(path, "alpha")
    assert not opened.is_charged("r", 1, "train")
    opened.charge(charge())
    written = path.read_bytes()
    stale.charge(charge(time="1999-12-31T00:00:00+00:00"))
    again = PrivacyLedger(path, "alpha")
    again.charge(charge(time="2000-01-01T00:00:00+00:00"))
    assert path.read_bytes() == written and again.is_charged("r", 1, "train") and not again.is_charged("r", 2, "train")


@pytest.mark.parametrize(
    "other",
    [
        charge(events=[STEP, STEP]),
        charge(events=[]),
        charge(seeded=True),
        charge().model_copy(update={"agreement": "b"}),
    ],
)
def test_the_same_question_with_other_content_is_refused(path, other):
    opened = PrivacyLedger(path, "alpha")
    opened.charge(charge())
    with pytest.raises(ValidationErrors, match="train of round 1 of run r was charged with other content"):
        opened.charge(other)
    assert len(opened.charges()) == 1


def test_one_accountant_over_all_rounds(path):
    """Mistake 7 of public code: a new accountant each round would say the epsilon of one."""
    opened = PrivacyLedger(path, "alpha")
    for round in range(3):
        opened.charge(charge(round))
    whole = accounting.epsilon([STEP.model_copy(update={"steps": 60})], DELTA)
    assert opened.epsilon() == PrivacyLedger(path, "alpha").epsilon() == whole
    assert opened.epsilon() > 1.2 * accounting.epsilon([STEP], DELTA)
    assert opened.epsilon(delta=1e-7) > opened.epsilon()


def test_where_noise_follows_from_releases_the_figure_is_that_of_a_filter(tmp_path):
    """Loss distributions compose what was fixed beforehand; they would say less here."""
    for path, order in ((tmp_path / "ceiling", 5), (tmp_path / "free", None)):
        opened = PrivacyLedger(path, "alpha", *((8.0, DELTA) if order else ()), order=order)
        opened.charge(charge(1))
        fixed = opened.epsilon()
        opened.charge(charge(2, events=[STEP.model_copy(update={"noise_multiplier": 2.5})], follows=True))
        events = [event for each in opened.charges() for event in each.events]
        filtered = accounting.renyi_epsilon(events, DELTA, order or ledger.USUAL_ORDER)
        assert opened.epsilon() == filtered > accounting.epsilon(events, DELTA) > fixed
        assert opened.epsilon(opened.charges()[:1]) == fixed
        assert order is None or opened.counted() == filtered


def test_seeded_noise_protects_nobody(tmp_path):
    free = PrivacyLedger(tmp_path / "free", "alpha")
    free.charge(charge(seeded=True))
    assert free.epsilon() == math.inf
    real = PrivacyLedger.for_plan(tmp_path / "real", "alpha", [STEP] * 3, DELTA)
    assert real.can_afford([STEP]) and not real.can_afford([STEP], seeded=True)
    with pytest.raises(ValidationErrors, match="no noise that nobody knows"):
        real.charge(charge(seeded=True))
    played = PrivacyLedger.for_plan(tmp_path / "played", "alpha", [STEP] * 3, DELTA, simulation=True)
    played.charge(charge(seeded=True))
    assert played.epsilon() == math.inf and 0 < played.counted() < math.inf


def test_a_free_event_is_charged_all_the_same(path):
    opened = PrivacyLedger.for_plan(path, "alpha", [STEP], DELTA)
    opened.charge(charge())
    opened.charge(charge(2, events=[]))
    assert opened.is_charged("r", 2, "train")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0.5, 9.0), st.sampled_from([0.05, 0.2, 1.0])), max_size=12))
def test_the_filter_never_lets_the_sum_pass(tmp_path_factory, releases):
    path = tmp_path_factory.mktemp("ledger") / ledger.NAME
    opened = PrivacyLedger(path, "alpha", 3.0, DELTA, order=7)
    taken = []
    for round, (steps, noise, rate) in enumerate(releases):
        event = PrivacyEvent(mechanism="dp-sgd", steps=steps, noise_multiplier=noise, sampling_rate=rate)
        fits = accounting.renyi_epsilon([*taken, event], DELTA, 7) <= 3.0
        assert opened.can_afford([event]) == fits
        if fits:
            opened.charge(charge(round, events=[event]))
            taken.append(event)
        else:
            with pytest.raises(ValidationErrors):
                opened.charge(charge(round, events=[event]))
    assert opened.counted() <= 3.0
    assert accounting.epsilon(taken, DELTA) <= 3.0
    assert [c.events[0] for c in PrivacyLedger(path, "alpha").charges()] == taken


# --- the file


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"run": "r"}', b"\x00\x00", b'{"site": "alpha"}'])
def test_a_broken_line_in_the_middle_is_refused_however_often_it_is_read(path, broken):
    PrivacyLedger(path, "alpha").charge(charge())
    opened = PrivacyLedger(path, "alpha")
    with open(path, "ab") as handle:
        handle.write(broken + b"\n" + charge(2).model_dump_json().encode() + b"\n")
    for _ in range(2):
        with pytest.raises(ValidationErrors, match=r"line 3.*until the line is restored"):
            opened.charge(charge(3))
    with pytest.raises(ValidationErrors, match="line 3"):
        PrivacyLedger(path, "alpha")


def test_a_line_cut_short_is_written_over_by_the_next(path):
    opened = PrivacyLedger(path, "alpha")
    whole = path.read_bytes()
    with open(path, "ab") as handle:
        handle.write(charge(events=[STEP] * 9).model_dump_json().encode())  # all but its end, and longer than the next
    assert not opened.is_charged("r", 1, "train")
    opened.charge(charge(2))
    assert path.read_bytes().startswith(whole) and path.read_bytes().endswith(b"\n")
    assert [c.round for c in PrivacyLedger(path, "alpha").charges()] == [2]


def test_an_opening_cut_short_was_none(path):
    path.write_bytes(b'{"site": "alp')
    assert PrivacyLedger(path, "alpha", 2.0, DELTA).opening == PrivacyLedger(path, "alpha").opening
    assert PrivacyLedger(path, "alpha").opening.ceiling_epsilon == 2.0


def test_a_ledger_that_became_shorter_is_refused(path):
    opened = PrivacyLedger(path, "alpha")
    opened.charge(charge())
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(ValidationErrors, match="became shorter"):
        opened.charge(charge(2))


def test_a_failed_write_charges_nothing_and_harms_nothing(path, monkeypatch):
    opened = PrivacyLedger(path, "alpha")

    def full(_):
        os.truncate(path, path.stat().st_size - 10)  # a disk that took part of the line
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", full)
        with pytest.raises(OSError):
            opened.charge(charge())
    opened.charge(charge(2))
    assert [c.round for c in PrivacyLedger(path, "alpha").charges()] == [2]


def test_each_charge_is_on_the_disk_when_it_returns_and_so_is_the_name_of_the_file(path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(journal.os, "fsync", fsync)
    opened = PrivacyLedger(path, "alpha")
    assert synced == [str(path), str(path.parent)]
    opened.charge(charge())
    opened.charge(charge())  # whoever wrote it may have been killed before it was on the disk
    assert synced[2:] == [str(path), str(path)]


# --- several at once, and killed


def _try_to_charge(path, start, round, passed):
    opened = PrivacyLedger(path, "alpha")
    append = opened._journal.append

    def slowly(record):  # between the check and the line there is time for the others
        time.sleep(0.1)
        append(record)

    opened._journal.append = slowly
    start.wait()
    try:
        opened.charge(charge(round))
        passed.put(round)
    except ValidationErrors:
        passed.put(None)


def test_of_processes_that_cannot_all_be_afforded_as_many_pass_as_can(path):
    PrivacyLedger.for_plan(path, "alpha", [STEP] * 2, DELTA)
    context = multiprocessing.get_context("fork")
    start, passed = context.Barrier(4), context.Queue()
    ready = [context.Process(target=_try_to_charge, args=(path, start, i, passed)) for i in range(4)]
    for process in ready:
        process.start()
    found = sorted(round for round in (passed.get(timeout=60) for _ in ready) if round is not None)
    for process in ready:
        process.join()
    assert len(found) == 2
    assert sorted(c.round for c in PrivacyLedger(path, "alpha").charges()) == found


CHARGER = """
import sys
from pathlib import Path
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.ledger import LedgerEntry, PrivacyLedger
path, first = Path(sys.argv[1]), int(sys.argv[2])
event = PrivacyEvent(mechanism="dp-sgd", steps=1, noise_multiplier=2.0, sampling_rate=0.1)
ledger = PrivacyLedger(path, "alpha", 1e6, 1e-5, order=4)
for round in range(first, first + 100_000):
    ledger.charge(LedgerEntry(run="r", round=round, question="train", agreement="a", events=(event,)))
    print(round, flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_any_moment_nothing_is_under_counted(path, kills):
    generator, said = np.random.default_rng(), []
    for kill in range(kills):
        process = subprocess.Popen([sys.executable, "-c", CHARGER, path, str(kill * 100_000)], stdout=subprocess.PIPE)
        said.append(process.stdout.readline())
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        said += [line for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]
        opened = PrivacyLedger(path, "alpha")
        kept = {c.round for c in opened.charges()}
        reported = {int(line) for line in said}
        assert reported <= kept and len(kept) <= len(reported) + kill + 1
        assert opened.counted() >= accounting.renyi_epsilon(
            [PrivacyEvent(mechanism="dp-sgd", steps=len(reported), noise_multiplier=2.0, sampling_rate=0.1)], DELTA, 4
        )


def test_many_charges_are_read_as_one_sum(path):
    opened = PrivacyLedger(path, "alpha", 1e6, DELTA, order=4)
    lines = b"".join(charge(i).model_dump_json().encode() + b"\n" for i in range(3000))
    with open(path, "ab") as handle:
        handle.write(lines)
    assert opened.counted() == accounting.renyi_epsilon([STEP.model_copy(update={"steps": 60_000})], DELTA, 4)


def test_an_opening_says_when_and_with_what():
    opening = LedgerOpening(site="alpha")
    assert opening.version and opening.time.endswith("+00:00")
