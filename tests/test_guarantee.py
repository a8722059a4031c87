"""A plan's noise and its promise are one thing: calibrated, checked before a training, and kept by a filter."""

import math

import numpy as np
import pytest

from autofed import api, plans, privacy
from autofed.errors import ValidationErrors
from autofed.federation.site import privacy_problems
from autofed.files import digest, write_json
from autofed.privacy import accounting, guarantee
from autofed.privacy.events import PrivacyEvent
from autofed.training.network import coupling_layers
from tests.plans_made import small_plan
from tests.small_federation import PRIVATE, private


def promised(mechanism, epsilon, **more):
    made = small_plan().change(PRIVATE[mechanism] | more)
    return made.change(guarantee.consistent_fields(made, epsilon, 1e-5, noise_is_given=False))


def best_renyi_epsilon(events):
    return accounting.renyi_epsilon(events, 1e-5, accounting.best_order(events, 1e-5))


@pytest.mark.parametrize("mechanism", PRIVATE)
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_noise_is_calibrated_for_the_promise_and_not_for_more(mechanism, epsilon):
    plan = promised(mechanism, epsilon)
    found = accounting.epsilon(guarantee.planned(plan, plan.local.training.steps_per_round), 1e-5)
    assert 0.98 * epsilon < found <= epsilon
    assert guarantee.problems(plan) == []


@pytest.mark.parametrize("change", [{"training.rounds": 6}, {"steps_per_round": 2}, {"steps_at": {"bravo": 3}},
                                    {"sampling_rate": 0.9}, {"noise_multiplier": 0.5}])  # fmt: skip
def test_a_promise_that_no_longer_holds_is_named(change):
    (first, *_) = guarantee.problems(promised("dp-sgd", 2.0).change(change))
    assert "the plan promises 2;" in first and "spend epsilon" in first


def test_a_private_plan_without_a_promise_is_refused():
    (problem,) = guarantee.problems(small_plan().change(PRIVATE["dp-sgd"]))
    assert "--epsilon 8 --delta 1e-5" in problem


def test_costs_are_those_of_the_steps_and_rounds_that_are_taken():
    """Mistake 6, rounds billed as steps: the plan's events are the sum of what the rounds will charge."""
    plan = promised("adp", 8.0, **{"noise_ratio": 0.5, "training.rounds": 4, "steps_per_round": 5})
    mechanism, charged = privacy.find_mechanism(plan, 4), []
    for round in range(1, 5):
        neutral = {"below": np.full((round - 1, 1), plan.agreement.privacy.quantile)}
        charged += privacy.adapted_mechanism(mechanism, neutral, round).cost(5)
    assert accounting.merged(charged) == accounting.merged(guarantee.planned(plan, 5))
    assert sum(event.steps for event in charged) == 20
    noises = [event.noise_multiplier for event in charged]
    assert noises[-1] == pytest.approx(noises[0] / 2) and noises == sorted(noises, reverse=True)


def test_shared_scores_are_part_of_the_promise():
    plain, sharing = promised("dp-sgd", 8.0), promised("dp-sgd", 8.0, score_noise=3.0)
    assert sharing.agreement.privacy.noise_multiplier > plain.agreement.privacy.noise_multiplier
    assert PrivacyEvent(mechanism="scores", steps=1, noise_multiplier=3.0) in guarantee.planned(sharing, 1)


def test_the_default_delta_is_that_of_the_largest_site():
    made = small_plan().change(PRIVATE["dp-sgd"] | {"agreement.patients": {"alpha": 20_000, "bravo": 5}})
    found = guarantee.consistent_fields(made, 8.0, None, noise_is_given=False)
    assert found["agreement.privacy.delta"] == pytest.approx(1 / 200_000)


def test_a_plan_written_when_noise_could_respond_is_read_and_keeps_its_digest(tmp_path):
    """The key was written as 0 by adp and as null by all others."""
    made = promised("adp", 4.0)
    written = made.model_dump(mode="json")
    written["agreement"]["privacy"]["noise_response"] = 0.0
    write_json(tmp_path / "plan.json", written)
    read = plans.load(tmp_path / "plan.json")
    assert read.agreement.digest() == digest(written["agreement"]) != made.agreement.digest()
    assert guarantee.problems(read) == [] and privacy.find_mechanism(read, 4) == privacy.find_mechanism(made, 4)
    assert "noise_response" in made.model_dump(mode="json")["agreement"]["privacy"], "or every digest would change"


@pytest.mark.parametrize("mechanism", ["adp", "dp-sgd"])
def test_noise_that_responds_is_no_more(mechanism):
    with pytest.raises(ValidationErrors, match="noise that responds to the clip was removed.*leave it out"):
        promised(mechanism, 4.0, noise_response=1.0)


def test_layers_that_couple_patients_are_named():
    from torch import nn

    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True),
                           nn.GroupNorm(1, 2), nn.InstanceNorm2d(2))  # fmt: skip
    assert coupling_layers(module) == ["1 (BatchNorm2d)", "2 (InstanceNorm2d)"]


def test_a_network_with_batch_norm_is_refused_for_patients(monkeypatch):
    from torch import nn

    from autofed import algorithms
    from autofed.federation import site

    build = site.build
    monkeypatch.setattr(site, "build", lambda plan: nn.Sequential(build(plan), nn.BatchNorm3d(1)))
    made = private(small_plan(), "dp-sgd")
    (problem,) = privacy_problems(made, algorithms.make(made.agreement.algorithm))
    assert problem.startswith("the layer 1 (BatchNorm3d) couples patients, so dp-sgd")
    made = private(small_plan(), "feddp")  # bounds the whole update
    assert privacy_problems(made, algorithms.make(made.agreement.algorithm)) == []


def test_what_a_mechanism_has_no_protection_for_is_refused():
    from autofed import algorithms

    made = private(small_plan(), "feddp").change({"algorithm.name": "scaffold"})
    (problem,) = privacy_problems(made, algorithms.make(made.agreement.algorithm))
    assert "scaffold releases control" in problem


def test_batch_dice_is_refused_for_patients():
    with pytest.raises(ValidationErrors, match="batch_dice couples the patients of a batch.*write false"):
        small_plan().change(PRIVATE["dp-sgd"] | {"batch_dice": True})


# --- at the keyboard


def test_epsilon_at_the_keyboard_calibrates_a_finished_plan(tmp_path):
    small_plan().save(tmp_path / "plan.json")
    made = api.change(tmp_path / "plan.json", tmp_path / "out.json", PRIVATE["dp-sgd"], epsilon=8.0, delta=1e-5)
    stated = plans.load(tmp_path / "out.json").agreement.privacy
    assert stated == made.agreement.privacy and (stated.epsilon, stated.delta) == (8.0, 1e-5)
    assert guarantee.problems(made) == [] and made.agreement.training.validate_every == 0
    longer = api.change(made, None, {"training.rounds": 9})
    assert longer.agreement.privacy.epsilon == 8.0 and guarantee.problems(longer) == []
    assert longer.agreement.privacy.noise_multiplier > stated.noise_multiplier
    louder = api.change(made, None, {"noise_multiplier": 2 * stated.noise_multiplier})
    assert louder.agreement.privacy.epsilon < 4 and guarantee.problems(louder) == []
    open_again = api.change(made, None, {"privacy.mechanism": "none"})
    assert not open_again.agreement.privacy.is_private


def test_a_grade_goes_with_what_it_is_of():
    made = api.change(small_plan(), None, PRIVATE["dp-sgd"])
    assert "agreement.privacy" in {reason.field for reason in made.reasons}
    for other in ("feddp", "none"):
        changed = api.change(made, None, {"privacy.mechanism": other})
        assert "agreement.privacy" not in {reason.field for reason in changed.reasons}


@pytest.mark.parametrize("settings, epsilon, said", [
    ({}, 8.0, "hardly anything would be learned from 4, 4 patients"),
    (PRIVATE["dp-sgd"] | {"noise_multiplier": 1.0}, 8.0, "leave one out"),
    ({"noise_multiplier": 0.1}, 8.0, "leave one out"),
    ({"privacy.mechanism": "none"}, 8.0, "the mechanism none, which guarantees nothing"),
    ({"privacy.epsilon": 3.0}, 8.0, "given twice, by --epsilon and by --set"),
    ({"privacy.mechanism": "dp-sgd", "quantile": 0.3}, None, "'dp-sgd' has no quantile"),
    (PRIVATE["dp-sgd"], 0.0, "found an epsilon of 0; write one above 0"),
    (PRIVATE["dp-sgd"], math.nan, "found an epsilon of nan"),
])  # fmt: skip
def test_wishes_that_contradict_each_other_are_refused(settings, epsilon, said):
    with pytest.raises(ValidationErrors, match=said):
        api.change(small_plan(), None, settings, epsilon=epsilon)


def test_the_filter_of_a_ledger_and_the_promise_agree():
    plan = promised("dp-sgd", 8.0)
    events = guarantee.planned(plan, 1)
    assert accounting.epsilon(events, 1e-5) <= best_renyi_epsilon(events)
    assert math.isinf(accounting.epsilon([*events, PrivacyEvent(mechanism="none", steps=1)], 1e-5))


def test_a_mechanism_that_is_named_again_keeps_its_promise():
    made = api.change(small_plan(), None, PRIVATE["dp-sgd"], epsilon=8.0, delta=1e-5)
    again = api.change(made, None, {"privacy.mechanism": "dp-sgd", "training.rounds": 9})
    assert (again.agreement.privacy.epsilon, again.agreement.privacy.delta) == (8.0, 1e-5)
    other = api.change(made, None, {"privacy.mechanism": "adp"})
    assert other.agreement.privacy.epsilon == 8.0 and guarantee.problems(other) == []


def test_a_plan_that_is_open_again_is_as_others_are():
    before, named = small_plan(), PRIVATE["dp-sgd"]
    training = api.change(api.change(before, None, named), None, {"privacy.mechanism": "none"}).agreement.training
    assert (training.ema, training.validate_every) == (0.0, 1)


def test_the_adaptive_clip_is_not_normalised_away():
    assert small_plan().change({"privacy.mechanism": "adp"}).agreement.privacy.clipping == "flat"


@pytest.mark.parametrize("delta, said", [(0.0, "found a delta of 0"), (2.0, "found a delta of 2")])
def test_a_delta_that_is_none_is_refused(delta, said):
    with pytest.raises(ValidationErrors, match=said):
        api.change(small_plan(), None, PRIVATE["dp-sgd"], epsilon=8.0, delta=delta)


def test_a_delta_of_one_in_so_many_patients_is_refused():
    made = small_plan().change(PRIVATE["dp-sgd"] | {"agreement.patients": {"alpha": 500, "bravo": 50}})
    found = guarantee.problems(made.change(guarantee.consistent_fields(made, 8.0, 0.01, noise_is_given=False)))
    assert ["allows as much as one of 500 patients" in problem for problem in found] == [True]


def test_a_plan_names_the_mechanisms_that_there_are():
    named = [small_plan().change({"privacy.mechanism": mechanism}) for mechanism in plans.mechanisms()]
    assert [privacy.find_mechanism(plan).name for plan in named] == list(plans.mechanisms())
    unknown = small_plan().agreement.privacy.model_copy(update={"mechanism": "laplace"})
    made = small_plan().model_copy(update={"agreement": small_plan().agreement.model_copy(update={"privacy": unknown})})
    with pytest.raises(ValidationErrors, match="no mechanism 'laplace'; the mechanisms are: none, dp-sgd, adp, feddp"):
        privacy.find_mechanism(made)


@pytest.mark.parametrize("rounds", [2, 100])
def test_the_filter_counts_a_tenth_to_a_quarter_more(rounds):
    """As docs/privacy.md says of a ceiling for one plan of epsilon 8."""
    plan = promised("dp-sgd", 8.0, **{"training.rounds": rounds, "steps_per_round": 6, "sampling_rate": 0.2})
    events = guarantee.planned(plan, 6)
    assert 1.05 < best_renyi_epsilon(events) / accounting.epsilon(events, 1e-5) < 1.3
