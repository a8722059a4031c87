"""Fingerprint, plan and preprocessing beside nnU-Net 2.8.1: time, memory, and whether the same arrays come out.

    python tests/benchmarks/versus_nnunet.py DATA -o OUT --nnunet ENV [--federation NAME] [--processes 2] [--quick]

DATA holds <federation>/sites/<site>/. The cases of all sites become one dataset, and both programs prepare it for the
3D configuration one after the other, each as a fresh tree of processes with as many workers, one thread in each, and
the files in the cache of the system. ENV is nnU-Net's own environment, since it and autofed want different packages:

    python3 -m venv ENV
    ENV/bin/pip install torch==2.13.0 nnunetv2==2.8.1

Prints a Markdown table and writes OUT/<federation>/results.json. A federation that is finished is not run again, and an
interrupted one goes on after its last finished run. The median of three runs counts; --quick makes one. Without
--nnunet only autofed is measured, and nothing is compared. Linux only: memory is read in /proc.

"autofed" calls `measure`, `planner.make` and `preprocess`, which is what nnU-Net's command does. "autofed, commands" is
what a user types, three commands; `plan` then also measures for some seconds how fast the machine trains, which nnU-Net
does not do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
from _nnunet import environment, measure_trees, pool_sites, reached

FEDERATIONS = ("hippocampus", "kidney-ct-simulated")
SIDES = ("autofed", "autofed, commands", "nnU-Net")
REPEATS = 3

FASTER = 5.0
MEMORY_SHARE = 0.5
TOLERANCE = 0.02
"""What is aimed at: how much faster, with what share of nnU-Net's memory, and the mean difference of intensities."""


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--nnunet", type=Path, help="the environment that nnU-Net is installed in")
    parser.add_argument("--federation", action="append", choices=FEDERATIONS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one run of each instead of the median of three")
    parser.add_argument("--only-prepare", type=Path, help=argparse.SUPPRESS)  # autofed's side, in a process of its own
    args = parser.parse_args()
    if args.only_prepare:
        prepare_with_autofed(args.only_prepare, args.output, args.processes)
        return
    for federation in args.federation or FEDERATIONS:
        out = args.output / federation
        out.mkdir(parents=True, exist_ok=True)
        print(
            run_federation(args.data / federation, out.resolve(), args.nnunet, args.processes, args.quick), flush=True
        )


def run_federation(data: Path, out: Path, nnunet: Path | None, processes: int, quick: bool) -> str:
    """Both programs on the pooled data of one federation, as a Markdown table."""
    raw = out / "raw" / "Dataset001_pooled"
    cases = pool_sites(sorted(p.parent for p in data.glob("sites/*/dataset.json")), raw)
    sides = [side for side in SIDES if nnunet or side != "nnU-Net"]
    wanted = {"cases": cases, "processes": processes, "sides": sides, "repeats": 1 if quick else REPEATS}
    results = out / "results.json"
    if not results.is_file() or json.loads(results.read_text())["wanted"] != wanted:
        for command in warm_up(nnunet):
            subprocess.run(command, check=True, capture_output=True, env=environment(out, out, out))
        runs = {side: [] for side in sides}
        for repeat in range(wanted["repeats"]):
            for side in sides:  # in turn, so that what else the machine does falls on all of them
                runs[side].append(run_side(side, raw, out, nnunet, processes, repeat))
        about = {"date": str(date.today()), "machine": f"{platform.machine()}, {os.cpu_count()} processors"}
        same = compare(out) if nnunet else None
        results.write_text(json.dumps({"about": about, "wanted": wanted, "runs": runs, "arrays": same}, indent=1))
    return table(data.name, json.loads(results.read_text()))


# --- one run ---------------------------------------------------------------------------------------------------------


def run_side(side: str, raw: Path, out: Path, nnunet: Path | None, processes: int, repeat: int) -> dict:
    """One fresh run of one program, or what was measured when it ran before."""
    key = side.replace(", ", "_")
    known = out / f"{key}.{repeat}.json"
    if known.is_file():
        return json.loads(known.read_text())
    folder = out / key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    commands, marks = {
        "autofed": autofed_side,
        "autofed, commands": autofed_commands,
        "nnU-Net": lambda *given: nnunet_side(nnunet, *given),
    }[side](raw, folder, processes)
    begin = time.time()
    cost = measure_trees(commands, environment(raw.parent, folder, folder / "results"), folder / "log.txt")
    ends = {**{phase: path.stat().st_mtime - begin for phase, path in marks.items()}, "preprocess": cost.seconds}
    phases = {p: end - start for (p, end), start in zip(ends.items(), (0.0, *ends.values()), strict=False)}
    known.write_text(json.dumps({**asdict(cost), "phases": phases}, indent=1))
    return json.loads(known.read_text())


def autofed_side(raw: Path, folder: Path, processes: int) -> tuple[list[list[str]], dict[str, Path]]:
    """The commands of autofed's side, and the files whose writing ends a phase."""
    command = [sys.executable, __file__, "-", "-o", folder, "--only-prepare", raw, "--processes", processes]
    return [[str(part) for part in command]], _marks(folder)


def autofed_commands(raw: Path, folder: Path, processes: int) -> tuple[list[list[str]], dict[str, Path]]:
    """The same as a user types it."""
    tool = str(Path(sys.executable).with_name("autofed"))
    fingerprint, plan, work = folder / "fingerprint.json", folder / "plan.json", folder / "work"
    commands = [
        [tool, "fingerprint", raw, "-o", fingerprint, "--processes", processes],
        [tool, "plan", fingerprint, "-o", plan],
        [tool, "preprocess", plan, raw, "-o", work, "--processes", processes],
    ]
    return [[str(part) for part in command] for command in commands], _marks(folder)


def nnunet_side(
    nnunet: Path | None, raw: Path, folder: Path, processes: int
) -> tuple[list[list[str]], dict[str, Path]]:
    """The command of nnU-Net's side; it checks the data as well, as autofed always does."""
    assert nnunet is not None
    command = [
        nnunet / "bin" / "nnUNetv2_plan_and_preprocess", "-d", int(raw.name[7:10]), "-c", "3d_fullres",
        "-npfp", processes, "-np", processes, "--verify_dataset_integrity", "--no_pbar",
    ]  # fmt: skip
    done = folder / raw.name
    marks = {"fingerprint": done / "dataset_fingerprint.json", "plan": done / "nnUNetPlans.json"}
    return [[str(part) for part in command]], marks


def _marks(folder: Path) -> dict[str, Path]:
    return {"fingerprint": folder / "fingerprint.json", "plan": folder / "plan.json"}


def prepare_with_autofed(raw: Path, folder: Path, processes: int) -> None:
    """Fingerprint, plan and preprocessing of one dataset, by the functions behind the commands."""
    from autofed import planner, preprocessing
    from autofed.data import open_dataset
    from autofed.fingerprints import exact
    from autofed.plans import Budget

    dataset = open_dataset(raw)
    found = exact.measure(dataset, processes=processes)
    found.save(folder / "fingerprint.json")
    plan = planner.make(found, Budget())
    plan.save(folder / "plan.json")
    preprocessing.preprocess(dataset, plan.local, folder / "work", processes=processes)


def warm_up(nnunet: Path | None) -> list[list[str]]:
    """Commands that bring both programs' libraries into the cache of the system."""
    ours = [[sys.executable, "-c", "import autofed.preprocessing, autofed.api"]]
    return ours + ([[str(nnunet / "bin" / "nnUNetv2_plan_and_preprocess"), "-h"]] if nnunet else [])


# --- the same arrays? ------------------------------------------------------------------------------------------------


def compare(out: Path) -> dict:
    """How far the prepared arrays and the plans of the two programs are apart."""
    import blosc2

    theirs_folder = next((out / "nnU-Net").glob("Dataset*/nnUNetPlans_3d_fullres"))
    cases = {}
    for path in sorted((out / "autofed" / "work").glob("*/*/*/case.json")):
        ours, label = (blosc2.open(str(path.parent / f"{n}.b2nd"), mode="r")[:] for n in ("image", "label"))
        theirs, truth = (
            blosc2.open(str(theirs_folder / f"{path.parent.name}{end}.b2nd"), mode="r")[:] for end in ("", "_seg")
        )
        cases[path.parent.name] = _differences(ours, theirs, label, np.maximum(truth[0], 0))
    return {"cases": cases, "plan": _plans(out, theirs_folder.parent)}


def _differences(ours: np.ndarray, theirs: np.ndarray, label: np.ndarray, truth: np.ndarray) -> dict:
    """Intensities: mean and highest absolute difference. Labels: share of voxels that differ, of all and of those in
    a structure.
    """
    if ours.shape != theirs.shape:
        return {"grids": [ours.shape, theirs.shape]}
    apart = np.abs(ours.astype(np.float64) - theirs)
    differ = int(np.count_nonzero(label != truth))
    return {
        "mean": float(apart.mean()),
        "max": float(apart.max()),
        "labels": differ / label.size,
        "labels_in_structures": differ / max(1, int(np.count_nonzero((label > 0) | (truth > 0)))),
    }


def _plans(out: Path, folder: Path) -> dict[str, list]:
    """What both plans say, [autofed's, nnU-Net's]."""
    ours = json.loads((out / "autofed" / "plan.json").read_text())["local"]
    theirs = json.loads((folder / "nnUNetPlans.json").read_text())
    full = theirs["configurations"]["3d_fullres"]
    found = {
        "spacing": [ours["geometry"]["spacing_mm"], full["spacing"]],
        "patch": [ours["training"]["patch_size"], full["patch_size"]],
        "batch": [ours["training"]["batch_size"], full["batch_size"]],
        "median shape": [ours["geometry"]["median_shape"], [round(n) for n in full["median_image_size_in_voxels"]]],
        "axes": [ours["geometry"]["transpose"], theirs["transpose_forward"]],
    }
    statistics_of = theirs["foreground_intensity_properties_per_channel"]["0"]
    for name in ("mean", "std", "percentile_00_5", "percentile_99_5"):
        if ours["intensity"]["channels"][0]["scheme"] == "ct":
            found[name] = [ours["intensity"]["channels"][0][name], statistics_of[name]]
    return found


# --- what is printed -------------------------------------------------------------------------------------------------


def table(name: str, results: dict) -> str:
    """One federation as Markdown."""
    wanted, about = results["wanted"], results["about"]
    lines = [
        f"### {name}",
        "",
        f"{wanted['cases']} cases, {wanted['processes']} processes, median of {wanted['repeats']}; {about['machine']}; "
        f"{about['date']}. Memory is that of all processes together; a page they share counts once (PSS).",
        "",
        "| program | seconds | fingerprint, plan, preprocess | processor seconds | peak MB | by RSS |",
        "|---|---|---|---|---|---|",
    ]
    medians = {side: _median(runs) for side, runs in results["runs"].items()}
    for side, cost in medians.items():
        phases = ", ".join(f"{cost['phases'][p]:.1f}" for p in ("fingerprint", "plan", "preprocess"))
        lines.append(
            f"| {side} | {cost['seconds']:.1f} | {phases} | {cost['cpu_seconds']:.1f} | {cost['pss_mb']:.0f} | "
            f"{cost['rss_mb']:.0f} |"
        )
    if "nnU-Net" in medians:
        lines += ["", *_verdict(medians), "", *_likeness(results["arrays"])]
    return "\n".join([*lines, ""])


def _median(runs: Sequence[dict]) -> dict:
    """The run in the middle by seconds, with the highest memory of all."""
    middle = statistics.median_low([run["seconds"] for run in runs])
    run = next(run for run in runs if run["seconds"] == middle)
    return {**run, **{key: max(r[key] for r in runs) for key in ("pss_mb", "rss_mb")}}


def _verdict(medians: Mapping[str, dict]) -> list[str]:
    ours, theirs = medians["autofed"], medians["nnU-Net"]
    faster, share = theirs["seconds"] / ours["seconds"], ours["pss_mb"] / theirs["pss_mb"]
    return [
        f"* {faster:.1f} times faster (aim: {FASTER:g}), {theirs['cpu_seconds'] / ours['cpu_seconds']:.1f} times by "
        f"processor seconds, {theirs['seconds'] / medians['autofed, commands']['seconds']:.1f} times by its commands: "
        f"{reached(faster >= FASTER)}",
        f"* {share:.2f} of the memory (aim: {MEMORY_SHARE:g}): {reached(share <= MEMORY_SHARE)}",
    ]


def _likeness(arrays: dict) -> list[str]:
    cases = arrays["cases"]
    other = [case for case, found in cases.items() if "grids" in found]
    lines = [f"* {case}: grids {cases[case]['grids']}" for case in other]
    same = [found for found in cases.values() if "grids" not in found]
    worst = {key: max((found[key] for found in same), default=0.0) for key in same[0]} if same else {}
    if same:
        mean = statistics.fmean(found["mean"] for found in same)
        lines.append(
            f"* intensities: mean difference {mean:.2g}, {worst['mean']:.2g} in the worst case, {worst['max']:.2g} in "
            f"the worst voxel (aim: {TOLERANCE:g} in the mean of every case): "
            f"{reached(not other and worst['mean'] < TOLERANCE)}"
        )
        lines.append(
            f"* labels: in the worst case {100 * worst['labels']:.2g} % of all voxels differ, "
            f"{100 * worst['labels_in_structures']:.2g} % of those in a structure"
        )
    for what, (ours, theirs) in arrays["plan"].items():
        agree = np.shape(ours) == np.shape(theirs) and np.allclose(ours, theirs, rtol=1e-6)
        lines.append(f"* {what}: {_short(ours)}" + ("" if agree else f", nnU-Net {_short(theirs)}"))
    return lines


def _short(value: list | float) -> str:
    return ", ".join(f"{v:.6g}" for v in np.atleast_1d(value))


if __name__ == "__main__":
    main()
