"""Every plan of the gallery follows from its fingerprint, and says what it is for."""

from pathlib import Path

import pytest

from autofed import planner, plans
from autofed.errors import ValidationErrors
from autofed.files import read_json
from autofed.fingerprints import Fingerprint
from autofed.plans import Budget

GALLERY = Path(__file__).parent.parent / "plans"
TASKS = ("dermoscopy", "breast-ultrasound", "histology", "kidney-ct-simulated", "brain-mri", "hippocampus")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["plan.json", "plan-cpu.json"])
def test_the_plan_is_made_again_from_its_fingerprint(task, name):
    stored = plans.load(GALLERY / task / name)
    fingerprint = Fingerprint.load(GALLERY / task / "fingerprint.json")
    assert planner.make(fingerprint, stored.budget) == stored


@pytest.mark.parametrize("task", TASKS)
def test_the_private_plan_or_its_refusal_is_made_again(task):
    plan, refusal = GALLERY / task / "plan-private.json", GALLERY / task / "refusal.json"
    fingerprint = Fingerprint.load(GALLERY / task / "fingerprint.json")
    assert plan.is_file() != refusal.is_file()
    if plan.is_file():
        stored = plans.load(plan)
        assert stored.budget.epsilon == 8 and planner.make(fingerprint, stored.budget) == stored
        assert planner.forecast(stored).grade != "hopeless"
    else:
        stored = read_json(refusal)
        with pytest.raises(ValidationErrors) as error:
            planner.make(fingerprint, Budget.parse(stored["budget"], str(refusal)))
        assert error.value.problems == tuple(stored["problems"]) and "hardly anything would be learned" in str(
            error.value
        )


def test_few_patients_are_refused():
    assert {task for task in TASKS if (GALLERY / task / "refusal.json").is_file()} >= {
        "histology", "kidney-ct-simulated", "brain-mri",
    }  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_task_says_what_it_is_for(task):
    text = (GALLERY / task / "README.md").read_text()
    for part in ("For ", "Data: ", "Measured: "):
        assert part in text, part
    assert ("simulated" in text) == ("simulated" in task)


def test_nothing_in_the_gallery_is_left_out():
    assert {p.name for p in GALLERY.iterdir() if (p / "fingerprint.json").is_file()} == set(TASKS)
