"""What a round costs beside the sites' local training: messages, averaging, checks, saving.

    OMP_NUM_THREADS=1 python tests/benchmarks/overhead.py DATA -o OUT [--federation hippocampus]

A few rounds of fedavg under the gallery's plan for a CPU, with steps as planned. "Local" is the time inside the sites'
fit, feeding included; the rest of the rounds, from the first request to the last saved state, is the engine. At the
sizes of algorithms.py the share stands in its own tables. Nothing else should be at work on the machine.
"""

from __future__ import annotations

import argparse
import platform
import shutil
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from _federations import GALLERY, markdown, watching

from autofed import api, plans
from autofed.files import write_json

FEDERATIONS = ("hippocampus", "dermoscopy")
ROUNDS = 3
AIM = 0.02
"""What share of a round the engine may take."""


def main() -> None:
    """Run, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--federation", action="append", choices=FEDERATIONS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    rows = [row(args, federation) for federation in args.federation or FEDERATIONS]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads; {date.today()}.\n")
    head = ("plan", "parameters, million", "steps a round and site", "s a round", "of it local", "engine, %", "aim")
    print(markdown(head, rows), flush=True)


def row(args: argparse.Namespace, federation: str) -> tuple[str, ...]:
    """One federation, timed from start to end."""
    made = plans.load(GALLERY / federation / "plan-cpu.json")
    made = made.change({"training.rounds": args.rounds, "training.snapshots": [args.rounds], "validate_every": 0})
    out = args.output.resolve() / "overhead" / federation
    sites = sorted(p.parent for p in (args.data / federation).glob("sites/*/dataset.json"))
    api.preprocess(made, sites, out / "work", processes=2)
    shutil.rmtree(out / "run", ignore_errors=True)
    with watching() as watch:
        api.train(made, out / "work", out / "run", device=args.device)
    share = 1 - watch.local / watch.seconds
    write_json(out / "result.json", {**asdict(watch), "share": share})
    return (
        f"plans/{federation}/plan-cpu.json", f"{made.local.network.parameters / 1e6:.2f}",
        str(made.local.training.steps_per_round), f"{watch.seconds / watch.rounds:.2f}",
        f"{watch.local / watch.rounds:.2f}", f"{100 * share:.2f}", "reached" if share < AIM else "NOT reached",
    )  # fmt: skip


if __name__ == "__main__":
    main()
