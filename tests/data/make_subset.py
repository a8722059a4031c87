"""Make the shipped pictures from the full federations: `python make_subset.py FOLDER_WITH_HIPPOCAMPUS_AND_NUCLEI`.

The first cases of each site by sorted name, byte for byte; only `numTraining` in dataset.json is written anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

CASES = {
    "hippocampus": {"sites/alpha": 4, "sites/bravo": 5, "sites/charlie": 6, "sites/delta": 5, "test": 4},
    "nuclei": {"sites/alpha": 6, "sites/bravo": 5, "sites/charlie": 4, "test": 4},
}


def copy_cases(source: Path, target: Path, count: int, suffix: str) -> None:
    """Copy the first `count` labelled cases of one dataset; `suffix` is Tr (a site) or Ts (the test set)."""
    labels = sorted((source / f"labels{suffix}").iterdir())[:count]
    chosen = [label.name.split(".")[0] for label in labels]
    scans = [p for p in sorted((source / f"images{suffix}").iterdir()) if p.name.rpartition("_")[0] in chosen]
    for folder, paths in ((f"images{suffix}", scans), (f"labels{suffix}", labels)):
        (target / folder).mkdir(parents=True)
        for path in paths:
            shutil.copyfile(path, target / folder / path.name)
    description = json.loads((source / "dataset.json").read_text())
    description["numTraining"] = len(chosen)
    (target / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the folder that holds hippocampus/ and nuclei/")
    parser.add_argument("--target", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    for federation, parts in CASES.items():
        shutil.rmtree(arguments.target / federation, ignore_errors=True)
        for part, count in parts.items():
            suffix = "Ts" if part == "test" else "Tr"
            copy_cases(arguments.source / federation / part, arguments.target / federation / part, count, suffix)


if __name__ == "__main__":
    main()
