"""DCFed: only labels travel, a private teacher alone answers, and a site that errs does not spoil the others."""

import json
import shutil

import numpy as np
import pytest
import torch

import autofed
from autofed import algorithms, privacy
from autofed.algorithms import LearningRateCycle, RunSetup
from autofed.algorithms.dcfed import DCFed
from autofed.algorithms.fedavg import FedAvg
from autofed.data.images import read_labels
from autofed.errors import ValidationErrors
from autofed.federation import client, communication, metrics, rounds
from autofed.federation.aggregation import Aggregator
from autofed.federation.client import SITE_ONLY, SiteContext, _rate
from autofed.federation.node import Handshake, SiteNode
from autofed.federation.site import privacy_problems
from autofed.federation.transports.flower.transport import _plan_mismatches
from autofed.federation.transports.in_process import InProcess
from autofed.messages import Failure, Request, Response, from_bytes, load_groups
from autofed.planner.forecast import forecast
from autofed.plans import AlgorithmSettings
from autofed.preprocessing import UNKNOWN, differences, find_public, open_public, public_digests
from autofed.privacy import guarantee
from autofed.privacy.ledger import PrivacyLedger
from autofed.report.pages import _training
from tests.equality import same_arrays
from tests.small_federation import CASES, OPEN, labelled, private, site_of, train, with_algorithm
from tests.synthetic import ORGAN_AND_TUMOUR, REGIONS, TUMOUR, make_site

SEEDED = {"noise_seed": 1, "simulation": True}


@pytest.fixture
def ear():
    """A transport that keeps what travelled."""

    class Ear(InProcess):
        down, up = [], []

        def __call__(self, requests):
            answers = super().__call__(requests)
            Ear.down += requests.values()
            Ear.up += answers.values()
            return answers

    return Ear


def memories(folder, kind="memory"):
    return {path.parent.parent.name: load_groups(path)[0] for path in folder.glob(f"sites/*/{kind}/round_00003.*")}


# --- what travels


def test_only_bytes_about_public_images_travel(ground, tmp_path, ear):
    state = train(ground, tmp_path, "dcfed", transport=ear)
    names = set(state.shared["agreed"])
    for request in map(from_bytes, ear.down):
        assert set(request.shared) == {"agreed", "course"} and set(request.shared["agreed"]) == names
        assert {array.dtype for array in request.shared["agreed"].values()} == {np.dtype("uint8")}
        assert sum(array.size for array in request.shared["course"].values()) == 5
    for release in map(from_bytes, ear.up):
        assert set(release.arrays) == {"answers", "metrics"} and set(release.arrays["metrics"]) == {"loss"}
        for name, said in release.arrays["answers"].items():
            assert said.dtype == np.uint8 and said.shape == (2, *state.shared["agreed"][name].shape)


def test_sites_learn_from_the_agreed_labels_and_each_keeps_its_own_network(ground, tmp_path):
    train(ground, tmp_path / "together", "dcfed")
    plan, stores = ground
    deaf = plan.change({"algorithm.name": "dcfed"})
    alone = {"weight": 0.0}
    state = train((deaf, stores), tmp_path / "alone", "dcfed", settings=OPEN | alone)
    assert any((found != UNKNOWN).any() for found in state.shared["agreed"].values())
    together, alone = (memories(tmp_path / folder) for folder in ("together", "alone"))
    assert set(together) == set(CASES)
    for site in CASES:
        assert not same_arrays(together[site]["weights"], alone[site]["weights"])
    assert not same_arrays(together["alpha"]["weights"], together["bravo"]["weights"])


@pytest.mark.parametrize(("members", "asked"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_an_ensemble_is_the_models_of_the_last_rounds_of_an_act(ground, tmp_path, monkeypatch, members, asked):
    seen, label = [], SiteContext.label
    monkeypatch.setattr(
        SiteContext, "label", lambda self, found, *rest: seen.append(found) or label(self, found, *rest)
    )
    train(ground, tmp_path, "dcfed", settings=OPEN | {"begin": 1.0, "members": members})
    assert [len(found) for found in seen] == [asked] * len(CASES)  # once a site, after three rounds
    for found in seen:
        weights = [next(iter(one.values())).tobytes() for one in found]
        assert len(set(weights)) == asked


def test_no_model_of_an_earlier_act_is_a_member(ground, tmp_path, monkeypatch):
    seen, label = [], SiteContext.label
    monkeypatch.setattr(
        SiteContext, "label", lambda self, found, *rest: seen.append(len(found)) or label(self, found, *rest)
    )
    train(ground, tmp_path, "dcfed", settings=OPEN | {"begin": 0.6, "exchanges": 2})
    assert sorted(seen) == [1] * len(CASES) + [2] * len(CASES)  # after the second round, and after the third alone


def test_a_teacher_that_is_a_moving_average_knows_the_steps_of_the_round_in_which_it_answers(
    ground, tmp_path, monkeypatch
):
    seen, label = {}, SiteContext.label
    monkeypatch.setattr(
        SiteContext, "label", lambda self, found, *rest: seen.update({self.name: found[0]}) or label(self, found, *rest)
    )
    plan = ground[0].change({"training.ema": 0.5})
    train((plan, ground[1]), tmp_path, "dcfed", settings=OPEN | {"begin": 1.0})
    kept = memories(tmp_path)
    assert all(
        same_arrays(seen[site], kept[site]["mean"]) and not same_arrays(seen[site], kept[site]["weights"])
        for site in CASES
    )


class Forgetful(InProcess):
    """Between rounds sites forget what their members said, and somebody else draws from torch's generator."""

    def __call__(self, requests):
        for site in self.sites.values():
            shutil.rmtree(site.folder / "said", ignore_errors=True)
        torch.manual_seed(len(requests))
        return super().__call__(requests)


def test_passes_with_dropout_are_the_same_for_whoever_goes_on_after_a_break(ground, tmp_path, ear):
    plan, stores = ground[0].change({"network.dropout": 0.3}), ground[1]
    found = {}
    for name, door, passes in (("whole", InProcess, 2), ("broken", Forgetful, 2), ("none", InProcess, 0)):
        state = train(
            (plan, stores), tmp_path / name, "dcfed", transport=door, settings=OPEN | {"dropout_passes": passes}
        )
        found[name] = state.shared["agreed"], memories(tmp_path / name)["alpha"]["weights"]
    assert all(same_arrays(one, other) for one, other in zip(found["whole"], found["broken"], strict=True))
    assert not any(same_arrays(one, other) for one, other in zip(found["whole"], found["none"], strict=True))


# --- privacy: the release is a function of the private teacher alone


def private_bytes(ground, folder, ear):
    train((private(ground[0], "dp-sgd"), ground[1]), folder, "dcfed", transport=ear, **SEEDED)
    found, ear.up, ear.down = (ear.up, ear.down), [], []
    return found


def never(self, agreed, weight, act):
    """No model apart."""


def other_data(self, agreed, weight, act):
    """The model apart learns from other patients, and for more steps."""
    site = self._site
    before, store, steps = self._mechanism, site.store, site.steps
    site.store, site.steps = site.store.only(sorted(site.store.patients)[:1]), 3
    try:
        whole(self, agreed, weight, act)
    finally:
        assert self._mechanism is before
        site.store, site.steps = store, steps


def full_disk(self, *_):
    raise OSError("the disk is full")


whole = SiteContext.fit_unreleased


@pytest.mark.parametrize("apart", [never, other_data])
def test_no_byte_depends_on_the_model_that_was_trained_without_the_mechanism(ground, tmp_path, ear, monkeypatch, apart):
    expected = private_bytes(ground, tmp_path / "one", ear)
    first = memories(tmp_path / "one", SITE_ONLY)
    assert set(first) == set(CASES)
    with monkeypatch.context() as patch:
        patch.setattr(SiteContext, "fit_unreleased", apart)
        assert private_bytes(ground, tmp_path / "two", ear) == expected
    second = memories(tmp_path / "two", SITE_ONLY)
    assert not any(same_arrays(first[site]["weights"], second[site]["weights"]) for site in second)


def test_what_goes_wrong_in_the_model_apart_is_for_the_sites_log_alone(ground, tmp_path, ear, monkeypatch):
    expected = private_bytes(ground, tmp_path / "one", ear)
    (tmp_path / "two" / "sites" / "bravo" / "site.log").mkdir(parents=True)  # a log that cannot be written either
    with monkeypatch.context() as patch:
        patch.setattr(client, "fit", failing_without_mechanism(client.fit))
        assert private_bytes(ground, tmp_path / "two", ear) == expected
    assert "the disk is full" in (tmp_path / "two" / "sites" / "alpha" / "site.log").read_text()
    assert not any("past" in group for found in memories(tmp_path / "one", SITE_ONLY).values() for group in found)


def failing_without_mechanism(fit):
    def half(weights, store, local, mechanism, *schedule, **options):
        if not mechanism.private:
            full_disk(mechanism)
        return fit(weights, store, local, mechanism, *schedule, **options)

    return half


def test_rubbish_where_the_model_apart_is_kept_changes_no_byte(ground, tmp_path, ear):
    expected = private_bytes(ground, tmp_path / "one", ear)
    for site in CASES:
        folder = tmp_path / "two" / "sites" / site / SITE_ONLY
        folder.mkdir(parents=True)
        for round in range(4):
            (folder / f"round_{round:05d}.safetensors").write_bytes(b"rubbish")
        (folder / "best.safetensors").write_bytes(b"rubbish")
    assert private_bytes(ground, tmp_path / "two", ear) == expected


def test_the_secret_noise_decides_what_the_teacher_says(ground, tmp_path, ear):
    """Else the tests above would hold of answers that depend on nothing."""
    expected = private_bytes(ground, tmp_path / "one", ear)
    plan = private(ground[0], "dp-sgd")
    train((plan, ground[1]), tmp_path / "two", "dcfed", transport=ear, noise_seed=2, simulation=True)
    assert ear.up != expected[0]
    assert all(set(from_bytes(data).arrays) == {"answers"} for data in ear.up)  # no loss, and nothing else


def test_the_model_apart_is_no_dp_model_and_the_teacher_is(ground, tmp_path):
    train((private(ground[0], "dp-sgd"), ground[1]), tmp_path, "dcfed", **SEEDED)
    teachers, own = memories(tmp_path), memories(tmp_path, SITE_ONLY)
    assert all(not same_arrays(teachers[site]["weights"], own[site]["weights"]) for site in CASES)
    assert json.loads((tmp_path / "sites/alpha/losses.json").read_text()).keys() == {"1", "2", "3"}


def test_the_model_apart_and_the_lessons_see_as_many_patches_as_the_teacher_on_average(ground, tmp_path, monkeypatch):
    plan = private(ground[0], "dp-sgd", sampling_rate=0.9, patches_per_patient=4)
    expected = {site: round(0.9 * patients * 4 / 2) for site, patients in CASES.items()}
    assert {site: plan.batches_at(site) for site in CASES} == expected and ground[0].batches_at("alpha") == 1
    seen, fit = [], client.fit
    monkeypatch.setattr(
        client, "fit", lambda *a, **more: seen.append((a[3], more["terms"].auxiliary)) or fit(*a, **more)
    )
    train((plan, ground[1]), tmp_path, "dcfed", **SEEDED)
    apart = [mechanism.passes for mechanism, _ in seen if not mechanism.private]
    assert apart == [expected[site] for site in CASES] * 3
    lessons = [lesson for _, lesson in seen if lesson]
    assert {lesson.batches for lesson in lessons} == set(expected.values())
    assert {lesson.clip for lesson in lessons} == {plan.agreement.privacy.clip}


@pytest.mark.parametrize("exchanges_wanted", [1, 8])
def test_the_ledger_knows_the_private_steps_and_nothing_else(ground, tmp_path, exchanges_wanted):
    """However often sites answer, and however much they learn from public images."""
    plan = private(ground[0], "dp-sgd")
    train((plan, ground[1]), tmp_path, "dcfed", settings=OPEN | {"exchanges": exchanges_wanted}, **SEEDED)
    for site in CASES:
        ledger = PrivacyLedger.existing(tmp_path / site / "ledger.jsonl")
        events = [event for charge in ledger.charges() for event in charge.events]
        assert [(e.mechanism, e.steps) for e in events] == [("dp-sgd", 1)] * 3
        assert [charge.question for charge in ledger.charges()] == ["train"] * 3
        stated = plan.agreement.privacy
        planned = guarantee.planned(plan, plan.steps_at(site))
        assert sum(e.steps for e in events) == sum(e.steps for e in planned)
        assert privacy.accounting.epsilon(events, stated.delta) <= stated.epsilon


def test_a_mechanism_whose_models_are_not_private_lets_no_answer_leave(ground, tmp_path):
    """FedDP noises what leaves of a round, and trains without it: its model is no private teacher."""
    with pytest.raises(ValidationErrors, match="dcfed releases answers, and feddp has no protection for it"):
        train((private(ground[0], "feddp"), ground[1]), tmp_path, "dcfed")
    assert "answers" not in privacy.find_mechanism(private(ground[0], "feddp")).release({"answers": {}})


@pytest.mark.parametrize("stated", [False, True])
def test_answers_leave_only_if_the_algorithm_says_what_made_them(ground, tmp_path, ear, monkeypatch, stated):
    """Another algorithm could put whatever it knows of its patients into a group of that name."""
    honest = FedAvg.local

    def telling(self, site, request):
        return {**honest(self, site, request), "answers": {"of": np.arange(300, dtype=np.uint8)}}

    monkeypatch.setattr(FedAvg, "local", telling)
    monkeypatch.setattr(FedAvg, "is_dp_postprocessing", stated, raising=False)
    train((private(ground[0], "dp-sgd"), ground[1]), tmp_path, "fedavg", transport=ear, **SEEDED)
    assert {frozenset(from_bytes(data).arrays) for data in ear.up} == {frozenset({"update", *["answers"] * stated})}


def test_an_algorithm_that_does_not_say_so_cannot_be_private(ground, monkeypatch):
    plan, _ = labelled((with_algorithm(private(ground[0], "dp-sgd"), "dcfed"), ground[1]))
    chosen = algorithms.make(plan.agreement.algorithm)
    assert privacy_problems(plan, chosen) == []
    monkeypatch.setattr(DCFed, "is_dp_postprocessing", False)
    assert "dcfed releases answers" in privacy_problems(plan, chosen)[0]


def test_a_forecast_does_not_average_the_noise_of_sites_that_share_no_weights(ground):
    wholes = {
        name: forecast(with_algorithm(private(ground[0], "dp-sgd"), name)).ratio
        for name in ("fedavg", "local", "dcfed")
    }
    assert wholes["dcfed"] == wholes["local"] > wholes["fedavg"]


# --- the course of a training


def state_of(ground, **settings):
    plan, public = labelled(with_dcfed(ground), settings)
    chosen = algorithms.make(plan.agreement.algorithm)
    return plan, chosen, chosen.start(RunSetup(plan, {"w": np.zeros(3, np.float32)}, public.grids))


def with_dcfed(ground):
    return with_algorithm(ground[0], "dcfed"), ground[1]


def answers_of(state, value):
    return {n: np.full((2, *grid.shape), value, np.uint8) for n, grid in state.shared["agreed"].items()}


def walk(ground, answer, rounds=12, **settings):
    """(asks, weight, act) of every round, where sites answer the same as long as they are asked."""
    made = ground[0].change({"training.rounds": rounds}), ground[1]
    _, chosen, state = state_of(made, **settings)
    seen = []
    for round in range(1, rounds + 1):
        course = state.shared["course"]
        seen.append((bool(course["asks"][0]), float(course["weight"][0]), tuple(course["act"].tolist())))
        groups = {"answers": answers_of(state, answer) if seen[-1][0] else {}, "metrics": {}}
        assert chosen.misfits(groups, state.shared) == []
        state = chosen.merge(state, [Response("r", round, site, groups) for site in CASES], None)
    return seen, state


def rounds_asked(seen):
    return [round for round, (asks, *_) in enumerate(seen, 1) if asks]


def test_sites_are_asked_where_an_act_ends_and_the_weight_ramps_up_in_the_next(ground):
    seen, _ = walk(ground, 128, begin=0.3, exchanges=3, ramp=0.5, weight=2.0)
    assert rounds_asked(seen) == [4, 8, 12]
    assert [act for *_, act in seen] == [(0, 4)] * 4 + [(4, 8)] * 4 + [(8, 12)] * 4
    weights = [weight for _, weight, _ in seen]
    assert weights[:4] == [0] * 4 and weights[5:8] == weights[9:] == [2.0] * 3
    assert weights[4] == weights[8] == pytest.approx(2 * np.exp(-5 * (1 - 1 / 2) ** 2))


def test_sites_that_are_asked_once_learn_to_the_end_from_what_they_said_then(ground):
    seen, _ = walk(ground, 128, begin=0.25, exchanges=1)
    assert rounds_asked(seen) == [3]
    assert [act for *_, act in seen] == [(0, 3)] * 3 + [(3, 12)] * 9
    assert walk(ground, 128, rounds=1)[0] == [(True, 0.0, (0, 1))]


def test_the_rate_comes_to_rest_where_an_act_ends_and_begins_anew(ground):
    plan = ground[0].change({"training.rounds": 6}).agreement.training
    act = LearningRateCycle(2, 6)
    assert _rate(plan, 2, act) == 1 and _rate(plan, 5.999, act) < 0.001
    assert _rate(plan, 4, act) == pytest.approx(0.5**0.9)
    assert _rate(plan, 1.999, LearningRateCycle(0, 2)) < 0.002
    assert _rate(plan, 4, None) == plan.rate_at(4) == pytest.approx((1 / 3) ** 0.9)


def test_a_site_takes_its_steps_at_the_rates_of_the_act(ground, tmp_path, monkeypatch):
    rates, fit = [], client.fit
    monkeypatch.setattr(client, "fit", lambda *a, **more: rates.append(a[4].rate(0)) or fit(*a, **more))
    plan = ground[0].change({"training.rounds": 4})
    train((plan, ground[1]), tmp_path, "dcfed", settings=OPEN | {"begin": 0.5, "exchanges": 2})
    assert sorted(rates, reverse=True) == [pytest.approx(r) for r in [1.0] * 4 + [0.5**0.9] * 4]


def test_a_private_teacher_keeps_the_rates_of_its_plan_and_the_model_apart_has_acts(ground, tmp_path, monkeypatch):
    rates, fit = {True: set(), False: set()}, client.fit

    def spied(weights, store, local, mechanism, schedule, **more):
        rates[mechanism.private].add(round(schedule.rate(0), 6))
        return fit(weights, store, local, mechanism, schedule, **more)

    monkeypatch.setattr(client, "fit", spied)
    plan = private(ground[0].change({"training.rounds": 4}), "dp-sgd")
    train((plan, ground[1]), tmp_path, "dcfed", settings=OPEN | {"begin": 0.5, "exchanges": 2}, **SEEDED)
    assert rates == {True: {round((1 - r / 4) ** 0.9, 6) for r in range(4)}, False: {1.0, round(0.5**0.9, 6)}}


def test_nobody_is_asked_again_when_the_labels_have_settled(ground):
    seen, state = walk(ground, 0, begin=0.25, exchanges=10, settled=0.02)
    assert rounds_asked(seen) == [3, 4]  # the first answers change everything, the second nothing
    assert seen[-1][1] == 1.0 and all((found == 0).all() for found in state.shared["agreed"].values())


def test_where_every_gate_is_shut_nothing_is_agreed_and_nothing_settles(ground):
    seen, state = walk(ground, 128, begin=0.25, exchanges=10)
    assert rounds_asked(seen) == list(range(3, 13))
    assert all((found == UNKNOWN).all() for found in state.shared["agreed"].values())


@pytest.mark.parametrize("spoil", ["other names", "other grid", "other depth", "other dtype", "nothing"])
def test_a_site_that_answers_something_else_is_left_out_and_named(ground, tmp_path, spoil):
    _, chosen, state = state_of(ground, **OPEN)
    answers = answers_of(state, 0)
    first = sorted(answers)[0]
    match spoil:
        case "other names":
            answers["strange"] = answers.pop(first)
        case "other grid":
            answers[first] = answers[first][:, :-1]
        case "other depth":
            answers = {name: np.concatenate([array, array]) for name, array in answers.items()}
        case "other dtype":
            answers[first] = answers[first].astype(np.float32)
        case "nothing":
            answers = {}
    found = chosen.misfits({"answers": answers}, state.shared)
    assert found == ["answered with labels of other images, structures or grids than it was asked for"]

    class Spoiling(InProcess):
        def __call__(self, requests):
            sent = super().__call__(requests)
            release = from_bytes(sent["alpha"])
            arrays = {**release.arrays, "answers": answers}
            return {**sent, "alpha": autofed.messages.to_bytes(Response("r", release.round, "alpha", arrays))}

    train((ground[0].change({"faults.least_sites": 1}), ground[1]), tmp_path, "dcfed", transport=Spoiling)
    assert all("labels of other images" in line["left_out"]["alpha"] for line in metrics.read(tmp_path / "rounds"))


@pytest.mark.parametrize("settings", [{"confidence": 2}, {"temperature": 0}, {"members": 0}, {"weight": -1},
                                      {"dropout_passes": -1}, {"dropout_passes": 1.5}, {"exchanges": 2.0},
                                      {"members": 2.0}, {"exchanges": 0}])  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValidationErrors, match=f"{next(iter(settings))} is"):
        algorithms.make(AlgorithmSettings(name="dcfed", settings=settings))


def test_labels_that_are_none_of_the_public_images_are_a_bad_request(ground, tmp_path):
    plan, public = labelled(with_dcfed(ground))
    ledgers = {"alpha": tmp_path / "ledger.jsonl"}
    site = site_of("alpha", ground[1]["alpha"], plan, tmp_path / "site", ledgers, run="r", public=public)
    shared = algorithms.make(plan.agreement.algorithm).start(RunSetup(plan, {}, public.grids)).shared
    course = {**shared["course"], "weight": np.ones(1, np.float32)}
    shared = {"agreed": {"../alpha_000": np.zeros((1, 2, 2), np.uint8)}, "course": course}
    answer = from_bytes(site.answer(autofed.messages.to_bytes(Request("r", 1, "train", shared))))
    assert isinstance(answer, Failure) and answer.code == "bad-request"
    assert "is none of the public images" in (tmp_path / "site" / "site.log").read_text()


# --- public images


def test_public_images_are_agreed_on_by_content_and_differences_are_named(tmp_path, make_site):
    folder = make_site("public", cases=3)
    agreed = public_digests(find_public(folder, 1))
    assert agreed == public_digests(find_public(folder / "imagesTr", 1))  # with or without a dataset around
    first, second, third = sorted((folder / "imagesTr").iterdir())
    shutil.copy(first, folder / "imagesTr" / "more_0000.nii.gz")
    shutil.copy(first, second)
    third.unlink()
    assert differences(agreed, agreed) == []
    found = differences(agreed, public_digests(find_public(folder, 1)))
    assert [line.split(" is ")[0] for line in found] == ["public_002", "more", "public_001"]
    assert ["not here" in found[0], "not agreed on" in found[1], "other content" in found[2]] == [True] * 3


def test_public_images_of_any_size_come_onto_the_grid_and_back(ground, tmp_path):
    """Smaller and larger than the patch, which is 16 voxels wide."""
    for name, shape in (("small", (5, 6, 7)), ("large", (20, 14, 18))):
        make_site(tmp_path / name, cases=1, shape=shape)
        shutil.copytree(tmp_path / name / "imagesTr", tmp_path / "public" / "imagesTr", dirs_exist_ok=True)
    plan = agreed_on(with_algorithm(ground[0], "dcfed").change({"algorithm.settings": OPEN}), tmp_path / "public")
    public = open_public(tmp_path / "public", plan, tmp_path / "work")
    assert public.grids == {"large_000": (20, 14, 18), "small_000": (5, 6, 7)}
    maps = {name: np.zeros(grid, np.uint8) for name, grid in public.grids.items()}
    maps["small_000"][1:4, 2:5, 2:5] = 1
    maps["large_000"][:] = UNKNOWN
    store = public.labelled(maps, tmp_path / "labels")
    assert list(store.patients) == ["small_000"] and set(np.unique(store.label("small_000")[:])) == {0, 1}
    work, stores = tmp_path / "sites", ground[1]
    chosen = algorithms.make(plan.agreement.algorithm)
    sites = [site_of(n, s, plan, work / n, {n: work / f"{n}.jsonl"}, run="r", public=public) for n, s in stores.items()]
    state = chosen.start(RunSetup(plan, {}, public.grids))
    course = rounds.RunContext(
        chosen, Aggregator.of(plan, CASES), plan, InProcess(sites), tmp_path / "rounds", "r", tuple(CASES)
    )
    end = rounds.run_rounds(course, state)
    assert all((found != UNKNOWN).any() for found in end.shared["agreed"].values())
    assert not any("left_out" in line for line in metrics.read(tmp_path / "rounds"))


def agreed_on(plan, folder):
    found = public_digests(find_public(folder, len(plan.agreement.channels)))
    return plan.model_copy(update={"agreement": plan.agreement.model_copy(update={"public_images": found})})


def test_what_cannot_be_labelled_is_refused_by_name(ground, tmp_path):
    plan = with_algorithm(ground[0], "dcfed")
    make_site(tmp_path / "flat", cases=1, dimension=2, ending=".nii.gz")
    with pytest.raises(ValidationErrors, match="flat_000: the image has 1 slices, the plan is 3D"):
        open_public(tmp_path / "flat", agreed_on(plan, tmp_path / "flat"), tmp_path / "work")
    with pytest.raises(ValidationErrors, match="found 2 channels, but the plan has 1"):
        make_site(tmp_path / "two", cases=1, channels=("a", "b"))
        find_public(tmp_path / "two", 1)
    with pytest.raises(ValidationErrors, match="no images were found"):
        (tmp_path / "empty").mkdir()
        find_public(tmp_path / "empty", 1)


# --- between machines


def test_a_site_may_have_another_network_but_no_other_agreement(ground):
    for name, free in (("dcfed", True), ("fedavg", False)):
        plan = with_algorithm(ground[0], name)
        said = Handshake(site="alpha", agreement=plan.agreement.digest(), local="of its own")
        assert bool(_plan_mismatches(said, plan)) == (not free)
        assert _plan_mismatches(said.model_copy(update={"agreement": "another"}), plan)


def test_a_site_that_holds_other_public_images_does_not_take_part(ground, tmp_path):
    plan, _ = labelled(with_dcfed(ground))
    work = next(iter(ground[1]["alpha"].folders.values())).parents[2]
    plan.save(tmp_path / "plan.json")
    shutil.copytree(work.parent / "public", tmp_path / "public")
    place = {"site": "alpha", "work": work, "plan": tmp_path / "plan.json", "memory": tmp_path / "memory"}
    SiteNode(**place, public=tmp_path / "public").check()
    assert SiteNode(**place, public=tmp_path / "public").handshake("0" * 32).agreement
    with pytest.raises(ValidationErrors, match="agrees on 2 public images; name the folder"):
        SiteNode(**place).check()
    next((tmp_path / "public" / "imagesTr").iterdir()).unlink()
    with pytest.raises(ValidationErrors, match="public_000 is agreed on but not here"):
        SiteNode(**place, public=tmp_path / "public").check()
    assert SiteNode(**place, public=tmp_path / "public").handshake("0" * 32).agreement == ""
    assert "public_000 is agreed on" in (tmp_path / "memory" / "site.log").read_text()


# --- through the verbs

SMALL = {"training.batch_size": 4, "steps_per_round": 6, "training.rounds": 3, "learning_rate": 0.05,
         "network.features": [8, 16, 16], "patch_size": [32, 32], "network.strides": [[1, 1], [2, 2], [2, 2]],
         "network.kernels": [[3, 3]] * 3, "training.momentum": 0.9, "training.precision": "float32"}  # fmt: skip
PICTURES = {"dimension": 2, "labels": TUMOUR, "shape": (40, 48)}
LEARNING = {"begin": 0.5, "exchanges": 2, "confidence": 0.6, "doubt": 1.0, "share": 0.3}


class Federation:
    """Three sites of which the last drew its outlines on other pictures, a public folder, a test set, and a plan."""

    def __init__(self, root):
        counts = {"alpha": 2, "bravo": 2, "charlie": 5}
        self.root, self.names = root, tuple(counts)
        self.sites = [make_site(root / "raw" / name, cases=cases, **PICTURES) for name, cases in counts.items()]
        self.public = make_site(root / "public", cases=8, seed=3, **PICTURES)
        self.test = make_site(root / "test", cases=12, part="Ts", seed=4, **PICTURES)
        self.shuffle(self.sites[-1] / "labelsTr")
        self.plan = autofed.plan(self.sites, hours=0.01, device="cpu", settings=SMALL)
        autofed.preprocess(self.plan, self.sites, root / "work")

    def shuffle(self, folder):
        """Every picture gets the outline of another one, upside down."""
        files = sorted(folder.iterdir())
        maps = [read_labels(file) for file in files]
        for file, (label, geometry) in zip(files, maps[1:] + maps[:1], strict=True):
            autofed.data.images.write(file, np.ascontiguousarray(label[:, ::-1, ::-1]).astype(np.uint8), geometry)

    def train(self, folder, name="dcfed", plan=None, **options):
        made = (plan or self.plan).change({"algorithm.name": name})
        if name == "dcfed":
            made = made.change({"algorithm.settings": LEARNING | options.pop("settings", {})})
            options = {"public": self.public, **options}
        return autofed.train(made, self.root / "work", folder, device="cpu", **options)

    def dice(self, run, model):
        """On the test set."""
        out = run.folder.parent / f"{run.folder.name}_{model}"
        autofed.predict(run.folder, self.test / "imagesTs", out, model=model, mirroring=False, device="cpu")
        return autofed.evaluate(out, self.test / "labelsTs").mean.dice


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return Federation(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    return pictures.train(tmp_path_factory.mktemp("runs") / "run", plan=pictures.plan.change({"training.rounds": 20}))


@pytest.mark.slow
def test_a_site_with_wrong_labels_does_not_pull_the_others_down_and_is_reported(pictures, trained, tmp_path):
    longer = pictures.plan.change({"training.rounds": 20})
    alone = pictures.train(tmp_path / "local", "local", plan=longer)
    together, apart = ([pictures.dice(run, site) for site in ("alpha", "bravo")] for run in (trained, alone))
    assert all(a >= b - 0.01 for a, b in zip(together, apart, strict=True))
    last = [line for line in metrics.read(trained.fold_folder()) if "notes" in line][-1]["sites"]
    honest = [last[site] for site in ("alpha", "bravo")]
    assert last["charlie"]["disagreement"] > max(said["disagreement"] for said in honest)
    assert last["charlie"]["trust"] < min(said["trust"] for said in honest) == 1
    said = "\n".join(communication.communication_summary(trained))
    assert "against those of all: alpha" in said and "weights would have been" in said
    assert "pseudo-labels are no formal guarantee" in said and said.splitlines()[-1] in _training([trained.folder])


def test_a_site_that_saw_something_else_before_it_learned_from_the_others_is_named():
    lines = [{"sites": {"alpha": {"disagreement": a}, "charlie": {"disagreement": c}}} for a, c in ((0.1, 0.8), (0, 0))]
    listed, named = communication._disagreement("all", lines)
    assert "alpha 0.10 at first, 0.00 in the end, charlie 0.80 at first" in listed and "charlie sees something" in named


def test_a_site_that_missed_the_first_exchange_is_reported_all_the_same():
    lines = [{"sites": {"alpha": {"disagreement": 0.1}}}, {"sites": {"charlie": {"disagreement": 0.9}}}]
    listed, named = communication._disagreement("all", lines)
    assert "charlie 0.90 at first, 0.90 in the end" in listed and "charlie sees something" in named


@pytest.mark.parametrize(("settings", "rounds", "said"), [
    ({}, 1, "no round was left in which a site could learn from them"),
    ({"confidence": 0.0, "doubt": 1.0, "share": 0.0}, 3, "only background"),
])  # fmt: skip
def test_labels_that_can_teach_nothing_are_called_so(pictures, tmp_path, monkeypatch, settings, rounds, said):
    if rounds > 1:
        monkeypatch.setattr(SiteContext, "label", lambda self, *_: {
            name: np.zeros((2, *grid), np.uint8) for name, grid in self._site.public.grids.items()
        })  # fmt: skip
    plan = pictures.plan.change({"training.rounds": rounds})
    run = pictures.train(tmp_path / "run", plan=plan, settings=OPEN | settings)
    assert said in "\n".join(communication.communication_summary(run))


def test_a_plan_for_dcfed_takes_its_network_unless_another_is_asked_for(pictures):
    wanted = {"hours": 0.01, "device": "cpu", "algorithm": "dcfed"}
    assert autofed.plan(pictures.sites, **wanted).local.network.kind == "dcfed"
    assert autofed.plan(pictures.sites, preset="plain", **wanted).local.network.kind == "unet"


@pytest.mark.slow
def test_every_site_and_the_student_predict(pictures, trained):
    assert trained.models() == ["alpha", "bravo", "charlie", "student"]
    assert pictures.dice(trained, "student") > 0.6
    with pytest.raises(ValidationErrors, match="choose --model from: alpha, bravo, charlie, student"):
        trained.members()


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_without_naming_the_images_again(pictures, tmp_path, monkeypatch):
    whole = pictures.train(tmp_path / "whole", settings=OPEN)
    with monkeypatch.context() as patch:
        patch.setattr("autofed.api.coordinator.train_student", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pictures.train(tmp_path / "cut", settings=OPEN)
    again = autofed.train(
        tmp_path / "cut" / "plan.json", pictures.root / "work", tmp_path / "cut", resume=True, device="cpu"
    )
    student = [load_groups(run.student_path("all"))[0]["weights"] for run in (whole, again)]
    with pytest.raises(
        ValidationErrors, match="test_000, test_001, test_002, test_003, test_004 and 7 more are here but not"
    ):
        autofed.train(
            again.plan(), pictures.root / "work", again.folder, resume=True, public=pictures.test / "imagesTs"
        )
    assert same_arrays(*student) and again.models() == whole.models()


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_sites_with_networks_and_grids_of_their_own(pictures, tmp_path):
    coarse = pictures.plan.change({
        "network.features": [8, 12], "network.strides": [[1, 1], [2, 2]], "network.kernels": [[3, 3]] * 2,
        "geometry.spacing_mm": [999.0, 2.0, 2.0], "patch_size": [16, 20],
    })  # fmt: skip
    autofed.preprocess(coarse, pictures.sites[:1], pictures.root / "work")
    run = pictures.train(tmp_path / "run", site_plans={"alpha": coarse})
    assert run.site_plan("alpha").local == coarse.local != run.site_plan("bravo").local
    assert len(run.members("alpha")[0].read()) < len(run.members("bravo")[0].read())
    label, _ = read_labels(next((pictures.test / "labelsTs").iterdir()))
    assert pictures.dice(run, "alpha") is not None
    assert read_labels(next((tmp_path / "run_alpha").glob("*_000.png")))[0].shape == label.shape
    with pytest.raises(ValidationErrors, match="nobody is no site of the plan"):
        pictures.train(tmp_path / "other", site_plans={"nobody": coarse})


VOLUMES = {"dimension": 3, "channels": ("T1", "T2"), "labels": REGIONS, "order": (1, 2)}
COLOURS = {"dimension": 2, "channels": ("R", "G", "B"), "labels": ORGAN_AND_TUMOUR, "shape": (40, 48)}


@pytest.mark.parametrize(("data", "annotated"), [(VOLUMES, 0.8), (COLOURS, 1.0)])
def test_volumes_and_colours_regions_and_folds(tmp_path, data, annotated):
    """Regions with an ignored part in two channels, or classes in three; each with a fold held out."""
    sites = [make_site(tmp_path / name, cases=5, annotated=annotated, **data) for name in ("alpha", "bravo")]
    public, test = (make_site(tmp_path / name, cases=3, part="Ts", seed=3, **data) for name in ("public", "test"))
    asked = {"hours": 0.001, "device": "cpu", "algorithm": "dcfed", "preset": "plain"}
    stages = len(autofed.plan(sites, **asked).local.network.features)
    small = {"training.rounds": 3, "steps_per_round": 6, "learning_rate": 0.05, "algorithm.settings": OPEN,
             "network.features": [8] * stages}  # fmt: skip
    plan = autofed.plan(sites, settings=small, **asked)
    autofed.preprocess(plan, sites, tmp_path / "work")
    told = {}
    run = autofed.train(
        plan, tmp_path / "work", tmp_path / "run", folds=["0"], public=public / "imagesTs", device="cpu",
        progress=lambda stage, done, total: told.update({stage: (done, total)}),
    )  # fmt: skip
    assert told["alpha labels public images"] == told["bravo labels public images"] == (3, 3)  # one model, three images
    agreed = run.agreed("0")
    assert len(agreed) == 3 and set(np.unique(list(agreed.values())[0])) <= {0, 1, 2, UNKNOWN}
    assert any(((found != 0) & (found != UNKNOWN)).any() for found in agreed.values())
    for model in ("alpha", "student"):
        autofed.predict(run.folder, test / "imagesTs", tmp_path / model, model=model, mirroring=False, device="cpu")
        assert autofed.evaluate(tmp_path / model, test / "labelsTs").mean.dice is not None


@pytest.mark.slow
def test_where_every_label_is_gated_away_the_sites_train_alone_and_there_is_no_student(pictures, tmp_path, caplog):
    run = pictures.train(tmp_path / "run", settings={"confidence": 1.0, "doubt": 0.0})
    assert run.models() == ["alpha", "bravo", "charlie"] and "there is no student" in caplog.text
    assert "labels of 0 % of the public images" in "\n".join(communication.communication_summary(run))


def test_what_is_asked_for_must_fit(pictures, tmp_path):
    with pytest.raises(ValidationErrors, match="name a folder that holds them"):
        pictures.train(tmp_path / "run", public=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValidationErrors, match="no images were found"):
        pictures.train(tmp_path / "run", public=tmp_path / "empty")
    with pytest.raises(ValidationErrors, match="--public is for sites that label public images; fedavg shares weights"):
        pictures.train(tmp_path / "run", "fedavg", public=pictures.public)
    with pytest.raises(ValidationErrors, match="weights of its own; leave --init out"):
        pictures.train(tmp_path / "run", init=tmp_path)
    other = agreed_on(pictures.plan, pictures.test / "imagesTs")
    with pytest.raises(ValidationErrors, match="agreed on but not here"):
        pictures.train(tmp_path / "run", plan=other)
    assert not (tmp_path / "run").exists()


def test_passes_with_dropout_need_networks_that_have_some(pictures, tmp_path):
    dropping, still = pictures.plan.change({"network.dropout": 0.2}), pictures.plan
    asked = {"settings": {"dropout_passes": 2}}
    with pytest.raises(ValidationErrors) as error:
        pictures.train(tmp_path / "run", site_plans={"bravo": dropping}, init=tmp_path, **asked)
    assert len(error.value.problems) == 2 and "leave --init out" in error.value.problems[0]
    assert error.value.problems[1].startswith("alpha, charlie: dropout_passes is 2, but no channel of the network")
    with pytest.raises(ValidationErrors, match="bravo: dropout_passes is 2.* write --set network.dropout=0.2"):
        pictures.train(tmp_path / "run", plan=dropping, site_plans={"bravo": still}, **asked)
    assert not (tmp_path / "run").exists()


def test_a_site_by_itself_refuses_passes_that_its_own_network_cannot_take(ground, tmp_path):
    plan, public = labelled(with_dcfed(ground), {"dropout_passes": 2})
    work = next(iter(ground[1]["alpha"].folders.values())).parents[2]
    plan.save(tmp_path / "plan.json")
    place = {"site": "alpha", "work": work, "plan": tmp_path / "plan.json", "memory": tmp_path / "memory"}
    premises = SiteNode(**place, public=work.parent / "public")
    with pytest.raises(ValidationErrors, match="no channel of the network drops out"):
        premises.check()
    assert premises.handshake("0" * 32).agreement == ""
    with pytest.raises(ValidationErrors, match="no channel of the network drops out"):
        site_of("alpha", ground[1]["alpha"], plan, tmp_path, {"alpha": tmp_path / "l.jsonl"}, run="r", public=public)
    plan.change({"network.dropout": 0.2}).save(tmp_path / "plan.json")
    assert premises.handshake("0" * 32).agreement


def test_a_private_run_hands_each_site_its_better_model_and_the_world_the_student(pictures, tmp_path):
    short = {"training.rounds": 3, "steps_per_round": 2}
    made = pictures.plan.change({"privacy.mechanism": "dp-sgd", "sampling_rate": 0.5, **short})
    made = made.change(guarantee.consistent_fields(made, None, None, noise_is_given=True))
    run = pictures.train(tmp_path / "run", plan=made, simulation=True, settings=OPEN)
    assert set(run.models()) >= {"alpha", "bravo", "charlie"}
    folder, last = run.site_folder("alpha"), "round_00003.safetensors"
    own, teacher = (load_groups(folder / kind / last)[0] for kind in (SITE_ONLY, "memory"))
    found = run.members("alpha")[-1].read()
    assert same_arrays(found, own["mean"]) and not same_arrays(
        found, teacher["mean"]
    )  # a private plan takes moving averages
    assert "private mechanism trained" in communication.communication_summary(run)[-1]
    assert "loss" not in (run.fold_folder() / "metrics.jsonl").read_text()
    kept = tmp_path / "weights.safetensors"
    shutil.copy(folder / SITE_ONLY / last, kept)
    for init in (folder / SITE_ONLY / last, kept):
        with pytest.raises(ValidationErrors, match="for its site alone"):
            pictures.train(tmp_path / "next", "fedavg", init=init)
    with pytest.raises(ValidationErrors, match="is the stored state of a site"):
        pictures.train(tmp_path / "next", "fedavg", plan=made, simulation=True, init=folder / "memory" / last)
    assert not (tmp_path / "next" / "run.json").exists()
