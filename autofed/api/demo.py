"""The whole pipeline on the small federations that come with autofed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autofed import api, plans, report
from autofed.errors import ValidationErrors
from autofed.parallel import Progress, silent
from autofed.plans import Plan

FEDERATIONS = {"3d": "hippocampus", "2d": "nuclei"}

FEWEST_STEPS = 150
"""Steps at each site. After fewer the model may find nothing at all, and the demo would show nothing."""


@dataclass(frozen=True)
class Result:
    """The result of the demo: mean Dice over the test cases, the folder of pictures, and the page."""

    cases: int
    dice: float | None
    pictures: Path
    page: Path


def data(task: str) -> Path:
    """The folder of a shipped federation ("3d" or "2d"): in the installed package, or in a checkout's tests/data."""
    name = FEDERATIONS[task]
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "demo_data" / name, package.parent / "tests" / "data" / name):
        if folder.is_dir():
            return folder
    raise ValidationErrors("demo", [f"the shipped data ({name}) is not there; install autofed again"])


def run(output: Path, task: str = "3d", *, minutes: float = 2.5, progress: Progress = silent) -> Result:
    """Plan, preprocess, train, predict and evaluate; called again, it continues where it was interrupted.

    On a machine so slow that fewer than `FEWEST_STEPS` fit into the minutes, it takes longer.
    """
    source, folder = data(task), Path(output) / task
    sites = sorted(p.parent for p in source.glob("sites/*/dataset.json"))
    processes = os.cpu_count() or 1
    plan_path = folder / "plan.json"
    if not plan_path.is_file():  # a second plan would measure the machine again and would not fit the run
        _plan(sites, minutes, processes, progress).save(plan_path)
    plan = plans.load(plan_path)
    api.preprocess(plan, sites, folder / "work", processes=processes, progress=progress)
    api.train(plan, folder / "work", folder / "run", resume=(folder / "run" / "run.json").is_file(), progress=progress)
    test = source / "test"
    api.predict(folder / "run", test / "imagesTs", folder / "predictions", progress=progress)
    pictures = report.draw_predictions(folder / "predictions", progress)
    scores = api.evaluate(folder / "predictions", test / "labelsTs", folder / "report.json", progress=progress)
    page = folder / "report.html"
    report.page(scores, folder / "predictions", test / "labelsTs", [folder / "run"], page)
    return Result(len(scores.cases), scores.mean.dice, pictures[0].parent, page)


def _plan(sites: Sequence[Path], minutes: float, processes: int, progress: Progress) -> Plan:
    plan = api.plan(sites, hours=minutes / 60, processes=processes, progress=progress)
    steps = plan.agreement.training.rounds * plan.local.training.steps_per_round
    if steps >= FEWEST_STEPS:
        return plan
    return api.plan(sites, hours=minutes / 60 * FEWEST_STEPS / steps, processes=processes, progress=progress)
