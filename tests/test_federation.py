"""Algorithms, sites and the loop: what holds for every algorithm, and what crosses the door."""

import errno
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from autofed import algorithms, privacy
from autofed.errors import ValidationErrors
from autofed.federation import checkpoints, metrics
from autofed.federation.aggregation import Aggregator
from autofed.federation.site import CODES
from autofed.federation.transports.in_process import InProcess
from autofed.messages import Failure, Request, Response, ServerState, from_bytes, to_bytes
from autofed.plans import AlgorithmSettings
from autofed.privacy.ledger import PrivacyLedger
from autofed.training.network import build, weights_of
from tests.equality import same_arrays
from tests.small_federation import SITES, final_arrays, site_of, train


def test_sites_count_by_their_patients(ground):
    plan, _ = ground
    assert plan.agreement.site_weights == {"alpha": 2.0, "bravo": 3.0}
    releases = [
        Response("r", 1, s, {"update": {"w": np.full(2, v, np.float32)}}) for s, v in (("alpha", 1), ("bravo", 6))
    ]
    found = Aggregator.of(plan, SITES).average(releases, "update")
    assert found["w"].tolist() == [4, 4]


def test_local_models_know_nothing_of_each_other(ground, tmp_path):
    """A site's own model is the same whether or not another site takes part."""
    plan, stores = ground
    train(ground, tmp_path / "both", "local")
    train((plan, {"alpha": stores["alpha"]}), tmp_path / "alone", "local")
    both, alone = final_arrays(tmp_path / "both", plan), final_arrays(tmp_path / "alone", plan)
    assert same_arrays({n: a for n, a in both.items() if n.startswith("alpha/")}, alone)


@pytest.mark.parametrize("name", ["fedavg", "pooled"])
def test_a_site_takes_as_many_steps_as_the_plan_gives_it(ground, tmp_path, name):
    made = ground[0].change({"training.steps_at": {"bravo": 3}, "training.rounds": 1}), ground[1]
    train(made, tmp_path, name)
    charged = {s: PrivacyLedger(tmp_path / s / "ledger.jsonl", s).charges()[0].events[0].steps for s in SITES}
    assert charged == ({"alpha": 1, "bravo": 3} if name == "fedavg" else {"alpha": 4, "bravo": 4})
    losses = [line["sites"] for line in metrics.read(tmp_path / "rounds")]
    assert set(losses[0]) == ({"alpha", "bravo"} if name == "fedavg" else {"pooled"})


@pytest.mark.parametrize("name", ["fednova", "scaffold"])
def test_what_counts_its_way_from_rest_begins_at_rest_all_the_same(ground, tmp_path, name):
    kept = ground[0].change({"keep_momentum": True}), ground[1]
    ends = [train(made, tmp_path / folder, name) for folder, made in (("reset", ground), ("kept", kept))]
    assert same_arrays(dict(ends[0].shared["weights"]), dict(ends[1].shared["weights"]))


def test_momentum_that_is_kept_is_remembered_at_the_site_and_changes_the_way(ground, tmp_path):
    kept = ground[0].change({"keep_momentum": True}), ground[1]
    ends = [train(made, tmp_path / name) for name, made in (("reset", ground), ("kept", kept))]
    assert not same_arrays(dict(ends[0].shared["weights"]), dict(ends[1].shared["weights"]))
    names = final_arrays(tmp_path / "kept", ground[0])
    assert any(name.startswith("alpha/momentum/") for name in names)
    assert not any(name.startswith("alpha/") for name in final_arrays(tmp_path / "reset", ground[0]))


# --- the door


def ask(site, round=1, run="r", task="train"):
    weights = weights_of(build(site.plan.local.network, seed=1))
    return to_bytes(Request(run, round, task, {"weights": weights}))


@pytest.fixture
def site(ground, tmp_path):
    plan, stores = ground
    return site_of("alpha", stores["alpha"], plan, tmp_path / "site", {"alpha": tmp_path / "ledger.jsonl"}, run="r")


def charges(site):
    return site.ledgers[0].charges()


def test_the_same_request_is_answered_from_the_store_and_uncharged(site):
    first = site.answer(ask(site))
    assert site.answer(ask(site)) == first
    assert len(charges(site)) == 1
    site.answer(ask(site, round=2))
    assert len(charges(site)) == 2


def test_another_question_under_the_same_name_is_refused(site):
    site.answer(ask(site))
    other = Request("r", 1, "train", {"weights": weights_of(build(site.plan.local.network, seed=2))})
    assert from_bytes(site.answer(to_bytes(other))).code == "bad-request"
    site.answer(ask(site, round=2))
    assert from_bytes(site.answer(ask(site, round=1))).code == "bad-request"  # the past is not computed anew
    assert len(charges(site)) == 2


def test_a_round_is_trained_once_for_one_charge(site, tmp_path):
    class Greedy(type(site.algorithm)):
        def local(self, view, request):
            view.fit(request.shared["weights"])
            return super().local(view, request)

    site.algorithm = Greedy()
    assert from_bytes(site.answer(ask(site))).code == "failed"
    assert "have been taken" in (tmp_path / "site" / "site.log").read_text()


def test_an_algorithm_cannot_send_anything_beside_what_the_mechanism_releases(site):
    release = from_bytes(site.answer(ask(site)))
    assert set(release.arrays) == {"update", "metrics"}


def test_a_release_is_charged_before_it_is_computed(site):
    """A crash in the middle of the work must leave the charge behind."""
    site.algorithm = _Failing()
    assert isinstance(from_bytes(site.answer(ask(site))), Failure)
    assert len(charges(site)) == 1


@dataclass(frozen=True)
class _Failing(algorithms.Algorithm):
    def start(self, setup): ...

    def merge(self, state, releases, average): ...

    def local(self, site, request):
        raise ValueError("Mr Smith of ward 7, scan 12, has no left kidney")


def test_a_failure_crosses_the_door_as_a_code_and_nothing_more(site, tmp_path):
    site.algorithm = _Failing()
    answer = site.answer(ask(site))
    assert b"Smith" not in answer and b"kidney" not in answer
    message = from_bytes(answer)
    assert (message.run, message.round, message.site, message.code) == ("r", 1, "alpha", "failed")
    assert "Mr Smith" in (tmp_path / "site" / "site.log").read_text()


@pytest.mark.parametrize("data", [b"", b"rubbish" * 9, to_bytes(Failure("r", 1, "x", "failed"))])
def test_rubbish_is_a_bad_request_and_costs_nothing(site, data):
    assert from_bytes(site.answer(data)).code == "bad-request"
    assert charges(site) == []


@pytest.mark.parametrize("request_", [{"round": 99}, {"round": 0}, {"run": "another"}, {"task": "../../train"}])
def test_what_is_no_round_of_this_run_is_a_bad_request(site, request_):
    assert from_bytes(site.answer(ask(site, **request_))).code == "bad-request"
    assert charges(site) == []


def test_what_the_ledger_does_not_allow_is_not_computed(ground, tmp_path):
    plan, stores = ground
    PrivacyLedger(tmp_path / "ledger.jsonl", "alpha", ceiling_epsilon=1.0, ceiling_delta=1e-5)
    ledgers = {"alpha": tmp_path / "ledger.jsonl"}
    site = site_of("alpha", stores["alpha"], plan, tmp_path / "site", ledgers, run="r")
    site.algorithm = _Failing()  # would answer "failed" if it were reached
    assert from_bytes(site.answer(ask(site))).code == "not-affordable"


def test_a_full_disk_crosses_the_door_as_a_code_even_if_the_log_finds_no_room(site, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("autofed.federation.site.write_bytes", full)
    monkeypatch.setattr(site, "log", full)
    assert from_bytes(site.answer(ask(site))).code == "disk-full"


def test_what_the_mechanism_does_not_release_stays(ground, tmp_path):
    plan, stores = ground
    site = site_of("alpha", stores["alpha"], plan, tmp_path / "site", {"alpha": tmp_path / "ledger.jsonl"}, run="r")

    class NoMetrics(type(site.mechanism)):
        def release(self, arrays):
            return {"update": arrays["update"]}

    site.mechanism = NoMetrics(batch_size=2)
    release = from_bytes(site.answer(ask(site)))
    assert set(release.arrays) == {"update"}


def test_every_code_is_declared(site):
    for data in (b"", ask(site)):
        message = from_bytes(site.answer(data))
        assert not isinstance(message, Failure) or message.code in CODES


# --- the loop


def fake(answers):
    """A transport that answers what a test wants."""

    class Fake:
        def __init__(self, sites):
            self.real = InProcess(sites)

        def __call__(self, requests):
            found = {n: answers(n, from_bytes(a)) for n, a in self.real(requests).items()}
            return {n: a if isinstance(a, bytes) else to_bytes(a) for n, a in found.items() if a is not None}

    return Fake


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda n, r: None, "the site alpha did not answer"),
        (lambda n, r: b"rubbish", "alpha answered what is no message"),
        (lambda n, r: Failure("r", 1, n, "out-of-memory"), "alpha failed with the code 'out-of-memory'"),
        (lambda n, r: replace(r, round=7), "another question"),
        (lambda n, r: replace(r, site="mallory"), "another question"),
        (lambda n, r: replace(r, arrays={"update": {k: v * np.nan for k, v in r.arrays["update"].items()}}), "NaN"),
        (lambda n, r: replace(r, arrays={"update": {k: v[:1] for k, v in r.arrays["update"].items()}}), "other names"),
    ],
)
def test_an_answer_that_cannot_be_merged_ends_the_round_by_name(ground, tmp_path, answer, says):
    broken = fake(lambda n, r: answer(n, r) if n == "alpha" else r)
    with pytest.raises(ValidationErrors, match=says):
        train(ground, tmp_path, transport=broken)
    assert checkpoints.saved_rounds(tmp_path / "rounds") == []


def test_only_what_is_needed_is_kept(ground, tmp_path):
    plan = ground[0].change({"training.snapshots": [1, 3]})
    train((plan, ground[1]), tmp_path)
    assert checkpoints.saved_rounds(tmp_path / "rounds") == [1, 3]
    assert len(list((tmp_path / "sites" / "alpha" / "releases").iterdir())) == 1


def test_metrics_are_lines_of_json(ground, tmp_path):
    train(ground, tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "rounds" / "metrics.jsonl").read_text().splitlines()]
    assert [x["round"] for x in lines] == [1, 2, 3]
    assert all(set(x["sites"]) == set(SITES) and x["sites"]["alpha"]["loss"] > 0 for x in lines)


def test_state_on_disk_is_the_state(ground, tmp_path):
    state = ServerState(2, {"weights": {"w": np.arange(3, dtype=np.float32)}}, {"kept": {"c": np.ones(2)}})
    checkpoints.save(tmp_path, state, ground[0])
    found = checkpoints.load(tmp_path, 2)
    assert same_arrays(dict(found.shared["weights"]), dict(state.shared["weights"]))
    assert same_arrays(dict(found.server_only["kept"]), dict(state.server_only["kept"]))


# --- finding algorithms


def test_a_wrong_name_is_answered_with_the_names_there_are():
    with pytest.raises(ValidationErrors, match="'fedavgg' does not exist; the algorithms are: .*fedavg.*local.*pooled"):
        algorithms.find("fedavgg")


def test_an_algorithm_from_outside_the_package_only_if_it_is_trusted():
    name = "tests.test_federation:_Failing"
    assert algorithms.find(name, trusted=(name,)).__name__ == "_Failing"
    with pytest.raises(ValidationErrors, match="this site did not allow"):
        algorithms.find(name)
    with pytest.raises(ValidationErrors, match="this site did not allow"):
        algorithms.make(AlgorithmSettings(name="os:system"))


@pytest.mark.parametrize("name", ["tests.test_federation:Missing", "os:path", ":x", "nowhere.at.all:X"])
def test_what_is_no_algorithm_is_refused(name):
    with pytest.raises(ValidationErrors, match="cannot be loaded|is not a dataclass"):
        algorithms.find(name, trusted=(name,))


def test_settings_that_an_algorithm_does_not_have_are_named():
    with pytest.raises(ValidationErrors, match="fedavg has no setting 'mu'"):
        algorithms.make(AlgorithmSettings(name="fedavg", settings={"mu": 0.1}))


# --- mechanisms that learn from what was released


def test_what_sites_release_for_adapting_reaches_every_mechanism_of_the_next_round(ground, tmp_path, monkeypatch):
    """A mechanism that counts rounds: site and coordinator rebuild it from the shared history."""
    seen = []

    @dataclass(frozen=True)
    class Counting(type(privacy.find_mechanism(ground[0]))):
        adapts: ClassVar = {"ones": (1,)}
        age: int = 0

        def release(self, arrays):
            seen.append(self.age)
            return {**arrays, privacy.ADAPTATION: {"ones": np.ones(1)}}

        def adapt(self, released):
            assert released["ones"].tolist() == [1]
            return replace(self, age=self.age + 1)

    monkeypatch.setattr(privacy, "find_mechanism", lambda plan, patients=0: Counting(batch_size=2))
    end = train(ground, tmp_path)
    assert seen == [0, 0, 1, 1, 2, 2]
    assert end.shared[privacy.ADAPTATION]["ones"].shape == (3, 1)
