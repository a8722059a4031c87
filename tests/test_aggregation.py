"""Robust averages: what a site that lies can do to them, and that they are the mean where nobody lies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as drawn

from autofed import plans, privacy
from autofed.errors import ValidationErrors
from autofed.federation.aggregation import Aggregator
from autofed.federation.aggregation_rules import Mean, Median, NormBound, TrimmedMean
from autofed.privacy.none import NoPrivacy
from tests.plans_made import small_plan

MEAN = Mean()
RULES = {
    "median": Median(),
    "trimmed-mean": TrimmedMean(0.2),
    "norm-bound": NormBound(1.0),
}
robust = pytest.mark.parametrize("rule", RULES)
BEARS = {"median": lambda n: (n - 1) // 2, "trimmed-mean": lambda n: 1 if 3 <= n <= 5 else 2}
"""How many liars of up to ten sites."""


def honest(sites=5, seed=0):
    """Updates (4, 25) around one direction, so that their mean says something."""
    generator = np.random.default_rng(seed)
    names = [f"site{i}" for i in range(sites)]
    return {s: {"w": (1 + 0.3 * generator.normal(size=(4, 25))).astype(np.float32)} for s in names}


def alike(releases):
    return dict.fromkeys(releases, 1.0)


def distance(one, two):
    return float(np.linalg.norm(one["w"].astype(float) - two["w"]))


@pytest.mark.parametrize(
    ("rule", "factor", "most"),
    [
        *((rule, factor, 0.2) for rule in BEARS for factor in (1000, -1000, -1)),
        # a bound leaves a liar its share of the weight: one of five, wherever it likes
        ("norm-bound", 1000, 0.15),
        ("norm-bound", -1000, 0.45),
    ],
)
def test_a_liar_moves_the_mean_and_not_these(rule, factor, most):
    told = honest()
    lied = {**told, "site3": {"w": np.float32(factor) * told["site3"]["w"]}}
    truth, weights = MEAN.average(told, alike(told)), alike(told)
    pulled, moved = (distance(m.average(lied, weights), truth) for m in (MEAN, RULES[rule]))
    size = float(np.linalg.norm(truth["w"]))
    assert moved < most * size
    assert pulled > (0.39 if factor == -1 else 190) * size


@robust
def test_a_liar_is_told_from_the_truth_by_size_alone(rule):
    """Whatever it multiplies its answer by above a thousand changes nothing more."""
    told = honest()
    found = [RULES[rule].average({**told, "site0": {"w": told["site0"]["w"] * np.float32(k)}}, alike(told))
             for k in (1e3, 1e6, 1e30)]  # fmt: skip
    assert np.allclose(found[0]["w"], found[1]["w"]) and np.allclose(found[0]["w"], found[2]["w"])


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_coordinate_that_nobody_lies_about_stays_as_it_is(rule):
    told = honest()
    lied = {**told, "site1": {"w": told["site1"]["w"].copy()}}
    lied["site1"]["w"][0] *= -1e6
    before, after = (RULES[rule].average(releases, alike(told))["w"] for releases in (told, lied))
    assert np.array_equal(before[1:], after[1:]) and not np.array_equal(before[0], after[0])


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_who_claims_most_patients_counts_once(rule):
    told = honest()
    vain = {**alike(told), "site2": 1e9}
    assert np.array_equal(RULES[rule].average(told, vain)["w"], RULES[rule].average(told, alike(told))["w"])


def test_under_a_bound_sites_weigh_by_their_patients():
    told = {s: {"w": np.array(v, np.float32)} for s, v in {"a": [3, 0], "b": [0, 3], "c": [30, 40]}.items()}
    found = NormBound(2.0).average(told, {"a": 1.0, "b": 2.0, "c": 3.0})
    assert found["w"] == pytest.approx([(3 + 3 * 3.6) / 6, (2 * 3 + 3 * 4.8) / 6])  # c is shrunk to 2 * 3


def test_the_norm_is_that_of_all_arrays_of_a_group():
    told = {s: {"v": np.array([3.0 * k]), "w": np.array([4.0 * k])} for s, k in {"a": 1, "b": 1, "c": 10}.items()}
    found = NormBound(1.0).average(told, {"a": 1.0, "b": 1.0, "c": 2.0})
    assert (found["v"], found["w"]) == (pytest.approx([3.0]), pytest.approx([4.0]))


@pytest.mark.parametrize(("sites", "cut"), [(1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_the_share_that_is_trimmed_is_rounded_up_and_leaves_somebody(sites, cut):
    told = {f"s{i:02d}": {"w": np.array([float(i**2)])} for i in range(sites)}
    left = [float(i**2) for i in range(sites)][cut : sites - cut]
    assert RULES["trimmed-mean"].average(told, alike(told))["w"] == pytest.approx(np.mean(left))


def test_the_median_of_an_even_number_lies_in_the_middle():
    told = {s: {"w": np.array([v])} for s, v in zip("abcd", (1.0, 2.0, 4.0, 1e9), strict=True)}
    assert RULES["median"].average(told, alike(told))["w"] == [3.0]


sites_told = st.integers(1, 9).flatmap(
    lambda n: drawn(np.float32, (n, 6), elements=st.floats(-1e6, 1e6, width=32)).map(
        lambda rows: {f"site{i}": {"w": row[:4], "v": row[4:]} for i, row in enumerate(rows)}
    )
)


@robust
@settings(max_examples=40, deadline=None)
@given(told=sites_told, order=st.randoms(use_true_random=False))
def test_the_order_of_the_sites_does_not_matter_to_the_bit(rule, told, order):
    turned = list(told.items())
    order.shuffle(turned)
    weights = {site: 1.0 + i for i, site in enumerate(told)}
    one, two = (RULES[rule].average(releases, weights) for releases in (told, dict(turned)))
    assert all(one[n].tobytes() == two[n].tobytes() and one[n].dtype == np.float32 for n in ("w", "v"))


@robust
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=40, deadline=None)
@given(sites=st.integers(1, 9), value=st.floats(-1e6, 1e6, width=32))
def test_equal_answers_are_their_own_average(rule, dtype, sites, value):
    """One site alone among them. In float64 the mean itself is that only nearly."""
    row = np.array([value, -value / 3, 1.0], dtype)
    told = {f"site{i}": {"w": row} for i in range(sites)}
    found, mean = (m.average(told, alike(told))["w"] for m in (RULES[rule], MEAN))
    assert np.array_equal(found, mean) if dtype is np.float32 else np.allclose(found, mean, rtol=1e-15)
    assert np.array_equal(found, row) or (rule, dtype) == ("norm-bound", np.float64)


@pytest.mark.parametrize("rule", BEARS)
@settings(max_examples=60, deadline=None)
@given(told=sites_told.filter(lambda t: len(t) >= 3), lie=drawn(np.float32, (4, 6)), data=st.data())
def test_with_as_many_liars_as_are_borne_every_coordinate_lies_between_honest_answers(rule, told, lie, data):
    liars = data.draw(st.sets(st.sampled_from(sorted(told)), max_size=BEARS[rule](len(told))))
    lie = np.nan_to_num(lie, nan=-1e30)
    lied = {**told, **{s: {"w": row[:4], "v": row[4:]} for s, row in zip(sorted(liars), lie, strict=False)}}
    found = RULES[rule].average(lied, alike(told))
    for name in ("w", "v"):
        truth = np.stack([told[s][name] for s in told if s not in liars])
        assert (truth.min(0) <= found[name]).all() and (found[name] <= truth.max(0)).all()


@settings(max_examples=60, deadline=None)
@given(told=sites_told, factor=st.floats(1, 1e9), data=st.data())
def test_with_half_the_sites_lying_no_answer_counts_for_more_than_an_honest_one_might(told, factor, data):
    liars = data.draw(st.sets(st.sampled_from(sorted(told)), max_size=len(told) // 2))
    lied = {s: {n: a.astype(float) * (factor if s in liars else 1) for n, a in told[s].items()} for s in told}
    found = RULES["norm-bound"].average(lied, alike(told))
    largest = max(np.linalg.norm(np.concatenate([told[s]["w"], told[s]["v"]]).astype(float))
                  for s in told if s not in liars)  # fmt: skip
    assert np.linalg.norm(np.concatenate([found["w"], found["v"]])) <= largest * (1 + 1e-9)


# --- in a plan


@robust
def test_a_plan_names_the_rule_and_its_mechanism_is_the_same(rule):
    plan = small_plan(**{"average.rule": rule, "average.trim": 0.3, "average.bound": 2.0})
    found = Aggregator.of(plan, ("alpha",)).rule
    assert type(found) is type(RULES[rule])
    assert getattr(found, "trim", 0.3) == 0.3 and getattr(found, "bound", 2.0) == 2.0
    assert privacy.find_mechanism(plan) == NoPrivacy(2)


def test_without_a_rule_it_is_the_mean():
    assert Aggregator.of(small_plan(), ()).rule == Mean()


def test_a_site_that_holds_all_data_weighs_one_beside_nobody():
    plan = small_plan().change({"agreement.patients": {"alpha": 10, "bravo": 40}})
    assert Aggregator.of(plan, ("alpha", "bravo")).site_weights == {"alpha": 10, "bravo": 40}
    assert Aggregator.of(plan, ("pooled",)).site_weights == {"pooled": 1}


@pytest.mark.parametrize(("field", "value"), [("average.trim", 0.5), ("average.bound", 0.5), ("average.rule", "mode")])
def test_rules_that_cannot_be_are_refused(field, value):
    with pytest.raises(ValidationErrors, match=field):
        small_plan(**{field: value})


def test_sites_weigh_by_their_patients_and_no_longer_by_noise():
    plan = small_plan().change({"agreement.patients": {"alpha": 10, "bravo": 40}})
    assert plan.agreement.site_weights == {"alpha": 10, "bravo": 40}
    assert plan.change({"average.weights": "patients"}).agreement == plan.agreement
    with pytest.raises(ValidationErrors, match='weights by noise gained nothing and are gone; write "patients"'):
        plan.change({"average.weights": "noise"})


def test_a_plan_that_was_written_with_weights_by_patients_still_loads_and_one_with_noise_says_why_not(tmp_path):
    small_plan().save(tmp_path / "plan.json")
    written = (tmp_path / "plan.json").read_text()
    assert written.count('"weights": "patients"') == 1
    assert plans.load(tmp_path / "plan.json") == small_plan()
    (tmp_path / "plan.json").write_text(written.replace('"weights": "patients"', '"weights": "noise"'))
    with pytest.raises(ValidationErrors, match="weights by noise gained nothing and are gone"):
        plans.load(tmp_path / "plan.json")
