"""Sites that answer late, not at all or with rubbish: named, left out of the round, and asked again."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from autofed.data.labels import Labels
from autofed.errors import ValidationErrors
from autofed.federation import checkpoints, metrics
from autofed.federation.screening import Responses, screen_responses
from autofed.federation.transports.in_process import InProcess
from autofed.messages import Failure, Request, Response, from_bytes, to_bytes
from autofed.privacy import ADAPTATION
from autofed.privacy.ledger import PrivacyLedger
from tests.equality import same_arrays
from tests.small_federation import final_arrays, private, train


@pytest.fixture(scope="module")
def ground(ground):
    """Two sites, one of which is enough for a round."""
    plan, stores = ground
    return plan.change({"faults.least_sites": 1}), stores


def faulty(fault, rounds=(2,), site="alpha", times=99):
    """A transport over which the answers of a site in some rounds are what `fault` makes of its release, or nothing.

    Only its first so many answers are.
    """
    left = [times]

    class Faulty(InProcess):
        def __call__(self, requests):
            answers = super().__call__(requests)
            if site in answers and from_bytes(requests[site]).round in rounds and left[0]:
                left[0] -= 1
                made = fault(from_bytes(answers.pop(site)))
                answers |= {} if made is None else {site: made if isinstance(made, bytes) else to_bytes(made)}
            return answers

    return Faulty


def altered(change):
    """The release with every array of its update changed."""
    return lambda r: replace(r, arrays={**r.arrays, "update": {n: change(a) for n, a in r.arrays["update"].items()}})


def one_weight(value):
    """The release with a single weight of its update put to a value."""

    def change(release):
        update = {name: array.copy() for name, array in release.arrays["update"].items()}
        next(iter(update.values())).flat[0] = value
        return replace(release, arrays={**release.arrays, "update": update})

    return change


FAULTS = {
    "did not answer": lambda r: None,
    "answered what is no message": lambda r: b"rubbish",
    "answered what is no message: it is not whole": lambda r: to_bytes(r)[:-9],
    "failed with the code 'out-of-memory'": lambda r: Failure(r.run, r.round, r.site, "out-of-memory"),
    "answered another question than that of round 2": lambda r: replace(r, round=1),
    "answered another question": lambda r: replace(r, site="bravo"),
    "answered without update": lambda r: replace(r, arrays={}),
    "NaN or infinite values in update": altered(lambda a: a * np.nan),
    "answered with NaN or infinite": one_weight(np.inf),
    "other names, shapes or dtypes in update": altered(lambda a: a[:1]),
    "other names, shapes or dtypes": altered(lambda a: a.astype(np.float64)),
    "leads to a value of": one_weight(1000.0),
    " is the most": altered(lambda a: a + 1e4),
}


@pytest.mark.parametrize("says", FAULTS)
def test_a_faulty_answer_is_named_left_out_of_its_round_and_the_site_asked_again(ground, tmp_path, caplog, says):
    with caplog.at_level(logging.WARNING):
        train(ground, tmp_path, transport=faulty(FAULTS[says]))
    lines = metrics.read(tmp_path / "rounds")
    assert [set(line["sites"]) for line in lines] == [{"alpha", "bravo"}, {"bravo"}, {"alpha", "bravo"}]
    assert says in lines[1]["left_out"]["alpha"] and "left_out" not in lines[0]
    assert f"round 2 (train) without the site alpha: it {lines[1]['left_out']['alpha']}" in caplog.text


def test_an_update_far_longer_than_those_of_the_other_sites_does_not_count():
    sent = {"weights": {"w": np.zeros(9, np.float32)}}
    request = Request("r", 1, "train", sent)
    lengths = {"alpha": 0.01, "bravo": 0.02, "charlie": 5.0, "delta": 0.0}
    answers = {
        s: to_bytes(Response("r", 1, s, {"update": {"w": np.full(9, v, np.float32)}})) for s, v in lengths.items()
    }
    labels = Labels.declared({"background": 0, "tumour": 1})
    found = screen_responses(Responses.none_from(answers), answers, request, {"update": "weights"}, labels)
    assert [response.site for response in found.accepted] == ["alpha", "bravo", "delta"]
    assert found.left_out == {"charlie": "answered with a update 333 times as long as is usual among the sites"}


@pytest.mark.parametrize("arrays", [
    {"metrics": {"dice": np.zeros(1)}}, {"dice": {"lesion": np.ones(1)}}, {"dice": {"tumour": np.full(1, 1.5)}},
    {"dice": {"tumour": np.ones(3)}}, {"sums": {"tumour": np.ones(2)}}, {"sums": {"tumour": -np.ones((2, 2))}},
])  # fmt: skip
def test_scores_that_are_none_do_not_count(arrays):
    request, labels = Request("r", 1, "validate"), Labels.declared({"background": 0, "tumour": 1})
    replies = {"alpha": to_bytes(Response("r", 1, "alpha", arrays))}
    found = screen_responses(Responses.none_from(replies), replies, request, {}, labels)
    assert found.accepted == () and "answered with" in found.left_out["alpha"]


def test_a_site_far_from_the_others_does_not_slip_in_when_it_is_asked_again(ground, tmp_path):
    """The check is over all who answered, not over those of one attempt."""
    labels, like = Labels.declared({"background": 0, "tumour": 1}), {"update": "weights"}
    request = Request("r", 1, "train", {"weights": {"w": np.zeros(9, np.float32)}})
    bytes_of = lambda s, v: to_bytes(Response("r", 1, s, {"update": {"w": np.full(9, v, np.float32)}}))  # noqa: E731
    sites = ("a", "b", "c", "far")
    replies = {"b": bytes_of("b", 0.01), "c": bytes_of("c", 0.01)}
    first = screen_responses(Responses.none_from(sites), replies, request, like, labels)
    assert [response.site for response in first.accepted] == ["b", "c"] and set(first.left_out) == {"a", "far"}
    replies = {"a": bytes_of("a", 0.01), "far": bytes_of("far", 5.0)}
    found = screen_responses(first, replies, request, like, labels)
    assert [response.site for response in found.accepted] == ["a", "b", "c"] and set(found.left_out) == {"far"}


def test_the_round_is_that_of_the_others_alone(ground, tmp_path):
    """What was left out leaves no trace: the weights are those of a round that the site was never asked in."""
    found = train(ground, tmp_path / "rubbish", transport=faulty(altered(lambda a: a * np.nan)))
    silent = train(ground, tmp_path / "silent", transport=faulty(lambda r: None))
    assert same_arrays(dict(found.shared["weights"]), dict(silent.shared["weights"]))
    whole = train(ground, tmp_path / "whole")
    assert not same_arrays(dict(found.shared["weights"]), dict(whole.shared["weights"]))


@pytest.mark.parametrize("says", FAULTS)
def test_with_too_few_sites_the_round_is_asked_again_and_nothing_is_lost(ground, tmp_path, says):
    """The second try of a site that had computed already gives its stored release, uncharged."""
    made = ground[0].change({"faults.least_sites": 2}), ground[1]
    train(made, tmp_path / "faulty", transport=faulty(FAULTS[says], times=2))
    train(made, tmp_path / "whole")
    assert same_arrays(final_arrays(tmp_path / "faulty", made[0]), final_arrays(tmp_path / "whole", made[0]))
    assert len(PrivacyLedger(tmp_path / "faulty" / "alpha" / "ledger.jsonl", "alpha").charges()) == 3


def test_after_so_many_failures_the_run_ends_saved_and_goes_on_later(ground, tmp_path):
    made = ground[0].change({"faults.least_sites": 2, "faults.attempts": 2}), ground[1]
    says = (
        "round 2: 2 problems\n.*1 of 2 sites answered in 2 attempts; the plan wants 2\n.*the site alpha did not answer"
    )
    with pytest.raises(ValidationErrors, match=says):
        train(made, tmp_path / "broken", "scaffold", transport=faulty(lambda r: None))
    assert checkpoints.saved_rounds(tmp_path / "broken" / "rounds") == [1]
    train(made, tmp_path / "broken", "scaffold", state=checkpoints.load(tmp_path / "broken" / "rounds", 1))
    train(made, tmp_path / "whole", "scaffold")
    assert same_arrays(final_arrays(tmp_path / "broken", made[0]), final_arrays(tmp_path / "whole", made[0]))


def test_a_site_goes_on_from_the_round_in_which_its_answer_last_counted(ground, tmp_path):
    """Its control variate of a lost round is forgotten: the common one stays the average of those that counted."""
    seen = []

    class Watching(faulty(lambda r: None)):
        def __call__(self, requests):
            seen.append({site: from_bytes(request).since for site, request in requests.items()})
            return super().__call__(requests)

    found = train(ground, tmp_path, "scaffold", transport=Watching)
    assert seen == [{"alpha": 0, "bravo": 0}, {"alpha": 1, "bravo": 1}, {"alpha": 1, "bravo": 2}]
    own = final_arrays(tmp_path, ground[0])
    for name, common in found.shared["control"].items():
        expected = (2 * own[f"alpha/control/{name}"] + 3 * own[f"bravo/control/{name}"]) / 5
        assert np.allclose(common, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["local", "fedbn"])
def test_a_site_that_was_silent_at_first_still_gets_a_model_of_its_own(ground, tmp_path, name):
    train(ground, tmp_path, name, transport=faulty(lambda r: None, rounds=(1,)))
    assert any(key.startswith("alpha/weights/") for key in final_arrays(tmp_path, ground[0]))


def test_an_answer_of_nobody_who_was_asked_is_not_looked_at(ground, tmp_path):
    class Mallory(InProcess):
        def __call__(self, requests):
            return super().__call__(requests) | {"mallory": to_bytes(Response("r", 1, "mallory"))}

    found = train(ground, tmp_path / "mallory", transport=Mallory)
    assert same_arrays(dict(found.shared["weights"]), dict(train(ground, tmp_path / "whole").shared["weights"]))


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_a_late_answer_comes_in_the_next_round_and_does_not_count(ground, tmp_path, name):
    """Round 2 hears nothing of alpha; its answer to round 2 is delivered in round 3, and then its own in a retry."""
    held = {}

    class Late(InProcess):
        def __call__(self, requests):
            answers = super().__call__(requests)
            if "alpha" in answers and from_bytes(requests["alpha"]).round == 2:
                held["alpha"] = answers.pop("alpha")
            elif held and "alpha" in answers:
                answers["alpha"] = held.pop("alpha")
            return answers

    train(ground, tmp_path, name, transport=Late)
    said = [line.get("left_out", {}).get("alpha", "") for line in metrics.read(tmp_path / "rounds")]
    assert said == ["", "did not answer", "answered another question than that of round 3"]


ADAPTATIONS = {
    "none": None,
    "other": {"above": np.zeros(1, np.float32)},
    "longer": {"below": np.zeros(3, np.float32)},
}


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_a_site_that_says_nothing_to_adapt_to_does_not_end_the_training_of_the_others(ground, tmp_path, name):
    """The next round's mechanism depends on it, at every site."""

    def fault(release):
        arrays = {group: found for group, found in release.arrays.items() if group != ADAPTATION}
        told = {} if ADAPTATIONS[name] is None else {ADAPTATION: ADAPTATIONS[name]}
        return replace(release, arrays={**arrays, **told})

    made = private(ground[0], "adp"), ground[1]
    assert train(made, tmp_path, transport=faulty(fault)).round == 3
    lines = metrics.read(tmp_path / "rounds")
    assert [set(line["sites"]) for line in lines] == [{"alpha", "bravo"}, {"bravo"}, {"alpha", "bravo"}]
    assert "to adapt to, where {'below': (1,)} was expected" in lines[1]["left_out"]["alpha"]
