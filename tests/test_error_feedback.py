"""Differences in few bytes: nothing that rounding takes is lost for good, on the way down and on the way up."""

from __future__ import annotations

import numpy as np
import pytest

from autofed import algorithms
from autofed.federation import checkpoints, metrics
from autofed.federation.transports.in_process import InProcess
from autofed.messages import Failure, Request, ServerState, from_bytes, load_groups, quantization, to_bytes
from autofed.messages.error_feedback import ErrorFeedbackBuffer, StateLost, is_state_lost, make_broadcast
from tests import small_federation
from tests.small_federation import SITES, sharing, train

CODED = ("bfloat16", "int8")
RELEASED = {"update": "weights"}
SHAPES = {"a": (3, 300), "b": (40,)}


def draw(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return {name: (scale * generator.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def shelf(folder, precision="int8"):
    return ErrorFeedbackBuffer(folder, RELEASED, precision)


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
        made = make_broadcast(state_of(round - 1, weights, kept), ["weights"], precision)
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
        made = make_broadcast(state_of(round - 1, weights, kept), ["weights"], "int8")
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
            request = sent(make_broadcast(state_of(round - 1, draw(0)), ["weights"], "int8"), round, min(round - 1, 1))
            answers[name], _ = here.release(here.received(request), {"update": draw(round)})
        assert sorted(p.name for p in here.folder.iterdir()) == ["round_00001.safetensors", "round_00003.safetensors"]
    assert equal(answers["late"]["update"], answers["silent"]["update"])
    assert not equal(answers["late"]["update"], draw(3))


def test_what_a_difference_builds_on_must_be_there(tmp_path):
    here, weights = shelf(tmp_path), draw(0)
    first = make_broadcast(state_of(0, weights), ["weights"], "int8")
    request = sent(make_broadcast(state_of(1, weights, first.held), ["weights"], "int8"), 2, 1)
    with pytest.raises(StateLost, match="after round 1"):
        here.received(request)


def test_groups_that_are_not_of_weights_travel_as_they_are(tmp_path):
    other, history = {"x": np.ones(999, np.float32)}, {"clip": np.ones((4, 300), np.float32)}
    made = make_broadcast(state_of(0, draw(0), other=other, adaptation=history), ["weights"], "int8")
    request = sent(made, 1, 0)
    assert list(request.shared) == ["weights", "other", "adaptation"] and list(request.precisions) == ["weights"]
    assert equal(request.shared["other"], other) and equal(request.shared["adaptation"], history)
    arrays, precisions = shelf(tmp_path).release(
        request, {"update": draw(1), "metrics": {"loss": np.ones(400, np.float32)}}
    )
    assert precisions == {"update": "int8"} and list(arrays) == ["update", "metrics"]


def test_a_group_that_changed_its_shape_begins_anew(tmp_path):
    old = {"held.weights": {"a": np.ones(900, np.float32), "b": np.ones(40, np.float32)}}
    made = make_broadcast(state_of(1, draw(0), old), ["weights"], "int8")
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
        came = quantization.quantized(arrays["update"], precisions["update"])
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
        came = quantization.quantized(arrays["update"], "int8")
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
    made = make_broadcast(state_of(0, weights), ["weights"], "float32")
    request = sent(made, 1, 0)
    assert request.precisions == {} and made.held == {} and here.received(request) is request
    arrays, precisions = here.release(request, {"update": update})
    assert arrays["update"] is update and precisions == {} and list(tmp_path.iterdir()) == []


# --- a federation


def with_wire(ground, precision, **settings):
    return ground[0].change({"agreement.wire": precision, "training.rounds": 2, **settings}), ground[1]


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_ends_nearly_where_it_ends_in_float32(ground, tmp_path, name):
    """Of the way that training goes from the start, rounding takes little."""
    ends = {}
    for precision in ("float32", *CODED):
        made = with_wire(ground, precision)
        ends[precision] = train(made, tmp_path / precision, name).shared.get("weights", {})
        coded = list(tmp_path.glob(f"{precision}/sites/*/wire/round_00002.safetensors"))
        assert len(coded) == (precision != "float32") * {"local": 0, "dcfed": 0, "pooled": 1}.get(name, 2)
    assert not list(tmp_path.glob("float32/sites/*/wire")) and bool(ends["int8"]) == (name in sharing())
    start = _first_weights(made[0])
    for precision in CODED if ends["int8"] else ():
        off, way = (_way(ends["float32"], other) for other in (ends[precision], start))
        assert 0 < off <= 0.05 * way, precision


def _first_weights(plan):
    from autofed.training.network import build, weights_of

    return weights_of(build(plan.local.network, seed=1))


def _way(a, b):
    return float(np.sqrt(sum(np.square(a[n].astype(np.float64) - b[n]).sum() for n in a)))


@pytest.mark.parametrize(("precision", "times"), [("bfloat16", 1.95), ("int8", 3.8)])
def test_so_many_times_fewer_bytes_go_both_ways_in_every_round(ground, tmp_path, precision, times):
    """Whole messages, of a network of 0.34 million parameters."""
    lines = {}
    for chosen in ("float32", precision):
        made = with_wire(ground, chosen, **{"network.features": [16, 32, 64], "training.batch_size": 2})
        train(made, tmp_path / chosen)
        lines[chosen] = metrics.read(tmp_path / chosen / "rounds")
    for plain, coded in zip(lines["float32"], lines[precision], strict=True):
        for way in ("down", "up"):
            assert set(coded["bytes"][way]) == set(SITES)
            assert all(plain["bytes"][way][s] > 4 * 330_000 for s in SITES)
            assert all(plain["bytes"][way][s] >= times * coded["bytes"][way][s] for s in SITES)


def test_all_sites_train_from_the_same_weights_also_after_a_missed_round(ground, tmp_path):
    """Alpha's answer of round 2 is lost on its way: round 3 comes to it whole, and round 4 as a difference again."""
    asked = []

    class Losing(InProcess):
        def __call__(self, requests):
            answers = dict(super().__call__(requests))
            asked.append({n: from_bytes(data) for n, data in requests.items()})
            if asked[-1]["alpha"].round == 2:
                del answers["alpha"]
            return answers

    made = with_wire(ground, "int8", **{"training.rounds": 4, "faults.least_sites": 1})
    train(made, tmp_path, transport=Losing)
    assert [sorted(n for n in SITES if r[n].precisions) for r in asked] == [[*SITES], [*SITES], ["bravo"], [*SITES]]
    last = checkpoints.load(tmp_path / "rounds", 4)
    shelves = [load_groups(tmp_path / "sites" / n / "wire" / "round_00004.safetensors")[0] for n in SITES]
    assert all(equal(held["held.weights"], last.server_only["held.weights"]) for held in shelves)
    assert not equal(shelves[0]["lost.update"], shelves[1]["lost.update"])
    down = [line["bytes"]["down"]["alpha"] for line in metrics.read(tmp_path / "rounds")]
    assert down[0] == down[1] == down[3] < down[2] / 3
    assert set(metrics.read(tmp_path / "rounds")[1]["bytes"]["up"]) == {"bravo"}


@pytest.mark.parametrize("dies", [False, True])
def test_a_site_that_lost_its_disk_says_so_and_gets_the_whole(ground, tmp_path, dies):
    """Also if the coordinator dies after that, and asks again as it did at first."""

    asked = []

    class Forgetting(InProcess):
        def __call__(self, requests):
            asked.append(list(requests))
            for path in tmp_path.glob("sites/alpha/wire/round_00001.safetensors"):
                path.unlink()
            answers = super().__call__(requests)
            if dies and len(asked) == 3:
                raise KeyboardInterrupt
            return answers

    made = with_wire(ground, "int8", **{"training.rounds": 3})
    if dies:
        with pytest.raises(KeyboardInterrupt):
            train(made, tmp_path, transport=Forgetting)
    train(made, tmp_path, transport=Forgetting, state=checkpoints.load(tmp_path / "rounds", 1) if dies else None)
    assert asked.count(["alpha"]) == 1 + dies
    lines = metrics.read(tmp_path / "rounds")
    assert all(sorted(line["sites"]) == [*SITES] and "left_out" not in line for line in lines)
    down = [line["bytes"]["down"] for line in lines]
    assert down[1]["alpha"] > 4 * down[1]["bravo"] and down[2]["alpha"] == down[2]["bravo"]
    shelves = [load_groups(tmp_path / "sites" / n / "wire" / "round_00003.safetensors")[0] for n in SITES]
    assert equal(shelves[0]["held.weights"], shelves[1]["held.weights"])
    assert "held after round 1" in (tmp_path / "sites" / "alpha" / "site.log").read_text()


@pytest.mark.parametrize(
    "answer", [b"", b"rubbish", to_bytes(Failure("r", 1, "a", "failed")), to_bytes(Request("r", 1, "q"))]
)
def test_only_who_says_so_has_forgotten(answer):
    assert not is_state_lost(answer) and is_state_lost(to_bytes(Failure("r", 1, "a", "forgotten")))


def test_a_difference_in_a_precision_that_was_not_agreed_is_refused(ground, tmp_path):
    for agreed, found, question in (
        ("float32", "int8", "train"),
        ("bfloat16", "int8", "train"),
        ("int8",) * 2 + ("validate",),
    ):
        plan, stores = with_wire(ground, agreed)
        site = small_federation.sites_of(plan, stores, tmp_path / agreed, "r")[0]
        weights = _first_weights(plan)
        answer = from_bytes(
            site.answer(to_bytes(Request("r", 1, question, {"weights": weights}, 0, {"weights": found})))
        )
        assert isinstance(answer, Failure) and answer.code == "bad-request"
