"""A private answer that is cut off at any point: charged once, and never made again with other noise."""

import os
import signal
from multiprocessing import get_context

import numpy as np
import pytest

import autofed.federation.site
from autofed.algorithms import RunSetup, make
from autofed.errors import ValidationErrors
from autofed.federation.site import Site
from autofed.messages import Failure, Request, Response, from_bytes, to_bytes
from autofed.messages.error_feedback import ErrorFeedbackBuffer
from autofed.privacy import accounting, guarantee
from autofed.privacy.ledger import PrivacyLedger
from autofed.training.network import build, weights_of
from tests import small_federation
from tests.small_federation import private, site_of

COMPUTED = (ErrorFeedbackBuffer, "release", "before")
POINTS = {
    "before the charge": (Site, "_charge", "before"),
    "after the charge": (Site, "_charge", "after"),
    "after computing": COMPUTED,
    "before storing": (autofed.federation.site, "write_bytes", "before"),
    "after storing": (autofed.federation.site, "write_bytes", "after"),
}


@pytest.fixture(scope="module")
def ground(ground):
    plan, stores = ground
    return private(plan, "adp"), stores


def site_in(folder, ground, **options):
    plan, stores = ground
    return site_of(
        "alpha", stores["alpha"], plan, folder / "site", {"alpha": folder / "ledger.jsonl"}, run="r", **options
    )


def question(ground, **changes):
    plan = ground[0]
    state = make(plan.agreement.algorithm).start(RunSetup(plan, weights_of(build(plan.local.network, seed=1))))
    return to_bytes(Request("r", 1, "train", {**state.shared, **changes}))


def charges(folder):
    return len(PrivacyLedger(folder / "ledger.jsonl", "alpha").charges())


class Killed(BaseException):
    """Like kill -9: nothing in the site catches it."""


def cut(monkeypatch, owner, function, when, seen):
    """Have a function die; of what is written only the response counts."""
    whole = getattr(owner, function)

    def dying(*arguments):
        if function == "write_bytes" and arguments[0].parent.name != "releases":
            return whole(*arguments)
        seen.append(arguments)
        if when == "after":
            whole(*arguments)
        raise Killed

    monkeypatch.setattr(owner, function, dying)


@pytest.mark.parametrize("point", POINTS)
def test_an_answer_that_was_cut_off_is_charged_once_and_keeps_its_noise(ground, tmp_path, monkeypatch, point):
    seen = []
    with monkeypatch.context() as during, pytest.raises(Killed):
        cut(during, *POINTS[point], seen)
        site_in(tmp_path, ground).answer(question(ground))
    assert charges(tmp_path) == (0 if point == "before the charge" else 1)
    again = site_in(tmp_path, ground).answer(question(ground))
    assert isinstance(from_bytes(again), Response) and charges(tmp_path) == 1
    if POINTS[point][1] == "write_bytes":  # what would have been sent is what is sent
        assert seen[0][1] == again
    assert site_in(tmp_path, ground).answer(question(ground)) == again
    assert charges(tmp_path) == 1
    assert not list((tmp_path / "site" / "secrets").iterdir())


def test_a_charged_round_whose_noise_is_lost_is_refused(ground, tmp_path, monkeypatch):
    with monkeypatch.context() as during, pytest.raises(Killed):
        cut(during, *COMPUTED, [])
        site_in(tmp_path, ground).answer(question(ground))
    for secret in (tmp_path / "site" / "secrets").iterdir():
        secret.unlink()
    found = from_bytes(site_in(tmp_path, ground).answer(question(ground)))
    assert isinstance(found, Failure) and found.code == "spent"
    assert charges(tmp_path) == 1


def test_a_secret_serves_one_request_alone(ground, tmp_path, monkeypatch):
    """Who has a site cut off after its charge may not have the same noise tried on other content."""
    with monkeypatch.context() as during, pytest.raises(Killed):
        cut(during, *COMPUTED, [])
        site_in(tmp_path, ground).answer(question(ground))
    others = {n: a + 1 for n, a in from_bytes(question(ground)).shared["weights"].items()}
    found = from_bytes(site_in(tmp_path, ground).answer(question(ground, weights=others)))
    assert isinstance(found, Failure) and found.code == "spent"
    assert isinstance(from_bytes(site_in(tmp_path, ground).answer(question(ground))), Response)
    assert charges(tmp_path) == 1


def test_a_plan_that_promises_too_much_opens_no_door(ground, tmp_path):
    liar = ground[0].change({"privacy.epsilon": 0.1}), ground[1]
    with pytest.raises(ValidationErrors, match=r"the plan promises 0\.1"):
        site_in(tmp_path, liar)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_an_answered_round_is_not_answered_anew_when_its_release_is_gone(ground, tmp_path):
    site_in(tmp_path, ground).answer(question(ground))
    for release in (tmp_path / "site" / "releases").iterdir():
        release.unlink()
    found = from_bytes(site_in(tmp_path, ground).answer(question(ground)))
    assert isinstance(found, Failure) and found.code == "spent"


def test_the_same_round_with_other_weights_is_refused(ground, tmp_path):
    first = site_in(tmp_path, ground).answer(question(ground))
    others = {n: a + 1 for n, a in from_bytes(question(ground)).shared["weights"].items()}
    found = from_bytes(site_in(tmp_path, ground).answer(question(ground, weights=others)))
    assert isinstance(found, Failure) and found.code == "bad-request"
    assert site_in(tmp_path, ground).answer(question(ground)) == first
    assert charges(tmp_path) == 1


def test_a_history_that_is_too_short_is_refused(ground, tmp_path):
    """Its noise would be that of an earlier round."""
    site = site_in(tmp_path, ground)
    later = from_bytes(question(ground))
    found = from_bytes(site.answer(to_bytes(Request("r", 2, "train", later.shared, since=0))))
    assert isinstance(found, Failure) and found.code == "bad-request"
    assert charges(tmp_path) == 0


def test_scores_are_not_told_when_the_plan_keeps_them(ground, tmp_path):
    rounds = ground[0].agreement.training.rounds
    for asked in ("validate", "verify"):
        found = from_bytes(site_in(tmp_path, ground).answer(to_bytes(Request("r", rounds, asked))))
        assert isinstance(found, Failure) and found.code == "bad-request"
    assert charges(tmp_path) == 0


def test_noise_from_a_seed_is_known_to_everybody_and_the_ledger_says_so(ground, tmp_path):
    site_in(tmp_path, ground, noise_seed=1, simulation=True).answer(question(ground))
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl", "alpha")
    assert [charge.seeded for charge in ledger.charges()] == [True]
    assert ledger.epsilon() == float("inf")


def test_a_site_stops_at_its_ceiling_whatever_it_is_asked(ground, tmp_path):
    PrivacyLedger(tmp_path / "ledger.jsonl", "alpha", ceiling_epsilon=0.01, ceiling_delta=1e-5, order=8)
    found = from_bytes(site_in(tmp_path, ground).answer(question(ground)))
    assert isinstance(found, Failure) and found.code == "not-affordable"
    assert charges(tmp_path) == 0


def _answer_twice(folder, ground, data, pipe):
    pipe.send(site_in(folder, ground).answer(data))


@pytest.mark.slow
def test_two_processes_that_are_asked_at_once_give_one_answer(ground, tmp_path):
    context, data = get_context("fork"), question(ground)
    ends = [context.Pipe() for _ in range(2)]
    workers = [context.Process(target=_answer_twice, args=(tmp_path, ground, data, end[1])) for end in ends]
    for worker in workers:
        worker.start()
    answers = [end[0].recv() for end in ends]
    for worker in workers:
        worker.join()
    assert answers[0] == answers[1] and charges(tmp_path) == 1


@pytest.mark.slow
def test_killed_for_real_at_any_moment(ground, tmp_path):
    """kill -9 at growing delays: whatever was reached, the answer after it is charged once and is the stored one."""
    context, data = get_context("fork"), question(ground)
    for number, delay in enumerate((0.02, 0.05, 0.1, 0.2, 0.4, 0.8)):
        folder = tmp_path / str(number)
        mine, theirs = context.Pipe()
        worker = context.Process(target=_answer_twice, args=(folder, ground, data, theirs))
        worker.start()
        sent = mine.recv() if mine.poll(delay) else None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        again = site_in(folder, ground).answer(data)
        assert isinstance(from_bytes(again), Response) and charges(folder) == 1
        assert sent in (None, again)


def test_a_made_up_history_cannot_lower_the_noise_beyond_the_promise(ground, tmp_path):
    """Noise is a schedule, whatever a request says of the rounds before."""
    more = {"noise_ratio": 0.7, "training.rounds": 12, "clip_rate": 2.0}
    made = ground[0].change(small_federation.PRIVATE["adp"] | more)
    made = made.change(guarantee.consistent_fields(made, 3.0, 1e-5, noise_is_given=False))
    PrivacyLedger(tmp_path / "ledger.jsonl", "alpha", 100.0, 1e-5)  # that of the hospital would allow much more
    site, weights = site_in(tmp_path, (made, ground[1])), from_bytes(question(ground)).shared["weights"]
    codes = set()
    for round in range(1, 13):  # each round claims that nobody was clipped in the last one
        below = np.full((round - 1, 1), 0.5, np.float32)
        below[-1:] = 1.0
        asked = Request("r", round, "train", {"weights": weights, "adaptation": {"below": below}})
        codes.add(getattr(from_bytes(site.answer(to_bytes(asked))), "code", ""))
    assert codes == {""}
    spent = [event for charge in site.ledgers[0].charges() for event in charge.events]
    assert accounting.merged(spent) == accounting.merged(guarantee.planned(made, 1))
    assert accounting.epsilon(spent, 1e-5) <= 3.0
