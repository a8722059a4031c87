"""The main job on real federations: fedavg beside pooled and local, at the same total of patches.

    python tests/benchmarks/main_job.py DATA -o OUT [--federation hippocampus] [--quick | --full]

DATA holds <federation>/sites/<site>/ and <federation>/test/{imagesTs,labelsTs}. A run that was interrupted goes
on; what is finished is not run again. Prints a Markdown table and writes OUT/<federation>/results.json.

Every arm takes the same number of steps with the same batch in all: fedavg and local share them out evenly over the
sites, pooled takes them all on the union. "local" is the mean over the sites' models, each on the whole test set.
The arms are compared without mirrored views, which take four times as long; fedavg is also scored with them, as predict
does it. "Undisturbed" is the time that the training would have taken if every round had been as fast as the fastest:
other work on the machine lengthens the others.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

from autofed import api, plans
from autofed.federation import metrics
from autofed.federation.run_folder import Run
from autofed.files import write_json
from autofed.inference.scores import Report

QUICK_HOURS = {"hippocampus": 0.2, "dermoscopy": 0.35}
ARMS = ("fedavg", "pooled", "local")
FULL_HOURS = 8.0


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--federation", action="append", choices=QUICK_HOURS)
    parser.add_argument("--arm", action="append", choices=ARMS)
    parser.add_argument("--device", default="auto")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a quarter of an hour of training an arm (the default)")
    size.add_argument("--full", action="store_true", help=f"{FULL_HOURS} h of training an arm, for a GPU")
    args = parser.parse_args()
    for federation in args.federation or QUICK_HOURS:
        hours = FULL_HOURS if args.full else QUICK_HOURS[federation]
        run_federation(args.data / federation, args.output / federation, hours, args.arm or ARMS, args.device)


def run_federation(data: Path, out: Path, hours: float, arms: tuple[str, ...], device: str) -> None:
    """All arms of one federation under one plan."""
    sites = sorted(p.parent for p in data.glob("sites/*/dataset.json"))
    plan_path = out / "plan.json"
    if not plan_path.is_file():
        api.plan(sites, plan_path, hours=hours, device=device, processes=2)
    made = plans.load(plan_path)
    api.preprocess(made, sites, out / "work", processes=2)
    results = [run_arm(data, out, made, arm, device) for arm in arms]
    about = {
        "date": str(date.today()), "machine": f"{platform.machine()}, {made.budget.device}, "
        f"{made.local.training.precision}", "seed": made.local.training.seed, "hours_planned": hours,
    }  # fmt: skip
    write_json(out / "results.json", {"about": about, "arms": results})
    print(table(data.name, made, results, about), flush=True)


def run_arm(data: Path, out: Path, made: plans.Plan, arm: str, device: str) -> dict:
    """Train one arm, predict the test set with each of its models, and score."""
    folder = out / arm
    if (folder / "result.json").is_file():
        return {**json.loads((folder / "result.json").read_text()), **minutes(folder / "run")}
    run = api.train(made, out / "work", folder / "run", algorithm=arm, device=device,
                      resume=(folder / "run" / "run.json").is_file())  # fmt: skip
    begin = time.monotonic()
    reports = {model: score(run.folder, data, folder / model, model, device, mirroring=False) for model in run.models()}
    mirrored = None
    if arm == "fedavg" and made.inference.mirror_axes:
        mirrored = score(run.folder, data, folder / "mirrored", "global", device, mirroring=True).mean.dice
    result = {
        "arm": arm,
        "dice_with_mirrored_views": mirrored,
        "dice": {model: report.mean.dice for model, report in reports.items()},
        "jaccard": {model: report.mean.jaccard for model, report in reports.items()},
        "hd95": {model: report.mean.hd95_mm for model, report in reports.items()},
        "prediction_minutes": (time.monotonic() - begin) / 60,
    }
    write_json(folder / "result.json", result)
    return {**result, **minutes(run.folder)}


def minutes(run: Path) -> dict[str, float]:
    """Minutes of training by the clock, and what they would be if every round were as fast as the fastest."""
    seconds = [line["seconds"] for line in metrics.read(Run(run).fold_folder())]
    return {"training_minutes": sum(seconds) / 60, "undisturbed_minutes": min(seconds) * len(seconds) / 60}


def score(run: Path, data: Path, target: Path, model: str, device: str, mirroring: bool) -> Report:
    """Predict the test set with one model, and score it."""
    api.predict(run, data / "test" / "imagesTs", target, model=model, mirroring=mirroring, device=device)
    return api.evaluate(target, data / "test" / "labelsTs", target / "report.json")


def table(name: str, made: plans.Plan, results: list[dict], about: dict) -> str:
    """One federation as Markdown."""
    training = made.local.training
    steps = made.agreement.training.rounds * training.steps_per_round * len(made.agreement.patients)
    lines = [
        f"### {name}",
        "",
        f"{made.local.network.parameters / 1e6:.2f} million parameters, patch {training.patch_size}, batch "
        f"{training.batch_size}, {steps} steps in all ({made.agreement.training.rounds} rounds); seed {about['seed']}; "
        f"{about['machine']}; {about['date']}.",
        "",
        "| arm | Dice | Jaccard | HD95 | training, min | undisturbed, min |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(
            f"| {result['arm']} | {_mean(result['dice'], 4)} | {_mean(result['jaccard'], 4)} | "
            f"{_mean(result['hd95'], 2)} | {result['training_minutes']:.1f} | {result['undisturbed_minutes']:.1f} |"
        )
        if result["dice_with_mirrored_views"]:
            lines.append(f"| {result['arm']}, mirrored views | {result['dice_with_mirrored_views']:.4f} | | | | |")
        if len(result["dice"]) > 1:
            lines += [f"| {result['arm']}, {model} | {dice:.4f} | | | | |" for model, dice in result["dice"].items()]
    return "\n".join([*lines, ""])


def _mean(values: dict[str, float], digits: int) -> str:
    return f"{sum(values.values()) / len(values):.{digits}f}"


if __name__ == "__main__":
    main()
