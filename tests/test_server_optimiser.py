"""The coordinator's step against the papers' formulas, and that a resumed run keeps its momentum."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import numpy as np
import pytest

from autofed import algorithms
from autofed.errors import ValidationErrors
from autofed.federation import checkpoints, rounds, server_optimiser
from autofed.federation.aggregation import Aggregator
from autofed.federation.transports.in_process import InProcess
from autofed.messages import Response, ServerState, from_bytes, to_bytes
from autofed.plans import AlgorithmSettings, ServerSettings
from tests import small_federation
from tests.equality import same_arrays
from tests.plans_made import small_plan

OPTIMISERS = (
    ServerSettings(optimiser="momentum", rate=0.5),
    ServerSettings(optimiser="adam", rate=0.03),
    ServerSettings(rate=0.5),
)
stepping = pytest.mark.parametrize("chosen", OPTIMISERS, ids=lambda chosen: chosen.optimiser)


def state(*values, round=0, dtype=np.float32, **kept):
    return ServerState(round, {"weights": {"w": np.array(values, dtype)}}, kept)


def walk(chosen, start, updates, dtype=np.float64):
    """The weights after each round of updates, the same whatever the weights are."""
    now, seen = state(*start, dtype=dtype), []
    for update in updates:
        merged = state(*(now.shared["weights"]["w"] + np.asarray(update, dtype)), round=now.round + 1, dtype=dtype)
        now = server_optimiser.step(chosen, now, merged)
        seen.append(now.shared["weights"]["w"])
    return np.array(seen)


def test_a_plain_step_of_rate_one_is_the_merge_itself():
    merged = state(1e-9, 3e8)
    assert server_optimiser.step(ServerSettings(), state(1e9, 1e-9), merged) is merged


def test_a_plain_step_goes_a_share_of_the_way():
    assert walk(ServerSettings(rate=0.25), [1.0, 2.0], [[4.0, -4.0]] * 2).tolist() == [[2, 1], [3, 0]]


def test_momentum_sums_updates_as_fedavgm():
    found = walk(ServerSettings(optimiser="momentum", rate=0.5, momentum=0.9), [0.0], [[1.0], [2.0], [0.0]])
    velocities = [1.0, 0.9 + 2, 0.9 * 2.9]
    assert found[:, 0] == pytest.approx(np.cumsum(velocities) * 0.5)


def test_adam_is_algorithm_two_of_reddi():
    chosen = ServerSettings(optimiser="adam", rate=0.1, momentum=0.9, second_momentum=0.99, epsilon=1e-3)
    updates = np.array([[1.0, -1e-3], [0.5, 0.0], [-2.0, 5e-3]])
    w, m, v = np.array([1.0, 1.0]), np.zeros(2), np.full(2, 1e-6)
    for update, found in zip(updates, walk(chosen, w, updates), strict=True):
        m, v = 0.9 * m + 0.1 * update, 0.99 * v + 0.01 * update**2
        w = w + 0.1 * m / (np.sqrt(v) + 1e-3)
        assert found == pytest.approx(w, rel=1e-12)


def test_adam_moves_a_steady_coordinate_by_the_rate_as_its_docstring_says():
    moved = np.diff(walk(ServerSettings(optimiser="adam", rate=1.0), [0.0], [[50.0]] * 400)[:, 0], prepend=0.0)
    assert moved[0] == pytest.approx(1, rel=1e-3) and moved[-1] == pytest.approx(1, rel=0.02)
    assert moved.argmax() in (11, 12, 13) and moved.max() == pytest.approx(2.1, abs=0.05)


@stepping
def test_an_update_of_nothing_changes_nothing(chosen):
    assert walk(chosen, [1.0, -2.0], [[0.0, 0.0]] * 3, np.float32).tolist() == [[1, -2]] * 3


@stepping
def test_what_is_kept_has_the_dtype_and_the_names_of_the_weights(chosen):
    found = server_optimiser.step(chosen, state(1.0, 2.0), state(1.5, 2.5, round=1, other={"c": np.ones(1)}))
    assert (
        set(found.server_only) - {"other"}
        == {
            "momentum": {server_optimiser.VELOCITY},
            "adam": {server_optimiser.FIRST, server_optimiser.SECOND},
            "plain": set(),
        }[chosen.optimiser]
    )
    assert all(found.server_only[g]["w"].dtype == np.float32 for g in found.server_only if g != "other")
    assert found.shared["weights"]["w"].dtype == np.float32 and found.round == 1


def test_a_state_without_common_weights_is_left_alone():
    merged = ServerState(1, {"start": {"w": np.ones(2)}})
    assert server_optimiser.step(OPTIMISERS[0], state(1.0), merged) is merged


@pytest.mark.parametrize("name", algorithms.names())
def test_an_algorithm_that_shares_no_weights_leaves_nothing_to_step_with(name):
    made = algorithms.make(AlgorithmSettings(name=name))
    server_optimiser.raise_if_idle(ServerSettings(), made, name)
    for chosen in OPTIMISERS:
        if name in ("local", "dcfed"):
            with pytest.raises(
                ValidationErrors, match=f"{name} shares no weights.*{chosen.optimiser} and rate {chosen.rate:g}"
            ):
                server_optimiser.raise_if_idle(chosen, made, name)
        else:
            server_optimiser.raise_if_idle(chosen, made, name)


# --- in the loop


@dataclass(frozen=True)
class Pulling:
    """Sites that pull the weights half of the way to .9, 1 and 1.1 without training; those that lie, far away."""

    liars: frozenset[str] = frozenset()

    def __call__(self, requests):
        answers = {}
        for (site, data), goal in zip(sorted(requests.items()), (0.9, 1.0, 1.1), strict=True):
            request = from_bytes(data)
            lie = site in self.liars
            update = {n: np.full_like(a, -9) if lie else (goal - a) / 2 for n, a in request.shared["weights"].items()}
            answers[site] = to_bytes(Response(request.run, request.round, site, {"update": update}))
        return answers


def trained(folder, transport=None, begin=None, **settings):
    sites = ("alpha", "bravo", "charlie")
    plan = small_plan(sites=sites, cases=6, **{"training.rounds": 4, "validate_every": 0, **settings})
    chosen, aggregator = algorithms.make(plan.agreement.algorithm), Aggregator.of(plan, sites)
    course = rounds.RunContext(chosen, aggregator, plan, transport or Pulling(), folder, "r", sites)
    return rounds.run_rounds(course, begin or state(0.5, -2.0))


class CutOff(InProcess):
    """The coordinator is killed before the third round."""

    def __call__(self, requests):
        if from_bytes(next(iter(requests.values()))).round == 3:
            raise KeyboardInterrupt
        return super().__call__(requests)


@pytest.mark.parametrize("name", small_federation.sharing())
def test_with_every_algorithm_a_run_that_was_cut_off_ends_with_the_same_bits(ground, tmp_path, name):
    made = ground[0].change({"server.optimiser": "adam", "server.rate": 0.003}), ground[1]
    whole = small_federation.train(made, tmp_path / "whole", name)
    with pytest.raises(KeyboardInterrupt):
        small_federation.train(made, tmp_path / "cut", name, transport=CutOff)
    before = checkpoints.load(tmp_path / "cut" / "rounds", 2)
    small_federation.train(made, tmp_path / "cut", name, state=before)
    assert same_arrays(*(small_federation.final_arrays(tmp_path / folder, ground[0]) for folder in ("whole", "cut")))
    moved = max(np.abs(a - before.shared["weights"][n]).max() for n, a in whole.shared["weights"].items())
    assert 0 < moved < 2.2 * 0.003  # Adam's own bound on a step


@pytest.mark.parametrize("optimiser", ["momentum", "adam"])
def test_a_run_resumed_from_its_files_is_the_unbroken_one_to_the_bit(tmp_path, optimiser):
    chosen = {"server.optimiser": optimiser, "training.ema": 0.5, "training.snapshots": [2, 4]}
    whole = trained(tmp_path / "whole", **chosen)
    shutil.copytree(tmp_path / "whole" / "round_00002", tmp_path / "resumed" / "round_00002")
    resumed = trained(tmp_path / "resumed", begin=checkpoints.load(tmp_path / "resumed", 2), **chosen)
    assert resumed.shared["weights"]["w"].tobytes() == whole.shared["weights"]["w"].tobytes()
    assert all(
        whole.server_only[g][n].tobytes() == a.tobytes()
        for g in whole.server_only
        for n, a in resumed.server_only[g].items()
    )
    plain = trained(tmp_path / "plain", **{"training.ema": 0.5})
    assert not np.allclose(
        whole.server_only["mean"]["w"], plain.server_only["mean"]["w"]
    )  # the average is of the weights stepped to


def test_a_lying_site_is_left_without_force_by_the_rule_of_the_plan(tmp_path):
    liar = Pulling(frozenset({"bravo"}))
    ends = {
        rule: trained(tmp_path / rule, liar, **{"average.rule": rule, "training.rounds": 12}).shared["weights"]["w"]
        for rule in ("mean", "median", "trimmed-mean", "norm-bound")
    }
    assert (ends.pop("mean") < -5).all()
    assert all(((end > 0.6) & (end < 1.15)).all() for end in ends.values()), ends


# --- set by hand


@pytest.mark.parametrize(("optimiser", "rate"), [("momentum", 1.0), ("adam", 0.03), ("plain", 1.0)])
def test_an_optimiser_set_by_hand_brings_its_rate_and_says_why(optimiser, rate):
    made = small_plan(**{"server.optimiser": optimiser})
    assert made.agreement.server == ServerSettings(optimiser=optimiser, rate=rate)
    assert [r.value for r in made.reasons if r.field == "agreement.server.rate"] == [str(rate)]
    made = small_plan(**{"server.optimiser": optimiser, "server.rate": 0.03})
    assert made.agreement.server.rate == 0.03


def test_an_optimiser_that_there_is_not():
    with pytest.raises(ValidationErrors, match=r"agreement\.server\.optimiser"):
        small_plan(**{"server.optimiser": "lion"})
