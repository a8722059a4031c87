"""Where the time of a training step goes: making its patches, and learning from them.

    python tests/benchmarks/step_time.py DATA -o OUT [--federation hippocampus] [--device auto] [--before DIR] [--quick]

DATA as in main_job.py; one site of each federation is prepared. Prints Markdown tables and writes OUT/step_time.json.
The first table is the making of patches in one thread, with nothing beside it. The others are steps of training, fed as
`fit` feeds them by default: "waiting" is what making the patches adds to the step. Times are medians over steps, so
that other work on the machine disturbs them less; those of making patches are means, since few patches are rotated.

With --before, a checkout of an earlier version (`git worktree add DIR COMMIT`), the same steps are also taken by that
version and by this one in turns, each time in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from autofed import api, plans
from autofed.files import write_json
from autofed.preprocessing import Store, open_store
from autofed.privacy.none import NoPrivacy
from autofed.training import batches
from autofed.training.batches import intensities, patches
from autofed.training.devices import autocast, pick_device, synchronise
from autofed.training.fit import Learner

FEDERATIONS = ("dermoscopy", "hippocampus")
HOURS = 0.3
STEPS, QUICK_STEPS = 40, 8
TURNS = 3
FED_PER_STEP = 4
"""Making patches is timed over so many times as many steps: it is quicker, and varies more."""
PHASES = ("waiting", "forward", "loss", "backward", "optimiser")


def main() -> None:
    """Measure everything, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--federation", action="append", choices=FEDERATIONS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps of a kind, not {STEPS}")
    args = parser.parse_args()
    device, steps = pick_device(args.device), QUICK_STEPS if args.quick else STEPS
    about = {"date": str(date.today()), "machine": platform.machine(), "device": device, "steps": steps,
             "threads": torch.get_num_threads()}  # fmt: skip
    results = {}
    for name in args.federation or FEDERATIONS:
        made, store = prepare(args.data / name, args.output / name)
        results[name] = measure(made.local, store, device, steps)
        print(tables(name, made.local.training, results[name]), flush=True)
        if args.before:
            results[name]["turns"] = compare(made.local, args.output / name / "work", store, args.before, steps)
            print(turns_table(results[name]["turns"]), flush=True)
    write_json(args.output / "step_time.json", {"about": about, "seconds": results})


def prepare(data: Path, out: Path) -> tuple[plans.Plan, Store]:
    """A plan for all sites, and the first site's data prepared for it."""
    sites = sorted(p.parent for p in data.glob("sites/*/dataset.json"))
    if not (out / "plan.json").is_file():
        api.plan(sites, out / "plan.json", hours=HOURS, processes=2)
    made = plans.load(out / "plan.json")
    api.preprocess(made, sites[:1], out / "work", processes=2)
    return made, open_store(out / "work", sites[0].name, made.local)


def measure(local: plans.LocalPlan, store: Store, device: str, steps: int) -> dict:
    """Seconds a step: of making patches, part by part, and of training in each precision and layout."""
    training = {}
    for precision in ("float32", "bfloat16"):
        for channels_last in (False, True):
            kind = f"{precision}{', channels last' if channels_last else ''}"
            training[kind] = time_training(local, store, device, steps, precision, channels_last)
    return {"making": time_making(local.training, store, FED_PER_STEP * steps), "training": training}


def compare(local: plans.LocalPlan, work: Path, store: Store, before: Path, steps: int) -> dict:
    """Seconds a step of the earlier version and of this one, in turns: by precision and version, one dict a turn."""
    here, site = Path(__file__).resolve(), next(iter(store.folders.values())).parent.parent.name
    found: dict = {}
    for precision in ("float32", "bfloat16"):
        training = local.training.model_copy(update={"precision": precision})
        section = local.model_copy(update={"training": training}).model_dump_json()
        for _ in range(TURNS):
            for version, checkout in (("before", before.resolve()), ("now", here.parents[2])):
                command = [sys.executable, here.with_name("_steps.py"), work, site, section, str(steps)]
                said = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(checkout)}, check=True,
                                      capture_output=True, text=True)  # fmt: skip
                found.setdefault(precision, {}).setdefault(version, []).append(json.loads(said.stdout))
    return found


def turns_table(found: dict) -> str:
    """Medians over the turns, and their ratio, as Markdown."""
    lines = ["| ms a step | making patches | learning | together |", "|---|---|---|---|"]
    for precision, versions in found.items():
        medians = {v: {p: median(t[p] for t in turns) for p in turns[0]} for v, turns in versions.items()}
        lines += [f"| {precision}, {v} | " + " | ".join(f"{1e3 * s:.1f}" for s in m.values()) + " |"
                  for v, m in medians.items()]  # fmt: skip
        ratios = [medians["now"][part] / medians["before"][part] for part in medians["now"]]
        lines.append("| ratio | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
    return "\n".join([*lines, ""])


# --- making patches --------------------------------------------------------------------------------------------------


def time_making(training: plans.Training, store: Store, steps: int) -> dict[str, float]:
    """Mean seconds a step, part by part."""
    spent: dict[str, float] = defaultdict(float)
    list(batches.stream(store, draws(store, training, 2), training, (0,), workers=0))  # to warm up
    with watched(spent, training):
        feed = batches.stream(store, draws(store, training, steps), training, (1,), workers=0)
        begin = time.perf_counter()
        for _ in feed:
            pass
        whole = time.perf_counter() - begin
    spent["the rest"] = whole - sum(spent.values())
    return {part: seconds / steps for part, seconds in spent.items()}


@contextmanager
def watched(spent: dict[str, float], training: plans.Training) -> Iterator[None]:
    """Within it, the parts of making patches add their time to `spent`."""
    with ExitStack() as stack:
        for owner, name, part in (
            (Store, "image", "reading"),
            (Store, "label", "reading"),
            (Store, "locations", "reading"),
            (patches, "_crop", "reading"),
            (batches.SpatialTransform, "transform_image", "spatial, image"),
            (batches.SpatialTransform, "transform_label", "spatial, labels"),
        ):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), part, spent)))
        chain = intensities.transforms(training.rotate_in_plane_only)
        named = tuple(timed(t, f"{i} {type(t).__name__}", spent) for i, t in enumerate(chain, 1))
        stack.enter_context(patch.object(intensities, "transforms", lambda _in_plane: named))
        yield


def timed(work: Callable, part: str, spent: dict[str, float]) -> Callable:
    """The same work, its time added to a part."""

    def doing(*args, **named):
        begin = time.perf_counter()
        try:
            return work(*args, **named)
        finally:
            spent[part] += time.perf_counter() - begin

    spent[part] += 0.0  # in the order in which they are named
    return doing


def draws(store: Store, training: plans.Training, steps: int) -> Iterator[list[list[str]]]:
    """The draws of a training without privacy."""
    sampler = NoPrivacy(training.batch_size).sampler(list(store.patients), (1,))
    return (next(sampler) for _ in range(steps))


# --- training --------------------------------------------------------------------------------------------------------


def time_training(
    local: plans.LocalPlan, store: Store, device: str, steps: int, precision: str, channels_last: bool
) -> dict[str, float]:
    """Median seconds a step, phase by phase, after two steps to warm up."""
    training = local.training.model_copy(update={"precision": precision})
    learner = Learner(local.network, training, device)
    layout = (torch.channels_last if local.axes == 2 else torch.channels_last_3d) if channels_last else None
    learner.module.to(memory_format=layout or torch.contiguous_format)
    optimiser = torch.optim.SGD(learner.module.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    feed = batches.stream(store, draws(store, training, steps + 2), training, (1,))
    for _ in range(steps + 2):
        clock = Clock(device, times)
        made = next(feed)[0]
        clock.note("waiting")
        image = torch.from_numpy(made.image).to(device, memory_format=layout or torch.contiguous_format)
        with autocast(training.precision, device):
            outputs = learner.module(image)
        clock.note("forward")
        loss = learner._loss([logits.float() for logits in outputs], torch.from_numpy(made.label).to(device))
        clock.note("loss")
        loss.backward()
        clock.note("backward")
        torch.nn.utils.clip_grad_norm_(learner.module.parameters(), training.gradient_clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        clock.note("optimiser")
    return {phase: median(seconds[2:]) for phase, seconds in times.items()}


class Clock:
    """Notes the time since it was last asked, when the device has done all that it was told."""

    def __init__(self, device: str, times: dict[str, list[float]]):
        self.device, self.times, self.last = device, times, time.perf_counter()

    def note(self, phase: str) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        self.times[phase].append(now - self.last)
        self.last = now


def tables(name: str, training: plans.Training, found: dict) -> str:
    """Both as Markdown."""
    size = "x".join(map(str, training.patch_size))
    whole = sum(found["making"].values())
    lines = [f"### {name}: {training.batch_size} patches of {size}", "", "| making patches | ms a step | share |"]
    lines += ["|---|---|---|"]
    lines += [f"| {part} | {1e3 * s:.2f} | {s / whole:.0%} |" for part, s in found["making"].items()]
    lines += [f"| together | {1e3 * whole:.2f} | |", ""]
    lines += [f"| training, ms a step | {' | '.join(PHASES)} | together |", "|---" * (len(PHASES) + 2) + "|"]
    for kind, times in found["training"].items():
        cells = [f"{1e3 * times[phase]:.1f}" for phase in PHASES] + [f"{1e3 * sum(times.values()):.1f}"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
