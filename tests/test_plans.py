"""The plan as a record: round trip, overrides, and checks across its sections."""

import itertools
import json
import math

import numpy as np
import pytest

from autofed import plans
from autofed.errors import ValidationErrors
from autofed.plans import Budget, spaced_snapshots
from tests.plans_made import small_plan


def test_saved_and_loaded_is_the_same(tmp_path):
    plan = small_plan()
    plan.save(tmp_path / "plan.json")
    assert plans.load(tmp_path / "plan.json") == plan


def test_unknown_key_is_refused_by_name(tmp_path):
    value = small_plan().model_dump(mode="json")
    value["local"]["training"]["learnig_rate"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(ValidationErrors, match="local.training.learnig_rate"):
        plans.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [('{"sites": 1}', "not a plan"), ('{"agreement": {}, "version": 99}', "version 99"), ("{", "not JSON")],
)
def test_other_files_are_no_plans(tmp_path, content, says):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValidationErrors, match=says):
        plans.load(tmp_path / "plan.json")


def test_set_finds_a_field_by_its_ending_and_notes_it():
    plan = small_plan().change({"training.rounds": 20, "batch_size": 4})
    assert plan.agreement.training.rounds == 20
    assert plan.local.training.batch_size == 4
    assert plan.agreement.training.snapshots == tuple(spaced_snapshots(20))
    assert [r.why for r in plan.reasons if r.field == "local.training.batch_size"] == ["set by hand, instead of 2"]


def test_set_names_every_wrong_field_at_once():
    with pytest.raises(ValidationErrors) as error:
        small_plan().change({"training.rouns": 20, "mirror_axes": [0]})
    assert "rouns" in str(error.value) and "rounds" in str(error.value)
    assert "local.training.mirror_axes or inference.mirror_axes" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("patch_size", [15, 16, 16], "multiple of"),
        ("patch_size", [16, 16], "axes"),
        ("network.in_channels", 2, "channels"),
        ("training.mirror_axes", [3], "mirror_axes"),
        ("training.mirror_axes", [-1], "mirror_axes"),
        ("inference.mirror_axes", [0, 1, 2], "must be among local.training.mirror_axes"),
        ("network.strides", [[1, 1, 1], [2, 2, 0], [2, 2, 2]], "strides.1.2"),
        ("network.strides", [[2, 2, 2], [2, 2, 2], [2, 2, 2]], "strides are 1"),
        ("network.kernels", [[3, 3, 3], [3, 3, 2], [3, 3, 3]], "odd"),
        ("network.kernels", [[3, 3, 3], [3, 3, -1], [3, 3, 3]], "kernels.1.2"),
        ("network.features", [4, 0, 4], "features.1"),
        ("patch_size", [16, 16, 0], "patch_size.2"),
        ("geometry.spacing_mm", [1, 1, 0], "spacing_mm.2"),
        ("geometry.spacing_mm", [1, 1, math.inf], "spacing_mm.2.*finite"),
        ("geometry.median_shape", [1, 1, 0], "median_shape.2"),
        ("geometry.transpose", [0, 1, 1], "once each"),
        ("geometry.configuration", "2d", "axes in a 2d plan; write 2"),
        ("agreement.labels", {"background": 0, "a": 1, "b": 3}, "without a gap"),
        ("agreement.labels", {"ground": 0, "a": 1, "b": 2}, "without a gap"),
        ("agreement.patients", {}, "patients"),
        ("agreement.patients", {"alpha": 0}, "patients.alpha"),
        ("agreement.patients", {"../alpha": 1}, "the site is called"),
        ("agreement.patients", {"global": 1}, "no site may be called"),
        ("learning_rate", math.inf, "finite"),
        ("gradient_clip", math.inf, "finite"),
        ("weight_decay", math.nan, "finite"),
        ("privacy.epsilon", 8.0, '"none" protects nothing'),
        ("privacy.noise_multiplier", 0.5, '"none" protects nothing'),
        ("training.rounds", 0, "rounds"),
        ("training.rounds", "many", "rounds"),
        ("training.snapshots", [9], "snapshots"),
        ("learning_rate", -1, "learning_rate"),
    ],
)
def test_values_that_cannot_be_are_refused(field, value, says):
    with pytest.raises(ValidationErrors, match=says):
        small_plan().change({field: value})


def test_every_site_annotated_something_and_every_structure_was_annotated_somewhere():
    plan = small_plan()
    assert plan.change({"annotated": {"alpha": ["structure_1"]}}).agreement.annotated == {"alpha": ("structure_1",)}
    with pytest.raises(ValidationErrors) as caught:
        plan.change({"annotated": {"alpha": [], "bravo": ["structure_1"], "charlie": ["kidney"]}})
    for said in (
        "annotated names 'charlie', which is not among the sites alpha, bravo",
        "annotated names 'kidney' at charlie, which is no structure",
        "annotated names nothing at alpha, which then teaches nothing",
        "no site annotated structure_2; remove it",
    ):
        assert said in str(caught.value)


def test_the_slices_come_first_in_a_flat_plan():
    with pytest.raises(ValidationErrors, match="begin with 0"):
        small_plan((1, 32, 32)).change({"geometry.transpose": [1, 0, 2]})


@pytest.mark.parametrize("name", ["snapshots", "training.snapshots", "agreement.training.snapshots"])
def test_snapshots_set_by_hand_stand_however_they_are_named(name):
    plan = small_plan().change({name: [7, 20], "training.rounds": 20})
    assert plan.agreement.training.snapshots == (7, 20)
    assert [r.value for r in plan.reasons if r.field == "agreement.training.snapshots"][-1] == "[7, 20]"


def test_what_follows_a_field_set_by_hand_is_noted():
    plan = small_plan().change({"training.rounds": 20, "training.mirror_axes": [1, 2]})
    assert plan.agreement.training.snapshots == (16, 18, 20)
    assert plan.local.training.mirror_axes == plan.inference.mirror_axes == (1, 2)
    last = {r.field: r for r in plan.reasons}
    assert last["agreement.training.snapshots"].value == "[16, 18, 20]"
    assert "20 rounds" in last["agreement.training.snapshots"].why
    assert last["inference.mirror_axes"].value == "[1, 2]" and "as in training" in last["inference.mirror_axes"].why


def test_mirrored_views_set_by_hand_stand():
    plan = small_plan().change({"training.mirror_axes": [1, 2], "inference.mirror_axes": [2]})
    assert plan.local.training.mirror_axes == (1, 2) and plan.inference.mirror_axes == (2,)


@pytest.mark.parametrize(
    ("field", "says"),
    [("hours", "--hours"), ("budget.hours", "--hours"), ("memory_gb", "--memory"), ("device", "--device"),
     ("speed", "measured"), ("budget.epsilon", "privacy.epsilon"), ("budget.delta", "privacy.delta")],
)  # fmt: skip
def test_the_budget_is_a_record_that_no_hand_changes(field, says):
    with pytest.raises(ValidationErrors, match=says):
        small_plan().change({field: 1})


@pytest.mark.parametrize("field", ["hours", "memory_gb"])
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e300])
def test_a_budget_has_an_end(field, value):
    with pytest.raises(ValidationErrors, match=field):
        Budget.parse({field: value}, "the budget")


def test_a_private_mechanism_may_promise():
    value = small_plan(**{"privacy.mechanism": "magic"}).change({"privacy.epsilon": 8.0, "privacy.delta": 1e-5})
    assert value.agreement.privacy.epsilon == 8.0


def test_preparation_digest_knows_grid_and_intensity_only():
    plan = small_plan()
    assert plan.change({"learning_rate": 0.5}).local.preprocessing_digest() == plan.local.preprocessing_digest()
    assert (
        plan.change({"geometry.spacing_mm": [2, 1, 1]}).local.preprocessing_digest()
        != plan.local.preprocessing_digest()
    )


def test_agreement_digest_changes_with_what_sites_vet():
    plan = small_plan()
    assert plan.change({"training.rounds": 9}).agreement.digest() != plan.agreement.digest()
    assert plan.change({"learning_rate": 0.5}).agreement.digest() == plan.agreement.digest()


@pytest.mark.parametrize(("rounds", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (50, [40, 45, 50])])
def test_snapshots_are_late_and_spaced(rounds, expected):
    assert spaced_snapshots(rounds) == expected


def test_a_speed_at_which_steps_cost_nothing_is_refused():
    nothing = {f"seconds_per_{unit}": 0.0 for unit in ("step", "gigaelement", "teraflop", "megavoxel")}
    with pytest.raises(ValidationErrors, match="costs nothing"):
        Budget.parse({"hours": 1, "speed": nothing}, "the budget")


def test_a_ct_channel_needs_its_numbers():
    with pytest.raises(ValidationErrors, match="percentile_00_5"):
        small_plan().change({"intensity.channels": [{"scheme": "ct", "mean": 1.0, "std": 1.0}]})


# --- the schedule of the learning rate


def schedule(*lengths):
    *before, rounds = lengths
    return plans.RoundSchedule.parse({"rounds": rounds, "snapshots": [rounds], "extended": before}, "rounds")


def test_the_rate_falls_with_the_power_of_nine_tenths():
    assert [schedule(10).rate_at(t) for t in (0, 2.5, 5, 10)] == pytest.approx([1, 0.75**0.9, 0.5**0.9, 0])


@pytest.mark.parametrize("lengths", [(10, 20), (10, 20, 40), (10, 11), (50, 100)])
def test_more_rounds_make_no_jump(lengths):
    training = schedule(*lengths)
    for before, after in itertools.pairwise(lengths):
        assert training.rate_at(before - 1e-6) == pytest.approx(0, abs=1e-5)
        assert 0 < training.rate_at(before) <= 0.005  # a step at rate 0 would be for nothing
        climb = (after - before) / 10
        steps = before + np.linspace(0, climb, 101)
        rates = np.array([training.rate_at(t) for t in steps])
        assert (np.diff(rates) > 0).all() or after - before == 1  # it climbs, in no larger steps than a hundredth
        assert np.abs(np.diff(rates)).max() <= 0.011
        assert training.rate_at(before + climb) == pytest.approx((1 - (before + climb) / after) ** 0.9)
    assert training.rate_at(lengths[-1]) == 0


def test_what_was_before_an_extension_stays_as_it_was():
    short, long = schedule(10), schedule(10, 30)
    assert [short.rate_at(t / 10) for t in range(100)] == [long.rate_at(t / 10) for t in range(100)]
    short, long = (training.model_copy(update={"validate_every": 3}) for training in (short, long))
    assert [short.validates(r) for r in range(1, 11)] == [long.validates(r) for r in range(1, 11)]


@pytest.mark.parametrize("lengths", [(10, 10), (20, 10), (10, 30, 20)])
def test_an_extension_makes_a_training_longer(lengths):
    with pytest.raises(ValidationErrors, match="must make a training longer"):
        schedule(*lengths)


def test_a_plan_is_extended_with_its_history_and_keeps_snapshots_that_are_there():
    plan = small_plan(**{"training.rounds": 20})
    assert plan.agreement.training.snapshots == (16, 18, 20)
    longer = plan.extend(21)
    assert longer.agreement.training.extended == (20,)
    assert longer.agreement.training.snapshots == (18, 20, 21)
    longest = longer.extend(60)
    assert longest.agreement.training.extended == (20, 21)
    assert longest.agreement.training.snapshots == (48, 54, 60)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_plan_is_not_made_shorter(rounds):
    with pytest.raises(ValidationErrors, match=f"{rounds} rounds were asked for, 3 are planned"):
        small_plan().extend(rounds)


def test_a_private_plan_is_not_extended_and_chooses_nothing_by_scores():
    private = small_plan(**{"privacy.mechanism": "dp-sgd"})
    assert private.agreement.training.validate_every == 0
    with pytest.raises(ValidationErrors, match="noise of a private plan is made for its rounds"):
        private.extend(9)
    with pytest.raises(ValidationErrors, match="write training.validate_every 0"):
        private.change({"validate_every": 2})


def test_rounds_that_are_validated():
    training = plans.RoundSchedule(rounds=7, snapshots=(7,), validate_every=3)
    assert [r for r in range(1, 8) if training.validates(r)] == [3, 6, 7]
    assert not any(training.model_copy(update={"validate_every": 0}).validates(r) for r in range(1, 8))


@pytest.mark.parametrize(("setting", "stays"), [({"batch_size": 1}, False), ({"training.rounds": 2}, True)])
def test_the_stated_memory_goes_with_the_sizes_that_it_was_stated_for(setting, stays):
    reason = plans.Reason(field="local.network", value="1 GB", why="told from the layers")
    plan = small_plan().model_copy(update={"reasons": (reason,)})
    assert (reason in plan.change(setting).reasons) == stays


def code_of(plan, field):
    return next(reason.code for reason in plan.reasons if reason.field == field)


def test_what_a_person_set_is_known_by_its_code_also_after_it_was_written(tmp_path):
    plan = small_plan().change({"batch_size": 4, "training.mirror_axes": [1]}).change({"training.rounds": 9}, "planned")
    plan.save(tmp_path / "plan.json")
    read = plans.load(tmp_path / "plan.json")
    assert read == plan
    for field in ("local.training.batch_size", "local.training.mirror_axes", "inference.mirror_axes"):
        assert code_of(plan, field) == code_of(read, field) == "by-hand"
    for field in ("agreement.training.rounds", "agreement.training.snapshots"):
        assert code_of(plan, field) == code_of(read, field) == "planned"


def test_the_code_of_a_reason_changes_neither_file_nor_digest(tmp_path):
    reason = plans.Reason(field="local.network", value="1 GB", why="told from the layers")
    plan = small_plan().model_copy(update={"reasons": (reason,)})
    coded = plan.model_copy(update={"reasons": (reason.model_copy(update={"code": "by-hand"}),)})
    assert plan != coded and plan.digest() == coded.digest() and plan.model_dump_json() == coded.model_dump_json()
    assert set(plan.model_dump(mode="json")["reasons"][0]) == {"field", "value", "why"}


@pytest.mark.parametrize("why, code", [
    ("set by hand", "by-hand"), ("set by hand, instead of 2", "by-hand"), ("as in RUN: set by hand", "by-hand"),
    ("as in training, which was set by hand", "by-hand"), ("as nnU-Net", "planned"),
])  # fmt: skip
def test_a_reason_that_was_written_gets_its_code_as_it_is_read(why, code):
    written = {"field": "local.network", "value": "1", "why": why}
    assert plans.Reason.parse(written, "a plan").code == code
    assert plans.Reason(**written).code == "planned", "what is decided now says its code itself"
