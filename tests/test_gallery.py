"""Every plan of the gallery follows from its fingerprint, and says what it is for."""

from pathlib import Path

import pytest

from autofed import planner, plans
from autofed.fingerprints import Fingerprint

GALLERY = Path(__file__).parent.parent / "plans"
TASKS = ("dermoscopy", "breast-ultrasound", "histology", "kidney-ct-simulated", "brain-mri", "hippocampus")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["plan.json", "plan-cpu.json"])
def test_the_plan_is_made_again_from_its_fingerprint(task, name):
    stored = plans.load(GALLERY / task / name)
    found = Fingerprint.load(GALLERY / task / "fingerprint.json")
    assert planner.make(found, stored.budget) == stored


@pytest.mark.parametrize("task", TASKS)
def test_every_task_says_what_it_is_for(task):
    text = (GALLERY / task / "README.md").read_text()
    for part in ("For ", "Data: ", "Measured: "):
        assert part in text, part
    assert ("simulated" in text) == ("simulated" in task)


def test_nothing_in_the_gallery_is_left_out():
    assert {p.name for p in GALLERY.iterdir() if (p / "fingerprint.json").is_file()} == set(TASKS)
