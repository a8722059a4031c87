"""The noised fingerprint: what a patient can change, what it costs, that it is made once, what plans come of it."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofed import api, plans
from autofed.api import ledgers
from autofed.api.private_fingerprinting import take_private_fingerprint
from autofed.data import Declaration, open_dataset
from autofed.errors import ValidationErrors
from autofed.files import write_json
from autofed.fingerprints import private as private_fingerprints
from autofed.fingerprints.private import CaseFeatures, IntensityStatistics, PrivateFingerprint
from autofed.planner.private_fingerprint import to_fingerprint
from autofed.privacy import accounting, guarantee
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.ledger import PrivacyLedger
from autofed.privacy.private_fingerprint import OF_PATIENTS, PrivateFingerprintMechanism, noise_for, order_of
from tests import cohorts
from tests.plans_made import SPEED, small_plan
from tests.small_federation import PRIVATE
from tests.synthetic import make_site

CT = Declaration(channels=("CT", "MRI"), labels={"background": 0, "a": 1}, dimension=3)
PARTS = private_fingerprints.feature_layout(CT)
HU = st.floats(-1024, 3071)
FACTS = st.builds(
    CaseFeatures,
    st.tuples(*[st.floats(1e-3, 1e3)] * 3),
    st.tuples(*[st.floats(1e-2, 1e5)] * 3),
    st.floats(0, 1),
    st.tuples(st.none() | st.builds(IntensityStatistics, HU, st.floats(0, 2000), HU, HU), st.none()),
)


def released(rows, secret=bytes(32), noise=2.0):
    return PrivateFingerprintMechanism(noise).with_key(secret).release({OF_PATIENTS: {"rows": rows}})["sums"]["rows"]


def site(folder, name="alpha", **more):
    return open_dataset(make_site(folder / name, **{"cases": 4, "channels": ("CT",), **more}))


# --- what a patient can change


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FACTS, st.integers(0, 3)), min_size=1, max_size=8))
def test_nobody_moves_the_sum_by_more_than_is_charged(cases):
    """Each patient in turn is replaced by nothing; the noise is the same, so it cancels."""
    rows = private_fingerprints.patient_rows(PARTS, [facts for facts, _ in cases], [f"patient {p}" for _, p in cases])
    whole = released(rows)
    for patient in range(len(rows)):
        without = rows * (np.arange(len(rows)) != patient)[:, None]
        assert np.linalg.norm(whole - released(without)) <= 1 + 1e-9


def test_the_mechanism_bounds_a_row_that_is_too_long_or_not_a_number():
    clean, bad = np.zeros((3, 4)), np.array([[3.0, 4.0, 0, 0], [np.nan, 1, 0, 0], [np.inf, 0, 0, 0]])
    assert (released(bad) - released(clean)).tolist() == pytest.approx([0.6, 0.8, 0, 0])


def test_two_cases_of_a_patient_count_as_one():
    one, other = (cohorts.federation("abdomen-ct (made up)", 1, 2, np.random.default_rng(1))[0]).facts
    parts = private_fingerprints.feature_layout(cohorts.ABDOMEN)
    (both,) = private_fingerprints.patient_rows(parts, [one, other], ["a", "a"])
    apart = private_fingerprints.patient_rows(parts, [one, other], ["a", "b"])
    assert both == pytest.approx(apart.mean(axis=0)) and np.linalg.norm(both) <= 1


def test_a_patient_with_more_cases_is_still_one_in_the_record(tmp_path):
    found = take_private_fingerprint(site(tmp_path, cases=6, patients=2, unlabelled=2), tmp_path / "work", 8.0)
    assert found.sites["alpha"].model_dump(exclude={"speed", "annotated"}) == {"patients": 2, "cases": 2, "labelled": 2}
    assert {part.patients for part in found.parts.values()} == {2}


def test_only_what_the_plan_needs_is_asked():
    names = {
        part.name.split(".")[0]
        for part in private_fingerprints.feature_layout(Declaration(channels=("R",), labels={}, dimension=2))
    }
    assert names == {"spacing", "extent", "kept"}
    ct = private_fingerprints.feature_layout(cohorts.ABDOMEN)
    assert "kept" not in [part.name for part in ct] and sum(part.name.startswith("ct.0.mean") for part in ct) == 3
    assert sum(private_fingerprints.feature_shares(ct)) == pytest.approx(1)


# --- the noise


def test_the_noise_of_the_record_is_what_is_charged():
    """Over many secrets every part has the variance that it states, and the row the multiplier that is charged."""
    rng, rows = np.random.default_rng(3), np.zeros((5, sum(part.size for part in PARTS)))
    counts = cohorts.Cohort("alpha", CT, (None,) * 5, ()).counts
    noise = np.stack([released(rows, rng.bytes(32)) for _ in range(200)])
    assert noise.std() == pytest.approx(2.0, rel=0.01)
    assert np.abs(np.corrcoef(noise[:, :30].T) - np.eye(30)).max() < 0.35
    told = [private_fingerprints.assemble(CT, counts, PARTS, one, 2.0, {}) for one in noise]
    for part in PARTS:
        numbers = np.array([one.parts[part.name].numbers for one in told])
        assert numbers.std() == pytest.approx(told[0].parts[part.name].variance ** 0.5, rel=4 / np.sqrt(numbers.size))
    (event,) = PrivateFingerprintMechanism(2.0).cost()
    assert (event.noise_multiplier, event.steps, event.unit) == (2.0, 1, "patient")


def test_noise_is_not_from_a_generator_that_anyone_can_seed(tmp_path):
    data, found = site(tmp_path), []
    for work in ("one", "other"):
        random.seed(0)
        np.random.seed(0)
        found.append(take_private_fingerprint(data, tmp_path / work, 8.0).parts["extent.z"].numbers)
    assert found[0] != found[1]


@pytest.mark.parametrize(("epsilon", "near"), [(8.0, 2.09), (3.0, 4.91)])
def test_the_noise_costs_the_training_a_twentieth_at_most(epsilon, near):
    noise = noise_for(epsilon, 1e-5)
    assert noise == pytest.approx(near, abs=0.01)
    beside, order = PrivateFingerprintMechanism(noise).cost(), order_of(noise)

    def raised(rate, steps):
        def train(z):
            return PrivacyEvent(mechanism="", steps=steps, noise_multiplier=z, sampling_rate=rate)

        def measure(events, delta):
            return accounting.renyi_epsilon(events, delta, order)

        alone = accounting.calibrate(lambda z: [train(z)], epsilon, 1e-5, measure)
        return accounting.calibrate(lambda z: [train(z), *beside], epsilon, 1e-5, measure) / alone

    found = [raised(*plan) for plan in ((0.05, 200), (0.2, 200), (1.0, 50))]
    assert max(found) <= 1.0501 and max(found) > 1.049  # enough, and at full batches no more than that


def test_the_order_of_the_filter_is_fixed_by_the_noise_and_near_the_best():
    """Whoever plans after a census has seen it, so nothing that is chosen then may decide how it is counted."""
    for epsilon in (1.0, 3.0, 8.0, 10.0):
        noise = noise_for(epsilon, 1e-5)
        best = max(range(2, 100), key=lambda order: accounting.renyi_room(epsilon, 1e-5, order) / order)
        assert abs(order_of(noise) - best) <= 1
    with pytest.raises(ValidationErrors, match="no noise leaves room"):
        noise_for(1e-4, 1e-5)


# --- charged once, before it is counted


def charges(work, name="alpha"):
    return PrivacyLedger.existing(work / name / "ledger.jsonl").charges()


def test_a_census_is_charged_once_and_handed_out_again_to_the_byte(tmp_path):
    folder = make_site(tmp_path / "alpha", cases=3)
    wanted = {"work": tmp_path / "work", "epsilon": 8.0}
    api.private_fingerprint(folder, tmp_path / "one.json", **wanted)
    api.private_fingerprint(folder, tmp_path / "other.json", **wanted)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    (charge,) = charges(tmp_path / "work")
    assert charge.events == PrivateFingerprintMechanism(noise_for(8.0, 1e-5)).cost() and charge.case_is_patient
    assert not (tmp_path / "work/alpha/census/secret.json").exists()


def test_what_was_cut_off_is_charged_and_finished_with_its_own_noise(tmp_path, monkeypatch):
    data, work = site(tmp_path), tmp_path / "work"

    def cut_off(*_, **__):
        assert len(charges(work)) == 1  # before anything is read
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(private_fingerprints, "feature_rows", cut_off)
        with pytest.raises(KeyboardInterrupt):
            take_private_fingerprint(data, work, 8.0)
    secret = json.loads((work / "alpha/census/secret.json").read_text())["secret"]
    with pytest.raises(
        ValidationErrors, match="a private fingerprint for --epsilon 8 --delta 1e-05 was charged and is not finished"
    ):
        take_private_fingerprint(data, work, 3.0)
    found = take_private_fingerprint(data, work, 8.0)
    parts = private_fingerprints.feature_layout(data.declaration())
    sums = released(private_fingerprints.feature_rows(data, parts), bytes.fromhex(secret), noise_for(8.0, 1e-5))
    assert found == private_fingerprints.private_fingerprint(data, parts, sums, noise_for(8.0, 1e-5))
    assert len(charges(work)) == 1


def test_nothing_is_counted_that_the_ledger_does_not_allow(tmp_path, monkeypatch):
    (tmp_path / "work/alpha").mkdir(parents=True)
    ledgers.open_ledger(tmp_path / "work/alpha", 0.5, 1e-5)
    monkeypatch.setattr(private_fingerprints, "feature_rows", lambda *_, **__: pytest.fail("counted"))
    with pytest.raises(ValidationErrors, match="does not allow"):
        take_private_fingerprint(site(tmp_path), tmp_path / "work", 8.0)
    assert charges(tmp_path / "work") == []


def test_other_data_or_another_promise_are_refused_and_a_second_census_is_charged(tmp_path):
    data, work = site(tmp_path), tmp_path / "work"
    first = take_private_fingerprint(data, work, 1.0)
    with pytest.raises(ValidationErrors, match="was computed for epsilon 1 and delta 1e-05"):
        take_private_fingerprint(data, work, 8.0)
    changed = site(tmp_path, cases=5)
    with pytest.raises(ValidationErrors, match="the data changed"):
        take_private_fingerprint(changed, work, 1.0)
    (work / "alpha/census/release.json").unlink()
    assert take_private_fingerprint(changed, work, 1.0).parts != first.parts
    assert [charge.round for charge in charges(work)] == [1, 2]


def test_simulations_and_ledgers_that_count_are_kept_apart(tmp_path):
    data = site(tmp_path)
    take_private_fingerprint(data, tmp_path / "real", 8.0)
    take_private_fingerprint(data, tmp_path / "simulated", 8.0, simulation=True)
    for work, simulation in (("real", True), ("simulated", False)):
        (tmp_path / work / "alpha/census/release.json").unlink()
        with pytest.raises(ValidationErrors, match="--simulation"):
            take_private_fingerprint(data, tmp_path / work, 8.0, simulation=simulation)


@pytest.mark.parametrize(("epsilon", "delta", "says"), [(None, None, "its --epsilon"), (8.0, 0.4, "far below 0.25")])
def test_a_census_without_a_promise_is_refused(tmp_path, epsilon, delta, says):
    with pytest.raises(ValidationErrors, match=says):
        take_private_fingerprint(site(tmp_path), tmp_path / "work", epsilon, delta)
    assert not (tmp_path / "work/alpha/ledger.jsonl").exists()


# --- the ceiling


@pytest.mark.parametrize("epsilon", [8.0, 3.0])
def test_the_promise_is_the_ceiling_and_the_training_that_comes_after_fits_under_it(tmp_path, epsilon):
    """By the ledger's own filter, for plans of any shape that `guarantee.consistent_fields` calibrates with it."""
    noise = noise_for(epsilon, 1e-5)
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl", "alpha", epsilon, 1e-5, order=order_of(noise))
    (own,) = PrivateFingerprintMechanism(noise).cost()
    for rate, steps in ((0.15, 500), (0.7, 40), (0.1, 30), (0.01, 500), (1.0, 10), (0.05, 2000)):
        plan = small_plan().change(PRIVATE["dp-sgd"] | {"sampling_rate": rate, "census_noise": noise,
                                   "training.rounds": 10, "steps_per_round": steps // 10})  # fmt: skip
        plan = plan.change(guarantee.consistent_fields(plan, epsilon, 1e-5, noise_is_given=False))
        events = guarantee.planned(plan, plan.local.training.steps_per_round)
        assert own in events and guarantee.problems(plan) == []
        assert ledger.can_afford(events), (rate, steps)
        louder = [event.model_copy(update={"noise_multiplier": 0.99 * event.noise_multiplier}) for event in events]
        assert not ledger.can_afford(louder), "nothing is left over either"


# --- plans


def test_sums_variances_and_patients_are_added():
    rng = np.random.default_rng(5)
    fed = cohorts.federation("hippocampus", 2, 30, rng)
    one, other = (cohorts.released(cohort, 2.0, rng) for cohort in fed)
    merged = private_fingerprints.merge([one, other])
    part = merged.parts["extent.x"]
    assert part.variance == pytest.approx(2 * one.parts["extent.x"].variance) and part.patients == 60
    assert part.numbers == pytest.approx(np.add(one.parts["extent.x"].numbers, other.parts["extent.x"].numbers))
    assert merged == private_fingerprints.merge([other, one])
    with pytest.raises(ValidationErrors, match="noise multipliers differ") as error:
        private_fingerprints.merge([one, cohorts.released(fed[1], 4.0, rng)])
    assert "site_0: 2; site_1: 4" in str(error.value)


def test_ranks_are_as_far_off_as_is_said():
    rng = np.random.default_rng(6)
    (cohort,) = cohorts.federation("hippocampus", 1, 200, rng)
    extents = [facts.extent_mm[1] for facts in cohort.facts]
    found = [private_fingerprints.distribution(cohorts.released(cohort, 2.0, rng), "extent.", 1) for _ in range(60)]
    edges = np.sqrt(found[0].values[:-1] * found[0].values[1:])
    true = np.array([np.mean(np.array(extents) < edge) for edge in edges])
    off = np.array([one.share[:-1] - true for one in found])
    assert 0.7 < np.sqrt(np.mean(off**2, axis=0)).max() / found[0].error < 1.2
    assert np.abs(off.mean(axis=0)).max() < 0.05
    assert all(np.all(np.diff(one.share) >= 0) and one.share[-1] == 1 for one in found)


@pytest.mark.parametrize("task", [*cohorts.TASKS, "abdomen-ct (made up)", "head-mri (made up)"])
def test_a_hundred_patients_a_site_give_the_open_plan(task):
    """The bar: the same dimensionality, patch within a pooling step, normalisation within a tenth of a deviation."""
    rng = np.random.default_rng([7, len(task)])
    fed = cohorts.federation(task, 3, 100, rng)
    made = cohorts.open_plan(fed)
    for _ in range(3):
        private = cohorts.private_plan(fed, noise_for(8.0, 1e-5), rng)
        assert cohorts.same_dimensionality(made, private)
        assert cohorts.patch_error(made, private) <= 1
        assert cohorts.intensity_error(made, private, fed) <= 0.1
        assert not any("taken from" in reason.why for reason in private.reasons)
        assert private.agreement.privacy.census_noise == noise_for(8.0, 1e-5)


def test_few_patients_take_their_plan_from_the_prior_or_a_default_and_say_so():
    rng = np.random.default_rng(8)
    fed = cohorts.federation("kidney-ct-simulated", 2, 6, rng)
    prior = plans.load(cohorts.GALLERY / "kidney-ct-simulated" / "plan.json")
    for wanted, name in ((prior, "the prior a prior"), (None, "autofed's default")):
        made = cohorts.private_plan(fed, 2.0, rng, wanted)
        why = {reason.field: reason.why for reason in made.reasons}
        for field in ("geometry.spacing_mm", "geometry.median_shape", "intensity.channels.CT"):
            assert "of 12 patients" in why[f"local.{field}"] and why[f"local.{field}"].endswith(f"taken from {name}")
        if wanted:
            assert made.local.geometry == prior.local.geometry
            assert made.local.intensity.channels[0].mean == pytest.approx(prior.local.intensity.channels[0].mean)
    pictures = plans.load(cohorts.GALLERY / "dermoscopy" / "plan.json")
    with pytest.raises(ValidationErrors, match="a plan for 2D, the sites have 3D"):
        cohorts.private_plan(fed, 2.0, rng, pictures)


def test_declared_facts_are_not_counted(tmp_path):
    folder = make_site(tmp_path / "alpha", cases=3, shape=(20, 24, 32), spacing_mm=(3, 1, 1))
    described = json.loads((folder / "dataset.json").read_text())
    write_json(folder / "dataset.json", {**described, "protocol": {"spacing_mm": [3, 1, 1], "size": [20, 24, 32]}})
    found = take_private_fingerprint(open_dataset(folder), tmp_path / "work", 8.0)
    assert set(found.parts) == {"kept"} and found.parts["kept"].variance == pytest.approx(noise_for(8.0, 1e-5) ** 2)
    made = to_fingerprint(found)
    assert [list(axis.spacing_mm) for axis in made.axes] == [["3.0"], ["1.0"], ["1.0"]]
    assert [list(axis.size) for axis in made.axes] == [["20"], ["24"], ["32"]]
    assert "declared" in made.noise.told["local.geometry.spacing_mm"]
    write_json(folder / "dataset.json", {**described, "protocol": {"spacing": [3, 1]}})
    with pytest.raises(ValidationErrors, match="`protocol` is"):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda v: v["parts"].pop("extent.x"), "the declaration asks for"),
        (lambda v: v["parts"]["extent.x"]["numbers"].pop(), "expected 97 numbers of 3 patients"),
        (lambda v: v["parts"]["extent.x"].update(patients=9), "of 9 patients"),
        (lambda v: v["parts"]["extent.x"].update(variance=0), "variance"),
        (lambda v: v["declared"].update({"spacing.y": {"1.0": 2}}), "of all 3 patients"),
        (lambda v: v["sites"].clear(), "there is none"),
    ],
)
def test_a_spoiled_record_is_refused(tmp_path, spoil, says):
    folder = make_site(tmp_path / "alpha", cases=3, dimension=2)
    api.private_fingerprint(folder, tmp_path / "alpha.json", work=tmp_path / "work", epsilon=8.0)
    value = json.loads((tmp_path / "alpha.json").read_text())
    assert PrivateFingerprint.parse(value, "alpha").patients == 3
    spoil(value)
    with pytest.raises(ValidationErrors, match=says):
        PrivateFingerprint.parse(value, "alpha")


# --- planning by them


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr("autofed.api.planning._measured_speed", lambda *_: SPEED)
    return {"hours": 0.01, "device": "cpu", "settings": {"privacy.mechanism": "dp-sgd"}}


def test_folders_and_noised_files_make_one_plan_whose_promise_counts_them(tmp_path, settled):
    alpha, bravo = (make_site(tmp_path / name, cases=4, channels=("CT",)) for name in ("alpha", "bravo"))
    wanted = {"work": tmp_path / "work", "epsilon": 8.0}
    api.private_fingerprint(alpha, tmp_path / "alpha.json", **wanted)
    small_plan(channels=("CT",)).save(tmp_path / "prior.json")
    made = api.plan([tmp_path / "alpha.json", bravo], private_census=True, prior=tmp_path / "prior.json", **wanted,
                      **settled)  # fmt: skip
    assert made.agreement.privacy.census_noise == noise_for(8.0, 1e-5) and made.agreement.patients["bravo"] == 4
    assert made.local.geometry.median_shape == (16, 16, 16)
    assert guarantee.problems(made) == []
    assert made.change({"mechanism": "none"}).agreement.privacy.census_noise  # it stays what the plan rests on
    text = (tmp_path / "alpha.json").read_text()
    assert "alpha_0" not in text and "voxels" not in text and "crop" not in text


def test_open_and_noised_fingerprints_are_not_mixed(tmp_path, settled):
    alpha, bravo = (make_site(tmp_path / name, cases=3) for name in ("alpha", "bravo"))
    api.private_fingerprint(alpha, tmp_path / "alpha.json", work=tmp_path / "work", epsilon=8.0)
    with pytest.raises(ValidationErrors, match="alpha are private, those of bravo are not"):
        api.plan([tmp_path / "alpha.json", bravo], **settled)


def test_a_census_without_work_or_epsilon_names_both(tmp_path, settled):
    alpha = make_site(tmp_path / "alpha", cases=3)
    for call in (lambda: api.plan([alpha], private_census=True, **settled),
                 lambda: api.private_fingerprint(alpha, work=None, epsilon=None)):  # fmt: skip
        with pytest.raises(ValidationErrors) as error:
            call()
        assert "--work WORK" in str(error.value) and "--epsilon" in str(error.value)


def test_the_ledger_tells_of_the_census(tmp_path):
    take_private_fingerprint(site(tmp_path), tmp_path / "work", 8.0)
    found = ledgers.ledger_statement(ledgers.find_ledger(tmp_path / "work/alpha"))
    assert [run.run for run in found.runs] == ["census"]
    assert "in the census of this ledger" in found.promise
    assert any("noised fingerprint that was handed over" in note for note in found.notes)
    assert not any("not in this ledger: they are counts" in note for note in found.notes)


def test_census_and_training_together_keep_the_promise_by_the_ledger(tmp_path, settled):
    """The whole way: the ceiling that the census opened is the promise, and the training after it fits under it."""
    alpha, bravo = (make_site(tmp_path / name, cases=4, channels=("CT",)) for name in ("alpha", "bravo"))
    work = tmp_path / "work"
    small_plan(channels=("CT",)).save(tmp_path / "prior.json")
    small = {"training.rounds": 2, "steps_per_round": 1, "network.features": [4, 4, 4], "patches_per_patient": 1}
    wanted = settled | {"settings": small, "even_if_hopeless": True, "prior": tmp_path / "prior.json"}
    made = api.plan([alpha, bravo], work=work, epsilon=8.0, private_census=True, **wanted)
    assert made.agreement.privacy.mechanism == "dp-sgd" and made.agreement.privacy.census_noise
    api.preprocess(made, [alpha, bravo], work)
    quieter = api.change(made, None, {"privacy.census_noise": 100.0})
    with pytest.raises(ValidationErrors, match="counts a census with noise 100, this site was charged one with 2.0"):
        api.train(quieter, work, tmp_path / "other", device="cpu", workers=0)
    api.train(made, work, tmp_path / "run", device="cpu", workers=0)
    for name in ("alpha", "bravo"):
        told = ledgers.ledger_statement(ledgers.find_ledger(work / name))
        assert [run.run == "census" for run in told.runs] == [True, False]
        assert 7.8 < told.epsilon <= 8.0 and told.ceiling.epsilon == 8.0 and 7.8 < told.ceiling.counted <= 8.0
    with pytest.raises(ValidationErrors, match="of its ceiling of epsilon 8"):
        api.train(made, work, tmp_path / "again", device="cpu", workers=0)
