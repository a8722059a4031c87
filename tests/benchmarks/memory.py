"""How much memory a training step takes, beside what the network states of itself without being run.

    python tests/benchmarks/memory.py [DATA] -o OUT [--quick]

DATA is not read. Each figure is that of a process of its own: it takes a step of a tiny network of the same kind, notes
its memory, resets the peak (Linux's /proc/self/clear_refs) and takes three steps. Twice over: as
glibc's malloc is, and with MALLOC_MMAP_THRESHOLD_=131072, the value that it starts with: larger blocks go back to the
system when they are freed. Left to itself malloc raises that threshold to up to 32 MB and keeps what is smaller: that
is faster, but the peak then holds blocks that nobody uses. The statement is about tensors, that is the second figure.

Prints Markdown tables, draws OUT/memory.png, writes OUT/memory.json; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

FIXED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
PRECISIONS = ("float32", "bfloat16")


def shape(kind: str, dimension: int, base: int, stages: int, classes: int = 3, deep: bool = True) -> dict:
    """The plan's network section."""
    blocks = {"unet": (), "resenc": (1, 3, 4, 6, 6, 6), "dcfed": (1,) * 6}[kind][:stages]
    return {
        "kind": kind, "in_channels": 1, "classes": classes, "features": [base * 2**s for s in range(stages)],
        "kernels": [[3] * dimension] * stages, "strides": [[1] * dimension, *[[2] * dimension] * (stages - 1)],
        "blocks": blocks, "deep_supervision": deep,
    }  # fmt: skip


TABLE = {
    "2D unet 8, narrow": (shape("unet", 2, 8, 5), 256, 8),
    "2D unet 32": (shape("unet", 2, 32, 5), 256, 4),
    "2D unet 32, one head": (shape("unet", 2, 32, 5, deep=False), 256, 4),
    "2D resenc 16": (shape("resenc", 2, 16, 4), 192, 4),
    "2D dcfed 32": (shape("dcfed", 2, 32, 4), 128, 4),
    "3D unet 8, narrow": (shape("unet", 3, 8, 4), 64, 2),
    "3D unet 8, 12 classes": (shape("unet", 3, 8, 4, classes=12), 64, 2),
    "3D unet 32, small patch": (shape("unet", 3, 32, 4), 32, 2),
    "3D unet 32": (shape("unet", 3, 32, 4), 64, 2),
    "3D unet 32, one head": (shape("unet", 3, 32, 4, deep=False), 48, 2),
    "3D resenc 8, narrow": (shape("resenc", 3, 8, 4), 64, 2),
    "3D resenc 32, small patch": (shape("resenc", 3, 32, 4), 32, 2),
    "3D dcfed 8, narrow": (shape("dcfed", 3, 8, 4), 64, 2),
    "3D dcfed 16": (shape("dcfed", 3, 16, 4), 48, 2),
}
CURVES = {
    2: (shape("unet", 2, 32, 5), (64, 128, 192, 256, 320, 384), 4),
    3: (shape("unet", 3, 32, 4), (16, 32, 48, 64, 80), 2),
}


def main() -> None:
    """Measure what is missing, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="not read")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="smaller patches, and malloc as it is for float32 alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(take(**json.loads(args.one))))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    known = args.output / "memory.json"
    found = json.loads(known.read_text()) if known.is_file() else {}
    for key, task, environ in tasks(args.quick):
        if key not in found:
            found[key] = measure(task, environ)
            known.write_text(json.dumps(found, indent=1))
    print(table(found, args.quick), flush=True)
    draw(found, args.quick, args.output / "memory.png")


def tasks(quick: bool) -> list[tuple[str, dict, dict]]:
    """Everything to be measured: its key, what the process is asked for, and how its malloc is set."""
    rows = []
    for name, network, edge, batch in cases(quick):
        for what in PRECISIONS:
            task = {"network": network, "patch": [edge] * len(network["strides"][0]), "batch": batch, "what": what}
            rows.append((f"{name} | {edge} | {what} | fixed", task, FIXED))
            if what == "float32" or (what == "bfloat16" and not quick):
                rows.append((f"{name} | {edge} | {what} | as it is", task, {}))
    return rows


def cases(quick: bool) -> list[tuple[str, dict, int, int]]:
    """Name, network, edge of the patch, and batch."""
    rows = [(name, network, edge, batch) for name, (network, edge, batch) in TABLE.items()]
    for dimension, (network, edges, batch) in CURVES.items():
        rows += [(f"curve {dimension}D", network, edge, batch) for edge in (edges[:-2] if quick else edges)]
    return rows


def measure(task: dict, environ: dict) -> dict:
    """What a fresh process takes and states, in bytes."""
    command = [sys.executable, __file__, "--one", json.dumps(task)]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def take(network: dict, patch: list[int], batch: int, what: str) -> dict:
    """Train in this process: the peak over what it had after a step of a tiny network."""
    from autofed.plans import Network, training_bytes

    plan = Network(**network)
    tiny = shape(plan.kind, len(patch), 16, 2)  # the libraries' own code is read from disk as it is first called
    train(Network(**tiny), (16,) * len(patch), 2, what)
    before = in_use("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(plan, tuple(patch), batch, what)
    stated = training_bytes(plan, tuple(patch), batch, what)
    return {"taken": in_use("VmHWM") - before, "stated": stated}


def in_use(name: str) -> int:
    """Bytes of this process's memory, by Linux's name of the measure."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def train(plan, patch: tuple[int, ...], batch: int, precision: str) -> None:
    """Three steps with momentum, as `fit` takes them."""
    import numpy as np
    import torch

    from autofed.plans import Training
    from autofed.training.batches import PatchBatch
    from autofed.training.fit import Learner

    recipe = Training(patch_size=patch, batch_size=batch, steps_per_round=1, precision=precision)
    learner = Learner(plan, recipe, "cpu")
    image = np.random.default_rng(0).standard_normal((batch, plan.in_channels, *patch), np.float32)
    patches = PatchBatch(image, (image[:, :1] > 0).astype(np.int16))
    parameters = list(learner.module.parameters())
    optimiser = torch.optim.SGD(parameters, lr=1e-4, momentum=0.99, nesterov=True, weight_decay=3e-5)
    for _ in range(3):
        for parameter, part in zip(parameters, learner.gradient(patches, []), strict=True):
            parameter.grad = part.detach()
        del part
        torch.nn.utils.clip_grad_norm_(parameters, 12.0)
        optimiser.step()


def table(found: dict, quick: bool) -> str:
    """All rows as Markdown."""
    lines = ["### Memory", "", "MB over the process's baseline.", ""]
    lines += ["| network | patch | batch | what | stated | taken | stated / taken | taken with malloc as it is |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, network, edge, batch in cases(quick):
        for what in PRECISIONS:
            fixed, free = (found.get(f"{name} | {edge} | {what} | {how}") for how in ("fixed", "as it is"))
            size = "x".join([str(edge)] * len(network["strides"][0]))
            cells = [f"{fixed['stated'] / 1e6:.0f}", f"{fixed['taken'] / 1e6:.0f}"]
            cells += [f"{fixed['stated'] / fixed['taken']:.2f}", f"{free['taken'] / 1e6:.0f}" if free else ""]
            lines.append(f"| {name} | {size} | {batch} | {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def draw(found: dict, quick: bool, path: Path) -> None:
    """Peak over the edge of the patch: stated as a line, taken as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for panel, dimension in zip(panels, CURVES, strict=True):
        edges = [edge for name, _, edge, _ in cases(quick) if name == f"curve {dimension}D"]
        for colour, what in zip(("C0", "C1"), PRECISIONS, strict=True):
            rows = [found[f"curve {dimension}D | {edge} | {what} | fixed"] for edge in edges]
            panel.plot(edges, [row["stated"] / 1e6 for row in rows], colour, label=f"{what}, stated")
            panel.plot(edges, [row["taken"] / 1e6 for row in rows], colour + "o", label=f"{what}, taken")
        network, _, batch = CURVES[dimension]
        panel.set(title=f"{dimension}D unet of {network['features']}, {batch} patches", xlabel="edge of the patch",
                  ylabel="MB over the baseline")  # fmt: skip
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
