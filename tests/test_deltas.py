"""Differences in few bytes: nothing that rounding takes is lost for good, on the way down and on the way up."""

from __future__ import annotations

import numpy as np
import pytest

from autofed import wire
from autofed.exchange import Request, ServerState, from_bytes, to_bytes
from autofed.federation.deltas import Shelf, parcel_of

CODED = ("bfloat16", "int8")
RELEASED = {"update": "weights"}
SHAPES = {"a": (3, 300), "b": (40,)}


def draw(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return {name: (scale * generator.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def shelf(folder, precision="int8"):
    return Shelf(folder, RELEASED, precision)


def state_of(round, weights, kept=None, **other):
    return ServerState(round, {"weights": weights, **other}, kept or {})


def sent(made, round, since):
    """The request as it arrives."""
    return from_bytes(to_bytes(made.request("r", round, "train", since)))


def equal(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


def farthest(a, b):
    return max(float(np.abs(a[n] - b[n]).max()) for n in a)


# --- down


@pytest.mark.parametrize("precision", CODED)
def test_the_sites_hold_what_the_coordinator_says_and_it_stays_one_rounding_from_the_state(tmp_path, precision):
    here, weights, kept, errors = shelf(tmp_path, precision), draw(0), {}, []
    for round in range(1, 12):
        made = parcel_of(state_of(round - 1, weights, kept), ["weights"], precision)
        request = sent(made, round, round - 1)
        assert request.precisions == {"weights": precision}
        request = here.received(request)
        found = request.shared["weights"]
        assert equal(found, made.whole["weights"]) and equal(found, made.held["held.weights"])
        here.release(request, {"update": draw(round)})
        errors.append(farthest(found, weights))
        assert 0 < errors[-1] <= max(float(np.abs(a).max()) for a in made.difference["weights"].values()) / 250
        kept, moved = made.held, draw(100 + round, 0.01)
        weights = {n: a + moved[n] for n, a in weights.items()}
    assert errors[-1] < errors[0] / 20  # of the differences by now, not of the weights


def test_a_site_that_missed_a_round_gets_the_whole_in_float32_and_goes_on_with_differences(tmp_path):
    sites, since = {name: shelf(tmp_path / name) for name in ("steady", "absent")}, {"steady": 0, "absent": 0}
    kept, weights = {}, draw(0)
    for round, there in ((1, ["steady", "absent"]), (2, ["steady"]), (3, ["steady", "absent"]), (4, ["absent"])):
        made = parcel_of(state_of(round - 1, weights, kept), ["weights"], "int8")
        for name in there:
            request = sent(made, round, since[name])
            assert bool(request.precisions) == ((name, round) != ("absent", 3))
            request = sites[name].received(request)
            assert equal(request.shared["weights"], made.whole["weights"])
            sites[name].release(request, {"update": draw(round)})
            since[name] = round
        kept, weights = made.held, {n: a * np.float32(1.01) for n, a in weights.items()}


def test_an_answer_that_did_not_count_leaves_no_trace_in_the_next(tmp_path):
    """Round 2 was answered, but too late: in round 3 the site goes on from what it kept of round 1."""
    answers = {}
    for name, rounds in (("late", (1, 2, 3)), ("silent", (1, 3))):
        here = shelf(tmp_path / name)
        for round in rounds:
            request = sent(parcel_of(state_of(round - 1, draw(0)), ["weights"], "int8"), round, min(round - 1, 1))
            answers[name], _ = here.release(here.received(request), {"update": draw(round)})
        assert sorted(p.name for p in here.folder.iterdir()) == ["round_00001.safetensors", "round_00003.safetensors"]
    assert equal(answers["late"]["update"], answers["silent"]["update"])
    assert not equal(answers["late"]["update"], draw(3))


def test_what_a_difference_builds_on_must_be_there(tmp_path):
    here, weights = shelf(tmp_path), draw(0)
    first = parcel_of(state_of(0, weights), ["weights"], "int8")
    request = sent(parcel_of(state_of(1, weights, first.held), ["weights"], "int8"), 2, 1)
    with pytest.raises(LookupError, match="after round 1"):
        here.received(request)


def test_groups_that_are_not_of_weights_travel_as_they_are(tmp_path):
    other, history = {"x": np.ones(999, np.float32)}, {"clip": np.ones((4, 300), np.float32)}
    made = parcel_of(state_of(0, draw(0), other=other, adaptation=history), ["weights"], "int8")
    request = sent(made, 1, 0)
    assert list(request.shared) == ["weights", "other", "adaptation"] and list(request.precisions) == ["weights"]
    assert equal(request.shared["other"], other) and equal(request.shared["adaptation"], history)
    arrays, precisions = shelf(tmp_path).release(
        request, {"update": draw(1), "metrics": {"loss": np.ones(400, np.float32)}}
    )
    assert precisions == {"update": "int8"} and list(arrays) == ["update", "metrics"]


def test_a_group_that_changed_its_shape_begins_anew(tmp_path):
    old = {"held.weights": {"a": np.ones(900, np.float32), "b": np.ones(40, np.float32)}}
    made = parcel_of(state_of(1, draw(0), old), ["weights"], "int8")
    assert equal(made.difference["weights"], draw(0))


# --- up


@pytest.mark.parametrize("precision", CODED)
def test_all_that_arrived_is_all_that_was_meant_but_for_the_last_rounding(tmp_path, precision):
    meant, arrived = ({n: np.zeros(s) for n, s in SHAPES.items()} for _ in range(2))
    worst = 0.0
    for round in range(1, 30):
        here = shelf(tmp_path, precision)  # a new process each time
        request = Request("r", round, "train", {"weights": draw(0)}, round - 1)
        update = draw(round, 0.01)
        arrays, precisions = here.release(request, {"update": update})
        came = wire.rounded(arrays["update"], precisions["update"])
        meant, arrived = (
            {n: a + part[n] for n, a in total.items()} for total, part in ((meant, update), (arrived, came))
        )
        worst = max(worst, farthest(came, arrays["update"]))
    assert farthest(meant, arrived) <= worst + 1e-6
    assert worst < 0.01 * 5 / 100


def descend(folder, remembers, rounds=60):
    """One site, a quadratic whose optimum is 1 throughout, and in each block one coordinate that swings to and fro.

    A step is too small for 8 bits beside the swing.
    """
    swing = {"a": np.zeros((3, 300), np.float32), "b": np.zeros(40, np.float32)}
    swing["a"].reshape(-1)[::100], swing["b"][0] = 10, 10
    steady = {n: a == 0 for n, a in swing.items()}
    weights, here = {n: np.zeros_like(a) for n, a in swing.items()}, shelf(folder)
    for round in range(1, rounds + 1):
        update = {n: np.where(steady[n], 0.03 * (1 - a), swing[n] * (-1) ** round).astype(np.float32)
                  for n, a in weights.items()}  # fmt: skip
        request = Request("r", round, "train", {"weights": weights}, round - 1 if remembers else 0)
        arrays, _ = here.release(request, {"update": update})
        came = wire.rounded(arrays["update"], "int8")
        weights = {n: a + came[n] for n, a in weights.items()}
    return max(float(np.abs(a[steady[n]] - 1).max()) for n, a in weights.items())


def test_where_8_bits_stall_what_was_lost_arrives_with_later_rounds(tmp_path):
    exact = (1 - 0.03) ** 60
    assert descend(tmp_path / "forgets", remembers=False) == 1
    assert descend(tmp_path / "remembers", remembers=True) == pytest.approx(exact, abs=0.04)


def test_the_same_request_has_the_same_answer(tmp_path):
    here = shelf(tmp_path)
    first = Request("r", 1, "train", {"weights": draw(0)}, 0)
    here.release(first, {"update": draw(1)})
    second = Request("r", 2, "train", {"weights": draw(0)}, 1)
    one, _ = here.release(second, {"update": draw(2)})
    two, _ = shelf(tmp_path).release(second, {"update": draw(2)})  # killed before it was sent
    assert equal(one["update"], two["update"])


def test_a_release_that_is_not_finite_is_the_sites_own_failure(tmp_path):
    request = Request("r", 1, "train", {"weights": draw(0)}, 0)
    with pytest.raises(ArithmeticError, match="NaN"):
        shelf(tmp_path).release(request, {"update": {n: a * np.nan for n, a in draw(1).items()}})
    assert list(tmp_path.iterdir()) == []


def test_with_float32_nothing_is_changed_and_nothing_kept(tmp_path):
    here, weights, update = shelf(tmp_path, "float32"), draw(0), draw(1)
    made = parcel_of(state_of(0, weights), ["weights"], "float32")
    request = sent(made, 1, 0)
    assert request.precisions == {} and made.held == {} and here.received(request) is request
    arrays, precisions = here.release(request, {"update": update})
    assert arrays["update"] is update and precisions == {} and list(tmp_path.iterdir()) == []
