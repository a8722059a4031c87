"""What crosses a site's door in a private training: every byte is a mechanism's release, or public by the plan."""

import json
from pathlib import Path

import numpy as np
import pytest

from autofed import algorithms, privacy
from autofed.federation.site import CODES
from autofed.federation.transports.in_process import InProcess
from autofed.messages import Failure, Request, Response, from_bytes, to_bytes
from autofed.privacy.dpsgd import DPSGD
from autofed.privacy.ledger import PrivacyLedger
from autofed.privacy.shared_scores import OF_PATIENTS, SharedScores
from autofed.training.network import build, weights_of
from tests.equality import same_arrays
from tests.small_federation import PRIVATE, final_arrays, private, sharing, site_of, train, with_algorithm


class Listening(InProcess):
    """Keeps every byte that a site sent."""

    sent: list[bytes]

    def __call__(self, requests):
        answers = super().__call__(requests)
        type(self).sent += answers.values()
        return answers


@pytest.fixture
def listening():
    return type("Ear", (Listening,), {"sent": []})


def protected(mechanism, name):
    groups = set(algorithms.find(name).released)
    return groups | ({privacy.ADAPTATION} if mechanism == "adp" else set())


def combinations():
    pairs = [(mechanism, name) for mechanism in PRIVATE for name in [*sharing(), "local"] if name != "pooled"]
    return [pair for pair in pairs if pair != ("feddp", "scaffold")]


@pytest.mark.parametrize("mechanism, name", combinations())
def test_every_byte_that_leaves_is_protected_or_public(ground, tmp_path, listening, mechanism, name):
    plan = private(with_algorithm(ground[0], name), mechanism)
    train((plan, ground[1]), tmp_path, name, transport=listening)
    shapes = {n: a.shape for n, a in weights_of(build(plan.local.network)).items()}
    assert len(listening.sent) == 6  # two sites, three rounds
    for data in listening.sent:
        message = from_bytes(data)
        assert isinstance(message, Response)
        assert (message.run, message.precisions) == ("r", {})
        assert message.site in plan.agreement.patients and message.round in (1, 2, 3)
        assert set(message.arrays) == protected(mechanism, name)
        for group, arrays in message.arrays.items():
            expected = {"below": (1,)} if group == privacy.ADAPTATION else shapes
            assert {
                n: a.shape for n, a in arrays.items()
            } == expected  # as many numbers as the plan says, whoever is ill
        words = Response(message.run, message.round, message.site, message.arrays)
        assert data == to_bytes(words)  # not a byte beside them


@pytest.mark.parametrize("mechanism", PRIVATE)
def test_what_leaves_has_noise_of_the_size_that_is_charged(ground, tmp_path, mechanism):
    """Twice the same step with everybody in it, but for the secret: what differs is noise, and its size is known."""
    everybody = {} if mechanism == "feddp" else {"sampling_rate": 1.0}
    once = {"training.rounds": 1, "training.snapshots": [1], "gradient_clip": 1e9, **everybody}
    plan = private(ground[0], mechanism, **once)
    stated, training, found = plan.agreement.privacy, plan.local.training, []
    for seed in (1, 2):
        ear = type("Ear", (Listening,), {"sent": []})
        train((plan, ground[1]), tmp_path / str(seed), transport=ear, noise_seed=seed, simulation=True)
        found.append({m.site: m.arrays["update"] for m in map(from_bytes, ear.sent)})
    (event, *_) = privacy.find_mechanism(plan, 2).cost(1)
    for site, patients in plan.agreement.patients.items():
        apart = np.concatenate([(found[0][site][n] - found[1][site][n]).ravel() for n in found[0][site]])
        if mechanism == "feddp":  # what is charged is halved, since an update may move by two clips
            expected = 2 * event.noise_multiplier * stated.clip
        else:  # a step of Nesterov's from rest goes (1 + momentum) times the noised mean
            way = training.learning_rate * (1 + training.momentum)
            expected = way * event.noise_multiplier * stated.clip / patients / np.sqrt(1 - (stated.quantile_share or 0))
        assert apart.std() == pytest.approx(np.sqrt(2) * expected, rel=0.05)


def test_no_two_trainings_share_their_noise(ground, tmp_path):
    plan = private(ground[0], "dp-sgd")
    for folder in ("one", "two"):
        train((plan, ground[1]), tmp_path / folder)
    assert not same_arrays(final_arrays(tmp_path / "one", plan), final_arrays(tmp_path / "two", plan))


def test_secrets_do_not_outlive_the_answers_that_they_made(ground, tmp_path):
    train((private(ground[0], "dp-sgd"), ground[1]), tmp_path)
    assert len(list(tmp_path.glob("sites/*/secrets"))) == 2
    assert not list(tmp_path.glob("sites/*/secrets/*"))


def test_losses_stay_at_the_site(ground, tmp_path, listening):
    train((private(ground[0], "dp-sgd"), ground[1]), tmp_path, transport=listening)
    own = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("sites/*/losses.json"))]
    assert [set(found) for found in own] == [{"1", "2", "3"}] * 2
    lines = (tmp_path / "rounds" / "metrics.jsonl").read_text()
    assert "loss" not in lines and "dice" not in lines


def test_scores_leave_only_with_noise_and_are_charged(ground, tmp_path):
    """The same question to two sites that differ in their secrets alone, and to one without anybody held out."""
    plan = private(ground[0], "dp-sgd", score_noise=2.0)
    store, found = ground[1]["bravo"], []
    weights = weights_of(build(plan.local.network, seed=1))
    request = to_bytes(Request("r", plan.agreement.training.rounds, "verify", {"weights": weights}))
    for folder, held in (("one", store), ("two", store), ("nobody", store.only(()))):
        ledger = tmp_path / folder / "ledger.jsonl"
        site = site_of("bravo", store, plan, tmp_path / folder, {"bravo": ledger}, run="r", held=held)
        release = from_bytes(site.answer(request))
        assert isinstance(release, Response) and set(release.arrays) == {"sums"}
        found.append(np.concatenate([a.ravel() for a in release.arrays["sums"].values()]))
        (charge,) = PrivacyLedger(ledger, "bravo").charges()
        assert [(e.mechanism, e.noise_multiplier) for e in charge.events] == [("scores", 2.0)]
        scores = json.loads((tmp_path / folder / "validation.json").read_text())
        assert bool(scores) == (folder != "nobody")  # every case's own stay here
    assert found[0].shape == found[1].shape == found[2].shape
    assert not np.array_equal(found[0], found[1])


def test_a_patient_moves_the_shared_scores_by_what_they_are_charged_for(tmp_path):
    structures, patients = 3, 40
    rows = {f"s{k}": np.random.default_rng(k).random((patients, 2)) for k in range(structures)}
    mechanism = SharedScores(0.5, columns=1)
    for gone in range(patients):
        less = {n: np.delete(a, gone, axis=0) for n, a in rows.items()}
        before, after = (mechanism.with_key(bytes(32)).release({OF_PATIENTS: each})["sums"] for each in (rows, less))
        apart = np.concatenate([(before[n] - after[n]).ravel() for n in rows])
        assert 0 < np.linalg.norm(apart) <= np.sqrt(2 * structures)


def test_an_error_within_crosses_as_a_code_and_nothing_else(ground, tmp_path, listening, monkeypatch):
    def fail(*_):
        raise ValueError("patient p1 has a tumour")

    monkeypatch.setattr(DPSGD, "step", fail)
    with pytest.raises(Exception, match="failed"):
        train((private(ground[0], "dp-sgd"), ground[1]), tmp_path, transport=listening)
    for data in listening.sent:
        message = from_bytes(data)
        assert isinstance(message, Failure) and message.code in CODES
        assert b"tumour" not in data and data == to_bytes(Failure("r", 1, message.site, message.code))
    assert "tumour" in (next(Path(tmp_path).glob("sites/*/site.log"))).read_text()
