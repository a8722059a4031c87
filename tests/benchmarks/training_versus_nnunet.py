"""Training beside nnU-Net 2.8.1: the same pooled cases, network, patch, batch and number of iterations.

    python tests/benchmarks/training_versus_nnunet.py DATA -o OUT --nnunet ENV --quick [--federation NAME]

DATA holds <federation>/sites/<site>/ and <federation>/test/{imagesTs,labelsTs}. ENV is nnU-Net's own environment, since
it and autofed want different packages:

    python3 -m venv ENV
    ENV/bin/pip install torch==2.13.0 nnunetv2==2.8.1

nnU-Net plans the pooled cases, and autofed is told to take its patch and its U-Net; --quick makes both narrower and
gives both 300 iterations of two patches, --full leaves them as they are and gives 1000 (for a GPU: --device cuda).
Everything else is each program's own: recipe, augmentation, feeding, precision, inference.

* Dice on the test set, which nobody trains on, all scored by autofed: each program predicts as it does by default, and
  without mirrored views. The difference is paired by case, with a bootstrap interval over the cases.
* Time of an iteration, feeding included: from the end of iteration 5 to the end of iteration 55 of a fresh process,
  one program after the other in turn. Nothing else may be at work on the machine.
* Memory of such a training from its first line to its last: all processes together, shared pages once (PSS).

autofed runs in the precision that its plan chooses and, if that is another one, in float32. Prints Markdown tables,
writes OUT/<federation>/results.{json,md}. What is finished is not run again; `--only` runs a part, `--arm` a program.
Linux only: memory is read in /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from _nnunet import environment, measure_trees, pool_sites, reached, run

FEDERATIONS = {"hippocampus": "3d_fullres", "dermoscopy": "2d"}
PARTS = ("dice", "timing", "memory")
NNUNET = "nnU-Net"
DATASET, PLANS, NARROW = "Dataset001_pooled", "nnUNetPlans", "nnUNetNarrowPlans"
HERE = Path(__file__).resolve().parent

WARM_UP, TIMED, REPEATS = 5, 50, 3
RESAMPLES = 10_000
PLANNED_HOURS = 0.1
"""What autofed plans for: a short training, which is what it gets."""

DICE_LOST = 0.005
LEARNT = 0.5
TIME_SHARE, TIME_STRETCH = 0.75, 0.6
MEMORY_SHARE = 0.7
"""What is aimed at: Dice lost at most, and shares of nnU-Net's time of an iteration and of its memory.

Where nnU-Net's own Dice is below `LEARNT` its training has hardly begun, and to be better than that is no aim.
"""

SHAPES = """
import json, sys
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
a, channels, classes = json.loads(sys.argv[1])
made = get_network_from_plans(a["network_class_name"], a["arch_kwargs"], a["_kw_requires_import"], channels, classes)
print(json.dumps([list(p.shape) for p in made.parameters()]))
"""


@dataclass(frozen=True)
class Scale:
    """Iterations in all and nnU-Net's epochs; features of the first stage; patches a batch (None: nnU-Net's)."""

    iterations: int
    epochs: int
    width: int
    batch: int | None


EPOCH = 25
"""Iterations in one of nnU-Net's epochs: its learning rate falls from epoch to epoch, and should not fall in leaps."""

QUICK, FULL = Scale(300, 300 // EPOCH, 8, 2), Scale(1000, 1000 // EPOCH, 32, None)


@dataclass(frozen=True)
class Task:
    """One federation, where its results go, and what is asked for."""

    data: Path
    out: Path
    nnunet: Path
    scale: Scale
    device: str

    @property
    def configuration(self) -> str:
        return FEDERATIONS[self.data.name]

    @property
    def sites(self) -> list[Path]:
        return sorted(p.parent for p in self.data.glob("sites/*/dataset.json"))

    @property
    def raw(self) -> Path:
        return self.out / "raw" / DATASET


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--nnunet", type=Path, help="the environment that nnU-Net is installed in")
    parser.add_argument("--federation", action="append", choices=FEDERATIONS)
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be repeated")
    parser.add_argument("--arm", action="append", choices=("nnunet", "autofed"), help="one of the programs")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each for Dice")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"{QUICK} (the default)")
    size.add_argument("--full", action="store_true", help=f"{FULL}")
    parser.add_argument(
        "--iterations", type=int, help=f"another number of them, a multiple of {EPOCH} and of the sites"
    )
    parser.add_argument("--train", nargs=2, type=Path, help=argparse.SUPPRESS)  # autofed's, in a process of its own
    args = parser.parse_args()
    if args.train:
        train_with_autofed(*args.train, args.output, args.device)
        return
    if not args.nnunet:
        print("without --nnunet ENV there is nothing to compare")
        return
    programs = args.arm or ("nnunet", "autofed")
    scale = FULL if args.full else QUICK
    if args.iterations:
        scale = replace(scale, iterations=args.iterations, epochs=args.iterations // EPOCH)
    for name in args.federation or FEDERATIONS:
        out = (args.output / name).resolve()
        task = Task(args.data.resolve() / name, out, args.nnunet.absolute(), scale, args.device)
        print(run_federation(task, args.only or PARTS, programs, args.seeds), flush=True)


def run_federation(task: Task, parts: Sequence[str], programs: Sequence[str], seeds: int) -> str:
    """What is missing of one federation, and all that is known of it as Markdown."""
    refuse_other_scale(task)
    network = prepare_nnunet(task)
    arms = [NNUNET] if "nnunet" in programs else []
    if "autofed" in programs:
        arms += [f"autofed, {precision}" for precision in prepare_autofed(task, network)]
    if "dice" in parts:
        for seed in range(seeds):
            for arm in arms:
                once(task, "dice", arm, seed, score)
    if "timing" in parts:
        for repeat in range(REPEATS):
            for arm in arms:  # in turn, so that what else the machine does falls on all of them
                once(task, "timing", arm, repeat, time_training)
    if "memory" in parts:
        for arm in arms:
            once(task, "memory", arm, 0, weigh_training)
    text = table(task, network)
    (task.out / "results.md").write_text(text)
    return text


def refuse_other_scale(task: Task) -> None:
    """Results of another scale or device must not be mixed with these."""
    asked = {**asdict(task.scale), "device": task.device}
    path = task.out / "scale.json"
    if path.is_file() and json.loads(path.read_text()) != asked:
        raise SystemExit(f"{task.out} holds results of {path.read_text()}, not of {json.dumps(asked)}; name another -o")
    task.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asked))


def once(task: Task, part: str, arm: str, number: int, work) -> None:
    """Run a part of an arm in a folder of its own, unless its result is known."""
    folder = task.out / part / f"{arm.replace(', ', '_')}.{number}"
    if folder.with_suffix(f".{number}.json").is_file():
        return
    print(f"{time.strftime('%H:%M:%S')} {task.data.name}: {part}, {arm}, {number}", file=sys.stderr, flush=True)
    if part != "dice":
        shutil.rmtree(folder, ignore_errors=True)  # a training that is timed runs from start to end
    folder.mkdir(parents=True, exist_ok=True)
    found = {"arm": arm, "number": number, "command": command_line(), "date": str(date.today()),
             **work(task, arm, number, folder)}  # fmt: skip
    folder.with_suffix(f".{number}.json").write_text(json.dumps(found, indent=1))


def command_line() -> str:
    return shlex.join(["python", *sys.argv])


# --- the same network ------------------------------------------------------------------------------------------------


def prepare_nnunet(task: Task) -> dict:
    """nnU-Net's data, plan and prepared cases; gives the network that both train, as narrow as the scale says."""
    pool_sites(task.sites, task.raw, task.data / "test" / "imagesTs")
    known = task.out / "network.json"
    if not known.is_file():
        command = [
            task.nnunet / "bin" / "nnUNetv2_plan_and_preprocess", "-d", "1", "-c", task.configuration,
            "-npfp", "2", "-np", "2", "--verify_dataset_integrity", "--no_pbar",
        ]  # fmt: skip
        run([str(part) for part in command], nnunet_environment(task, task.out / "results"), task.out / "nnunet.log")
        known.write_text(json.dumps(narrow(task)))
    return json.loads(known.read_text())


def nnunet_environment(task: Task, results: Path, threads: int | None = 1) -> dict[str, str]:
    """nnU-Net's folders; results of every training in a folder of its own."""
    return environment(task.raw.parent, task.out / "preprocessed", results, threads)


def narrow(task: Task) -> dict:
    """Write nnU-Net's plan with the scale's width and batch beside its own; gives what autofed is told."""
    folder = task.out / "preprocessed" / DATASET
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    chosen = plans["configurations"][task.configuration]
    kwargs = chosen["architecture"]["arch_kwargs"]
    planned = kwargs["features_per_stage"]
    kwargs["features_per_stage"] = [f * task.scale.width // planned[0] for f in planned]
    chosen["batch_size"] = task.scale.batch or chosen["batch_size"]
    plans["plans_name"] = NARROW
    (folder / f"{NARROW}.json").write_text(json.dumps(plans, indent=1))
    about = json.loads((task.raw / "dataset.json").read_text())
    asked = json.dumps([chosen["architecture"], len(about["channel_names"]), len(about["labels"])])
    command = [str(task.nnunet / "bin" / "python"), "-c", SHAPES, asked]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "transpose": plans["transpose_forward"],
        "spacing": chosen["spacing"],
        "patch_size": chosen["patch_size"],
        "batch_size": chosen["batch_size"],
        "features": kwargs["features_per_stage"],
        "kernels": kwargs["kernel_sizes"],
        "strides": kwargs["strides"],
        "shapes": json.loads(said.splitlines()[-1]),
    }


def prepare_autofed(task: Task, network: dict) -> list[str]:
    """autofed's plan for the same network, and its prepared cases; gives the precisions to run in."""
    from autofed import api, plans

    path = task.out / "plan.json"
    if not path.is_file():
        api.plan(
            task.sites, path, hours=PLANNED_HOURS, device=task.device, algorithm="pooled",
            configuration=task.configuration, settings=settings(task, network), processes=2,
        )  # fmt: skip
    made = plans.load(path)
    refuse_other_network(made, network)
    api.preprocess(made, task.sites, task.out / "work", processes=2)
    return list(dict.fromkeys([made.local.training.precision, "float32"]))


def settings(task: Task, network: dict) -> dict:
    """nnU-Net's network, patch and batch; the iterations as rounds, about twice as many as steps of a site in one."""
    per_site, rest = divmod(task.scale.iterations, len(task.sites))
    if rest or task.scale.iterations % EPOCH:
        raise SystemExit(
            f"{task.scale.iterations} iterations are no multiple of {EPOCH} and of {len(task.sites)} sites"
        )
    wanted = math.sqrt(2 * per_site)
    rounds = min((n for n in range(1, per_site + 1) if per_site % n == 0), key=lambda n: abs(n - wanted))
    return {
        **{f"network.{key}": network[key] for key in ("features", "kernels", "strides")},
        **{key: network[key] for key in ("patch_size", "batch_size")},
        "training.rounds": rounds,
        "training.steps_per_round": per_site // rounds,
    }


def refuse_other_network(made, network: dict) -> None:
    """All arrays of autofed's network must be in nnU-Net's, on the same grid and axes.

    nnU-Net's has more that change nothing: a bias of every convolution, most of which the normalisation after it takes
    out again, and a head at the coarsest stage whose weight in the loss is 0.
    """
    ours = Counter(shape for shape in shapes(made) if len(shape) > 1)
    theirs = Counter(tuple(shape) for shape in network["shapes"] if len(shape) > 1)
    dims = len(network["patch_size"])
    head = (made.local.network.classes, network["features"][-2], *(1,) * dims)
    grid = made.local.geometry.spacing_mm[-dims:]
    same_grid = np.allclose(grid, network["spacing"]) and list(made.local.geometry.transpose) == network["transpose"]
    if theirs - ours != Counter([head]) or ours - theirs or not same_grid:
        raise SystemExit(
            f"the networks differ: autofed has {ours - theirs} more, nnU-Net {theirs - ours}; grids {grid}, axes "
            f"{made.local.geometry.transpose}; nnU-Net {network['spacing']}, {network['transpose']}"
        )


def shapes(made) -> list[tuple[int, ...]]:
    """The shapes of all trainable arrays of a plan's network."""
    from autofed.training.network import build

    return [tuple(p.shape) for p in build(made.local.network).parameters()]


# --- a training ------------------------------------------------------------------------------------------------------


def training(
    task: Task, arm: str, folder: Path, seed: int, iterations: int | None, threads: int | None
) -> tuple[list[str], dict]:
    """The command of a training into a folder, whole or of so many iterations, and its environment.

    It leaves clock.json in the folder. Without a number of threads both programs choose.
    """
    if arm != NNUNET:
        command = [
            sys.executable, __file__, "-", "-o", folder, "--train", arm_plan(task, arm, folder, seed, iterations),
            task.out / "work", "--device", task.device,
        ]  # fmt: skip
        return [str(part) for part in command], environment(task.raw.parent, task.out, folder, threads)
    epochs = 1 if iterations else task.scale.epochs
    asked = {
        "epochs": epochs,
        "iterations": iterations or task.scale.iterations // epochs,
        "seed": seed,
        "clock": str(folder / "clock.json"),
    }
    command = [
        str(task.nnunet / "bin" / "python"), str(HERE / "_nnunet_train.py"), json.dumps(asked),
        DATASET, task.configuration, "all", "-p", NARROW, "-device", task.device,
    ]  # fmt: skip
    return command, nnunet_environment(task, folder / "results", threads)


def arm_plan(task: Task, arm: str, folder: Path, seed: int, iterations: int | None) -> Path:
    """The plan of an arm: its precision and seed, and only so many rounds as the iterations need."""
    from autofed import plans

    made = plans.load(task.out / "plan.json")
    changes = {"training.precision": arm.split(", ")[1], "training.seed": seed}
    if iterations:
        per_round = made.local.training.steps_per_round * len(task.sites)
        changes["training.rounds"] = math.ceil(iterations / per_round)
    made.change(changes).save(folder / "plan.json")
    return folder / "plan.json"


def train_with_autofed(plan: Path, work: Path, folder: Path, device: str) -> None:
    """`autofed train` as a user types it, with a clock where it has its bar."""
    from autofed import cli

    ends = []

    @contextmanager
    def clock() -> Iterator:
        yield lambda stage, done, total: ends.append(time.monotonic()) if done else None

    cli.terminal.progress = clock
    resume = ["--resume"] if (folder / "run" / "run.json").is_file() else []
    chosen = ["--algorithm", "pooled", "--device", device, *resume]
    sys.argv = ["autofed", "train", str(plan), str(work), "-o", str(folder / "run"), *chosen]
    cli.main()
    import torch

    (folder / "clock.json").write_text(json.dumps({"ends": ends, "threads": torch.get_num_threads()}))


def time_training(task: Task, arm: str, repeat: int, folder: Path) -> dict:
    """Seconds of an iteration, feeding included."""
    run(*training(task, arm, folder, repeat, WARM_UP + TIMED, None), folder / "log.txt")
    return pace(json.loads((folder / "clock.json").read_text()))


def pace(clock: dict) -> dict:
    """Seconds of an iteration after the warm-up, and what trained."""
    ends = clock.pop("ends")
    return {"seconds": (ends[WARM_UP + TIMED - 1] - ends[WARM_UP - 1]) / TIMED, **clock}


def weigh_training(task: Task, arm: str, repeat: int, folder: Path) -> dict:
    """The memory of such a training; a run of its own, since looking takes time."""
    command, environ = training(task, arm, folder, repeat, WARM_UP + TIMED, None)
    return asdict(measure_trees([command], environ, folder / "log.txt"))


# --- Dice ------------------------------------------------------------------------------------------------------------


def score(task: Task, arm: str, seed: int, folder: Path) -> dict:
    """Train to the end, predict the test set with and without mirrored views, and score every case."""
    if not (folder / "clock.json").is_file():
        threads = int(os.environ["OMP_NUM_THREADS"]) if os.environ.get("OMP_NUM_THREADS", "").isdigit() else None
        run(*training(task, arm, folder, seed, None, threads), folder / "log.txt")
    clock = json.loads((folder / "clock.json").read_text())
    predict = predict_with_nnunet if arm == NNUNET else predict_with_autofed
    found = {views: evaluated(task, predict(task, folder, views)) for views in ("default", "plain")}
    return {"threads": clock["threads"], **found}


def predict_with_nnunet(task: Task, folder: Path, views: str) -> Path:
    """nnU-Net's own prediction of the test set; plain: without mirrored views."""
    target = folder / views
    shutil.rmtree(target, ignore_errors=True)
    command = [
        task.nnunet / "bin" / "nnUNetv2_predict", "-i", task.raw / "imagesTs", "-o", target, "-d", DATASET,
        "-c", task.configuration, "-p", NARROW, "-f", "all", "-device", task.device,
        "--disable_progress_bar", *(["--disable_tta"] if views == "plain" else []),
    ]  # fmt: skip
    run([str(part) for part in command], nnunet_environment(task, folder / "results"), folder / f"{views}.txt")
    return target


def predict_with_autofed(task: Task, folder: Path, views: str) -> Path:
    """autofed's, which goes on where it was interrupted; once only where its plan has no mirrored views."""
    from autofed import api, plans

    if not plans.load(folder / "plan.json").inference.mirror_axes:
        views = "default"
    images, mirroring = task.data / "test" / "imagesTs", views == "default"
    api.predict(folder / "run", images, folder / views, mirroring=mirroring, device=task.device)
    return folder / views


def evaluated(task: Task, predictions: Path) -> dict:
    """Mean Dice over structures, and that of every case."""
    from autofed import api

    report = api.evaluate(predictions, task.data / "test" / "labelsTs", processes=2)
    return {"mean": report.mean.dice, "cases": {c.case: c.mean.dice for c in report.cases if c.mean.dice is not None}}


def paired(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """Mean difference of Dice over the cases, each the mean of its seeds, with its 95 % bootstrap interval."""
    cases = sorted(set.intersection(*(set(run) for run in (*ours, *theirs))))
    apart = np.array([np.mean([r[c] for r in ours]) - np.mean([r[c] for r in theirs]) for c in cases])
    draws = np.random.default_rng(0).integers(len(apart), size=(RESAMPLES, len(apart)))
    low, high = np.percentile(apart[draws].mean(axis=1), (2.5, 97.5))
    return float(apart.mean()), float(low), float(high)


# --- what is printed -------------------------------------------------------------------------------------------------


def table(task: Task, network: dict) -> str:
    """All that is known of one federation, as Markdown; also written as JSON."""
    known = {part: [json.loads(p.read_text()) for p in sorted(task.out.glob(f"{part}/*.json"))] for part in PARTS}
    about = describe(task, network)
    (task.out / "results.json").write_text(json.dumps({"about": about, **known}, indent=1))
    arms = sorted({found["arm"] for part in known.values() for found in part}, key=lambda arm: (arm != NNUNET, arm))
    lines = [f"### {task.data.name}", "", *(f"* {key}: {value}" for key, value in about.items()), ""]
    lines += ["| program | Dice | without mirrored views | seconds an iteration (runs) | threads | peak MB |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [row(arm, known) for arm in arms]
    verdicts = [line for arm in arms if arm != NNUNET for line in verdict(arm, known)]
    return "\n".join([*lines, *([""] if verdicts else []), *verdicts, ""])


def describe(task: Task, network: dict) -> dict:
    """Machine, date, versions, seeds, command, and what both train."""
    theirs = sum(math.prod(shape) for shape in network["shapes"])
    biases = f"nnU-Net {theirs} parameters"
    if (task.out / "plan.json").is_file():
        from autofed import plans

        made = plans.load(task.out / "plan.json")
        ours = sum(math.prod(shape) for shape in shapes(made))
        biases += (
            f", autofed {ours}: the same convolutions; nnU-Net's have biases, nearly all of which the normalisation "
            "takes out again, and there is a head at the coarsest stage, which does not count in its loss"
        )
    scale = task.scale
    return {
        "machine": f"{processor()}, {os.cpu_count()} processors, {task.device}",
        "date": str(date.today()),
        "versions": versions(task),
        "command": command_line(),
        "seeds": "from 0; nnU-Net's workers draw their patches without a seed",
        "network": f"features {network['features']}, strides {network['strides']}, kernels {network['kernels']}; "
        + biases,
        "training": f"{scale.iterations} iterations of {network['batch_size']} patches {network['patch_size']}, "
        f"nnU-Net in {scale.epochs} epochs{rounds(task)}",
    }  # fmt: skip


def rounds(task: Task) -> str:
    if not (task.out / "plan.json").is_file():
        return ""
    from autofed import plans

    made = plans.load(task.out / "plan.json")
    t = made.local.training
    return (
        f", autofed in {made.agreement.training.rounds} rounds, {t.precision} by its plan, learning rate "
        f"{t.learning_rate:g}, momentum {t.momentum:g}, mirrored axes {list(t.mirror_axes)}"
    )


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


def versions(task: Task) -> str:
    """Of both programs, both torches and both Pythons."""
    ask = "import platform, nnunetv2, torch; from importlib.metadata import version; " \
          "print(version('nnunetv2'), torch.__version__, platform.python_version())"  # fmt: skip
    said = subprocess.run([str(task.nnunet / "bin" / "python"), "-c", ask], capture_output=True, text=True, check=True)
    theirs = said.stdout.split()
    head = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"nnU-Net {theirs[0]} with torch {theirs[1]}, Python {theirs[2]}; autofed {version('autofed')} "
        f"({commit or 'no commit'}) with torch {version('torch')}, Python {platform.python_version()}"
    )


def row(arm: str, known: Mapping[str, list[dict]]) -> str:
    """What is known of an arm; a dash where a part has not been run."""
    dice, timing, memory = ([f for f in known[part] if f["arm"] == arm] for part in PARTS)
    means = [f"{statistics.fmean(f[v]['mean'] for f in dice):.4f}" if dice else "-" for v in ("default", "plain")]
    seconds = [f["seconds"] for f in timing]
    runs = ", ".join(f"{s:.3f}" for s in seconds)
    pace = f"{statistics.median(seconds):.3f} ({runs})" if seconds else "-"
    threads = ", ".join(sorted({f"{f['threads']}{_workers(f)}" for f in timing})) or "-"
    peak = f"{max(f['pss_mb'] for f in memory):.0f}" if memory else "-"
    return f"| {arm} | {means[0]} | {means[1]} | {pace} | {threads} | {peak} |"


def _workers(found: dict) -> str:
    return f" and {found['workers']} workers" if found.get("workers") else ""


def verdict(arm: str, known: Mapping[str, list[dict]]) -> list[str]:
    """The aims of an arm, for every part that both programs have run."""
    lines = []
    (dice, timing, memory), (dice0, timing0, memory0) = (
        [[f for f in known[part] if f["arm"] == which] for part in PARTS] for which in (arm, NNUNET)
    )
    for views, named in (("default", "each as it predicts"), ("plain", "without mirrored views")) if dice else ():
        if dice0:
            mean, low, high = paired([f[views]["cases"] for f in dice], [f[views]["cases"] for f in dice0])
            level = statistics.fmean(f[views]["mean"] for f in dice0)
            judged = reached(mean >= -DICE_LOST) if level >= LEARNT else f"NOT judged, nnU-Net is only at {level:.2f}"
            lines.append(
                f"* {arm}: Dice {100 * mean:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}), {named}, "
                f"{len(dice)} and {len(dice0)} seeds (aim: {-100 * DICE_LOST:g} or more): {judged}"
            )
    if timing and timing0:
        share = statistics.median(f["seconds"] for f in timing) / statistics.median(f["seconds"] for f in timing0)
        lines.append(
            f"* {arm}: {share:.2f} of nnU-Net's time of an iteration (aim: {TIME_SHARE:g}): "
            f"{reached(share <= TIME_SHARE)}; (stretch: {TIME_STRETCH:g}): {reached(share <= TIME_STRETCH)}"
        )
    if memory and memory0:
        share = max(f["pss_mb"] for f in memory) / max(f["pss_mb"] for f in memory0)
        lines.append(
            f"* {arm}: {share:.2f} of nnU-Net's memory (aim: {MEMORY_SHARE:g}): {reached(share <= MEMORY_SHARE)}"
        )
    return lines


if __name__ == "__main__":
    main()
