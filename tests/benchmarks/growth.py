"""How the time and the memory of fingerprint and preprocessing grow with the number and the size of volumes.

    python tests/benchmarks/growth.py [DATA] -o OUT [--nnunet ENV] [--processes 2] [--quick]

The volumes are made on the fly (DATA is not read): CT-like, int16, a noisy body with three structures in it. First 1,
2, 4 and 8 cases of 512x512x200 voxels (--quick: 1, 2, 4), then one case of each edge from 128 to 512. The cases of a
row are copies of one volume, and the grid that they are brought onto is given, with as many voxels as the files have:
so every case is resampled, and takes the same work. With --nnunet, nnU-Net's environment (see versus_nnunet.py),
nnU-Net does the same. Prints a Markdown table and writes OUT/growth.json; rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from versus_nnunet import environment, measure_trees, warm_up

CASES = (1, 2, 4, 8)
EDGES = (128, 256, 512)
LARGEST = 512
SLICES_PER_EDGE = 200 / 512
SPACING_MM = (2.0, 0.8, 0.8)
TARGET_MM = (1.6, 0.9, 0.9)
LABELS = {"background": 0, "liver": 1, "kidney": 2, "tumour": 3}
PHASES = ("fingerprint", "preprocess")


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="not read")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--nnunet", type=Path, help="the environment that nnU-Net is installed in")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="no more than four cases")
    parser.add_argument("--only", choices=PHASES, help=argparse.SUPPRESS)  # autofed's side, in a process of its own
    args = parser.parse_args()
    if args.only:
        run_autofed(args.only, args.data, args.output, args.processes)
        return
    out = args.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = [(LARGEST, cases) for cases in (CASES[:3] if args.quick else CASES)]
    rows += [(edge, 1) for edge in EDGES if edge != LARGEST]
    known = out / "growth.json"
    found = json.loads(known.read_text()) if known.is_file() else {}
    for edge, cases in rows:
        for program in ("autofed", *(["nnU-Net"] if args.nnunet else [])):
            key = f"{edge} {cases} {args.processes} {program}"
            if key not in found:
                raw = make_cases(out / "raw" / "Dataset001_volumes", edge, cases)
                found[key] = measure_program(program, raw, out / "prepared", args.nnunet, args.processes)
                known.write_text(json.dumps(found, indent=1))
    shutil.rmtree(out / "raw", ignore_errors=True)
    shutil.rmtree(out / "prepared", ignore_errors=True)
    print(table(rows, args.processes, found), flush=True)


def make_cases(raw: Path, edge: int, cases: int) -> Path:
    """A dataset of so many copies of one volume of edge x edge x (200 / 512 edge) voxels."""
    from autofed.data import images
    from autofed.data.images import Geometry

    wanted = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": cases, "file_ending": ".nii.gz"}
    about = raw / "dataset.json"
    first = [raw / "imagesTr" / f"{edge}_00_0000.nii.gz", raw / "labelsTr" / f"{edge}_00.nii.gz"]
    if not all(path.is_file() for path in first):
        shutil.rmtree(raw, ignore_errors=True)
        geometry = Geometry(3, SPACING_MM, (0.0,) * 3, tuple(np.eye(3).ravel().tolist()))
        for path, array in zip(first, make_volume(edge), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            images.write(path, array, geometry)
    for path in first:
        for copy in path.parent.iterdir():
            if copy != path:
                copy.unlink()
        for i in range(1, cases):
            shutil.copyfile(path, path.with_name(path.name.replace("_00", f"_{i:02d}", 1)))
    about.write_text(json.dumps(wanted))
    return raw


def make_volume(edge: int) -> tuple[np.ndarray, np.ndarray]:
    """An image in HU, int16, and its label map, uint8, both (Z, Y, X): ellipsoids in a body in air, with noise."""
    shape = (round(edge * SLICES_PER_EDGE), edge, edge)
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if a == i else 1 for a in range(3)])
               for i, n in enumerate(shape))  # fmt: skip
    label = np.zeros(shape, np.uint8)
    label[((z - 0.1) / 0.5) ** 2 + ((y + 0.1) / 0.35) ** 2 + ((x + 0.3) / 0.3) ** 2 < 1] = 1
    label[((z + 0.2) / 0.3) ** 2 + ((y - 0.3) / 0.15) ** 2 + ((x - 0.35) / 0.15) ** 2 < 1] = 2
    label[((z + 0.2) / 0.1) ** 2 + ((y - 0.3) / 0.07) ** 2 + ((x - 0.35) / 0.08) ** 2 < 1] = 3
    image = np.random.default_rng(0).standard_normal(shape, np.float32)
    image *= 15
    image += np.where((y / 0.7) ** 2 + (x / 0.85) ** 2 < 1, np.float32(40), np.float32(-1000))
    image += np.array([0, 60, 130, 20], np.float32)[label]
    return np.round(image, out=image).astype(np.int16), label


def measure_program(program: str, raw: Path, folder: Path, nnunet: Path | None, processes: int) -> dict:
    """What fingerprint and preprocessing cost one program, each as a fresh tree of processes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environ = environment(folder, raw.parent)
    own = [sys.executable, __file__, raw, "-o", folder, "--processes", processes, "--only"]
    steps = {"fingerprint": [[*own, "fingerprint"]], "preprocess": [[*own, "preprocess"]]}
    if program == "nnU-Net":
        assert nnunet is not None
        tool, number = str(nnunet / "bin" / "nnUNetv2_"), int(raw.name[7:10])
        steps = {
            "fingerprint": [[f"{tool}extract_fingerprint", "-d", number, "-np", processes]],
            "plan": [[f"{tool}plan_experiment", "-d", number, "-overwrite_target_spacing", *TARGET_MM,
                      "-overwrite_plans_name", "given"]],
            "preprocess": [[f"{tool}preprocess", "-d", number, "-plans_name", "given", "-c", "3d_fullres",
                            "-np", processes]],
        }  # fmt: skip
    for command in warm_up(nnunet):
        measure_trees([command], environ, folder / "log.txt", {})
    return {
        phase: asdict(measure_trees([[str(part) for part in c] for c in commands], environ, folder / "log.txt", {}))
        for phase, commands in steps.items()
    }


def run_autofed(phase: str, raw: Path, folder: Path, processes: int) -> None:
    """One phase of autofed's side, by the functions behind the commands; the grid is the given one."""
    from autofed.data import open_dataset
    from autofed.fingerprints import exact

    dataset = open_dataset(raw)
    if phase == "fingerprint":
        exact.measure(dataset, processes=processes).save(folder / "fingerprint.json")
        return
    from autofed import planner, preprocessing
    from autofed.plans import Budget

    made = planner.make(exact.Fingerprint.load(folder / "fingerprint.json"), Budget())
    made = made.change({"geometry.spacing_mm": list(TARGET_MM)})
    preprocessing.preprocess(dataset, made.local, folder / "work", processes=processes)


def table(rows: list[tuple[int, int]], processes: int, found: dict) -> str:
    """All rows as Markdown."""
    lines = [
        "### Growth",
        "",
        f"{processes} processes. MB is the peak of all processes together; a page they share counts once (PSS).",
        "",
        "| voxels | cases | program | fingerprint, s | MB | preprocess, s | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for edge, cases in rows:
        for program in ("autofed", "nnU-Net"):
            if cost := found.get(f"{edge} {cases} {processes} {program}"):
                cells = [f"{cost[p]['seconds']:.1f} | {cost[p]['pss_mb']:.0f}" for p in PHASES]
                size = f"{edge}x{edge}x{round(edge * SLICES_PER_EDGE)}"
                lines.append(f"| {size} | {cases} | {program} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
