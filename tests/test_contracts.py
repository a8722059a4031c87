"""What holds for every algorithm, with every way of averaging: new ones are picked up by themselves.

That every algorithm gives the same bits over Flower is in test_flower.py, that it travels in every precision and
resumes to the bit in test_deltas.py, and that it does with every step of the coordinator in test_server.py.
"""

from dataclasses import fields
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from autofed import algorithms, privacy
from autofed.algorithms import RunSetup
from autofed.federation import checkpoints, metrics, server_optimiser
from autofed.federation import rounds as loop
from autofed.federation.aggregation import Aggregator
from autofed.federation.transports.in_process import InProcess
from autofed.files import digest
from autofed.messages import Request, Response, from_bytes
from autofed.plans import AlgorithmSettings, AverageSettings
from autofed.preprocessing import pool_stores
from autofed.privacy.ledger import PrivacyLedger
from autofed.training.fit import LocalResult, Schedule, fit
from autofed.training.network import build, weights_of
from tests.equality import same_arrays
from tests.plans_made import small_plan
from tests.small_federation import PRIVATE, SITES, final_arrays, private, sharing, site_of, train, with_algorithm

TESTED = {"noise_seed": 1, "simulation": True}
"""Noise that can be drawn again: for tests alone, and the ledgers say so."""

RULES = AverageSettings.model_fields["rule"].annotation.__args__


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", algorithms.names())
def test_order_of_sites_does_not_matter(ground, tmp_path, name, rule):
    made = ground[0].change({"average.rule": rule, "training.rounds": 2}), ground[1]
    train(made, tmp_path / "one", name)
    train(made, tmp_path / "two", name, turned=True)
    assert same_arrays(final_arrays(tmp_path / "one", made[0]), final_arrays(tmp_path / "two", made[0]))


def combinations():
    """Every algorithm with every mechanism that can protect it."""
    for name, mechanism in product(algorithms.names(), ("none", *PRIVATE)):
        protects = privacy.find_mechanism(private(small_plan(), mechanism)).protects
        if mechanism == "none" or set(algorithms.find(name).released) <= set(protects):
            yield name, mechanism


def generous(plan):
    """Its promise also covers what a patient gives to the steps of all sites, as where all data are in one place."""
    return plan.change({"privacy.epsilon": 99.0}) if plan.agreement.privacy.is_private else plan


EVERY = [(name, mechanism, "float32") for name, mechanism in combinations()]


@pytest.mark.parametrize("name, mechanism", [pair[:2] for pair in EVERY if pair[1] != "none"])
def test_order_of_sites_does_not_matter_with_noise(ground, tmp_path, name, mechanism):
    made = generous(private(ground[0], mechanism, **{"training.rounds": 2})), ground[1]
    train(made, tmp_path / "one", name, **TESTED)
    train(made, tmp_path / "two", name, turned=True, **TESTED)
    assert same_arrays(final_arrays(tmp_path / "one", made[0]), final_arrays(tmp_path / "two", made[0]))


@pytest.mark.parametrize("name, mechanism, wire", [*EVERY, *((n, "none", "int8") for n in algorithms.names())])
def test_resumed_equals_unbroken_to_the_bit(ground, tmp_path, name, mechanism, wire):
    """The coordinator dies while round 2 is under way: one site has answered and stored, the other has not."""
    ground = generous(private(ground[0], mechanism)).change({"agreement.wire": wire}), ground[1]
    train(ground, tmp_path / "unbroken", name, **TESTED)

    class Dying(InProcess):
        def __call__(self, requests):
            first = next(iter(requests))
            answer = super().__call__({first: requests[first]})
            if from_bytes(requests[first]).round == 2:
                raise KeyboardInterrupt
            return answer | super().__call__({n: r for n, r in requests.items() if n != first})

    with pytest.raises(KeyboardInterrupt):
        train(ground, tmp_path / "broken", name, transport=Dying, **TESTED)
    rounds = tmp_path / "broken" / "rounds"
    assert checkpoints.saved_rounds(rounds) == [1]
    train(ground, tmp_path / "broken", name, state=checkpoints.load(rounds, 1), **TESTED)
    assert same_arrays(final_arrays(tmp_path / "unbroken", ground[0]), final_arrays(tmp_path / "broken", ground[0]))
    strip = lambda folder: [{**m, "seconds": 0} for m in metrics.read(folder)]  # noqa: E731
    assert strip(rounds) == strip(tmp_path / "unbroken" / "rounds")
    assert [m["round"] for m in metrics.read(rounds)] == [1, 2, 3]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", sharing())
def test_sites_that_learn_nothing_change_nothing(ground, name, rule):
    plan = ground[0].change({"average.rule": rule})
    chosen, weights = algorithms.make(AlgorithmSettings(name=name)), weights_of(build(plan.local.network, seed=1))
    state = chosen.start(RunSetup(plan, weights))
    idle = SimpleNamespace(
        name="",
        normalisation=(),
        memory=lambda: None,
        remember=lambda groups: None,
        mean_effective_steps=lambda mu: 1.0,
        fit=lambda weights, **_: LocalResult(dict(weights), np.zeros(1, np.float32), effective_steps=1.0),
    )
    releases = [Response("r", 1, s, chosen.local(idle, Request("r", 1, "train", state.shared))) for s in SITES]
    aggregator = Aggregator.of(plan, SITES)
    merged = chosen.merge(state, releases, aggregator.average)
    after = server_optimiser.step(aggregator.server, state, merged)
    assert after.round == 1 and same_arrays(dict(after.shared["weights"]), weights)


@pytest.mark.parametrize("name", sharing())
def test_one_site_that_holds_all_data_equals_plain_training_in_the_same_rounds(ground, tmp_path, name):
    """Without any federation: the training loop by itself on the pooled data, once for each round.

    A proximal term would be felt at one site, too, so it is left out.
    """
    plan, stores = ground
    together, local = pool_stores(stores), plan.local
    weights = weights_of(build(local.network, seed=1))
    for round in (1, 2, 3):
        seed = (local.training.seed, int(digest("pooled")[:16], 16), round)
        weights = fit(
            weights, together, local, privacy.find_mechanism(plan, 5),
            Schedule(2, lambda done, before=round - 1: (1 - (before + done) / 3) ** 0.9, seed),
        ).weights  # fmt: skip
    proximal = "mu" in {f.name for f in fields(algorithms.find(name))}
    made = with_algorithm(plan, name).change({"algorithm.settings": {"mu": 0.0} if proximal else {}})
    ledgers = {n: tmp_path / f"{n}.jsonl" for n in SITES}
    site = site_of("pooled", together, made, tmp_path / "site", ledgers, run="r")
    chosen = algorithms.make(made.agreement.algorithm)
    state = chosen.start(RunSetup(made, weights_of(build(local.network, seed=1))))
    course = loop.RunContext(
        chosen, Aggregator.of(made, ("pooled",)), made, InProcess([site]), tmp_path, "r", ("pooled",)
    )
    found = loop.run_rounds(course, state)
    assert all(np.allclose(found.shared["weights"][n], weights[n], atol=1e-5) for n in weights)
    assert [len(PrivacyLedger(path, n).charges()) for n, path in ledgers.items()] == [3, 3]
