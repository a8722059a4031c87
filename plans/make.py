"""Make the gallery anew from a folder of federations: fingerprints, and the plans that follow from them.

    python plans/make.py DATA [--task hippocampus] [--private]

DATA holds <task>/sites/<site>/ in nnU-Net's raw layout. The CPU plans are for the speed of the machine that runs this.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from autofed import api, planner, plans
from autofed.errors import ValidationErrors
from autofed.files import write_json
from autofed.fingerprints import Fingerprint, merge
from autofed.plans import Budget

GALLERY = Path(__file__).parent
TASKS = ("dermoscopy", "breast-ultrasound", "histology", "kidney-ct-simulated", "brain-mri", "hippocampus")
CPU_HOURS = {"hippocampus": 0.2, "dermoscopy": 0.35}
"""Hours of the CPU plans, as in the benchmarks; one hour for all other tasks."""

EPSILON = 8.0
"""Epsilon of the private plans."""


def main() -> None:
    """Write plans/<task>/{fingerprint,plan,plan-cpu}.json and plan-private.json or refusal.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument(
        "--private", action="store_true", help="only the private plans, from the fingerprints and plans that are there"
    )
    args = parser.parse_args()
    for task in args.task or TASKS:
        make_private(GALLERY / task) if args.private else make_task(args.data / task, GALLERY / task)
        print(task, flush=True)


def make_task(data: Path, folder: Path) -> None:
    """One task: the merged fingerprint, the full plan for 8 GB of an accelerator, and one for a CPU."""
    sites = sorted(p.parent for p in data.glob("sites/*/dataset.json"))
    merged = merge([api.fingerprint(site, processes=os.cpu_count() or 1) for site in sites])
    merged.save(folder / "fingerprint.json")
    planner.make(merged, Budget(device="cuda")).save(folder / "plan.json")
    hours = CPU_HOURS.get(data.name, 1.0)
    api.plan([folder / "fingerprint.json"], folder / "plan-cpu.json", device="cpu", hours=hours)
    make_private(folder)


def make_private(folder: Path) -> None:
    """The private plan for the CPU plan's budget, or why there is none."""
    fingerprint = Fingerprint.load(folder / "fingerprint.json")
    budget = plans.load(folder / "plan-cpu.json").budget.model_copy(update={"epsilon": EPSILON})
    plan, refusal = folder / "plan-private.json", folder / "refusal.json"
    try:
        planner.make(fingerprint, budget).save(plan)
        refusal.unlink(missing_ok=True)
    except ValidationErrors as error:
        write_json(refusal, {"budget": budget.model_dump(mode="json"), "problems": error.problems})
        plan.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
