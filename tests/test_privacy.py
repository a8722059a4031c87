"""The mechanism protocol with no privacy, and the ledger: append-only, locked, and never counting too little."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest

from autofed import privacy
from autofed.errors import ValidationErrors
from autofed.federation.aggregation_rules import Mean
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.ledger import PrivacyLedger
from autofed.privacy.none import NoPrivacy
from tests import charges_made
from tests.plans_made import small_plan


def charge(round=1, run="r"):
    return charges_made.charge(round, run, [PrivacyEvent(mechanism="none", steps=3)])


def test_drawing_is_repeatable_and_fills_the_batch():
    patients = [f"p{i}" for i in range(7)]
    once = list(islice(NoPrivacy(3).sampler(patients, (1, 2)), 50))
    assert once == list(islice(NoPrivacy(3).sampler(patients, (1, 2)), 50))
    assert once != list(islice(NoPrivacy(3).sampler(patients, (1, 3)), 50))
    assert all(len(groups) == 1 and len(groups[0]) == 3 for groups in once)
    assert {p for groups in once for p in groups[0]} == set(patients)
    assert [len(group) for group in next(NoPrivacy(3, passes=2).sampler(patients, (1, 2)))] == [3, 3]


def test_average_is_weighted_and_blind_to_the_order():
    releases = {"b": {"w": np.array([4.0, 8.0], np.float32)}, "a": {"w": np.array([1.0, 2.0], np.float32)},
                "c": {"w": np.array([0.1, 0.7], np.float32)}}  # fmt: skip
    weights = {"a": 3.0, "b": 1.0, "c": 5.0}
    found = Mean().average(releases, weights)["w"]
    assert found == pytest.approx([(3 + 4 + 0.5) / 9, (6 + 8 + 3.5) / 9])
    assert found.dtype == np.float32
    turned = Mean().average(dict(reversed(releases.items())), weights)["w"]
    assert found.tobytes() == turned.tobytes()


def test_step_is_the_mean_of_the_groups():
    one, two = [np.array([2.0])], [np.array([4.0])]
    assert NoPrivacy(1).step(iter([one]), one)[0] == 2
    assert NoPrivacy(1).step(iter([one, two]), one)[0] == 3


def test_an_empty_draw_is_a_step_all_the_same():
    (found,) = NoPrivacy(1).step(iter([]), [np.array([2.0, 3.0])])
    assert found.tolist() == [0, 0]


def test_everything_leaves_as_it_is_and_that_is_said():
    groups = {"update": {"w": np.ones(2)}, "metrics": {"loss": np.ones(1)}}
    assert NoPrivacy(1).release(groups) is groups
    assert [e.mechanism for e in NoPrivacy(1).cost(5)] == ["none"]


def test_unknown_mechanism_is_answered_with_those_that_exist():
    with pytest.raises(ValidationErrors, match="no mechanism 'magic'; the mechanisms are: none"):
        privacy.find_mechanism(small_plan(**{"privacy.mechanism": "magic"}))


def test_ledger_remembers_over_runs(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl", "alpha")
    assert ledger.epsilon() == 0
    ledger.charge(charge(1))
    again = PrivacyLedger(tmp_path / "ledger.jsonl", "alpha")
    again.charge(charge(1, run="another"))
    assert [c.run for c in again.charges()] == ["r", "another"]
    assert again.epsilon() == math.inf  # something left unprotected: no finite figure would be true


def test_the_ceiling_is_that_of_the_opening(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl", "alpha", ceiling_epsilon=8.0, ceiling_delta=1e-5)
    raised = PrivacyLedger(tmp_path / "ledger.jsonl", "alpha", ceiling_epsilon=1e9)
    assert raised.opening.ceiling_epsilon == 8.0
    assert not ledger.can_afford(charge().events)
    with pytest.raises(ValidationErrors, match=r"ceiling of epsilon 8\.0"):
        ledger.charge(charge())
    assert ledger.charges() == []


def test_another_sites_ledger_is_refused(tmp_path):
    PrivacyLedger(tmp_path / "ledger.jsonl", "alpha")
    with pytest.raises(ValidationErrors, match="ledger of alpha, not of bravo"):
        PrivacyLedger(tmp_path / "ledger.jsonl", "bravo")


def test_a_line_that_a_crash_cut_short_does_not_stop_the_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    PrivacyLedger(path, "alpha").charge(charge(1))
    with open(path, "ab") as handle:
        handle.write(b'{"run": "r", "rou')
    ledger = PrivacyLedger(path, "alpha")
    assert len(ledger.charges()) == 1
    ledger.charge(charge(2))
    assert [c.round for c in ledger.charges()] == [1, 2]


def test_charges_at_the_same_time_are_all_kept(tmp_path):
    path = tmp_path / "ledger.jsonl"
    PrivacyLedger(path, "alpha")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: PrivacyLedger(path, "alpha").charge(charge(i)), range(40)))
    assert sorted(c.round for c in PrivacyLedger(path, "alpha").charges()) == list(range(40))
