"""The plan as a record: round trip, overrides, and checks across its sections."""

import json

import pytest

from autofed import plans
from autofed.plans import spaced_snapshots
from autofed.problems import Problems
from tests.plans_made import small_plan


def test_saved_and_loaded_is_the_same(tmp_path):
    made = small_plan()
    made.save(tmp_path / "plan.json")
    assert plans.load(tmp_path / "plan.json") == made


def test_unknown_key_is_refused_by_name(tmp_path):
    value = small_plan().model_dump(mode="json")
    value["local"]["training"]["learnig_rate"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(Problems, match="local.training.learnig_rate"):
        plans.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [('{"sites": 1}', "not a plan"), ('{"agreement": {}, "version": 99}', "version 99"), ("{", "not JSON")],
)
def test_other_files_are_no_plans(tmp_path, content, says):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(Problems, match=says):
        plans.load(tmp_path / "plan.json")


def test_set_finds_a_field_by_its_ending_and_notes_it():
    made = small_plan().change({"training.rounds": 20, "batch_size": 4})
    assert made.agreement.training.rounds == 20
    assert made.local.training.batch_size == 4
    assert made.agreement.training.snapshots == tuple(spaced_snapshots(20))
    assert [r.why for r in made.reasons if r.field == "local.training.batch_size"][-1] == "set by hand"


def test_set_names_every_wrong_field_at_once():
    with pytest.raises(Problems) as error:
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
        ("training.rounds", 0, "rounds"),
        ("training.rounds", "many", "rounds"),
        ("training.snapshots", [9], "snapshots"),
        ("learning_rate", -1, "learning_rate"),
    ],
)
def test_values_that_cannot_be_are_refused(field, value, says):
    with pytest.raises(Problems, match=says):
        small_plan().change({field: value})


def test_preparation_digest_knows_grid_and_intensity_only():
    made = small_plan()
    assert made.change({"learning_rate": 0.5}).local.preparation_digest() == made.local.preparation_digest()
    assert made.change({"geometry.spacing_mm": [2, 1, 1]}).local.preparation_digest() != made.local.preparation_digest()


def test_agreement_digest_changes_with_what_sites_vet():
    made = small_plan()
    assert made.change({"training.rounds": 9}).agreement.digest() != made.agreement.digest()
    assert made.change({"learning_rate": 0.5}).agreement.digest() == made.agreement.digest()


@pytest.mark.parametrize(("rounds", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (50, [40, 45, 50])])
def test_snapshots_are_late_and_spaced(rounds, expected):
    assert spaced_snapshots(rounds) == expected
