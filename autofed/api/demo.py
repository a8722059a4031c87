"""The whole way on the small federations that come with autofed."""

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
"""At each site: after fewer the model may find nothing at all, which shows nobody what autofed does."""


@dataclass(frozen=True)
class Result:
    """What the demo shows: mean Dice over the test cases, and where to look."""

    cases: int
    dice: float | None
    pictures: Path
    page: Path


def data(task: str) -> Path:
    """The folder of a shipped federation: inside the installed package, or in the checkout's tests/data."""
    name = FEDERATIONS[task]
    package = Path(__file__).resolve().parents[1]
    for place in (package / "demo_data" / name, package.parent / "tests" / "data" / name):
        if place.is_dir():
            return place
    raise ValidationErrors("demo", [f"the shipped data ({name}) is not there; install autofed again"])


def run(output: Path, task: str = "3d", *, minutes: float = 2.5, progress: Progress = silent) -> Result:
    """Plan, preprocess, train, predict and evaluate; run again, it goes on where it was interrupted.

    Where fewer than `FEWEST_STEPS` fit into the minutes, since the machine is slow or busy, it takes longer.
    """
    source, out = data(task), Path(output) / task
    sites = sorted(p.parent for p in source.glob("sites/*/dataset.json"))
    processes = os.cpu_count() or 1
    plan_path = out / "plan.json"
    if not plan_path.is_file():  # a second plan would measure the machine anew and belong to another run
        _plan(sites, minutes, processes, progress).save(plan_path)
    made = plans.load(plan_path)
    api.preprocess(made, sites, out / "work", processes=processes, progress=progress)
    api.train(made, out / "work", out / "run", resume=(out / "run" / "run.json").is_file(), progress=progress)
    test = source / "test"
    api.predict(out / "run", test / "imagesTs", out / "predictions", progress=progress)
    pictures = report.draw_predictions(out / "predictions", progress)
    found = api.evaluate(out / "predictions", test / "labelsTs", out / "report.json", progress=progress)
    page = out / "report.html"
    report.page(found, out / "predictions", test / "labelsTs", [out / "run"], page)
    return Result(len(found.cases), found.mean.dice, pictures[0].parent, page)


def _plan(sites: Sequence[Path], minutes: float, processes: int, progress: Progress) -> Plan:
    made = api.plan(sites, hours=minutes / 60, processes=processes, progress=progress)
    fit = made.agreement.training.rounds * made.local.training.steps_per_round
    if fit >= FEWEST_STEPS:
        return made
    return api.plan(sites, hours=minutes / 60 * FEWEST_STEPS / fit, processes=processes, progress=progress)
