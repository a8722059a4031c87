"""All federations of a data folder, without a hand on them: `pytest -m slow tests/test_federations.py --data DATA`.

DATA holds <federation>/sites/<site>/ in raw layout and <federation>/test/{imagesTs,labelsTs}.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import autofed
from autofed.data.images import ending_of, read_labels
from autofed.federation import metrics
from autofed.files import read_json, write_json
from autofed.fingerprints import merge
from autofed.planner import make

NAMES = ("hippocampus", "dermoscopy", "breast-ultrasound", "histology", "nuclei", "kidney-ct-simulated", "brain-mri")
SHORT = {
    "training.rounds": 8, "training.steps_per_round": 16, "training.batch_size": 2, "training.snapshots": [8],
}  # fmt: skip
SCANS = 8
"""So many of the test scans are predicted."""

SMALLEST = 8
"""Features of the first stage in a short training."""

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", NAMES)]


def sites_of(data: Path, name: str) -> list[Path]:
    found = sorted(p.parent for p in (data / name).glob("sites/*/dataset.json"))
    assert found, f"no sites in {data / name}"
    return found


def pool(sites: list[Path], target: Path) -> Path:
    """One dataset with links to all cases of all sites, their names led by the site's."""
    for part in ("imagesTr", "labelsTr"):
        (target / part).mkdir(parents=True)
        for site in sites:
            for file in (site / part).iterdir():
                os.symlink(file.resolve(), target / part / f"{site.name}_{file.name}")
    about = [read_json(site / "dataset.json") for site in sites]
    patients = {
        f"{site.name}_{case}": f"{site.name}_{patient}"
        for site, one in zip(sites, about, strict=True) for case, patient in one.get("patients", {}).items()
    }  # fmt: skip
    total = sum(one["numTraining"] for one in about)
    write_json(target / "dataset.json", {**about[0], "numTraining": total, "patients": patients})
    return target


def some(test: Path, target: Path) -> Path:
    """A test set with links to the first scans of another and to their labels."""
    for part in ("imagesTs", "labelsTs"):
        (target / part).mkdir(parents=True)
    shutil.copy(test / "dataset.json", target)
    for label in sorted(p for p in (test / "labelsTs").iterdir() if not p.name.startswith("."))[:SCANS]:
        os.symlink(label.resolve(), target / "labelsTs" / label.name)
        case = label.name.removesuffix(ending_of(label))
        for image in (test / "imagesTs").glob(f"{case}_[0-9][0-9][0-9][0-9].*"):
            os.symlink(image.resolve(), target / "imagesTs" / image.name)
    return target


def test_the_plan_is_that_of_the_pooled_data(data, name, tmp_path):
    sites = sites_of(data, name)
    merged = make(merge([autofed.fingerprint(site, processes=2) for site in sites]))
    pooled = make(autofed.fingerprint(pool(sites, tmp_path / "all"), processes=2))
    assert merged.local.geometry == pooled.local.geometry
    assert merged.local.network == pooled.local.network
    assert merged.local.intensity == pooled.local.intensity
    assert merged.inference == pooled.inference
    for field in ("patch_size", "batch_size", "batch_dice", "mirror_axes", "rotate_in_plane_only"):
        assert getattr(merged.local.training, field) == getattr(pooled.local.training, field), field


def test_the_whole_way(data, name, tmp_path):
    sites, test = sites_of(data, name), some(data / name / "test", tmp_path / "test")
    first = autofed.plan(sites, hours=0.01, device="cpu", processes=2)
    narrow = [min(f, SMALLEST * 2**stage) for stage, f in enumerate(first.local.network.features)]
    made = autofed.plan(sites, hours=0.01, device="cpu", settings={**SHORT, "network.features": narrow})
    autofed.preprocess(made, sites, tmp_path / "work", processes=2)
    run = autofed.train(made, tmp_path / "work", tmp_path / "run", device="cpu")
    losses = [sum(site["loss"] for site in line["sites"].values()) for line in metrics.read(run.fold_folder())]
    assert losses[-1] < losses[0]
    written = autofed.predict(run.folder, test / "imagesTs", tmp_path / "out", mirroring=False)
    report = autofed.evaluate(tmp_path / "out", test / "labelsTs", tmp_path / "report.json")
    assert len(written) == len(report.cases) > 0 and report.mean.dice > 0
    found = sum(s["voxels"] for p in written for s in json.loads(p.read_text())["structures"].values())
    assert found > 0
    label = next(p for p in sorted((test / "labelsTs").iterdir()) if not p.name.startswith("."))
    assert read_labels(tmp_path / "out" / label.name)[0].shape == read_labels(label)[0].shape
