"""A private plan: what is searched, what it guarantees, its grade, and what is refused."""

import itertools
import math
from dataclasses import replace

import pytest

from autofed import api, planner, plans
from autofed.errors import ValidationErrors
from autofed.planner.coarser_grids import FEWEST_ACROSS, grid_candidates
from autofed.planner.forecast import SOUND, STRAINED, averaged_ratio, grade, step_ratio
from autofed.planner.private import make_private
from autofed.planner.private_search import LEAST_EXPECTED, WIDTHS, SearchProblem, candidate_configurations
from autofed.planner.suggestions import larger_epsilons, with_epsilon
from autofed.plans import Budget, Plan
from autofed.privacy import accounting, guarantee
from tests.plans_made import SPEED, fingerprint

SITES = ("alpha", "bravo")


def pictures(cases=1000, pixels=3000, edge=128, sites=SITES, **options):
    """Many patients with one large structure each, in pictures."""
    data = fingerprint((1, edge, edge), (999.0, 1.0, 1.0), cases, ("red",), 1, sites, **options)
    held = data.classes["structure_1"]
    large = held.model_copy(update={"cases": cases, "components": cases, "volume": cases * pixels << 24})
    return data.model_copy(update={"classes": {**data.classes, "structure_1": large}})


def budget(epsilon=8.0, hours=0.5, **options) -> Budget:
    return Budget(hours=hours, speed=SPEED, epsilon=epsilon, **options)


@pytest.fixture(scope="module")
def private_plan() -> Plan:
    return planner.make(pictures(), budget())


def test_the_plan_fixes_network_and_privacy_and_says_why(private_plan):
    private, reasons = private_plan.agreement.privacy, {reason.field: reason for reason in private_plan.reasons}
    assert private.mechanism == "dp-sgd" and private.epsilon == 8 and private.delta == 1e-5
    assert private_plan.agreement.training.validate_every == 0 and 0 < private_plan.agreement.training.ema < 1
    for field in (
        "agreement.privacy.sampling_rate", "agreement.privacy.patches_per_patient", "agreement.privacy.clip",
        "agreement.privacy.noise_multiplier", "agreement.training.rounds", "agreement.training.ema",
        "agreement.training.snapshots", "agreement.average.weights", "local.network.features",
        "local.training.learning_rate", "local.training.steps_per_round", "agreement.privacy",
    ):  # fmt: skip
        assert reasons[field].why, field
    assert reasons["agreement.privacy"].value == planner.forecast(private_plan).grade


def test_the_noise_is_the_least_that_keeps_the_guarantee(private_plan):
    assert guarantee.problems(private_plan) == []
    private = private_plan.agreement.privacy.model_copy(
        update={"noise_multiplier": private_plan.agreement.privacy.noise_multiplier * 0.999}
    )
    less_noise = private_plan.model_copy(
        update={"agreement": private_plan.agreement.model_copy(update={"privacy": private})}
    )
    assert "spend epsilon 8.0" in guarantee.problems(less_noise)[0]


def test_the_same_plan_is_made_again(private_plan, tmp_path):
    private_plan.save(tmp_path / "plan.json")
    assert planner.make(pictures(), plans.load(tmp_path / "plan.json").budget) == private_plan


def test_the_hours_are_kept(private_plan):
    steps = private_plan.agreement.training.rounds * private_plan.local.training.steps_per_round
    private = private_plan.agreement.privacy
    passes = {site: private.sampling_rate * n for site, n in private_plan.agreement.patients.items()}
    seconds = private_plan.budget.seconds_per_step(
        private_plan.local.network, private_plan.local.training.patch_size, private.patches_per_patient, passes
    )
    assert 0.3 * 1800 < steps * seconds <= 1800
    planner.check_memory(private_plan)


def test_the_forecast_is_of_the_noise_that_the_mechanism_adds(private_plan):
    expected, private = planner.forecast(private_plan), private_plan.agreement.privacy
    site = expected.sites["alpha"]
    assert site.patients == 500 and site.expected == pytest.approx(private.sampling_rate * 500)
    assert 7.9 < site.epsilon <= 8 + 1e-6
    parameters = private_plan.local.network.parameters
    assert site.ratio == pytest.approx(private.noise_multiplier * math.sqrt(parameters) / site.expected)
    assert expected.ratio == pytest.approx(site.ratio / math.sqrt(2)), "two equal sites"
    steps = private_plan.agreement.training.rounds * private_plan.local.training.steps_per_round
    assert expected.total_ratio == pytest.approx(expected.ratio / math.sqrt(steps) * (30_000 / parameters) ** 0.25)


def test_the_ratio_of_a_step_is_that_of_released_noise():
    """Measured on the mechanism itself: the length of a noise-only step over the clip."""
    import torch

    from autofed.privacy.dpsgd import DPSGD

    mechanism = DPSGD(50, 0.2, 1, 3.0, 1.5).with_key(bytes(32))
    step = mechanism.step([], [torch.zeros(100_000)])
    assert float(step[0].norm()) / 3.0 == pytest.approx(step_ratio(1.5, 100_000, 10.0), rel=0.02)


def test_weights_decide_how_much_of_a_sites_noise_is_left():
    assert averaged_ratio({"a": 3.0, "b": 4.0}, {"a": 1.0, "b": 1.0}) == pytest.approx(2.5)
    assert averaged_ratio({"a": 3.0, "b": 400.0}, {"a": 1.0, "b": 0.0}) == 3.0


def test_more_patients_and_a_larger_epsilon_make_less_noise():
    base, patients = _problem(pictures(200)), _problem(pictures(800))
    ratios = [problem.search()[0].total_ratio for problem in (base, patients, with_epsilon(base, 20.0))]
    assert ratios[0] > 1.3 * max(ratios[1:])


def test_grades_are_in_order():
    assert [grade(ratio) for ratio in (SOUND, SOUND * 1.01, STRAINED, STRAINED * 1.01)] == [
        "sound", "strained", "strained", "hopeless",
    ]  # fmt: skip


def test_few_patients_are_refused_with_the_nearest_plan_that_can_be():
    with pytest.raises(ValidationErrors) as error:
        planner.make(pictures(8), budget())
    (problem,) = error.value.problems
    assert "from 4, 4 patients at epsilon 8 (delta 1e-05)" in problem and "times as many patients" in problem
    assert "pseudo-labels travel and no weights, is no formal guarantee" in problem
    reason, evidence, heading, *suggestions = problem.split("\n")
    assert reason.startswith("hardly anything would be learned") and "parameters" in evidence and "help" in heading
    assert len(suggestions) >= 3 and suggestions[0].startswith("    limited learning with about")
    assert planner.forecast(planner.make(pictures(8), budget(), even_if_hopeless=True)).grade == "hopeless"


def test_what_is_suggested_does_help():
    problem = _problem(pictures(40))
    assert problem.search()[0].total_ratio > STRAINED
    with pytest.raises(ValidationErrors) as error:
        planner.make(pictures(40), budget())
    factor = float(str(error.value).split("with about ")[1].split(" times")[0])
    better = planner.make(pictures(round(40 * factor)), budget(), even_if_hopeless=True)
    assert planner.forecast(better).total_ratio < 1.1 * STRAINED
    assert replace(problem, patients_factor=factor).search()[0].total_ratio <= STRAINED


def test_a_wide_network_set_by_hand_is_told_of_the_smaller_one(private_plan):
    stages = len(private_plan.local.network.features)
    wide = api.change(private_plan, None, {"network.features": [256, 512, 512, 512][:stages]})
    assert planner.forecast(wide).grade != "sound"
    (suggestion,) = planner.suggestions(wide)
    assert suggestion.startswith("good learning as autofed plans it by itself")
    assert f"{private_plan.local.network.parameters} parameters" in suggestion


def test_a_sound_plan_needs_no_suggestion_and_a_strained_one_gets_some(private_plan):
    assert planner.forecast(private_plan).grade == "sound" and planner.suggestions(private_plan) == ()
    strained = planner.make(pictures(100), budget())
    assert planner.forecast(strained).grade == "strained"
    assert any("patients" in suggestion for suggestion in planner.suggestions(strained))


def test_what_a_person_set_badly_is_told_what_the_planner_would_do(private_plan):
    worse = api.change(private_plan, None, {"privacy.sampling_rate": 0.004, "training.rounds": 5, "steps_per_round": 2})
    assert planner.forecast(worse).grade == "hopeless"
    assert "as autofed plans it by itself" in planner.suggestions(worse)[0]
    assert next(r.value for r in worse.reasons if r.field == "agreement.privacy") == "hopeless"


def test_a_delta_that_gives_a_patient_away_is_refused(private_plan):
    assert private_plan.agreement.privacy.delta == accounting.default_delta(500)
    with pytest.raises(ValidationErrors, match="a delta of 0.01 allows one of 100 patients"):
        planner.make(pictures(), budget(delta=0.01))


def test_sites_with_too_few_to_draw_from_are_named_with_all_else_that_is_wrong():
    data = pictures()
    lone = data.sites["alpha"].model_copy(update={"patients": 1, "labelled": 1, "cases": 1})
    data = data.model_copy(update={"sites": {**data.sites, "alpha": lone}})
    with pytest.raises(ValidationErrors) as error:
        planner.make(data, budget(delta=0.5))
    assert len(error.value.problems) == 2 and "the site alpha has 1 patient" in str(error.value)


def test_no_hours_for_a_single_step_is_said():
    with pytest.raises(ValidationErrors, match="not one private step at every site fits 1e-06 h"):
        planner.make(pictures(), budget(hours=1e-6))


def test_a_coarser_grid_is_taken_only_where_structures_are_large_enough():
    nonprivate_plan = planner.make(pictures(), Budget(hours=0.5, speed=SPEED))
    large, small = (list(grid_candidates(nonprivate_plan, pictures(pixels=pixels))) for pixels in (6000, 20))
    assert [grid.factor for grid in large][-1] == 4 and [grid.factor for grid in small] == [1]
    assert all(a.outline_loss < b.outline_loss for a, b in itertools.pairwise(large))
    width = math.sqrt(4 * 6000 / math.pi)
    assert large[-1].outline_loss == pytest.approx(3 / width) and width / 4 > FEWEST_ACROSS
    assert [grid.factor for grid in grid_candidates(nonprivate_plan)] == [1], "nothing says how large structures are"


def test_grid_patch_and_pooling_of_a_coarser_plan_fit_together(private_plan):
    coarse = next(
        c
        for c in grid_candidates(planner.make(pictures(), Budget(hours=0.5, speed=SPEED)), pictures())
        if c.factor == 2
    )
    assert coarse.geometry.spacing_mm == (999.0, 2.0, 2.0) and coarse.geometry.median_shape == (1, 64, 64)
    assert coarse.topology.patch == (64, 64) and coarse.topology.divisor == (8, 8), "edges of 8 at the deepest stage"
    assert len(coarse.network(4).features) == len(coarse.topology.strides)


def test_all_that_is_searched_fits_memory_and_draws_somebody():
    problem = _problem(pictures(30))
    for candidate in problem.search():
        assert candidate.sampling_rate * 15 >= LEAST_EXPECTED and candidate.steps >= 1
        assert candidate.configuration.width in WIDTHS
    assert min(c.predicted_loss for c in problem.search()) == problem.search()[0].predicted_loss


def test_the_accountant_has_the_last_word(private_plan):
    problem = _problem(pictures())
    best = problem.best()
    events = [_event(best)]
    assert accounting.epsilon(events, 1e-5) <= 8 and best.noise_multiplier == accounting.calibrate(
        lambda z: [events[0].model_copy(update={"noise_multiplier": z})], 8, 1e-5
    )
    assert best.noise_multiplier == pytest.approx(accounting.approximate_noise(
        best.scheduled_steps, best.sampling_rate, 8, 1e-5), rel=0.1)  # fmt: skip


def test_what_is_searched_costs_what_the_plan_will_be_charged(private_plan):
    """One object states the cost: the mechanism of the candidate is that of the plan."""
    from autofed import privacy

    best = _problem(pictures()).best()
    steps = private_plan.local.training.steps_per_round
    assert best.schedule == (private_plan.agreement.training.rounds, steps)
    assert best.mechanism.planned(*best.schedule) == guarantee.training_events(private_plan, steps)
    assert replace(best.mechanism, patients=500) == privacy.find_mechanism(private_plan, 500)


def test_noise_is_calibrated_once_on_the_way_to_a_plan(monkeypatch):
    """Also when the best few are compared."""
    calls, calibrate = [], accounting.calibrate
    monkeypatch.setattr(accounting, "calibrate", lambda *args: calls.append(args) or calibrate(*args))
    private_plan = planner.make(pictures(), budget())
    assert len(calls) == 1
    stated = private_plan.agreement.privacy
    assert guarantee.consistent_fields(private_plan, None, None, noise_is_given=False) == {
        guarantee.NOISE: stated.noise_multiplier, guarantee.EPSILON: 8.0, guarantee.DELTA: stated.delta
    }  # fmt: skip


@pytest.mark.parametrize("cases, hours, epsilon", [(60, 0.5, 8.0), (400, 0.1, 2.0), (3000, 2.0, 4.0), (100, 0.02, 1.0)])
def test_the_best_of_the_few_is_the_best_by_the_accountant(cases, hours, epsilon, monkeypatch):
    """Each of them calibrated, which a search need not do."""
    data = pictures(cases)
    nonprivate_plan = planner.make(data, Budget(hours=hours, speed=SPEED))
    problem = SearchProblem.of(nonprivate_plan, epsilon, 1e-5, grid_candidates(nonprivate_plan, data))
    best, candidates, best_few = problem.best(), problem.search()[:3], []
    for candidate in candidates:
        monkeypatch.setattr(SearchProblem, "search", lambda problem, alone=candidate: [alone])
        best_few.append(problem.best())
    assert best == min(best_few, key=lambda candidate: candidate.predicted_loss)


def test_private_fingerprints_are_paid_from_the_guarantee():
    nonprivate_plan = planner.make(pictures(), Budget(hours=0.5, speed=SPEED))
    noised = nonprivate_plan.change({"privacy.census_noise": 2.4})
    paid, free = make_private(noised, 8.0), make_private(nonprivate_plan, 8.0)
    assert paid.agreement.privacy.census_noise == 2.4 and guarantee.problems(paid) == []
    assert planner.forecast(paid).total_ratio > planner.forecast(free).total_ratio
    with pytest.raises(ValidationErrors, match="private fingerprints spend the whole epsilon"):
        make_private(nonprivate_plan.change({"privacy.census_noise": 0.1}), 8.0)


def test_trained_weights_keep_grid_and_network():
    nonprivate_plan = planner.make(pictures(), Budget(hours=0.5, speed=SPEED))
    plan = make_private(nonprivate_plan, 8.0, keep_network=True, even_if_hopeless=True)
    assert plan.local.network == nonprivate_plan.local.network and plan.local.geometry == nonprivate_plan.local.geometry
    followed = planner.follow(pictures(), nonprivate_plan, "RUN", budget(), even_if_hopeless=True)
    assert followed.agreement.privacy.is_private and followed.local.network == nonprivate_plan.local.network


def test_trained_weights_keep_a_network_that_was_set_by_hand():
    nonprivate_plan = planner.make(pictures(), Budget(hours=0.5, speed=SPEED))
    by_hand = [8, 12, *nonprivate_plan.local.network.features[2:]]
    nonprivate_plan = nonprivate_plan.change({"network.features": by_hand, "deep_supervision": False})
    plan = make_private(nonprivate_plan, 8.0, keep_network=True, even_if_hopeless=True)
    assert plan.local.network == nonprivate_plan.local.network


def test_weights_that_do_not_learn_get_no_noise_in_the_search_either():
    nonprivate_plan = planner.make(pictures(), Budget(hours=0.5, speed=SPEED))
    half = nonprivate_plan.change({"training.trained": "decoder"})
    (decoder, *_), (everything, *_) = (
        list(candidate_configurations(plan, grid_candidates(plan))) for plan in (half, nonprivate_plan)
    )
    assert decoder.trained_parameters == decoder.network.trained_parameters("decoder") < everything.trained_parameters
    assert everything.trained_parameters == everything.network.parameters
    private_plan = make_private(half, 8.0)
    why = next(r.why for r in private_plan.reasons if r.field == "local.network.features")
    assert f", {private_plan.local.network.trained_parameters('decoder')} of which train and get noise" in why


def test_sites_take_as_many_steps_as_each_other():
    nonprivate_plan = planner.make(pictures(), Budget(hours=0.5, speed=SPEED)).change({"steps_at": {"alpha": 2000}})
    private_plan = make_private(nonprivate_plan, 8.0)
    assert (
        private_plan.agreement.training.steps_at == {}
        and private_plan.steps_at("alpha") == private_plan.local.training.steps_per_round
    )


@pytest.mark.parametrize("epsilon", [1e-3, 8.0, 70.0])
def test_every_epsilon_that_is_ruled_out_was_looked_at(epsilon):
    epsilons = list(larger_epsilons(epsilon))
    assert epsilons == sorted(epsilons) and epsilons[-1] == 100
    assert all(b <= 2 * a for a, b in itertools.pairwise(epsilons))


def test_an_open_plan_becomes_private_and_hand_settings_have_the_last_word():
    nonprivate_plan = planner.make(pictures(), Budget(hours=0.5, speed=SPEED))
    private_plan = api.change(nonprivate_plan, None, {}, epsilon=8)
    assert private_plan.agreement.privacy.mechanism == "dp-sgd" and guarantee.problems(private_plan) == []
    fewer = api.change(private_plan, None, {"privacy.sampling_rate": 0.5})
    assert fewer.agreement.privacy.sampling_rate == 0.5 and guarantee.problems(fewer) == []
    adaptive = api.change(private_plan, None, {"privacy.mechanism": "adp"})
    assert adaptive.agreement.privacy.mechanism == "adp" and guarantee.problems(adaptive) == []
    expected = planner.forecast(adaptive)
    z, share = adaptive.agreement.privacy.noise_multiplier, adaptive.agreement.privacy.quantile_share
    assert expected.sites["alpha"].ratio == pytest.approx(
        step_ratio(z / math.sqrt(1 - share), adaptive.local.network.parameters, expected.sites["alpha"].expected)
    )


def test_a_plan_without_single_patients_gradients_has_no_forecast():
    nonprivate_plan = planner.make(pictures(), Budget(hours=0.5, speed=SPEED))
    assert planner.forecast(nonprivate_plan) is None and planner.suggestions(nonprivate_plan) == ()
    feddp = api.change(nonprivate_plan, None, {"privacy.mechanism": "feddp", "privacy.noise_multiplier": 1.0})
    assert planner.forecast(feddp) is None


def _problem(data) -> SearchProblem:
    nonprivate_plan = planner.make(data, Budget(hours=0.5, speed=SPEED))
    return SearchProblem.of(nonprivate_plan, 8.0, 1e-5, grid_candidates(nonprivate_plan, data))


def _event(candidate):
    from autofed.privacy.events import PrivacyEvent

    return PrivacyEvent(
        mechanism="",
        steps=candidate.scheduled_steps,
        noise_multiplier=candidate.noise_multiplier,
        sampling_rate=candidate.sampling_rate,
    )
