"""What a short plan does differently from nnU-Net, one thing at a time, on pooled data.

    python tests/benchmarks/short_training.py DATA -o OUT [--federation hippocampus] [--quick | --full]

DATA as in main_job.py. Prints a Markdown table, writes OUT/<federation>/results.json, goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from autofed import api, plans
from autofed.files import write_json

FEDERATIONS = ("hippocampus", "dermoscopy")
QUICK_HOURS, FULL_HOURS = 0.03, 0.2
VARIANTS = {
    "3d": {
        "as planned": {},
        "all axes mirrored": {"training.mirror_axes": [0, 1, 2], "inference.mirror_axes": [0, 1, 2]},
        "learning rate .05": {"learning_rate": 0.05},
        "momentum .99, learning rate .01": {"momentum": 0.99, "learning_rate": 0.01},
    },
    "2d": {
        "as planned": {},
        "not mirrored": {"training.mirror_axes": [], "inference.mirror_axes": []},
        "learning rate .05": {"learning_rate": 0.05},
        "momentum .99, learning rate .01": {"momentum": 0.99, "learning_rate": 0.01},
    },
}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--federation", action="append", choices=FEDERATIONS)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"{QUICK_HOURS} h of training a variant (the default)")
    size.add_argument("--full", action="store_true", help=f"{FULL_HOURS} h of training a variant")
    args = parser.parse_args()
    for federation in args.federation or FEDERATIONS:
        compare(args.data / federation, args.output / federation, FULL_HOURS if args.full else QUICK_HOURS)


def compare(data: Path, out: Path, hours: float) -> None:
    """Every variant of one federation's plan."""
    sites = sorted(p.parent for p in data.glob("sites/*/dataset.json"))
    if not (out / "plan.json").is_file():
        api.plan(sites, out / "plan.json", hours=hours, algorithm="pooled", processes=2)
    made = plans.load(out / "plan.json")
    api.preprocess(made, sites, out / "work", processes=2)
    training = made.local.training
    steps = made.agreement.training.rounds * training.steps_per_round * len(sites)
    rows = [
        f"### {data.name}: {steps} steps of {training.batch_size} patches, pooled",
        "",
        "| variant | Dice |",
        "|---|---|",
    ]
    results = {}
    for name, changes in VARIANTS[f"{made.agreement.dimension}d"].items():
        results[name] = run(data, out, made.change(changes) if changes else made, name)
        rows.append(f"| {name} | {results[name]:.4f} |")
    write_json(out / "results.json", {"steps": steps, "dice": results})
    print("\n".join([*rows, ""]), flush=True)


def run(data: Path, out: Path, made: plans.Plan, name: str) -> float:
    """Mean Dice on the test set after one training."""
    folder = out / name.replace(" ", "_").replace(",", "")
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())["dice"]
    trained = api.train(made, out / "work", folder / "run", resume=(folder / "run" / "run.json").is_file())
    api.predict(trained.folder, data / "test" / "imagesTs", folder / "out")
    dice = api.evaluate(folder / "out", data / "test" / "labelsTs", processes=2).mean.dice
    assert dice is not None
    write_json(folder / "result.json", {"dice": dice})
    return dice


if __name__ == "__main__":
    main()
