"""What a private step costs beside an ordinary one on as many patches: time and memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/private_step.py -o OUT [--steps 15]

Learning alone, from patches that are there already: making them costs the same with and without privacy. Networks and
batches of the gallery's plans for a CPU, and small ones as in privacy.py. An ordinary step has one backward of the
batch; a private one has one backward for each of its patients, K patches each, clips, adds up and adds noise, and then
both take the optimiser's step. Here every step draws just the expected patients: batch / K.

Time is this process's processor time, both ways in turns, the median of all steps; memory, each from a process of its
own, the peak over what it had before, with malloc's threshold fixed (see memory.py). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from _federations import GALLERY, markdown
from memory import FIXED, in_use, shape

MOST = 1.15
"""What share of an ordinary step's time a private one may take."""

SMALL = {
    "2D unet 4, 64 x 64": (shape("unet", 2, 4, 4, classes=2, deep=False), [64, 64], 12),
    "2D unet 8, 64 x 64": (shape("unet", 2, 8, 5, classes=2), [64, 64], 12),
    "3D unet 4, 24 x 32 x 24": (shape("unet", 3, 4, 3, deep=False), [24, 32, 24], 8),
}
"""Network, patch, batch."""

PATCHES = (1, 2, 4)
"""A patient's, where the batch is a multiple."""

ORDINARY = 0
"""Instead of a number of patches a patient: no privacy."""


def main() -> None:
    """Measure what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=False)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--only", action="append", help="networks whose names hold this; may be repeated")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.one:
        task = json.loads(args.one)
        print(json.dumps(peak(**task) if task.pop("memory") else times(**task)))
        return
    path = args.output / "private_step.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name, size in cases().items():
        if name not in found and (not args.only or any(part in name for part in args.only)):
            found[name] = measured(size, args.steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1))
    print(f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads; {date.today()}.\n")
    print(table(found), flush=True)


def cases() -> dict[str, dict[str, Any]]:
    """By name: network, patch, batch, precision."""
    found = {}
    for path in sorted(GALLERY.glob("*/plan-cpu.json")):
        local = json.loads(path.read_text())["local"]
        training = local["training"]
        found[f"plans/{path.parent.name}"] = {
            "network": local["network"], "patch": training["patch_size"], "batch": training["batch_size"],
            "precision": training["precision"],
        }  # fmt: skip
    for name, (network, patch, batch) in SMALL.items():
        found[name] = {"network": network, "patch": patch, "batch": batch, "precision": "bfloat16"}
    return found


def measured(size: dict[str, Any], steps: int) -> dict[str, Any]:
    """Seconds and bytes by patches a patient; "0" is the ordinary step."""
    ways = [ORDINARY, *(k for k in PATCHES if size["batch"] % k == 0)]
    seconds = asked({**size, "ways": ways, "steps": steps, "memory": False}, {})
    held = {str(way): asked({**size, "way": way, "memory": True}, FIXED) for way in ways}
    return {"parameters": parameters(size), "batch": size["batch"], "seconds": seconds, "bytes": held}


def parameters(size: dict[str, Any]) -> int:
    """Of the network."""
    from autofed.plans import Network

    return Network.parse(size["network"], "the network").parameters


def asked(task: dict[str, Any], environ: dict[str, str]) -> Any:
    """What a process of its own finds."""
    command = [sys.executable, __file__, "--one", json.dumps(task)]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def times(ways: list[int], steps: int, **size: Any) -> dict[str, float]:
    """Median processor seconds of a step, each way in turns."""
    takes = {way: stepper(way, **size) for way in ways}
    seconds: dict[int, list[float]] = {way: [] for way in ways}
    for turn in range(steps + 2):
        for way in ways if turn % 2 else reversed(ways):
            begin = time.process_time()
            takes[way]()
            if turn > 1:  # to warm up
                seconds[way].append(time.process_time() - begin)
    return {str(way): float(np.median(found)) for way, found in seconds.items()}


def peak(way: int, network: dict[str, Any], patch: list[int], batch: int, precision: str) -> int:
    """Bytes that three steps take at their peak, over what a tiny network's step left."""
    tiny = {**network, **shape("unet", len(patch), 4, 2), "in_channels": network["in_channels"], "kind": "unet"}
    stepper(way, tiny, [16] * len(patch), batch, precision)()
    before = in_use("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    take = stepper(way, network, patch, batch, precision)
    for _ in range(3):
        take()
    return in_use("VmHWM") - before


def stepper(way: int, network: dict[str, Any], patch: list[int], batch: int, precision: str) -> Callable[[], None]:
    """A step of training, as `fit` takes it, with so many patches a patient, or an ordinary one."""
    import torch

    from autofed.plans import Network, Training
    from autofed.privacy.dpsgd import DPSGD
    from autofed.privacy.none import NoPrivacy
    from autofed.training.batches import PatchBatch
    from autofed.training.fit import Learner

    plan = Network.parse(network, "the network")
    recipe = Training(patch_size=tuple(patch), batch_size=batch, steps_per_round=1, precision=precision)  # type: ignore[arg-type]
    learner = Learner(plan, recipe, "cpu")
    parameters = list(learner.module.parameters())
    optimiser = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, nesterov=True)
    generator = np.random.default_rng(0)
    patients = batch // way if way else 0
    private = DPSGD(patients or 1, 1.0, way or 1, 1.0, 1.0, normalised=True)

    def groups() -> Iterator[PatchBatch]:
        for _ in range(patients or 1):
            image = generator.standard_normal((way or batch, plan.in_channels, *patch), np.float32)
            yield PatchBatch(image, (image[:, :1] > 0).astype(np.int16))

    drawn = list(groups())

    def take() -> None:
        mechanism = private.with_key(b"a benchmark's secret, of 32 bytes") if way else NoPrivacy(batch)
        gradients = (learner.gradient(group, []) for group in drawn)
        for parameter, part in zip(parameters, mechanism.step(gradients, parameters), strict=True):
            parameter.grad = part.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 12.0)
        optimiser.step()

    return take


def table(found: dict[str, Any]) -> str:
    """As Markdown: a row for every network and number of patches a patient."""
    rows, worst = [], {}
    for name, what in found.items():
        for way, seconds in what["seconds"].items():
            if way == str(ORDINARY):
                continue
            slower = seconds / what["seconds"][str(ORDINARY)]
            larger = what["bytes"][way] / what["bytes"][str(ORDINARY)]
            worst[name, way] = slower
            rows.append((
                name, f"{what['parameters'] / 1e6:.2f}", f"{what['batch']} = {what['batch'] // int(way)} x {way}",
                f"{1e3 * what['seconds'][str(ORDINARY)]:.1f}", f"{1e3 * seconds:.1f}", f"{slower:.2f}",
                "yes" if slower <= MOST else "NO", f"{what['bytes'][str(ORDINARY)] / 1e6:.0f}",
                f"{what['bytes'][way] / 1e6:.0f}", f"{larger:.2f}", "yes" if larger <= 1 else "NO",
            ))  # fmt: skip
    head = ("network", "parameters, million", "batch = patients x patches", "ms, ordinary", "ms, private", "ratio",
            f"at most {MOST:g}", "MB, ordinary", "MB, private", "ratio", "no more")  # fmt: skip
    return markdown(head, rows)


if __name__ == "__main__":
    main()
